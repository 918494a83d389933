"""One differentiable run of the base prompt: the model's own forward, with every site of a sweep in the graph."""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from emocircuits.sweep import attend
from emocircuits.sweep.generated import Continuation
from emocircuits.sweep.readout import Readout
from emocircuits.sweep.trace import first, refuse_hooks

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

Edit = Callable[[str, int, Tensor], Tensor]


class _Read(Exception):
    """The layer that the metric reads has run; what follows need not."""


@dc.dataclass
class Graph:
    """A run whose activations can be differentiated.

    Attributes:
        value: the metric, a float64 scalar.
        sites: by name and layer, each with a batch of one in front: ``resid_pre``, ``attn_out``, ``mlp_out``
            ``[1, T, d_model]``, ``q`` ``[1, H, T, D]``, ``k``, ``v`` ``[1, H_kv, T, D]``, ``z`` ``[1, T, H, D]``,
            ``neurons`` ``[1, T, F]``; ``resid_post`` of the layer that the metric reads.
    """

    value: Tensor
    sites: dict[tuple[str, int], Tensor]
    _drop: list[int | None] = dc.field(default_factory=lambda: [None])

    def gradients(self, wanted: Sequence[tuple[str, int]], drop: int | None = None) -> list[Tensor]:
        """``dm / dx`` of sites, shaped as they are; 0 where the metric does not depend on one.

        Args:
            wanted: names and layers.
            drop: a layer through whose attention and MLP no gradient goes (GradDrop).
        """
        there = [s for s in wanted if s in self.sites and self.sites[s].requires_grad]
        self._drop[0] = drop
        try:
            found = torch.autograd.grad(
                self.value, [self.sites[s] for s in there], retain_graph=True, allow_unused=True
            )
        finally:
            self._drop[0] = None
        known = dict(zip(there, found, strict=True))
        return [torch.zeros_like(self.sites[s]) if known.get(s) is None else known[s] for s in wanted]

    def through(self, output: tuple[str, int], source: tuple[str, int], cotangents: Tensor) -> Tensor | None:
        """Gradients at one site that come through another one alone, ``[n, *source.shape]``.

        Args:
            output: the site that they come through.
            source: the site where they are wanted.
            cotangents: ``[n, *output.shape]``, gradients at ``output``.

        Returns:
            None where ``output`` is not computed from ``source``.
        """
        (found,) = torch.autograd.grad(
            self.sites[output], self.sites[source], cotangents, retain_graph=True, allow_unused=True,
            is_grads_batched=True,
        )  # fmt: skip
        return found


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient for a while: none gets one, and no activation is kept for its sake."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def differentiable(sweep: Sweep, edits: Mapping[tuple[str, int], Tensor] | None = None) -> Graph:
    """Run the base prompt of a sweep, up to what the metric reads.

    Args:
        sweep: one pair.
        edits: values of sites, shaped as in :class:`Graph`, in place of what the run computes there. They become
            leaves of the graph. None: the run as it is, differentiable from the input of the first layer on.

    Raises:
        ValueError: weights made in inference mode, hooks in the decoder, or a metric that is not differentiable.
    """
    handle = sweep.handle
    refuse_hooks(handle)
    if isinstance(sweep.readout, Continuation):
        raise ValueError(
            "what a model generates is not differentiable: attribution needs a metric of the prompt's logits"
        )
    if any(p.is_inference() for p in handle.model.parameters()):
        raise ValueError("the model was made in inference mode, so autograd cannot run it; load it outside of that")
    stop = sweep.readout.stop
    given = dict(edits or {})
    sites: dict[tuple[str, int], Tensor] = {}
    drop: list[int | None] = [None]

    def edit(name: str, layer: int, x: Tensor) -> Tensor:
        if (name, layer) in given:
            x = given[name, layer].clone().detach().to(x).requires_grad_()
        elif not given and (name, layer) == ("resid_pre", 0):
            x = x.detach().requires_grad_()
        if name in ("attn_out", "mlp_out") and x.requires_grad:
            x.register_hook(lambda g: torch.zeros_like(g) if drop[0] == layer else None)
        sites[name, layer] = x
        return x

    inputs = sweep.corrupt_inputs if sweep.direction == "denoise" else sweep.clean_inputs
    with torch.inference_mode(False), torch.enable_grad(), frozen(handle.model), contextlib.ExitStack() as stack:
        stack.enter_context(attend.switched(handle))
        for layer in range(stop + 1):
            _watch(stack, sweep, layer, edit)
        _until(stack, sweep, stop, edit)
        with contextlib.suppress(_Read):
            handle.model(**{**inputs, "use_cache": False})
        stack.close()  # reading runs the final norm, which may be where the model was stopped
        readout = _own(sweep.readout)
        columns = list(readout.columns)
        value = readout.value(readout.read(sites["resid_post", stop][0, columns])[None]).sum()
    if not value.requires_grad:
        raise ValueError(
            "the metric is not differentiable (it gave a number that autograd cannot follow): attribution needs a "
            "declared metric, or a function that returns a tensor computed from the logits"
        )
    return Graph(value, sites, drop)


