"""From what leaves the last layer that matters to the metric: only the columns and vocabulary rows that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from emocircuits.families import Handle
from emocircuits.sweep.metrics import Metric
from emocircuits.sweep.resume import Packed
from emocircuits.sweep.trace import Trace

Finish = Callable[[Handle, Tensor], Tensor]


class Readout:
    """A metric on a model and a pair.

    Attributes:
        stop: the last layer that it reads through.
        columns: columns read, ascending.
        base: what is read of the base run, ``[1, columns, rows]``.
        reference: the same of the clean run.
        identity: what decides values besides metric, model and inputs.
    """

    def __init__(self, handle: Handle, metric: Metric, clean: Trace, base: Trace, finish: Finish) -> None:
        self.handle, self.metric, self.finish = handle, metric, finish
        total = len(handle.layers)
        depth = total - 1 if metric.depth is None else metric.depth
        if not -total <= depth < total:
            raise ValueError(f"the metric reads layer {depth}, the model has {total}")
        self.stop = depth % total
        self.columns = metric.columns(clean.columns)
        self.bias: Tensor | None = getattr(handle.unembed, "bias", None)
        self.identity: dict[str, Any] = {}
        self.rows: Tensor | None = None
        self.weight: Tensor | None = None
        if metric.depth is None and metric.rows is not None:
            probe = handle.unembed(handle.norm(clean.layers[-1].resid_post[-1:]))
            if not all(0 <= r < probe.shape[-1] for r in metric.rows):
                raise ValueError(f"the metric reads vocabulary rows {metric.rows}; the model has {probe.shape[-1]}")
            self.rows = torch.tensor(metric.rows, device=probe.device)
            # Of anything but a plain linear layer (quantised, an adapter, a forward of its own) all rows are computed.
            if type(handle.unembed) is nn.Linear and "forward" not in vars(handle.unembed):
                self.weight = handle.unembed.weight[self.rows].detach()
        self.reference = self.of(clean)
        self.base = self.of(base)

    @property
    def kept(self) -> tuple[Tensor, Tensor] | None:
        """Rows of the unembedding's weight that are held, and their numbers; None where it runs as a whole."""
        return None if self.weight is None or self.rows is None else (self.weight, self.rows)

    def of(self, run: Trace) -> Tensor:
        """What is read of a run, ``[1, columns, rows]``."""
        return self.read(run.layers[self.stop].resid_post[list(self.columns)])[None]

    def read(self, x: Tensor) -> Tensor:
        """Logits of the rows read, or the residual stream itself, of tokens ``[tokens, d_model]``."""
        if self.metric.depth is not None:
            return x
        h = self.handle.norm(x)
        if self.rows is None or self.weight is None:
            logits = self.finish(self.handle, self.handle.unembed(h))
            return logits if self.rows is None else logits[..., self.rows]
        bias = None if self.bias is None else self.bias[self.rows]
        return self.finish(self.handle, linear(h, self.weight, bias))

    def value(self, read: Tensor) -> Tensor:
        """The metric of ``[n, columns, rows]``, ``[n]`` float64."""
        work = torch.promote_types(read.dtype, torch.float32)
        return self.metric(read.to(work), self.reference.to(work)).double()

    def __call__(self, packed: Packed) -> Tensor:
        """Values ``[variants]`` float64; columns that were not computed are the base run's."""
        read, whole, start = self.read(packed.x), [], 0
        for g in packed.groups:
            if g.columns == self.columns:
                whole.append(read[start : start + g.size].unflatten(0, (g.count, -1)))
            else:
                filled = self.base.expand(g.count, -1, -1).clone()
                at = [i for i, c in enumerate(self.columns) if c in g.columns]
                offsets = [g.columns.index(self.columns[i]) for i in at]
                filled[:, at] = read[start : start + g.size].unflatten(0, (g.count, -1))[:, offsets]
                whole.append(filled)
            start += g.size
        return self.value(torch.cat(whole))


@torch.inference_mode()
def refuse_padding(readout: Readout, real: Tensor) -> None:
    """Refuse a metric that reads padding: what a model says there means nothing.

    Args:
        readout: the metric on a pair.
        real: ``[T]`` bool, False for padding.

    Raises:
        ValueError: the metric names a padded column, or its function gives another value where padding says another
            thing.
    """
    padded = ~real[list(readout.columns)]
    if not bool(padded.any()):
        return
    if readout.metric.pos is None:
        noise = torch.zeros_like(readout.base)
        g = torch.Generator().manual_seed(0)
        spread = 1 + float(readout.base.float().std())
        noise[:, padded] = (10 * spread * torch.randn(noise[:, padded].shape, generator=g)).to(noise)
        values = [float(readout.value(readout.base + by * noise)) for by in (0, 1, -1)]
        if len(set(values)) == 1:
            return
    first, last = (int(real.nonzero().flatten()[i]) for i in (0, -1))
    raise ValueError(
        f"the metric reads padding; the prompt's own columns are {first} to {last} (columns count padding): name one "
        "of them, or leave the padding out"
    )


def scaled(handle: Handle, logits: Tensor) -> Tensor:
    """What models do with logits after the unembedding: scaling (Cohere, Granite) and a cap (Gemma 2)."""
    config: Any = handle.text_config
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def finishing(handle: Handle, run: Trace, logits: Tensor) -> Finish:
    """Find out what the model does with its logits: some have a config with a scale and do not use it.

    Args:
        handle: the model.
        run: a run of it.
        logits: the model's own of that run, ``[T, vocabulary]``.

    Raises:
        ValueError: logits that are not finite.
        NotImplementedError: the logits are not made from the last residual stream in a known way.
    """
    theirs = logits[-1].float()
    if not bool(theirs.isfinite().all()):
        raise ValueError("the model's logits have NaN or infinite values; nothing can be measured")
    raw = handle.unembed(handle.norm(run.layers[-1].resid_post[-1:]))
    near = 2e-2 if raw.element_size() == 2 else 1e-4
    for finish in (scaled, _plain):
        ours = finish(handle, raw)[0].float()
        if torch.allclose(ours, theirs, rtol=0, atol=near * float(theirs.abs().max())):
            return finish
    raise NotImplementedError(
        f"logits of {type(handle.model).__name__} are not its final norm and unembedding of the last layer, so a "
        "sweep cannot read them"
    )


def _plain(handle: Handle, logits: Tensor) -> Tensor:
    return logits
