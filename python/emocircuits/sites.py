"""The places of a model where edits act during a forward pass: attention sites, wrapped forwards, hooks.

A place is a pair (layer, kind). `places` says which ones a plan needs, `install` puts them into a model. Another kind
of place is a name that `places` returns and a function in `_INSTALL`; it reads what it needs from the `State`.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from emocircuits import attention as hf_attention
from emocircuits.context import Context
from emocircuits.devices import device_of
from emocircuits.edits import ATTENTION, NEURONS, Site
from emocircuits.families import Handle
from emocircuits.gated import GatedMLP, is_gated
from emocircuits.plan import Plan
from emocircuits.tables import LayerTables
from emocircuits.tables.gates import Attention, RouteGate, gated
from emocircuits.tables.reroute import reroute
from emocircuits.tables.space import by_row
from emocircuits.undo import Changes
from emokernels import Routes
from emokernels.attention import prepare_step
from emokernels.attention import run as run_attention
from emokernels.heads import apply_head_edits

Place = tuple[int, str]
Tap = Callable[["Tapped"], None]
Reader = Callable[[Any], None]
"""Called with what a place holds once it is edited: a `Tapped` of an attention call, else the tensor."""


@dc.dataclass(frozen=True)
class Tapped:
    """What a tap sees of one attention call: its inputs, as in :func:`emokernels.attention`, and the routes.

    Key j is column ``dropped + j`` of the sequence: a sliding cache has lost the columns before.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    causal: bool
    routes: Routes | None
    roles: Tensor
    query_roles: Tensor
    softcap: float | None = None
    first: int = 0
    """Column of the first row."""
    dropped: int = 0
    gated: bool = False
    """The plan changes weights here that routes do not show."""


@dc.dataclass
class State:
    """What the places of one patched model share: roles and phase, tables by layer, the backend, who reads along."""

    context: Context
    backend: str
    tables: dict[int, LayerTables] = dc.field(default_factory=dict)
    open: bool = False
    stamp: str = ""
    readers: dict[Place, tuple[Reader, ...]] = dc.field(default_factory=dict)
    fuse_mlp: bool | None = None
    begins: tuple[Callable[[], None], ...] = ()
    """Called when a forward pass begins and its roles are known."""

    def show(self, place: Place, value: Any) -> None:
        """Give what ``place`` holds to those who read it."""
        for reader in self.readers.get(place, ()):
            reader(value)

    def with_readers(self, more: Mapping[Place, Reader]) -> dict[Place, tuple[Reader, ...]]:
        """The readers there are, and ``more``."""
        return {**self.readers, **{p: (*self.readers.get(p, ()), reader) for p, reader in more.items()}}


def places(plan: Plan) -> set[Place]:
    """(layer, what is edited there): ``ATTENTION``, ``NEURONS`` or a vector site."""
    return {(layer, edit.place()) for edit in plan for layer in edit.layers_used()}


def install(place: Place, handle: Handle, state: State, changes: Changes) -> None:
    """Make one place of a model follow ``state.tables`` until ``changes`` are undone."""
    layer, kind = place
    _INSTALL[kind](layer, kind, handle, state, changes)


