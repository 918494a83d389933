"""Going on from a layer of the base run with a batch of variants, without computing again what they share.

Tokens of all variants are packed into one row, each with its own column: norms, projections, rotary embedding and MLP
of the family's own layer are computed token by token anyway, and attention, which is not, is ours. So no modeling code
is copied, and variants of different length fill one matrix product.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.families import Handle
from emocircuits.sweep import attend
from emocircuits.sweep.attend import Call, replaced, taking
from emocircuits.sweep.keys import later, mask_rows, others, own, reach, span
from emocircuits.sweep.prefix import after_shared, plain
from emocircuits.sweep.trace import LayerTrace, Trace, first

Parts = Sequence[tuple[nn.Module, Callable[..., Any]]]
"""Modules and what they are replaced with."""
Watch = Callable[[int, "tuple[Group, ...]", Tensor, Tensor], None]
"""Told of every layer that is run the groups in which keys and values ``[H_kv, tokens, D]`` are new, and these."""


@dc.dataclass(frozen=True)
class Group:
    """Variants that are computed in the same columns, all others being as in the base run.

    Attributes:
        columns: ascending; what is packed for each variant.
        count: number of variants.
    """

    columns: tuple[int, ...]
    count: int

    @property
    def size(self) -> int:  # noqa: D102
        return len(self.columns) * self.count


@dc.dataclass(frozen=True)
class Packed:
    """Residual stream ``[tokens, d_model]`` of groups, variant by variant.

    ``point``: groups of one column, the only one in which the residual stream differs from the base run so far.
    ``set_z``: what else is patched on the way: from a layer, groups and their head outputs ``[tokens, H * D]`` to what
    these become.
    """

    x: Tensor
    groups: tuple[Group, ...]
    point: bool
    set_z: Callable[[int, tuple[Group, ...], Tensor], Tensor] | None = None

    def z(self, layer: int, groups: tuple[Group, ...], z: Tensor) -> Tensor:
        """Head outputs of some columns of the variants, with what is patched there."""
        return z if self.set_z is None else self.set_z(layer, groups, z)


class Decoder:
    """The text decoder of one base run, entered where variants begin to differ.

    Args:
        handle: the model.
        base: its run on the base prompt.
        stop: the last layer to compute.
        reads: columns of its output that are wanted.
    """

    def __init__(self, handle: Handle, base: Trace, stop: int, reads: tuple[int, ...]) -> None:
        self.handle, self.base, self.stop, self.reads = handle, base, stop, reads
        self.total = base.columns
        self.device = base.layers[0].resid_pre.device
        self._index: dict[tuple[Group, ...], Tensor] = {}
        self._without: dict[tuple[int, int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._plain: dict[int, bool] = {}
        self.queries = handle.parts("query")
        self.watch: Watch | None = None
        self.reach = reach(base)
        self.causal = self.reach == tuple(range(self.total))

    def plain(self, record: LayerTrace) -> bool:
        """Whether a layer's mask is the plain causal one; layers mostly share one."""
        assert record.mask is not None
        key = id(record.mask)
        if key not in self._plain:
            self._plain[key] = plain(record.mask)
        return self._plain[key]

    def forget(self) -> None:
        """Give back what is kept from batch to batch."""
        self._index.clear()
        self._without.clear()

    def index(self, groups: tuple[Group, ...]) -> Tensor:
        """The column of every packed token."""
        if groups not in self._index:
            if len(self._index) > 64:
                self._index.clear()
            columns = [c for g in groups for c in g.columns * g.count]
            self._index[groups] = torch.tensor(columns, device=self.device)
        return self._index[groups]

    def live(self, layer: int, column: int) -> tuple[int, ...]:
        """Columns of a layer's output that a change from ``column`` on reaches and somebody reads."""
        if layer == self.stop:
            return tuple(c for c in self.reads if c >= self.reach[column])
        return tuple(range(self.reach[column], self.total))

    # ---- one layer, some of it given -----------------------------------------------------------------

    def call(
        self, layer: int, x: Tensor, index: Tensor, parts: Sequence[tuple[nn.Module, Callable[..., Any]]]
    ) -> Tensor:
        """The layer's own forward on packed tokens, with some of its modules replaced. ``[tokens, d_model]``."""
        record = self.base.layers[layer]
        with replaced(parts):
            out = first(self.handle.layers[layer](x[None], **record.arguments(index)))[0]
        return out if record.added is None else out + record.added[index]

    def after_attention(self, layer: int, x: Tensor, groups: tuple[Group, ...], attention: Tensor) -> Tensor:
        """What leaves the layer, when its attention module gave ``attention``."""
        return self.call(layer, x, self.index(groups), self.gives_attention(layer, attention))

    def gives_attention(self, layer: int, out: Tensor) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The attention module, giving ``out``, and the norm before it, which then has nothing to do."""
        record = self.base.layers[layer]
        found: list[tuple[nn.Module, Callable[..., Any]]] = [
            (self.handle.attentions[layer], _giving(out, record.attention_extra))
        ]
        if record.before_attention is not None:
            found.append((record.before_attention, lambda x, *_, **__: x))
        return found

    def gives_mlp(self, layer: int, out: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
        """The MLP, giving ``out``."""
        return self.handle.mlps[layer], _giving(out, self.base.layers[layer].mlp_extra)

    def project(self, layer: int, z: Tensor) -> Tensor:
        """The output projection of head outputs ``[tokens, H * D]``."""
        out: Tensor = self.handle.output_projections[layer](z[None])[0]
        return out

    def qkv(self, layer: int, x: Tensor, index: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[H, tokens, D]``, keys and values ``[H_kv, tokens, D]`` of packed tokens.

        Args:
            layer: which.
            x: what enters it.
            index: columns.
            wanted: tokens whose queries are needed; None: all.
        """
        kept: list[Call] = []

        def take(call: Call) -> Tensor:
            kept.append(call)
            return call.query.new_zeros(1, call.query.shape[2], call.query.shape[1], call.value.shape[-1])

        attention = self.handle.attentions[layer]
        nothing = torch.zeros_like(x)
        parts = [
            (self.handle.output_projections[layer], lambda *_: nothing[None]),
            self.gives_mlp(layer, nothing),
        ]
        if wanted is not None and self.queries is not None:
            query = self.queries[layer]
            real = query.forward

            def some(h: Tensor) -> Tensor:
                q = real(h[:, wanted])
                return q.new_zeros(1, h.shape[1], q.shape[-1]).index_copy(1, wanted, q)

            parts.append((query, some))
        with taking(attention, take):
            self.call(layer, x, index, parts)
        return kept[0].query[0], kept[0].key[0], kept[0].value[0]

    # ---- from layer to layer --------------------------------------------------------------------------

    def run(self, layer: int, packed: Packed) -> Packed:
        """From what enters ``layer`` to what leaves `stop`, in the columns that are read."""
        set_z = packed.set_z
        if not self.causal and layer <= self.stop:
            packed = self.widened(layer, packed)
        with attend.switched(self.handle):
            for k in range(layer, self.stop + 1):
                packed = dc.replace(packed, set_z=set_z)
                packed = self.point(k, packed) if packed.point else self.dense(k, packed)
        return packed

    def widened(self, layer: int, packed: Packed) -> Packed:
        """The same variants with all columns that attention takes the change to, earlier ones too."""
        pre, groups, x, start = self.base.layers[layer].resid_pre, [], [], 0
        for g in packed.groups:
            columns = tuple(range(self.reach[g.columns[0]], self.total))
            whole = pre[span(columns)].expand(g.count, -1, -1).clone()
            whole[:, [c - columns[0] for c in g.columns]] = packed.x[start : start + g.size].unflatten(0, (g.count, -1))
            groups.append(Group(columns, g.count))
            x.append(whole.flatten(0, 1))
            start += g.size
        return Packed(torch.cat(x), tuple(groups), False)

    def dense(self, layer: int, packed: Packed) -> Packed:
        """One layer in which every column from the first changed one on may differ."""
        record, groups = self.base.layers[layer], packed.groups
        if layer < self.stop:

            def take(call: Call) -> Tensor:
                self._tell(layer, groups, call.key[0], call.value[0])
                z = self._dense(record, groups, groups, call.query[0], call.key[0], call.value[0])
                z = packed.z(layer, groups, z)
                return z.view(1, z.shape[0], call.query.shape[1], -1)

            with taking(self.handle.attentions[layer], take):
                return Packed(self.call(layer, packed.x, self.index(groups), []), groups, False)
        after = tuple(Group(self.live(layer, g.columns[0]), g.count) for g in groups)
        tokens = self._tokens(groups, after)
        q, k, v = self.qkv(layer, packed.x, self.index(groups), tokens)
        self._tell(layer, groups, k, v)
        z = packed.z(layer, after, self._dense(record, groups, after, q[:, tokens], k, v))
        x = self.after_attention(layer, packed.x[tokens], after, self.project(layer, z))
        return Packed(x, after, False)

    def _tell(self, layer: int, groups: tuple[Group, ...], k: Tensor, v: Tensor) -> None:
        if self.watch is not None:
            self.watch(layer, groups, k, v)

    def _tokens(self, groups: Sequence[Group], after: Sequence[Group]) -> Tensor:
        """Which packed tokens are in the columns of ``after``."""
        found, start = [], 0
        for g, kept in zip(groups, after, strict=True):
            offsets = [g.columns.index(c) for c in kept.columns]
            n = len(g.columns)
            found += [start + b * n + o for b in range(g.count) for o in offsets]
            start += g.size
        return torch.tensor(found, device=self.device)

    def _dense(
        self, record: LayerTrace, groups: Sequence[Group], after: Sequence[Group], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Head outputs ``[tokens, H * D]`` of ``after``; keys and values before a group are the base run's."""
        out = []
        rows = [g.size for g in after]
        live = [g.size for g in groups]
        for g, kept, qg, kg, vg in zip(
            groups, after, q.split(rows, 1), k.split(live, 1), v.split(live, 1), strict=True
        ):
            if not kept.size:
                continue
            start, b = g.columns[0], g.count
            query, key, value = (x.unflatten(1, (b, -1)).transpose(0, 1) for x in (qg, kg, vg))
            tail = kept.columns[0] == self.total - len(kept.columns)
            z = after_shared(
                record, start, query, key, value, mask_rows(record, kept.columns), tail and self.plain(record)
            )
            out.append(z.transpose(1, 2).reshape(kept.size, -1))
        return torch.cat(out)

    def point(self, layer: int, packed: Packed) -> Packed:
        """One layer into which every variant enters with one changed column: queries of the others are known."""
        record, groups = self.base.layers[layer], packed.groups
        q, k, v = self.qkv(layer, packed.x, self.index(groups))
        self._tell(layer, groups, k, v)
        zs, xs, after, start = [], [], [], 0
        for g in groups:
            p, b = g.columns[0], g.count
            part = slice(start, start + b)
            columns = self.live(layer, p)
            start += b
            if not columns:
                after.append(Group((), b))
                continue
            z, x = [], []
            known = tuple(c for c in columns if c > p)
            if columns[0] == p:
                z.append(own(record, p, q[:, part], k[:, part], v[:, part]))
                x.append(packed.x[part, None])
            if known:
                rest = self._others(layer, p, known)
                z.append(later(record, p, known, k[:, part], v[:, part], rest))
                x.append(record.resid_pre[span(known)].expand(b, -1, -1))
            zs.append(torch.cat(z, 1).flatten(0, 1))
            xs.append(torch.cat(x, 1).flatten(0, 1))
            after.append(Group(columns, b))
        found = tuple(after)
        z_found = packed.z(layer, found, torch.cat(zs))
        out = self.after_attention(layer, torch.cat(xs), found, self.project(layer, z_found))
        return Packed(out, found, False)

    def _others(self, layer: int, p: int, columns: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        key = (layer, p, columns)
        if key not in self._without:
            self._without.clear()
            self._without[key] = others(self.base.layers[layer], p, columns)
        return self._without[key]


def _giving(out: Tensor, extra: int) -> Callable[..., Any]:
    """A forward that gives ``out`` in the shape that the module's callers unpack."""
    whole = out[None]
    result: Any = whole if extra < 0 else (whole, *[None] * extra)
    return lambda *_, **__: result