def _own(readout: Readout) -> Readout:
    """The readout on tensors that autograd may keep, which those of inference mode are not."""
    own = copy.copy(readout)
    for name in ("weight", "bias", "rows", "reference", "base"):
        tensor = getattr(own, name)
        if isinstance(tensor, Tensor):
            setattr(own, name, tensor.clone().detach())
    return own


def _watch(stack: contextlib.ExitStack, sweep: Sweep, i: int, edit: Edit) -> None:
    """Pass the sites of one layer through ``edit``."""
    handle = sweep.handle
    known = sweep.base.layers[i].mask
    assert known is not None
    mask = known.clone()
    # A padded row sees nothing. Softmax of nothing has no gradient, so it attends to all and gives 0.
    unseeing = (mask <= torch.finfo(mask.dtype).min / 2).all(-1, keepdim=True)
    mask = mask.masked_fill(unseeing, 0.0)
    blind = bool(unseeing.any())

    def take(call: attend.Call) -> Tensor:
        q, k, v = (edit(n, i, x) for n, x in (("q", call.query), ("k", call.key), ("v", call.value)))
        z = attend.heads(q, k, v, mask, call.scaling, call.softcap)
        if blind:
            z = z.masked_fill(unseeing, 0.0)
        return edit("z", i, z.transpose(1, 2)).contiguous()

    stack.enter_context(attend.taking(handle.attentions[i], take))
    name = next(iter(inspect.signature(handle.layers[i].forward).parameters))

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit("resid_pre", i, args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: edit("resid_pre", i, kwargs[name])}

    stack.callback(handle.layers[i].register_forward_pre_hook(enter, with_kwargs=True).remove)
    for site in ("attn_out", "mlp_out"):

        def leave(_: nn.Module, __: Any, output: Any, site: str = site) -> Any:
            x = edit(site, i, first(output))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        stack.callback(handle.sites[site][i].register_forward_hook(leave).remove)
    if handle.geometry.neurons:

        def neurons(_: nn.Module, args: Any) -> Any:
            return edit("neurons", i, args[0]), *args[1:]

        stack.callback(handle.down_projections[i].register_forward_pre_hook(neurons).remove)


def _until(stack: contextlib.ExitStack, sweep: Sweep, stop: int, edit: Edit) -> None:
    """Stop the model where the metric reads."""
    module, enters = sweep.handle.site("resid_post", stop)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        edit("resid_post", stop, args[0] if args else kwargs["hidden_states"])
        raise _Read

    def after(_: nn.Module, __: Any, output: Any) -> None:
        edit("resid_post", stop, first(output))
        raise _Read

    hook = module.register_forward_pre_hook(before, with_kwargs=True) if enters else None
    stack.callback((hook or module.register_forward_hook(after)).remove)
