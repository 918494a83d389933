"""Where the activations of a traced run are kept, and how much memory a batch takes.

A run stays on the device when it fits there beside the batches. If not, each layer goes to host memory (pinned for a
GPU) as soon as it has run, and what is read of a layer comes back when it is read: keys and values of the layer that a
batch goes through, the patched activation of the layer that it enters, and nothing else.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from emocircuits.sweep.packed import available

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

Where = Literal["auto", "device", "host"]
WHERE = ("auto", "device", "host")
SHARE = 0.5
"""Of the free memory of a GPU, what activations may take, and of the rest what a batch may take."""
NAMES = ("resid_pre", "resid_post", "attention", "attn_out", "mlp", "mlp_out", "q", "k", "v", "z", "neurons")
"""Fields of a layer's trace that are moved; masks and arguments are small, shared between layers, and stay."""


class Host:
    """Activations of one run in host memory.

    At most two layers are on the device at once: the one that was read last, and on a GPU the one above it, of which
    is copied ahead, while the device computes, what was read of this layer and of the one below.

    Args:
        device: where they are read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[int, str], Tensor] = {}
        self._here: dict[tuple[int, str], tuple[Tensor, Any]] = {}
        self._at, self._read, self._below = -1, set[str](), set[str]()
        self._last: tuple[Tensor, Tensor] | None = None
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """In host memory."""
        return sum({x.data_ptr(): x.nbytes for x in self._kept.values()}.values())

    @property
    def resident(self) -> tuple[tuple[int, str], ...]:
        """Layers and fields that are on the device."""
        return tuple(sorted(self._here))

    def put(self, layer: int, fields: Mapping[str, Tensor]) -> None:
        """Take the activations of a layer; layers come in ascending order. Tensors that are one are kept once."""
        # What leaves a layer is what enters the next one.
        moved = {} if self._last is None else {_same(self._last[0]): self._last[1]}
        for name, x in fields.items():
            if _same(x) not in moved:
                moved[_same(x)] = self._take(x)
            self._kept[layer, name] = moved[_same(x)]
        post = fields.get("resid_post")
        self._last = None if post is None else (post, moved[_same(post)])

    def done(self) -> None:
        """All layers have come."""
        self._last = None

    def _take(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu", pin_memory=self.device.type == "cuda").copy_(x)

    def get(self, layer: int, name: str) -> Tensor | None:
        """An activation on the device; None for a field that the run does not have."""
        if (layer, name) not in self._kept:
            return None
        if layer != self._at:
            self._below = self._read if layer == self._at + 1 else set()
            self._at, self._read = layer, set()
        self._read.add(name)
        for key in [key for key in self._here if key[0] not in (layer, layer + 1)]:
            del self._here[key]
        if (layer, name) not in self._here:
            self._here[layer, name] = self._bring(layer, name, ahead=False)
        found, ready = self._here[layer, name]
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            found.record_stream(stream)
            self._here[layer, name] = (found, None)
        above = (layer + 1, name)
        if self._side is not None and name in self._below and above in self._kept and above not in self._here:
            self._here[above] = self._bring(*above, ahead=True)
        return found

    def _bring(self, layer: int, name: str, ahead: bool) -> tuple[Tensor, Any]:
        kept = self._kept[layer, name]
        if not ahead:
            return kept.to(self.device, non_blocking=True, copy=True), None
        with torch.cuda.stream(self._side):
            found = kept.to(self.device, non_blocking=True, copy=True)
            return found, self._side.record_event()


def _same(x: Tensor) -> tuple[Any, ...]:
    """Of tensors that are alive, what only views of the same numbers have in common."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def on_host(where: Where, fields: Mapping[str, Tensor], layers: int, runs: int = 1) -> bool:
    """Whether a run goes to host memory.

    Args:
        where: "device", "host", or "auto": to the host when `layers` like this one, of `runs` runs, would take more
            than :data:`SHARE` of the memory that is free on the GPU. On a CPU there is no other place.
        fields: activations of the first layer.
        layers: of the model.
        runs: how many runs of that size have to fit.
    """
    device = next(iter(fields.values())).device
    if where != "auto" or device.type != "cuda":
        return where == "host"
    return layers * runs * held(fields) > SHARE * free(device)


def held(fields: Mapping[str, Tensor]) -> int:
    """Bytes that tensors keep alive: of a view all that it is a view of, what is shared once."""
    storages = [x.untyped_storage() for x in fields.values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def free(device: torch.device) -> int:
    """Bytes of memory that can be had on a device, the allocator's own reserve included."""
    if device.type != "cuda":
        return available()
    left, _ = torch.cuda.mem_get_info(device)
    return int(left) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dc.dataclass(frozen=True)
class Demand:
    """Bytes that a batch takes at its worst moment, beside weights and traces.

    Attributes:
        token: of each packed token. Either in the MLP (three times its width: gate, up and what leaves the activation),
            or in attention (queries, keys and values before and after rotary embedding, head outputs, and one copy),
            and the residual stream and its norms.
        variant: of each variant of the largest group: groups attend one after the other, each to keys and values of the
            whole prompt, which are put together for each variant.
        score: of each packed token of that group: attention logits, where they are capped and so not fused.
        read: of each variant, while the metric is read.
    """

    token: int
    variant: int
    score: int
    read: int

    @classmethod
    def of(cls, sweep: Sweep) -> Demand:
        """Of a sweep's model, prompts and metric."""
        read, g = sweep.readout.base, sweep.handle.geometry
        item, work = read.element_size(), 4
        heads, shared = g.heads + 2 * g.kv_heads, 2 * g.kv_heads
        if read.is_cuda and g.kv_heads != g.heads:
            shared += 2 * g.heads
        mlp = g.neurons or 8 * g.d_model
        capped = any(r.softcap is not None for r in sweep.base.layers)
        return cls(
            token=item * (8 * g.d_model + max(3 * mlp, 4 * heads * g.head_dim)),
            variant=item * sweep.columns * shared * g.head_dim,
            score=3 * work * g.heads * sweep.columns if capped else 0,
            read=read[0].numel() * (2 * item + 3 * work),
        )

    def bytes(self, tokens: int, variants: int, group: tuple[int, int]) -> int:
        """Of a batch of so many tokens and variants, with so many tokens and variants in its largest group."""
        inside = tokens * self.token + group[0] * self.score + group[1] * self.variant
        return max(inside, variants * self.read)


def too_large(sweep: Sweep, variant: Any) -> str:
    """What to say when memory does not hold a single patch."""
    device = sweep.readout.base.device
    ways = ["shorter prompts"]
    if device.type == "cuda":
        ways.append("a model in half precision")
        if sweep.activations != "host":
            ways.append("activations='host'")
    if sweep.metric.rows is None and sweep.metric.depth is None:
        ways.append("a metric that reads few logits (logit_diff, log_prob)")
    return (
        f"{device} has no memory for one patch of layer {variant.layer} in a prompt of {sweep.columns} columns "
        f"({free(device) / 2**30:.2g} GiB can be had); give it {', or '.join(ways)}"
    )
