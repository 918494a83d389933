"""Gates of one layer: factors on head outputs that every row finds from its own attention, on the device."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.edits import GateHeads
from emocircuits.edits.gates import Measure
from emocircuits.tables.space import Space, by_row, phases
from emokernels import HeadEdits, Role

LOGITS_AT_ONCE = 1 << 24


@dc.dataclass(frozen=True)
class Attention:
    """One attention call, as an attention site gets it: q ``[B, H, N, D]``, k ``[B, Hkv, K, D]``."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float | None
    causal: bool
    softcap: float | None
    key_roles: Tensor

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``[B, H, n, K]`` of the rows ``[B, n]``, and which keys they see (``[B|1, 1|H, n, K]``; None: all)."""
        b, h, _, d = self.query.shape
        kv, keys, n = self.key.shape[1], self.key.shape[2], rows.shape[1]
        query = self.query.gather(2, rows[:, None, :, None].expand(b, h, n, d))
        grouped = query.reshape(b, kv, h // kv * n, d) @ self.key.mT
        logits = grouped.reshape(b, h, n, keys)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * (d**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is not None:
            mask = self.mask.expand(b, -1, -1, -1)
            mask = mask.gather(2, rows[:, None, :, None].expand(b, mask.shape[1], n, keys))
            return logits, mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if self.causal:
            last = rows + keys - self.query.shape[2]
            return logits, (torch.arange(keys, device=rows.device) <= last[..., None])[:, None]
        return logits, None


@dc.dataclass(frozen=True)
class GateTable:
    """One gate: factors ``by [B|1, R]`` for the heads that are not among the ``keep`` most attentive of a row."""

    by: Tensor
    keep: int
    source: tuple[int, ...]
    measure: Measure
    active: frozenset[str]

    @classmethod
    def of(cls, edit: GateHeads, space: Space) -> GateTable:
        """The table of one edit."""
        by = space.full((), 1.0)
        by[space.selection(edit)] = edit.by
        source = tuple(int(Role[name.upper()]) for name in edit.source)
        return cls(by, edit.keep, source, edit.measure, phases(by != 1.0))

    def factors(self, attention: Attention, kinds: Tensor, now: frozenset[str]) -> Tensor | None:
        """Factors ``[B, N, H]`` on the head outputs of rows of these ``kinds [B, N]``; None where nothing changes."""
        if now.isdisjoint(self.active):
            return None
        b, h, n, _ = attention.query.shape
        by = by_row(self.by, kinds).expand(b, n)
        rows = torch.arange(n, device=kinds.device).expand(b, n)
        chosen = n > 1 and not torch.compiler.is_compiling()
        if chosen:
            # Of a prompt often only the last row is gated: the others need no logits. A prompt may ask the device.
            changed = (by != 1.0).int()
            rows = changed.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(changed.sum(1).max()))]
        step = max(1, LOGITS_AT_ONCE // (b * h * attention.key.shape[2]))
        parts = [self._gate(attention, part, by.gather(1, part)) for part in rows.split(step, 1)]
        gate = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if not chosen:
            return gate
        return gate.new_ones(b, n, h).scatter(1, rows[..., None].expand(-1, -1, h), gate)

    def _gate(self, attention: Attention, rows: Tensor, by: Tensor) -> Tensor:
        """Factors ``[B, n, H]`` of some rows ``[B, n]``."""
        logits, seen = attention.logits(rows)
        source = _any_of(attention.key_roles, self.source)[:, None, None, :]
        counted = source if seen is None else source & seen
        if self.measure == "weights":
            logits = (logits if seen is None else logits.masked_fill(~seen, -torch.inf)).softmax(-1)
        score = logits.masked_fill(~counted, 0.0).sum(-1).transpose(1, 2)
        by = torch.where(counted.any(-1).any(1), by, 1.0)
        kept = score.topk(self.keep, dim=-1).indices
        return by[..., None].expand(score.shape).to(score.dtype).scatter(-1, kept, 1.0)


def gated(
    gates: dict[str, GateTable], heads: HeadEdits | None, attention: Attention, kinds: Tensor, now: frozenset[str]
) -> HeadEdits | None:
    """Head edits with the factors of all gates in them."""
    scale = None if heads is None else heads.scale
    for gate in gates.values():
        factors = gate.factors(attention, kinds, now)
        if factors is not None:
            scale = factors if scale is None else scale * factors
    if heads is None:
        return None if scale is None else HeadEdits(scale=scale)
    return HeadEdits(scale=scale, shift=heads.shift, replace=heads.replace, mask=heads.mask)


def _any_of(roles: Tensor, wanted: tuple[int, ...]) -> Tensor:
    found = roles == wanted[0]
    for role in wanted[1:]:
        found = found | (roles == role)
    return found