# -- attention -------------------------------------------------------------------------------------------------------
class AttentionSite:
    """Attention of one layer of a patched model."""

    def __init__(self, state: State, layer: int) -> None:
        self.state, self.layer = state, layer
        self.prepared: tuple[LayerTables, Tensor, Callable[..., Tensor] | None] | None = None

    def tables(self) -> LayerTables | None:
        """The tables of this layer, if the plan changes it."""
        return self.state.tables.get(self.layer)

    def active(self) -> bool:
        """Whether the plan changes the rows of the forward pass in progress here."""
        tables = self.tables()
        return tables is not None and not self.state.context.phases.isdisjoint(tables.attention_phases)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None,
        causal: bool,
        softcap: float | None = None,
    ) -> Tensor:
        """Head outputs ``[B, N, H, D]`` from Hugging Face's ``[B, H, N, D]`` inputs."""
        context, tables = self.state.context.at(query.device), self.tables()
        routes = heads = None
        if tables is not None and self.active():
            routes = tables.routes
            heads = None if tables.heads is None else tables.heads.edits(context.kinds, context.prefill)
        roles = context.key_roles(key.shape[2])
        if tables is not None and tables.gates:
            call = Attention(query, key, value, mask, scaling, causal, softcap, roles)
            heads = gated(tables.gates, heads, call, context.kinds, context.phases)
        if (
            tables is not None
            and routes is not None
            and heads is None
            and softcap is None
            and self.may_step(query, key, value)
        ):
            # A prompt brings a new role buffer, a refill new tables: either makes what was prepared obsolete.
            step = prepare_step(
                query, key, value, roles=roles, query_roles=context.rows, routes=routes, backend=self.state.backend
            )
            self.prepared = (tables, context.prompt, step)
        selected = tables.selected if tables is not None and context.prefill else {}
        if routes is not None and tables is not None and tables.slots is not None and context.prefill:
            roles, routes = by_row(tables.slots, context.key_kinds(key.shape[2])), tables.keyed
        z = run_attention(
            query, key, value, backend=self.state.backend, mask=mask, roles=roles, query_roles=context.rows,
            routes=routes, heads=None if selected else heads, causal=causal, scale=scaling, softcap=softcap,
        )[0]  # fmt: skip
        if selected:
            z = reroute(
                z, query, key, value, mask, context.kinds, selected, causal=causal, backend=self.state.backend,
                roles=roles, scale=scaling, softcap=softcap,
            )  # fmt: skip
            z = z if heads is None else apply_head_edits(z, heads)
        return z.transpose(1, 2)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """Head outputs of a decode step as it was prepared at an earlier one; None when it was not."""
        if not self.may_step(query, key, value) or self.prepared is None:
            return None
        (tables, prompt, step), context = self.prepared, self.state.context
        if step is None or tables is not self.tables() or prompt is not context.prompt:
            return None
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return step(query, key, value, context.step_mask(mask, query.dtype), scale).transpose(1, 2)

    def may_step(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether this call is a decode step that can run as it was prepared at an earlier one of the same prompt."""
        context = self.state.context
        return (
            not torch.compiler.is_compiling()
            and query.shape[2] == 1
            and not context.prefill
            and context.seen <= key.shape[2]
            and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        )


def _install_attention(layer: int, kind: str, handle: Handle, state: State, changes: Changes) -> None:
    changes.set(handle.attentions[layer], hf_attention.SITE, AttentionSite(state, layer))


def install_tap(layer: int, handle: Handle, state: State, changes: Changes) -> None:
    """Show the attention calls of a layer to ``state.readers``, whatever computes them."""

    def tap(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None,
        causal: bool,
        softcap: float | None = None,
    ) -> None:
        context, tables = state.context.at(query.device), state.tables.get(layer)
        edited = tables is not None and not context.phases.isdisjoint(tables.attention_phases)
        if edited and context.prefill and tables is not None and (tables.selected or tables.slots is not None):
            raise NotImplementedError(
                f"attention of layer {layer} cannot be read: the plan boosts routes to single positions there; "
                "read it with a plan without them"
            )
        call = Tapped(
            layer, query, key, value, mask, scaling, causal, tables.routes if tables is not None and edited else None,
            context.key_roles(key.shape[2]), context.rows, softcap, context.first,
            max(0, context.seen - key.shape[2]),
            tables is not None and any(isinstance(gate, RouteGate) for gate in tables.gates.values()),
        )  # fmt: skip
        state.show((layer, ATTENTION), call)

    changes.set(handle.attentions[layer], hf_attention.TAP, tap)


# -- neurons ---------------------------------------------------------------------------------------------------------
def _edit_neurons(state: State, layer: int, forward: Callable[..., Tensor], activations: Tensor) -> Tensor:
    tables = state.tables.get(layer)
    if tables is not None and tables.neurons is not None and not state.context.phases.isdisjoint(tables.neuron_phases):
        activations = tables.neurons.apply(activations, state.context.at(activations.device))
    if state.readers:
        state.show((layer, NEURONS), activations)
    return forward(activations)


def _install_neurons(layer: int, kind: str, handle: Handle, state: State, changes: Changes) -> None:
    # Its own forward, wrapped: a hook would send every call of the module down torch's slow path.
    module = handle.down_projections[layer]
    down = module.forward
    changes.set(module, "forward", functools.partial(_edit_neurons, state, layer, down))
    fuse = state.fuse_mlp if state.fuse_mlp is not None else device_of(module).type == "cuda"
    if fuse and is_gated(handle):
        mlp = handle.mlps[layer]
        changes.set(mlp, "forward", GatedMLP(state, layer, handle, mlp.forward, down))


# -- vectors ---------------------------------------------------------------------------------------------------------
def _edit_vector(state: State, layer: int, site: Site, hidden: Tensor) -> Tensor:
    tables = state.tables.get(layer)
    if tables is not None and not state.context.phases.isdisjoint(tables.vector_phases.get(site, ())):
        hidden = tables.vectors[site].apply(hidden, state.context.at(hidden.device).kinds)
    if state.readers:
        state.show((layer, site), hidden)
    return hidden


def _install_vector(layer: int, kind: str, handle: Handle, state: State, changes: Changes) -> None:
    edit = functools.partial(_edit_vector, state, layer, cast(Site, kind))
    module, enters = handle.site(kind, layer)
    if enters:
        # What leaves a layer comes before what enters the next one, in whatever order they are installed.
        first = kind == "resid_post"
        hook = functools.partial(_on_input, edit)
        changes.hook(module.register_forward_pre_hook, hook, with_kwargs=True, prepend=first)
    else:
        changes.hook(module.register_forward_hook, functools.partial(_on_output, edit))


def _on_input(
    edit: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}


def _on_output(edit: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


def _install_cache(layer: int, kind: str, handle: Handle, state: State, changes: Changes) -> None:
    """Nothing: a cache is edited when the forward pass of a prompt has ended (:mod:`emocircuits.caches`)."""


_INSTALL: dict[str, Callable[[int, str, Handle, State, Changes], None]] = {
    ATTENTION: _install_attention,
    NEURONS: _install_neurons,
    "resid_pre": _install_vector,
    "resid_post": _install_vector,
    "attn_out": _install_vector,
    "mlp_out": _install_vector,
    "k": _install_cache,
    "v": _install_cache,
}
