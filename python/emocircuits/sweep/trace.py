"""One complete run of one prompt that keeps what a sweep needs of it."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.families import Handle
from emocircuits.sweep import attend
from emocircuits.sweep.memory import NAMES, Host, Where, held, on_host

# Arguments of a decoder layer that have an entry for every column, and in which dimension.
BY_COLUMN = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1, "text_position_ids": -1}
DROPPED = ("attention_mask", "past_key_values", "past_key_value", "layer_past")


@dc.dataclass
class LayerTrace:
    """What one layer computed, in ``T`` columns.

    ``resid_pre``, ``resid_post``, ``attention`` (the module's output), ``attn_out`` (what is added to the residual
    stream: not the same where a norm is between), ``mlp`` and ``mlp_out`` are ``[T, d_model]``; ``q`` ``[1, H, T, D]``,
    ``k`` and ``v`` ``[1, H_kv, T, D]`` as attention gets them, after rotary embedding; ``z`` ``[T, H, D]``; ``neurons``
    ``[T, F]``, None for mixtures of experts.
    """

    resid_pre: Tensor = None  # type: ignore[assignment]
    resid_post: Tensor = None  # type: ignore[assignment]
    attention: Tensor = None  # type: ignore[assignment]
    attn_out: Tensor = None  # type: ignore[assignment]
    mlp: Tensor = None  # type: ignore[assignment]
    mlp_out: Tensor = None  # type: ignore[assignment]
    q: Tensor = None  # type: ignore[assignment]
    k: Tensor = None  # type: ignore[assignment]
    v: Tensor = None  # type: ignore[assignment]
    z: Tensor = None  # type: ignore[assignment]
    neurons: Tensor | None = None
    projected: Tensor | None = None
    mask: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    kwargs: dict[str, Any] = dc.field(default_factory=dict)
    attention_extra: int = 0
    mlp_extra: int = 0
    before_attention: nn.Module | None = None
    """The module (a norm) whose output only attention reads: it need not run where attention's output is known."""
    added: Tensor | None = None
    """What the text decoder adds after the layer (DeepStack), ``[T, d_model]``; ``resid_post`` has it."""
    additive: bool = False
    """Whether what leaves the layer is what enters it and ``attn_out`` and ``mlp_out``, with no factor on them."""

    def arguments(self, columns: Tensor) -> dict[str, Any]:
        """The layer's arguments for tokens that stand in ``columns`` ``[N]``, all in one row."""
        found: dict[str, Any] = {}
        for name, value in self.kwargs.items():
            dim = BY_COLUMN.get(name)
            if dim is None or value is None:
                found[name] = value
            elif isinstance(value, Tensor):
                found[name] = value.index_select(dim, columns)
            else:
                found[name] = tuple(part.index_select(dim, columns) for part in value)
        return found


class HostLayer(LayerTrace):
    """A layer whose activations are in host memory: what is read of it comes to the device then."""

    def __init__(self, record: LayerTrace, host: Host, layer: int) -> None:
        self.__dict__.update({k: v for k, v in vars(record).items() if k not in NAMES})
        self.__dict__.update(_host=host, _layer=layer)


def _brought(name: str) -> property:
    def read(self: Any) -> Tensor | None:
        found: Tensor | None = self._host.get(self._layer, name)
        return found

    return property(read)


for _name in NAMES:
    setattr(HostLayer, _name, _brought(_name))


@dc.dataclass
class Trace:
    """A whole run: its layers, and the rotary, mask and unembedding facts that a resumed run shares."""

    layers: list[LayerTrace]
    columns: int
    side: str = ""
    """The prompt that was run: "clean", "corrupt", ..."""
    host: Host | None = None
    """Where the layers' activations are, when not on the device."""

    @property
    def bytes(self) -> int:
        """What the activations take, on the host where they are there; what two layers share counts twice."""
        if self.host is not None:
            return self.host.bytes
        fields = [{n: x for n in NAMES if (x := getattr(layer, n)) is not None} for layer in self.layers]
        return sum(held(found) for found in fields)


