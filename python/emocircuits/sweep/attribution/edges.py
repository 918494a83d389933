"""Edge attribution patching: EAP (Syed et al. 2023, arXiv 2310.10348), EAP-IG (Hanna et al. 2024, arXiv 2403.17806).

The residual stream at a column is the sum of what the input, heads and MLPs below wrote; queries, keys, values, MLPs
and the logits read it. An edge is one writer into one reader. Its score is what the writer would write in the other
prompt, less what it writes in the base one, times the gradient that reaches the stream through this reader, over all
columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from emocircuits.sweep.attribution.gradients import Graph, differentiable
from emocircuits.sweep.attribution.graph import EdgeResult
from emocircuits.sweep.targets import refuse_wrapped, rows

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

EdgeMethod = Literal["eap", "eap-ig"]


def sweep_edges(sweep: Sweep, method: str, steps: int) -> EdgeResult:
    """See :meth:`Sweep.edges`."""
    if method not in ("eap", "eap-ig"):
        raise ValueError(f"method={method!r}: expected 'eap' or 'eap-ig'")
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    if sweep.several is not None:
        several = sweep.several
        return EdgeResult.mean([sweep_edges(several.sweep(i), method, steps) for i in range(len(several.pairs))])
    sweep.weights.check()
    _refuse(sweep)
    names = _names(sweep)
    scores = torch.full([len(n) for n in names], float("nan"), dtype=torch.float64)
    base, change = sweep.base.layers[0].resid_pre, _changes(sweep)
    points = [None] if method == "eap" else [k / steps for k in range(1, steps + 1)]
    for at in points:
        edits = None
        if at is not None:
            edits = {("resid_pre", 0): (base.double() + at * change["input"][0]).to(base)[None]}
        start = 0
        for below, read in _readers(sweep, differentiable(sweep, edits)):
            part = scores[: len(below), start : start + len(read)]
            start += len(read)
            part.copy_(part.nan_to_num(0.0) + _scores(sweep, change, below, read).cpu() / len(points))
    g = sweep.handle.geometry
    meta = {"method": method, "direction": sweep.direction, "steps": len(points)}
    return EdgeResult(scores, *names, sweep.clean, sweep.corrupt, g.heads // g.kv_heads, meta)


def _refuse(sweep: Sweep) -> None:
    """Refuse models whose residual stream is not the plain sum of what the nodes write.

    Raises:
        NotImplementedError: it is not; the message says why.
    """
    handle, kind = sweep.handle, type(sweep.handle.model).__name__
    if sweep.patch_with != "clean" or sweep.resampling is not None:
        raise NotImplementedError("edges carry the values of the other prompt: leave patch_with at 'clean'")
    for i in range(sweep.readout.stop + 1):
        record = sweep.base.layers[i]
        if handle.sites["attn_out"][i] is not handle.attentions[i]:
            raise NotImplementedError(
                f"{kind} normalises what attention writes (layer {i}), so what one head adds to the residual stream "
                "depends on the other heads and edges from heads have no scores of their own; use attribute()"
            )
        if not record.additive:
            raise NotImplementedError(
                f"layer {i} of {kind} scales what it adds to the residual stream, which edges do not follow; use "
                "attribute()"
            )
        if record.added is not None:
            raise NotImplementedError(
                f"{kind} adds image features between layers (after layer {i}), a writer that edges do not know; use "
                "attribute()"
            )
    refuse_wrapped(handle, "heads", range(sweep.readout.stop + 1))


def _names(sweep: Sweep) -> tuple[list[str], list[str]]:
    """Writers and readers, layer by layer."""
    g = sweep.handle.geometry
    kv = "h" if g.heads == g.kv_heads else "kv"
    sources, destinations = ["input"], []
    for l in range(sweep.readout.stop + 1):
        sources += [*(f"a{l}.h{h}" for h in range(g.heads)), f"m{l}"]
        destinations += [f"a{l}.h{h}<q>" for h in range(g.heads)]
        destinations += [f"a{l}.{kv}{h}<{x}>" for x in "kv" for h in range(g.kv_heads)]
        destinations.append(f"m{l}")
    return sources, [*destinations, "logits"]


def _changes(sweep: Sweep) -> Mapping[str, Tensor]:
    """What every writer would write, less what it writes, float64.

    ``input`` and ``m<layer>`` ``[1, T, d_model]``; of heads ``a<layer>`` ``[H, T, D]``, before the output projection.
    """
    found = {"input": (sweep.source.layers[0].resid_pre.double() - sweep.base.layers[0].resid_pre.double())[None]}
    for l in range(sweep.readout.stop + 1):
        new, old = sweep.source.layers[l], sweep.base.layers[l]
        found[f"a{l}"] = (new.z.double() - old.z.double()).transpose(0, 1)
        found[f"m{l}"] = (new.mlp_out.double() - old.mlp_out.double())[None]
    return {k: v.clone() for k, v in found.items()}


def _readers(sweep: Sweep, graph: Graph) -> Iterator[tuple[list[str], Tensor]]:
    """Readers in the order of their names, some at a time: the writers below, and gradients ``[readers, T, d_model]``.

    Writers come as the first part of all: "input", "a0.h0", ..., "m0", ...
    """
    g, stop = sweep.handle.geometry, sweep.readout.stop
    layers = range(stop + 1)
    flat = graph.gradients([(n, l) for l in layers for n in ("q", "k", "v", "mlp_out")])
    known = {(n, l): flat[4 * l + i] for l in layers for i, n in enumerate(("q", "k", "v", "mlp_out"))}
    below = ["input"]
    for l in layers:
        parts = []
        for name in ("q", "k", "v"):
            whole = known[name, l]  # [1, H, T, D]
            apart = torch.diag_embed(torch.ones(whole.shape[1], dtype=whole.dtype, device=whole.device))
            one = graph.through((name, l), ("resid_pre", l), whole * apart[:, None, :, None, None])
            assert one is not None
            parts.append(one[:, 0])
        yield below, torch.cat(parts)
        heads = [f"a{l}.h{h}" for h in range(g.heads)]
        # What attention adds reaches an MLP as the stream does; where it does not reach it, both read the same stream.
        cotangent = known["mlp_out", l][None]
        after = graph.through(("mlp_out", l), ("attn_out", l), cotangent)
        if after is not None:
            yield [*below, *heads], after[:, 0]
        else:
            before = graph.through(("mlp_out", l), ("resid_pre", l), cotangent)
            assert before is not None
            yield below, before[:, 0]
        below = [*below, *heads, f"m{l}"]
    yield below, graph.gradients([("resid_post", stop)])[0]


@torch.no_grad()
def _scores(sweep: Sweep, change: Mapping[str, Tensor], below: list[str], read: Tensor) -> Tensor:
    """``[writers, readers]`` float64. What heads write is made layer by layer, never kept."""
    gradient = read.double().flatten(1)
    found = []
    for name in dict.fromkeys(b.partition(".")[0] for b in below):
        written = change[name]
        if name.startswith("a"):
            weight = rows(sweep.handle.output_projections[int(name[1:])]).double()
            written = written @ weight.unflatten(0, (len(written), -1))
        found.append(written.flatten(1) @ gradient.T)
    return torch.cat(found)
