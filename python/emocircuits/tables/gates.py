"""Gates of one layer: edits of head outputs that every row finds from its own attention, on the device."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

import torch
from torch import Tensor

from emocircuits.edits import BoostRoute, GateHeads, GateRoute
from emocircuits.edits.gates import Measure
from emocircuits.plan import Plan
from emocircuits.tables.space import Space, by_row, phases
from emokernels import HeadEdits, Role

LOGITS_AT_ONCE = 1 << 24


@dc.dataclass(frozen=True)
class Attention:
    """One attention call, as an attention site gets it: q ``[B, H, N, D]``, k and v ``[B, Hkv, K, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    causal: bool
    softcap: float | None
    key_roles: Tensor

    def logits(self, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits ``[B, H, n, K]`` of the rows ``[B, n]`` (None: all), and which keys they see.

        The second is bool ``[B|1, 1|H, n, K]``, or None when they see all.
        """
        query, mask = self.query, self.mask
        b, h, n, d = query.shape
        kv, keys = self.key.shape[1], self.key.shape[2]
        if rows is not None:
            n = rows.shape[1]
            query = query.gather(2, rows[:, None, :, None].expand(b, h, n, d))
            if mask is not None:
                mask = mask.expand(b, -1, -1, -1)
                mask = mask.gather(2, rows[:, None, :, None].expand(b, mask.shape[1], n, keys))
        logits = (query.reshape(b, kv, h // kv * n, d) @ self.key.mT).reshape(b, h, n, keys)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * (d**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if mask is not None:
            if mask.dtype == torch.bool:
                return logits, mask
            seen = mask > torch.finfo(mask.dtype).min / 2
            return logits + mask.masked_fill(~seen, 0.0), seen
        if self.causal and self.query.shape[2] > 1:
            rows = torch.arange(n, device=query.device)[None] if rows is None else rows
            last = rows + keys - self.query.shape[2]
            return logits, (torch.arange(keys, device=rows.device) <= last[..., None])[:, None]
        return logits, None


@dc.dataclass(frozen=True)
class HeadGate:
    """GateHeads: factors ``by [B|1, R]`` for the heads that are not among the ``keep`` most attentive of a row."""

    by: Tensor
    keep: int
    source: tuple[int, ...]
    measure: Measure
    active: frozenset[str]

    @classmethod
    def of(cls, edit: GateHeads, space: Space) -> HeadGate:
        """The table of one edit."""
        by = space.full((), 1.0)
        by[space.selection(edit)] = edit.by
        return cls(by, edit.keep, _numbers(edit.source), edit.measure, phases(by != 1.0))

    def apply(self, heads: HeadEdits, attention: Attention, kinds: Tensor) -> HeadEdits:
        """``heads`` with the factors in them, for rows of these ``kinds [B, N]``."""
        b, h, n, _ = attention.query.shape
        by = by_row(self.by, kinds).expand(b, n)
        rows, parts = _gated_rows(by != 1.0, attention)
        gate = _joined([self._factors(attention, part, by if part is None else by.gather(1, part)) for part in parts])
        if rows is not None:
            gate = gate.new_ones(b, n, h).scatter(1, rows[..., None].expand(-1, -1, h), gate)
        return dc.replace(heads, scale=gate if heads.scale is None else heads.scale * gate)

    def _factors(self, attention: Attention, rows: Tensor | None, by: Tensor) -> Tensor:
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


@dc.dataclass(frozen=True)
class RouteGate:
    """GateRoute: factors ``by [B|1, R, H]`` on the weights of the source, where they sum to ``threshold`` or more."""

    by: Tensor
    threshold: Tensor
    source: tuple[int, ...]
    active: frozenset[str]

    @classmethod
    def of(cls, edit: GateRoute, space: Space, layer: int) -> RouteGate:
        """The table of one edit in one layer."""
        by = space.full((space.geometry.heads,), 1.0)
        rows, kinds = space.selection(edit)
        for at, head in edit.heads:
            if at == layer:
                by[rows, kinds, head] = edit.by
        return cls(by, by.new_tensor(edit.threshold), _numbers(edit.source), phases(by != 1.0))

    def apply(self, heads: HeadEdits, attention: Attention, kinds: Tensor) -> HeadEdits:
        """``heads`` with what the weights' change adds to head outputs, for rows of these ``kinds [B, N]``."""
        b, h, n, d = attention.query.shape
        by = by_row(self.by, kinds).expand(b, n, h)
        rows, parts = _gated_rows((by != 1.0).any(-1), attention)
        shift = _joined([self._change(attention, part, by) for part in parts])
        if rows is not None:
            shift = shift.new_zeros(b, n, h, d).scatter(1, rows[..., None, None].expand(-1, -1, h, d), shift)
        # Head edits act on the output as the gate leaves it: their factor holds for its change too.
        if heads.scale is not None:
            shift = shift * heads.scale[..., None]
        return dc.replace(heads, shift=shift if heads.shift is None else heads.shift + shift)

    def _change(self, attention: Attention, rows: Tensor | None, by: Tensor) -> Tensor:
        """``(by - 1) * sum_j p_j v_j`` over keys of the source, ``[B, n, H, D]``, zero below the threshold."""
        logits, seen = attention.logits(rows)
        logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
        p = logits.softmax(-1).nan_to_num(0.0) * _any_of(attention.key_roles, self.source)[:, None, None, :]
        b, h, n, keys = p.shape
        kv, value = attention.key.shape[1], attention.value
        read = (p.to(value.dtype).reshape(b, kv, h // kv * n, keys) @ value).reshape(b, h, n, -1).to(p.dtype)
        by = by if rows is None else by.gather(1, rows[..., None].expand(-1, -1, h))
        factor = by.to(p.dtype) - 1.0
        factor = torch.where(p.sum(-1).transpose(1, 2) >= self.threshold, factor, 0.0)
        return factor[..., None] * read.transpose(1, 2)


Gate = HeadGate | RouteGate


def gated(
    gates: dict[str, Gate], heads: HeadEdits | None, attention: Attention, kinds: Tensor, now: frozenset[str]
) -> HeadEdits | None:
    """Head edits with all gates in them: routes before heads, as in the order of a block."""
    for kind in (HeadGate, RouteGate):
        for gate in gates.values():
            if isinstance(gate, kind) and not now.isdisjoint(gate.active):
                heads = gate.apply(HeadEdits() if heads is None else heads, attention, kinds)
    return heads


def check_gates(plan: Plan) -> None:
    """NotImplementedError where a GateRoute meets a BoostRoute: its weights would be those before the boost."""
    boosted = {pair for edit in plan if isinstance(edit, BoostRoute) for pair in edit.heads}
    for i, edit in enumerate(plan):
        both = boosted.intersection(edit.heads) if isinstance(edit, GateRoute) else ()
        if both:
            raise NotImplementedError(
                f"edit {i} (GateRoute): head {min(both)} also has a BoostRoute; leave one of them out for this head"
            )


def _gated_rows(gated: Tensor, attention: Attention) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """Rows ``[B, n]`` that cover those where ``gated [B, N]``, and the same in bounded parts; None for all in order."""
    (b, n), chosen = gated.shape, None
    step = max(1, LOGITS_AT_ONCE // (b * attention.query.shape[1] * attention.key.shape[2]))
    if n > 1 and not torch.compiler.is_compiling():
        # Of a prompt often only the last row is gated: the others need no logits. A prompt may ask the device.
        count = max(1, int(gated.sum(1).max()))
        chosen = gated.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    elif n <= step:
        return None, (None,)
    rows = torch.arange(n, device=gated.device).expand(b, n) if chosen is None else chosen
    return chosen, rows.split(step, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(Role[name.upper()]) for name in names)


def _any_of(roles: Tensor, wanted: tuple[int, ...]) -> Tensor:
    found = roles == wanted[0]
    for role in wanted[1:]:
        found = found | (roles == role)
    return found