def first(output: Any) -> Tensor:
    """The tensor of a module's output."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def refuse_hooks(handle: Handle) -> None:
    """A resumed layer sees many variants in one row: hooks written for prompts would do something else there.

    Raises:
        ValueError: there are hooks in the text decoder that are not transformers' own.
    """
    for name, module in (*handle.text.named_modules(), ("the unembedding", handle.unembed)):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not str(getattr(hook, "__module__", "")).startswith(("transformers", "accelerate")):
                raise ValueError(f"{name or 'the text decoder'} has a forward hook; remove it before a sweep")


@torch.no_grad()
def refuse_lost_cap(handle: Handle, inputs: Mapping[str, Any], logits: Tensor) -> None:
    """Some releases of transformers run models that cap their attention logits on SDPA without the cap.

    Args:
        handle: the model.
        inputs: of one row.
        logits: of a traced run, with the cap, ``[T, vocabulary]``.

    Raises:
        ValueError: the model as it is loaded computes something else.
    """
    if handle.softcap is None or handle.text_config._attn_implementation == "eager":
        return
    own = handle.model(**{**inputs, "use_cache": False}).logits[0, -1].float()
    near = 2e-2 if logits.element_size() == 2 else 1e-4
    if not torch.allclose(own, logits[-1].float(), rtol=0, atol=near * float(own.abs().max())):
        raise ValueError(
            f"this release of transformers runs {type(handle.model).__name__} on "
            f"{handle.text_config._attn_implementation!r} attention without its cap of attention logits; load it with "
            "attn_implementation='eager', or use a newer release"
        )


@torch.no_grad()
def trace(
    handle: Handle, inputs: Mapping[str, Any], side: str, activations: Where = "auto", runs: int = 1
) -> tuple[Trace, Tensor]:
    """Run the model once.

    Args:
        handle: the model.
        inputs: of one row.
        side: what the prompt is called in messages.
        activations: where they are kept, see :func:`.memory.on_host`.
        runs: how many runs of that size have to fit on the device.

    Returns:
        The trace, and the model's logits ``[T, vocabulary]``.

    Raises:
        ValueError: activations that are not finite, or a model in training mode.
        NotImplementedError: a layer that a sweep cannot resume exactly; the message says why.
    """
    if any(m.training for m in handle.text.modules()):
        raise ValueError("the model is in training mode; call model.eval() before a sweep")
    run = _Running(handle, side, activations, runs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attend.switched(handle))
        for i, record in enumerate(run.layers):
            _watch(stack, handle, i, record, run)
        output = handle.model(**{**inputs, "use_cache": False})
    last = len(run.layers) - 1
    run.check(last)
    run.settle(last, run.layers[last].resid_post)
    for i, calls in enumerate(run.calls):
        _once(i, calls)
    if run.host is not None:
        run.host.done()
    logits = output.logits if hasattr(output, "logits") else output[0]
    return Trace(run.layers, int(run.layers[0].resid_pre.shape[0]), side, run.host), logits[0]


class _Running:
    """A run that is going on: each layer is checked, and put where it is kept, when the next one begins."""

    def __init__(self, handle: Handle, side: str, activations: Where, runs: int) -> None:
        self.handle, self.side, self.activations, self.runs = handle, side, activations, runs
        self.layers = [LayerTrace() for _ in handle.layers]
        self.calls = [0] * len(self.layers)
        self.host: Host | None = None
        self._masks: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._device: torch.device | None = None

    def entered(self, i: int) -> None:
        """Layer ``i`` has its input."""
        record = self.layers[i]
        self._device = self._device or record.resid_pre.device
        if record.resid_pre.device != self._device:
            raise NotImplementedError(
                f"layer {i} is on {record.resid_pre.device}, the first one on {self._device}; a sweep "
                "needs all layers on one device"
            )
        if not i:
            return
        before = self.layers[i - 1]
        self.check(i - 1)
        if not torch.equal(record.resid_pre, before.resid_post):
            if not self.handle.family.between_layers:
                raise NotImplementedError(
                    f"the text decoder changes the residual stream between layers {i - 1} and {i}, and family "
                    f"{self.handle.family.name} does not say how"
                )
            before.added = record.resid_pre - before.resid_post
        plain, before.resid_post = before.resid_post, record.resid_pre
        self.settle(i - 1, plain)

    def check(self, i: int) -> None:
        """Refuse what layer ``i`` did, or gave, if a sweep cannot go on from it."""
        _once(i, self.calls[i])
        _check(i, self.layers[i], self.side)

    def settle(self, i: int, left: Tensor) -> None:
        """Layer ``i`` is complete; ``left`` is what left it before anything was added."""
        record = self.layers[i]
        record.additive = _additive(record, left)
        # Layers mostly have one mask between them.
        key = id(record.mask)
        if key not in self._masks:
            self._masks[key] = (record.mask, _additive_mask(record))
        record.mask = self._masks[key][1]
        fields = {name: x for name in NAMES if (x := getattr(record, name)) is not None}
        if i == 0 and on_host(self.activations, fields, len(self.layers), self.runs):
            self.host = Host(record.resid_pre.device)
        if self.host is not None:
            self.host.put(i, fields)
            self.layers[i] = HostLayer(record, self.host, i)


def _watch(stack: contextlib.ExitStack, handle: Handle, i: int, record: LayerTrace, run: _Running) -> None:
    def take(call: attend.Call) -> Tensor:
        run.calls[i] += 1
        record.q, record.k, record.v, record.mask = call.query, call.key, call.value, call.mask
        record.scaling, record.softcap = call.scaling, call.softcap
        mask = visible(call.mask, call.query) if call.mask is None else call.mask
        z = attend.heads(call.query, call.key, call.value, mask, call.scaling, call.softcap).transpose(1, 2)
        record.z = z[0]
        return z.contiguous()

    stack.enter_context(attend.taking(handle.attentions[i], take))
    layer = handle.layers[i]
    names = list(inspect.signature(layer.forward).parameters)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        record.resid_pre = given.pop(names[0])[0]
        for name, value in given.items():
            parts = value if isinstance(value, tuple | list) else (value,)
            tensors = any(isinstance(p, Tensor) for p in parts)
            if tensors and name not in BY_COLUMN and name not in DROPPED:
                raise NotImplementedError(f"layer {i} takes {name}, which a sweep does not know how to cut to columns")
        record.kwargs = {k: None if k in DROPPED else v for k, v in given.items()}
        run.entered(i)

    def keep(module: nn.Module, name: str, extra: str | None = None) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            setattr(record, name, first(output)[0])
            if extra is not None:
                setattr(record, extra, len(output) - 1 if isinstance(output, tuple) else -1)

        stack.callback(module.register_forward_hook(hook).remove)

    stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
    _watch_norm(stack, handle, i, record)
    keep(layer, "resid_post")
    keep(handle.attentions[i], "attention", "attention_extra")
    keep(handle.mlps[i], "mlp", "mlp_extra")
    keep(handle.output_projections[i], "projected")
    for site in ("attn_out", "mlp_out"):
        keep(handle.sites[site][i], site)
    if handle.geometry.neurons:

        def neurons(_: nn.Module, args: Any) -> None:
            record.neurons = args[0][0]

        stack.callback(handle.down_projections[i].register_forward_pre_hook(neurons).remove)


def _watch_norm(stack: contextlib.ExitStack, handle: Handle, i: int, record: LayerTrace) -> None:
    """Find the module whose output goes to attention and nowhere else that matters."""
    given: dict[str, Any] = {}

    def hidden(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            given[name] = kwargs.get("hidden_states", args[0] if args else None)

        return hook

    def child(module: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            given.setdefault("norms", []).append((module, output))

        return hook

    def decide(*_: Any) -> None:
        norms = [m for m, out in given.get("norms", []) if out is given["attention"] and out is not given["mlp"]]
        record.before_attention = norms[0] if norms else None
        given.clear()

    attention, mlp = handle.attentions[i], handle.mlps[i]
    for name, module in (("attention", attention), ("mlp", mlp)):
        stack.callback(module.register_forward_pre_hook(hidden(name), with_kwargs=True).remove)
    for module in handle.layers[i].children():
        if module is not attention and module is not mlp:
            stack.callback(module.register_forward_hook(child(module)).remove)
    stack.callback(handle.layers[i].register_forward_hook(decide).remove)


def visible(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask of the whole prompt ``[1, 1 or H, T, T]``: transformers leaves a plain causal one out."""
    if mask is not None:
        return mask
    total = like.shape[-2]
    return torch.ones(total, total, dtype=torch.bool, device=like.device).tril()[None, None]


