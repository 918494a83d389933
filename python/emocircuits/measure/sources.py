"""Where in a model each quantity is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.edits import ATTENTION, NEURONS
from emocircuits.families import Handle
from emocircuits.measure.rows import NAMES as ROW_NAMES
from emocircuits.sites import Place, Reader, Tapped
from emocircuits.undo import Changes

View = Callable[[Tensor], Tensor]
SEEN = frozenset({"q", "k", "v", "mass", *ROW_NAMES})
"""What is read from attention calls."""


class Sources:
    """Sends what a model computes to ``save(name, layer, tensor, view)``, where ``view(tensor)`` is ``[B, N, ...]``.

    Args:
        handle: the model.
        wanted: layers by quantity.
        save: takes one tensor; ``view`` may be differentiated through.
        attend: takes an attention call and those quantities that are computed from it.

    Raises:
        NotImplementedError: the model has no such thing, or it cannot be read there.
    """

    def __init__(
        self,
        handle: Handle,
        wanted: dict[str, tuple[int, ...]],
        save: Callable[[str, int | None, Tensor, View], None],
        attend: Callable[[Tapped, Sequence[str]], None],
    ) -> None:
        self.handle, self.save, self.attend = handle, save, attend
        self.readers: dict[Place, list[Reader]] = {}
        self.hooks: list[Callable[[Changes], None]] = []
        self._entering: dict[int, Tensor] = {}
        for name, layers in wanted.items():
            if name in SEEN:
                continue
            for layer in layers:
                self._of_layer(name, layer)
        for layer in range(handle.geometry.layers):
            names = [name for name in wanted if name in SEEN and layer in wanted[name]]
            if names:
                self._read(layer, ATTENTION, functools.partial(self._attention, names))
        for name in wanted.keys() & {"embed", "final_scale", "final_normalized"}:
            self._of_model(name)

    def installed(self, changes: Changes) -> dict[Place, Reader]:
        """Put the hooks in until ``changes`` are undone; the readers are for ``Patched.reading``."""
        for hook in self.hooks:
            hook(changes)
        return {place: functools.partial(_all, readers) for place, readers in self.readers.items()}

    def _read(self, layer: int, kind: str, reader: Reader) -> None:
        self.readers.setdefault((layer, kind), []).append(reader)

    def _before(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        take = _outside(take)
        self.hooks.append(lambda c: c.hook(module.register_forward_pre_hook, lambda m, args: take(args[0])))

    def _after(self, module: nn.Module, take: Callable[[Tensor], None]) -> None:
        take = _outside(take)
        self.hooks.append(lambda c: c.hook(module.register_forward_hook, lambda m, args, out: take(out)))

    # -- of a layer ----------------------------------------------------------------------------------------------
    def _of_layer(self, name: str, layer: int) -> None:
        handle, geometry = self.handle, self.handle.geometry
        if name in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
            self._read(layer, name, lambda x: self.save(name, layer, x, _whole))
        elif name == "resid_mid":
            self._middle(layer)
        elif name == "neurons":
            handle.down_projections  # refused for mixtures of experts  # noqa: B018
            self._read(layer, NEURONS, lambda x: self.save(name, layer, x, _whole))
        elif name == "z":
            self._before(handle.output_projections[layer], lambda x: self.save(name, layer, x, _heads(geometry.heads)))
        elif name in ("gate", "up"):
            self._factor(name, layer)
        else:
            self._projection(name, layer)

    def _middle(self, layer: int) -> None:
        if getattr(self.handle.text_config, "use_parallel_residual", False):
            raise NotImplementedError(
                "resid_mid: attention and MLP of this model's layers read the same residual stream; "
                "capture resid_pre, attn_out and mlp_out"
            )

        def enter(hidden: Tensor) -> None:
            self._entering[layer] = hidden

        def leave(out: Tensor) -> None:
            hidden = self._entering.pop(layer)
            self.save("resid_mid", layer, out, lambda x: hidden + x)

        self._read(layer, "resid_pre", enter)
        self._read(layer, "attn_out", leave)

    def _factor(self, name: str, layer: int) -> None:
        handle = self.handle
        handle.down_projections  # refused for mixtures of experts  # noqa: B018
        parts, both = handle.parts(name), handle.parts("gate_up")
        if parts is not None:
            self._after(parts[layer], lambda x: self.save(name, layer, x, _whole))
        elif both is not None:
            half = 0 if name == "gate" else 1
            self._after(both[layer], lambda x: self.save(name, layer, x, lambda y: y.chunk(2, -1)[half]))
        elif name == "up":
            raise NotImplementedError(f"up: the MLPs of {type(handle.model).__name__} have no gate; capture neurons")
        else:
            self._before(_activation(handle.mlps[layer]), lambda x: self.save(name, layer, x, _whole))

    def _projection(self, name: str, layer: int) -> None:
        handle, geometry = self.handle, self.handle.geometry
        heads = geometry.heads if name == "q_proj" else geometry.kv_heads
        parts = handle.parts("query" if name == "q_proj" else "key")
        if parts is not None:
            self._after(parts[layer], lambda x: self.save(name, layer, x, _heads(heads)))
            return
        joint = handle.parts("qkv")
        if joint is None:
            raise NotImplementedError(
                f"{name}: the query and key projections of {type(handle.model).__name__} are not known; "
                f"capture {name[0]}, as attention sees it"
            )
        at, dim = ("q_proj", "k_proj").index(name), geometry.head_dim
        sizes = [geometry.heads * dim, geometry.kv_heads * dim, geometry.kv_heads * dim]

        def view(x: Tensor) -> Tensor:
            if handle.family.qkv_by_head:
                return x.unflatten(-1, (geometry.heads, 3, dim))[..., at, :]
            return x.split(sizes, -1)[at].unflatten(-1, (heads, dim))

        self._after(joint[layer], lambda x: self.save(name, layer, x, view))

    # -- attention -----------------------------------------------------------------------------------------------
    def _attention(self, names: Sequence[str], call: Tapped) -> None:
        for name in ("q", "k", "v"):
            if name in names:
                self._seen(name, call, name)
        rest = [name for name in names if name not in ("q", "k", "v")]
        if rest:
            self.attend(call, rest)

    def _seen(self, name: str, call: Tapped, which: str) -> None:
        if which == "q":
            self.save(name, call.layer, call.q, lambda q: q.transpose(1, 2))
            return
        rows = call.q.shape[2]
        first = call.first - call.dropped
        tensor = call.k if which == "k" else call.v
        self.save(name, call.layer, tensor, lambda x: x[:, :, first : first + rows].transpose(1, 2))

    # -- of the model --------------------------------------------------------------------------------------------
    def _of_model(self, name: str) -> None:
        handle: Any = self.handle
        if name == "embed":
            self._after(handle.model.get_input_embeddings(), lambda x: self.save(name, None, x, _whole))
            return
        centred = _centres(handle.norm, handle.geometry.d_model)
        # torch's default, which norms without the attribute use.
        eps = float(getattr(handle.norm, "variance_epsilon", getattr(handle.norm, "eps", 1e-5)))

        def parts(x: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide - wide.mean(-1, keepdim=True) if centred else wide
            scale = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
            return scale if name == "final_scale" else (wide / scale).to(x.dtype)

        self._before(handle.norm, lambda x: self.save(name, None, x, parts))


def _outside(take: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    return torch.compiler.disable(take, reason="capture() reads activations: call the model uncompiled")


def _all(readers: Sequence[Reader], value: Any) -> None:
    for reader in readers:
        reader(value)


def _whole(x: Tensor) -> Tensor:
    return x


def _heads(heads: int) -> View:
    return lambda x: x.unflatten(-1, (heads, -1))


def _activation(mlp: nn.Module) -> nn.Module:
    """The activation function of an MLP without a gate: its only part that has no weights."""
    found = [m for name, m in mlp.named_children() if "drop" not in name and not list(m.parameters())]
    if len(found) != 1:
        raise NotImplementedError(f"gate: no activation function was found in {type(mlp).__name__}; capture neurons")
    return found[0]


@torch.no_grad()
def _centres(norm: nn.Module, width: int) -> bool:
    """Whether a norm subtracts the mean: then a constant input is the same to it whatever its sign."""
    like = next(norm.parameters(), torch.empty(0))
    ones = torch.ones(1, 1, width, dtype=like.dtype, device=like.device)
    return bool(torch.equal(norm(ones), norm(-ones)))
