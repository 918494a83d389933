"""What is patched: where a variant enters, and with what."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from emocircuits.families import Handle
from emocircuits.sweep import qkv
from emocircuits.sweep.keys import span
from emocircuits.sweep.resume import Decoder, Group, Packed
from emocircuits.sweep.trace import LayerTrace, Trace

if TYPE_CHECKING:
    from transformers import DynamicCache

    from emocircuits.sweep.api import Sweep
    from emocircuits.sweep.planner import Work

KINDS = ("heads", "neurons", "residual", "attn_out", "mlp_out", "qkv")
PATCHES = ("clean", "zero", "mean", "resample")
UNITS = {"heads": "head", "neurons": "group", "qkv": "qkv"}


class Variant(NamedTuple):
    """One patch: layer, column (None: all), and head or neuron group (None: the target has no parts)."""

    layer: int
    column: int | None
    unit: int | None


@dc.dataclass(frozen=True)
class Target:
    """A kind of patch.

    Attributes:
        kind: one of :data:`KINDS`.
        groups: neurons of every group; empty for others.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...] = ()

    def site(self, record: LayerTrace) -> Tensor:
        """What is overwritten, ``[T, ...]``.

        ``[T, H, D]`` for heads, ``[T, F]`` for neurons, ``[T, H + 2 H_kv, D]`` for qkv, else ``[T, d_model]``.
        """
        if self.kind == "qkv":
            return qkv.site(record)
        name = {"heads": "z", "neurons": "neurons", "residual": "resid_pre"}.get(self.kind, self.kind)
        found = getattr(record, name)
        assert isinstance(found, Tensor)
        return found

    @property
    def mixes(self) -> bool:
        """Whether attention of the patched layer still carries the change to later columns."""
        return self.kind in ("residual", "qkv")

    def entry(self, sweep: Sweep, decoder: Decoder, layer: int) -> Entry:
        """How variants enter at a layer."""
        patched = values(self, sweep.source.layers[layer], sweep.patch_with, sweep.real)
        return Entry(sweep.handle, decoder, self, layer, patched)

    def steps(
        self, sweep: Sweep, variants: Sequence[Variant], cache: DynamicCache
    ) -> contextlib.AbstractContextManager[Callable[[Tensor], None] | None]:
        """What the patches do while their texts are decoded, from the filled cache: nothing.

        The context gives what is told of the rows that go on (:func:`~.decoding.decode`).
        """
        return contextlib.nullcontext()

    def cost(self, work: Work, variant: Variant) -> int:
        """FLOPs of a variant; 0 where it provably changes nothing that is read."""
        size = max((len(g) for g in self.groups), default=1)
        return work.patch(self.kind, variant, size)


def values(target: Target, source: LayerTrace, patch: str | Tensor, real: Tensor) -> Tensor:
    """What patched places are set to, as :meth:`Target.site`.

    Args:
        target: the kind.
        source: this layer in the run that patches come from.
        patch: "clean" or "resample" (that run's own values), "zero", "mean" (that run's mean over real columns), or a
            tensor that broadcasts to the site.
        real: ``[T]`` bool.

    Raises:
        ValueError: a tensor that does not broadcast, or the mean of what positions have rotated.
    """
    if target.kind == "qkv" and isinstance(patch, str) and patch == "mean":
        raise ValueError("queries and keys are rotated by position, so their mean is of nothing; use clean or zero")
    site = target.site(source)
    if isinstance(patch, Tensor):
        try:
            return patch.to(site).expand_as(site)
        except RuntimeError as error:
            raise ValueError(
                f"patch_with is {list(patch.shape)}, which does not broadcast to {list(site.shape)}"
            ) from error
    if patch == "zero":
        return torch.zeros_like(site)
    if patch == "mean":
        return site[real].mean(0, keepdim=True).expand_as(site)
    return site


