"""What TransformerLens' one-liners patch besides a sweep's own targets (:mod:`.compat`), clean into corrupt.

Attention patterns, and the residual stream between attention and MLP.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emocircuits.sweep import attend
from emocircuits.sweep.generated import Generated
from emocircuits.sweep.keys import reach
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.resume import Decoder
from emocircuits.sweep.several import over_pairs
from emocircuits.sweep.targets import Entry, Target

if TYPE_CHECKING:
    from emocircuits.sweep.api import Positions, Sweep


@dc.dataclass(frozen=True)
class PatternTarget(Target):
    """A head's attention weights of the other run on this run's values: a change of its output, column by column.

    ``key``: the column whose weight alone is taken from the other run; None: all of them.
    """

    kind: str = "heads"
    key: int | None = None

    def entry(self, sweep: Sweep, decoder: Decoder, layer: int) -> Entry:
        """Heads whose new outputs are gathered with the other run's weights."""
        base, source = sweep.base.layers[layer], sweep.source.layers[layer]

        def weights(record: Any) -> Tensor:
            s = attend.scores(record.q, record.k, record.mask, record.scaling, record.softcap)
            return s.softmax(-1).nan_to_num(0.0)[0].to(record.v.dtype)  # [H, T, T]

        value = base.v[0].repeat_interleave(base.q.shape[1] // base.v.shape[1], 0)
        if self.key is None:
            z = (weights(source) @ value).transpose(0, 1)
        else:
            change = (weights(source) - weights(base))[:, :, self.key, None] * value[:, None, self.key]
            z = base.z + change.transpose(0, 1)
        return Entry(sweep.handle, decoder, self, layer, z)


@over_pairs
def pattern(sweep: Sweep, positions: Positions) -> SweepResult:
    """Rows of a head's attention pattern: [layer, head] for all rows at once, else [layer, pos, head]."""
    return sweep._sweep(PatternTarget(), list(range(sweep.handle.geometry.heads)), positions, None)


@over_pairs
def pattern_entries(sweep: Sweep) -> SweepResult:
    """Single weights of a head's attention pattern: [layer, head, pos, key]."""
    heads = list(range(sweep.handle.geometry.heads))
    layers, total = sweep.handle.geometry.layers, sweep.columns
    table = torch.full((layers, len(heads), total, total), sweep.corrupt, dtype=torch.float64)
    result = None
    for key, first in enumerate(reach(sweep.base)):
        rows = list(range(first, total))  # earlier ones do not see it
        result = sweep._sweep(PatternTarget(key=key), heads, rows, None)
        table[:, :, rows, key] = result.values.transpose(1, 2)
    assert result is not None
    labels = {"layer": list(range(layers)), "head": heads, "pos": list(range(total)), "key": list(range(total))}
    return dc.replace(result, values=table, axes=("layer", "head", "pos", "key"), labels=labels)


@over_pairs
def residual_between(sweep: Sweep) -> SweepResult:
    """The residual stream between attention and MLP, column by column: [layer, pos].

    What leaves a layer in a column follows from it, so patching it is patching what enters the next layer.

    Raises:
        NotImplementedError: attention and MLP read the same residual stream, or something else is added after the MLP.
    """
    if isinstance(sweep.metric, Generated):
        raise NotImplementedError("the residual stream between attention and MLP with generated text; use residual()")
    decoder = Decoder(sweep.handle, sweep.base, sweep.readout.stop, sweep.readout.columns)
    for layer, record in enumerate(sweep.base.layers):
        if not _one_after_the_other(decoder, layer) or record.added is not None:
            raise NotImplementedError(
                f"layer {layer} has no residual stream between attention and MLP that alone decides what leaves it; "
                "patch attn_out and mlp_out"
            )
    stop, read = sweep.readout.stop, sweep.readout
    table = torch.full((len(sweep.base.layers), sweep.columns), sweep.corrupt, dtype=torch.float64)
    found = sweep.residual("each", layers=[*range(1, stop + 1)] or None)
    if stop:
        table[:stop] = found.values
    with torch.inference_mode():
        other = read.of(sweep.source)
        for i, column in enumerate(read.columns):
            one = read.base.clone()
            one[:, i] = other[:, i]
            table[stop, column] = float(read.value(one))
    labels = {**found.labels, "layer": list(range(len(table)))}
    return dc.replace(found, values=table, labels=labels, meta={**found.meta, "target": "residual_between"})


@torch.inference_mode()
def _one_after_the_other(decoder: Decoder, layer: int) -> bool:
    """Whether the MLP reads what attention added."""
    record, index = decoder.base.layers[layer], torch.zeros(1, dtype=torch.long, device=decoder.device)
    seen: list[Tensor] = []
    forward = decoder.handle.mlps[layer].forward

    def keep(*args: Any, **more: Any) -> Any:
        seen.append(args[0] if args else more["hidden_states"])
        return forward(*args, **more)

    mlp: tuple[Any, Callable[..., Any]] = (decoder.handle.mlps[layer], keep)
    for out in (record.attention[index], record.attention[index] + 1):
        decoder.call(layer, record.resid_pre[index], index, [*decoder.gives_attention(layer, out), mlp])
    return not torch.equal(*seen)