def _once(i: int, calls: int) -> None:
    if calls != 1:
        raise NotImplementedError(f"layer {i} called transformers' attention interface {calls} times, expected once")


def _check(i: int, record: LayerTrace, side: str) -> None:
    total = record.resid_pre.shape[0]
    if record.k.shape[2] != total:
        raise NotImplementedError(f"layer {i} attends to {record.k.shape[2]} keys in a prompt of {total} columns")
    if record.mask is not None and record.mask.shape[-2:] != (total, total):
        raise NotImplementedError(f"layer {i} has a mask of {list(record.mask.shape)} for {total} columns")
    for name in ("resid_pre", "q", "k", "v", "z", "attention", "mlp", "resid_post"):
        if not bool(torch.isfinite(getattr(record, name)).all()):
            raise ValueError(
                f"{name} of layer {i} in the {side} run has NaN or infinite values; nothing can be measured"
            )
    if record.projected is None or not torch.equal(record.projected, record.attention):
        raise NotImplementedError(f"attention of layer {i} does something after its output projection")
    record.projected = None


def _additive_mask(record: LayerTrace) -> Tensor:
    """The mask as what is added to logits, so that attention need not turn it into that in every call."""
    seen = visible(record.mask, record.q)
    if seen.dtype == torch.bool:
        return torch.zeros_like(seen, dtype=record.q.dtype).masked_fill(~seen, float("-inf"))
    return seen


def _additive(record: LayerTrace, left: Tensor) -> bool:
    """See :attr:`LayerTrace.additive`."""
    total = record.resid_pre + record.attn_out + record.mlp_out
    eps = 16 * torch.finfo(total.dtype).eps * float(left.abs().max())
    return torch.allclose(total, left, rtol=0, atol=eps)