def rows(projection: torch.nn.Module) -> Tensor:
    """The weight of a projection as ``[in, out]``.

    Raises:
        NotImplementedError: not a plain linear layer (quantised, or with an adapter).
    """
    own = vars(projection).get("forward")
    # accelerate's wrappers move tensors and compute the same; so do packed products.
    if own is not None and not hasattr(projection, "_hf_hook") and not getattr(own, "packed", False):
        raise NotImplementedError(f"a {type(projection).__name__} with a forward of its own; remove it before a sweep")
    if isinstance(projection, Conv1D):
        return projection.weight.detach()
    if type(projection) is torch.nn.Linear:
        return projection.weight.detach().T
    raise NotImplementedError(
        f"a {type(projection).__name__} in place of a linear layer; merge adapters or load the model unquantised"
    )


def refuse_wrapped(handle: Handle, kind: str, layers: Iterable[int]) -> None:
    """Refuse layers whose weights patches of a kind need and cannot have, before any of them runs.

    Raises:
        NotImplementedError: see :func:`rows`; the message names the layer.
    """
    if kind in ("heads", "qkv", "combinations", "routes"):
        projections = handle.output_projections
    elif kind == "neurons":
        projections = handle.down_projections
    else:
        return
    for layer in layers:
        try:
            rows(projections[layer])
        except NotImplementedError as error:
            raise NotImplementedError(f"layer {layer} has {error}") from error


class Entry:
    """Packed variants of one layer and one target, ready to be resumed at the next layer (or at this one).

    Args:
        handle: the model.
        decoder: of the base run.
        target: what is patched.
        layer: where.
        patched: what it is set to, from :func:`values`.
    """

    def __init__(self, handle: Handle, decoder: Decoder, target: Target, layer: int, patched: Tensor) -> None:
        self.handle, self.decoder, self.target, self.layer = handle, decoder, target, layer
        self.record = decoder.base.layers[layer]
        self.mlp = handle.mlps[layer]
        self.patched = patched

    def columns(self, column: int | None, start: int, unit: int | None = None) -> tuple[int, ...]:
        """The columns in which the patch is made and somebody looks; empty: it changes nothing."""
        found = tuple(range(start, self.decoder.total)) if column is None else (column,)
        if self.layer == self.decoder.stop and (not self.target.mixes or self.query(unit)):
            return tuple(c for c in found if c in self.decoder.reads)
        start = self.decoder.reach[found[0]]
        return found if any(r >= start for r in self.decoder.reads) else ()

    def query(self, unit: int | None) -> bool:
        """Whether a unit is the queries of a head: they change its output in their own columns and nowhere else."""
        return self.target.kind == "qkv" and unit is not None and unit < self.record.q.shape[1]

    def __call__(
        self, parts: Sequence[tuple[tuple[int, ...], Sequence[int | None]]], point: bool
    ) -> tuple[int, Packed]:
        """Enter.

        Args:
            parts: for each group of variants the columns patched and the units.
            point: whether each is one column.

        Returns:
            The layer to go on at, and what enters it.
        """
        kind, record = self.target.kind, self.record
        spread = kind == "qkv" and not all(self.query(unit) for _, units in parts for unit in units)
        if spread:
            # A key or value is met by all later queries.
            groups = tuple(Group(self.decoder.live(self.layer, c[0]), len(units)) for c, units in parts)
            point = False
        else:
            groups = tuple(Group(columns, len(units)) for columns, units in parts)
        index = self.decoder.index(groups)
        if kind == "residual":
            return self.layer, Packed(self.patched[index], groups, point)
        if kind in ("heads", "neurons", "qkv"):
            delta = torch.cat([self._delta(c, units, g.columns) for (c, units), g in zip(parts, groups, strict=True)])
        # Where a norm is between the MLP and the residual stream, what neurons add goes through it.
        if record.additive and kind == "neurons" and self.handle.sites["mlp_out"][self.layer] is self.mlp:
            return self.layer + 1, Packed(record.resid_post[index] + delta, groups, point)
        if record.additive and kind == "mlp_out":
            added = record.resid_post[index] + (self.patched[index] - record.mlp_out[index])
            return self.layer + 1, Packed(added, groups, point)
        x = record.resid_pre[index]
        if kind in ("heads", "qkv"):
            out = self.decoder.after_attention(self.layer, x, groups, record.attention[index] + delta)
        else:
            known = self.decoder.gives_attention(self.layer, record.attention[index])
            if kind == "neurons":
                known.append(self.decoder.gives_mlp(self.layer, record.mlp[index] + delta))
            else:
                if kind == "mlp_out":
                    known.append(self.decoder.gives_mlp(self.layer, record.mlp[index]))
                site = self.handle.sites[kind][self.layer]
                if site is self.handle.attentions[self.layer]:
                    known = self.decoder.gives_attention(self.layer, self.patched[index])
                elif site is self.mlp:
                    known[-1] = self.decoder.gives_mlp(self.layer, self.patched[index])
                else:
                    given = self.patched[index][None]
                    known.append((site, lambda *_, **__: given))
            out = self.decoder.call(self.layer, x, index, known)
        return self.layer + 1, Packed(out, groups, point)

    def _delta(self, columns: tuple[int, ...], units: Sequence[int | None], changed: tuple[int, ...]) -> Tensor:
        """What patches add to attention or MLP in the columns that these change, ``[variants * changed, d_model]``."""
        at = span(columns)
        if self.target.kind == "qkv":
            heads = self.record.z.shape[1]
            weight = rows(self.handle.output_projections[self.layer]).unflatten(0, (heads, -1))
            out = span(changed)
            found = []
            for unit in units:
                assert unit is not None
                which, change = qkv.change(self.record, self.patched, unit, at, out)
                found.append((change @ weight[which]).sum(0))
            return torch.cat(found)
        if self.target.kind == "heads":
            change = (self.patched[at] - self.record.z[at]).transpose(0, 1)  # [H, n, D]
            weight = rows(self.handle.output_projections[self.layer]).unflatten(0, (change.shape[0], -1))
            chosen = [u for u in units if u is not None]
            whole = chosen == list(range(change.shape[0]))
            added = change @ weight if whole else change[chosen] @ weight[chosen]
            return added.flatten(0, 1)
        assert self.record.neurons is not None
        change = self.patched[at] - self.record.neurons[at]
        weight = rows(self.handle.down_projections[self.layer])
        parts = []
        for unit in units:
            assert unit is not None
            group = self.target.groups[unit]
            chosen_neurons = span(group)
            parts.append(change[:, chosen_neurons] @ weight[chosen_neurons])
        return torch.cat(parts)


