"""What has been captured so far: pieces that are put together when they are read, or running sums."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from emocircuits.measure.names import QUANTITIES
from emocircuits.measure.tokens import Choice, Chosen, Index
from emokernels import Role

R = len(Role)
Reduce = Literal["mean", "mean_by_role"] | None
Key = tuple[str, int | None]
Raw = tuple[Tensor, Callable[[Tensor], Tensor]]


class Store:
    """Pieces by (quantity, layer), one a forward pass, and the index of their tokens.

    A pass counts when it has come to its end (`complete`); what an interrupted pass left is dropped.

    Attributes:
        index: of the tokens held; None with `reduce`.
        count: tokens in the means: ``[]``, or ``[R]`` by role.
        held: bytes of the pieces.
        version: another number whenever something came in.
        raw: of the last pass, when gradients are kept: the tensor that the model used, and what was taken of it.
    """

    def __init__(self, wanted: dict[str, tuple[int, ...]], choice: Choice, reduce: Reduce) -> None:
        self.wanted, self.choice, self.reduce = wanted, choice, reduce
        self.version = self.passes = self.held = 0
        self.raw: dict[Key, Raw] = {}
        self.count = torch.zeros(R if reduce == "mean_by_role" else (), dtype=torch.float64)
        self._sums: dict[Key, Tensor] = {}
        self._rows = torch.zeros(0)
        self._pieces: dict[Key, list[Tensor]] = {}
        self._index: list[Index] = []
        self._limits: list[int] = []
        self._want: Tensor | None = None
        self._pending: dict[Key, Tensor] = {}
        self._pending_rows: Tensor | None = None
        self._chosen: Chosen | None = None
        self._done = False

    # -- coming in -----------------------------------------------------------------------------------------------
    def restart(self) -> None:
        """A new sequence takes the place of the last one; means go on."""
        self.settle()
        if self.reduce is None:
            self._pieces, self._sums, self._index, self._limits, self._want, self.held = {}, {}, [], [], None, 0
            self._rows = torch.zeros(0)

    def rewind(self, column: int) -> None:
        """The sequence goes on from an earlier column: what was captured from there on is not part of it any more."""
        self._limits = [min(limit, column) for limit in self._limits]

    def begin(self, chosen: Chosen | None) -> None:
        """A pass begins, of which these tokens are wanted."""
        self._pending, self._pending_rows, self.raw = {}, None, {}
        self._chosen, self._done = chosen, False

    def put(self, name: str, layer: int | None, value: Tensor) -> None:
        """What a pass has of one quantity: ``[B, P, ...]`` or ``[T, ...]``."""
        assert self._chosen is not None
        if self.reduce is not None:
            value = self._sum(value if self._chosen.columns is None else value.flatten(0, 1), self._chosen)
        self._pending[name, layer] = value

    def put_mass(self, layer: int, flow: Tensor, rows: Tensor) -> None:
        """Sums of one pass ``[B, H, R, R]`` over ``rows [B, R]`` of each role."""
        if self.reduce is not None:
            flow, rows = flow.sum(0, keepdim=True), rows.sum(0, keepdim=True)
        self._pending["mass", layer] = flow
        self._pending_rows = rows.cpu()

    def complete(self) -> None:
        """The pass in progress has come to its end."""
        self._done = True

    def settle(self) -> None:
        """Take over what the last pass brought."""
        if not self._done or self._chosen is None:
            return
        chosen, self._done = self._chosen, False
        for key, value in self._pending.items():
            if key[0] == "mass" or self.reduce is not None:
                self._sums[key] = self._sums[key] + value if key in self._sums else value
            else:
                self._pieces.setdefault(key, []).append(value)
                self.held += value.numel() * value.element_size()
        if self._pending_rows is not None:
            rows = self._pending_rows
            self._rows = self._rows + rows if self._rows.shape == rows.shape else rows
        if self.reduce is None:
            self._index.append(chosen.index)
            self._limits.append(sys.maxsize)
            self._want = chosen.want if chosen.want is not None else self._want
        else:
            roles = chosen.index.role.flatten()
            self.count += torch.bincount(roles, minlength=R) if self.reduce == "mean_by_role" else len(roles)
        self._pending, self._pending_rows = {}, None
        self.passes += 1
        self.version += 1

    def _sum(self, value: Tensor, chosen: Chosen) -> Tensor:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.reduce == "mean":
            return value.sum(0)
        roles = chosen.index.role.flatten().to(value.device)
        return value.new_zeros(R, *value.shape[1:]).index_add(0, roles, value)

    # -- going out -----------------------------------------------------------------------------------------------
    def tensors(self, release: bool) -> tuple[dict[str, Tensor], Index | None]:
        """All quantities, stacked over their layers, and the index; with ``release`` the pieces are given up."""
        index, arrange = self._arrangement()
        out: dict[str, Tensor] = {}
        for name, layers in self.wanted.items():
            keys: list[Key] = [(name, layer) for layer in layers] or [(name, None)]
            found = [self._one(key, arrange) for key in keys if key in self._pieces or key in self._sums]
            if len(found) == len(keys):
                out[name] = torch.stack(found) if QUANTITIES[name].layered else found[0]
            if release:
                for key in keys:
                    self._pieces.pop(key, None)
        return out, index

    def _one(self, key: Key, arrange: Callable[[list[Tensor]], Tensor]) -> Tensor:
        if key[0] == "mass":
            flow = self._sums[key]
            mean = flow / self._rows.to(flow.device, flow.dtype)[:, None, :, None].clamp(min=1)
            return mean if self.reduce is None else mean[0]
        if self.reduce is not None:
            total = self._sums[key]
            count = self.count.to(total.device, total.dtype).clamp(min=1)
            return total / (count.view(-1, *[1] * (total.ndim - 1)) if self.reduce == "mean_by_role" else count)
        return arrange(_same_keys(key[0], self._pieces[key]))

    def _arrangement(self) -> tuple[Index | None, Callable[[list[Tensor]], Tensor]]:
        """The index of all tokens, and how pieces are put into its order."""
        if self.reduce is not None or not self._index:
            return None, lambda pieces: torch.cat(pieces)
        if not self.choice.flat and not self.choice.by_position:
            index = Index.cat(self._index, 1)
            kept = self._kept(1)[0].nonzero().flatten()
            index = index.map(lambda x: x[:, kept])
            if self.choice.slots > index.row.shape[1] and self.choice.steps == "all":
                raise ValueError(f"columns={self.choice.asked}: the sequence has fewer columns")
            return index, lambda pieces: _pick(torch.cat(pieces, 1), 1, kept)
        flat = Index.cat(self._index, 0)
        # Tokens of one batch row stand together, in their order.
        order = (flat.row * (int(flat.column.max()) + 1) + flat.column).argsort(stable=True)
        order = order[self._kept(0)[order]]
        if self._want is not None:
            order = self._listed(flat, self._want)
        return flat.map(lambda x: x[order]), lambda pieces: torch.cat(pieces)[order.to(pieces[0].device)]

    def _kept(self, dim: int) -> Tensor:
        """Which of the tokens are part of the sequence still."""
        return torch.cat([x.column < limit for x, limit in zip(self._index, self._limits, strict=True)], dim)

    def _listed(self, flat: Index, want: Tensor) -> Tensor:
        """``[B, P]``: where the tokens are that were asked for one by one."""
        at = {(b, p): i for i, (b, p) in enumerate(zip(flat.row.tolist(), flat.position.tolist(), strict=True))}
        for b, positions in enumerate(want.tolist()):
            for p in positions:
                if (b, p) not in at:
                    raise ValueError(
                        f"positions={self.choice.asked}: batch row {b} has no token at position {p}; "
                        "use a slice for rows of different lengths"
                    )
        return torch.tensor([[at[b, p] for p in positions] for b, positions in enumerate(want.tolist())])


def _pick(value: Tensor, dim: int, kept: Tensor) -> Tensor:
    return value if len(kept) == value.shape[dim] else value.index_select(dim, kept.to(value.device))


def _same_keys(name: str, pieces: list[Tensor]) -> list[Tensor]:
    """Rows of attention see more keys as a generation goes on: those that were not there yet are filled up."""
    if name not in ("scores", "pattern"):
        return pieces
    keys = max(p.shape[-1] for p in pieces)
    fill = 0.0 if name == "pattern" else -torch.inf
    return [torch.nn.functional.pad(p, (0, keys - p.shape[-1]), value=fill) for p in pieces]