def same_frame(clean: Trace, corrupt: Trace) -> None:
    """Masks and positions must be the same in both runs: a patch carries neither over.

    Raises:
        ValueError: they are not.
    """
    for i, (a, b) in enumerate(zip(clean.layers, corrupt.layers, strict=True)):
        assert a.mask is not None
        assert b.mask is not None
        if not torch.equal(a.mask, b.mask):
            raise ValueError(f"the attention masks of clean and corrupt differ in layer {i}")
        for name, value in a.kwargs.items():
            other = b.kwargs[name]
            left, right = (v if isinstance(v, tuple | list) else (v,) for v in (value, other))
            for x, y in zip(left, right, strict=True):
                if isinstance(x, Tensor) and not torch.equal(x, y):
                    raise ValueError(f"{name} of clean and corrupt differ: a column is not the same place in both")


def first_difference(clean: Trace, corrupt: Trace) -> int:
    """The first column whose input to the decoder differs between the runs; the number of columns if none does."""
    differ = (clean.layers[0].resid_pre != corrupt.layers[0].resid_pre).any(-1)
    for a, b in zip(clean.layers, corrupt.layers, strict=True):
        if a.added is not None and b.added is not None:
            differ |= (a.added != b.added).any(-1)
    return int(differ.int().argmax()) if bool(differ.any()) else clean.columns
