"""``with patch(model, plan):`` puts a plan into a Hugging Face model, and takes it out again, bit for bit.

While a model is patched, three things differ from the model left alone, all undone on exit:

- if the plan edits attention, the decoder uses our attention function, which hands unedited layers to the stock one;
- modules that the plan edits carry a hook, a site or a wrapped forward; modules it does not edit carry nothing;
- the backbone has a pre-hook that finds the roles of the tokens (:mod:`emocircuits.context`).
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from emocircuits import attention as hf_attention
from emocircuits.context import Context
from emocircuits.edits import AddVector, ReplaceVector, ScaleNeurons, Site
from emocircuits.families import Handle, open_model
from emocircuits.folding import Folding
from emocircuits.plan import Plan
from emocircuits.tables import LayerTables, check, compile_plan
from emokernels import Role, Routes
from emokernels.attention import prepare_step
from emokernels.attention import run as run_attention
from emokernels.backends import resolve

log = logging.getLogger(__name__)

MARK = "_emocircuits_patched"
ATTENTION, NEURONS = "attention", "neurons"
Tap = Callable[["Tapped"], None]


@dc.dataclass(frozen=True)
class Tapped:
    """What a tap sees of one attention call: its inputs, as in :func:`emokernels.attention`, and the routes."""

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


class _AttentionSite:
    """Attention of one layer of a patched model."""

    def __init__(self, patched: Patched, layer: int) -> None:
        self.patched, self.layer = patched, layer
        self.prepared: tuple[LayerTables, Tensor, Callable[..., Tensor] | None] | None = None

    def tables(self) -> LayerTables | None:
        return self.patched.tables.get(self.layer)

    def active(self) -> bool:
        return self.patched.tap is not None or self.edited()

    def edited(self) -> bool:
        tables = self.tables()
        return tables is not None and not self.patched.context.phases.isdisjoint(tables.attention_phases)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, causal: bool
    ) -> Tensor:
        context, tables = self.patched.context, self.tables()
        if self.may_step(query, key, value) and self.prepared is not None:
            prepared_tables, prompt, step = self.prepared
            if step is not None and prepared_tables is tables and prompt is context.prompt:
                scale = query.shape[3] ** -0.5 if scaling is None else scaling
                return step(query, key, value, context.step_mask(mask, query.dtype), scale).transpose(1, 2)
        routes = heads = None
        if tables is not None and self.edited():
            routes = tables.routes
            heads = None if tables.heads is None else tables.heads.edits(context.rows, context.prefill)
        roles = context.key_roles(key.shape[2])
        if tables is not None and routes is not None and heads is None and self.may_step(query, key, value):
            # A prompt brings a new role buffer, a refill new tables: either makes what was prepared obsolete.
            step = prepare_step(
                query, key, value, roles=roles, query_roles=context.rows, routes=routes, backend=self.patched.resolved
            )
            self.prepared = (tables, context.prompt, step)
        if self.patched.tap is not None:
            self.patched.tap(Tapped(self.layer, query, key, value, mask, scaling, causal, routes, roles, context.rows))
        return self.patched.attend(
            query, key, value, mask=mask, roles=roles, query_roles=context.rows, routes=routes, heads=heads,
            causal=causal, scale=scaling,
        )  # fmt: skip

    def may_step(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether this call is a decode step that can run as it was prepared at an earlier one of the same prompt."""
        context = self.patched.context
        return (
            not torch.compiler.is_compiling()
            and query.shape[2] == 1
            and not context.prefill
            and context.seen <= key.shape[2]
            and self.patched.tap is None
            and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        )


class Patched:
    """A model with a plan in it; what ``with patch(...) as patched`` binds.

    Attributes:
        model: the model, edited while the context is open.
        plan: the plan in force.
        backend: the attention backend that edited layers run on.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, backend: str, roles: Tensor | None, tap: Tap | None, fold: bool = False
    ) -> None:
        self.handle: Handle = open_model(model)
        self.folding = Folding(self.handle) if fold else None
        self.model, self.plan, self.backend, self.tap = model, plan, backend, tap
        self.resolved = resolve(backend, next(self.handle.text.parameters()))
        self._check(plan)
        self.context = Context(self.handle.placeholder_ids(), roles)
        self.tables: dict[int, LayerTables] = {}
        self._filled: tuple[Plan, int | None] | None = None
        self._undo = contextlib.ExitStack()
        self._installed: set[tuple[int, str]] = set()

    # -- checks --------------------------------------------------------------------------------------------------
    def _check(self, plan: Plan) -> None:
        check(plan, self.handle.geometry)
        self._unfolded(plan)
        if Role.VISUAL in plan.roles_used() and not self.handle.sees:
            raise ValueError(
                f"the plan edits visual tokens, but {type(self.model).__name__} is a text-only model; "
                "use a vision-language model, or a plan without the role 'visual'"
            )

    # -- entering and leaving ------------------------------------------------------------------------------------
    def __enter__(self) -> Patched:
        model = self.model
        if MARK in model.__dict__:
            raise ValueError(
                "the model is already patched; leave the outer patch() first, or patch once with plan_a + plan_b"
            )
        if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
            raise ValueError(
                "the model was compiled before patch(); patch the plain model and call torch.compile inside"
            )
        try:
            self._set(model, MARK, self)
            self._install()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        try:
            # Everything is undone, last first, even when undoing one thing fails.
            self._undo.close()
        finally:
            self.tables, self._filled, self._installed = {}, None, set()
            self.context.reset()

    def _hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        self._undo.callback(register(hook, **options).remove)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one module object, past ``nn.Module.__setattr__``, until the patch is left."""
        own = module.__dict__
        if name in own:
            self._undo.callback(own.__setitem__, name, own[name])
        else:
            self._undo.callback(own.pop, name, None)
        own[name] = value

    def _install(self) -> None:
        handle = self.handle
        self._hook(handle.backbone.register_forward_pre_hook, self._before_forward, with_kwargs=True)
        if hasattr(self.model, "generate"):
            self._set(self.model, "generate", functools.partial(_generate, self, getattr(self.model, "generate")))  # noqa: B009
        if self.folding is not None:
            self._undo.callback(self.folding.undo)
        self._install_places(self._unfolded(self.plan))
        if not self.plan.per_batch():
            self._fill(1)

    def _switch_attention(self) -> None:
        config = self.handle.text_config
        old = config._attn_implementation
        saved = [(c, c.__dict__.get("_attn_implementation_internal")) for c in _configs(self.model)]
        new = hf_attention.key_over(old)
        name = next(
            (n for n in getattr(self.model.config, "sub_configs", {}) if getattr(self.model.config, n, None) is config),
            None,
        )

        def undo() -> None:
            for c, value in saved:
                c._attn_implementation_internal = value

        self._undo.callback(undo)
        getattr(self.model, "set_attn_implementation")(new if name is None else {name: new})  # noqa: B009
        if config._attn_implementation != new:
            raise NotImplementedError(
                f"{type(self.model).__name__} keeps its attention ({config._attn_implementation}); it cannot be patched"
            )
        if old not in ("sdpa", "eager"):
            log.info("unedited layers run on SDPA while the model is patched (the model was loaded with %s)", old)

    def _install_places(self, plan: Plan) -> None:
        """Sites and hooks on the modules that ``plan`` edits and on no other."""
        handle = self.handle
        modules = {"resid_post": handle.layers, "attn_out": handle.attentions, "mlp_out": handle.mlps}
        places = _places(plan)
        if self.tap is not None:
            places |= {(layer, ATTENTION) for layer in range(handle.geometry.layers)}
        if any(kind == ATTENTION for _, kind in places) and not any(kind == ATTENTION for _, kind in self._installed):
            self._switch_attention()
        for layer, kind in sorted(places - self._installed):
            if kind == ATTENTION:
                self._set(handle.attentions[layer], hf_attention.SITE, _AttentionSite(self, layer))
            elif kind == NEURONS:
                # Its own forward, wrapped: a hook would send every call of the module down torch's slow path.
                module = handle.down_projections[layer]
                self._set(module, "forward", functools.partial(self._edit_neurons, layer, module.forward))
            else:
                edit = functools.partial(self._edit_vector, layer, cast(Site, kind))
                if kind == "resid_pre":
                    hook = functools.partial(_on_input, edit)
                    self._hook(handle.layers[layer].register_forward_pre_hook, hook, with_kwargs=True)
                else:
                    self._hook(modules[kind][layer].register_forward_hook, functools.partial(_on_output, edit))
        self._installed |= places

    # -- during a forward pass -----------------------------------------------------------------------------------
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_attentions(module, kwargs)
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        if torch.compiler.is_compiling() and self.context.may_step_compiled(kwargs):
            self.context.step_compiled()
        else:
            self._begin(kwargs)

    @torch.compiler.disable
    def _begin(self, kwargs: dict[str, Any]) -> None:
        """Roles of a prompt are found, and tables filled, outside of compiled graphs."""
        if self.context.begin(kwargs):
            self._require_visual()
            self._fill(self.context.batch)

    def _require_visual(self) -> None:
        if Role.VISUAL not in self.plan.roles_used():
            return
        roles = self.context.rows
        missing = (~(roles == int(Role.VISUAL)).any(-1)).nonzero().flatten().tolist()
        for i, edit in enumerate(self.plan):
            rows = [r for r in missing if edit.rows is None or r in edit.rows]
            if Role.VISUAL in edit.roles_used() and rows:
                raise ValueError(
                    f"edit {i} ({type(edit).__name__}) needs visual tokens, but the prompt of batch row "
                    f"{rows[0]} has none; "
                    "give an image with every prompt, or name the rows that have one (rows=[...])"
                )

    def _fill(self, batch: int) -> None:
        """Compile the plan for a batch of this size, unless that was just done."""
        key = (self.plan, batch if self.plan.per_batch() else None)
        if self._filled is None or self._filled != key:
            plan = self.plan if self.folding is None else self.folding.put(self.plan)
            parameter = next(self.handle.text.parameters())
            # Tables outlive this call; made in inference mode they could not serve a gradient later.
            with torch.inference_mode(False):
                new = compile_plan(plan, self.handle.geometry, batch, parameter.device, parameter.dtype)
            # Tables of the same form are refilled where they are: compiled graphs hold them.
            if not torch.is_grad_enabled():
                for layer in self.tables.keys() & new.keys():
                    if self.tables[layer].refill(new[layer]):
                        new[layer] = self.tables[layer]
            self.tables = new
            self._filled = key

    def _unfolded(self, plan: Plan) -> Plan:
        """What tables and hooks have to do of a plan: all of it, or what is not folded into the weights."""
        return plan if self.folding is None else self.folding.rest(plan)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Edited attention: ``[B, N, H, D]`` from Hugging Face's ``[B, H, N, D]`` inputs."""
        return run_attention(query, key, value, backend=self.resolved, **options)[0].transpose(1, 2)

    def _edit_neurons(self, layer: int, forward: Callable[..., Tensor], activations: Tensor) -> Tensor:
        tables = self.tables.get(layer)
        if tables is None or tables.neurons is None or self.context.phases.isdisjoint(tables.neuron_phases):
            return forward(activations)
        return forward(tables.neurons.apply(activations, self.context))

    def _edit_vector(self, layer: int, site: Site, hidden: Tensor) -> Tensor:
        tables = self.tables.get(layer)
        if tables is None or self.context.phases.isdisjoint(tables.vector_phases.get(site, ())):
            return hidden
        return tables.vectors[site].apply(hidden, self.context.rows)

    # -- changing the plan in place ------------------------------------------------------------------------------
    def replace(self, plan: Plan) -> None:
        """Put another plan in place of the current one; it takes effect with the next prompt.

        Raises:
            ValueError, NotImplementedError: as :func:`patch`; the old plan then stays in force.
        """
        self._check(plan)
        self._install_places(self._unfolded(plan))
        self.plan = plan


def patch(
    model: nn.Module,
    plan: Plan,
    *,
    backend: str = "auto",
    roles: Tensor | None = None,
    tap: Tap | None = None,
    fold: bool = False,
) -> Patched:
    """Put ``plan`` into ``model`` for the length of a ``with`` block.

    >>> with patch(model, plan) as patched:
    ...     model.generate(**inputs)

    Roles of the tokens are found from ``input_ids`` when a prompt comes in and stay frozen for its generation. Leaving
    the block, also by an exception, restores the model bit for bit.

    Args:
        model: a supported Hugging Face model (``emocircuits.families``), on any device, in any float dtype.
        plan: what to change. An empty plan changes nothing.
        backend: attention backend for edited layers: ``"auto"``, or a name from ``emokernels.backends()``, which then
            never falls back.
        roles: ``[B, N]`` uint8 of :class:`emokernels.Role`, instead of finding them (needed with ``inputs_embeds``).
        tap: called with a :class:`Tapped` at every attention call.
        fold: put the factors of ScaleNeurons edits into the weights of the down projections, instead of multiplying
            activations: no cost at run time, other rounding (:mod:`emocircuits.folding`).

    Raises:
        TypeError: ``model`` or ``plan`` is not one.
        ValueError: the plan names what the model does not have, or the model is already patched or compiled; with
            ``fold``, a ScaleNeurons edit that is not the same for all rows, roles and phases, or weights that cannot be
            scaled (quantised, shared).
        NotImplementedError: the model's family, or the backend, is not available.
        ValueError, NotImplementedError: inside the block, for what a patched model cannot do: ``output_attentions``,
            beam search, a batch whose rows do not fit the plan, a visual edit on a prompt without an image.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is {type(plan).__name__}: expected a Plan, such as Plan([BoostRoute(...)]) or Plan.load(path)"
        )
    return Patched(model, plan, backend, roles, tap, fold)


def _configs(model: nn.Module) -> list[Any]:
    """Every config object in the model, once."""
    found = (getattr(m, "config", None) for m in model.modules())
    return list({id(c): c for c in found if c is not None}.values())


def _places(plan: Plan) -> set[tuple[int, str]]:
    """(layer, what is edited there): ``ATTENTION``, ``NEURONS`` or a vector site."""
    places: set[tuple[int, str]] = set()
    for edit in plan:
        if isinstance(edit, AddVector | ReplaceVector):
            kind: str = edit.site
        else:
            kind = NEURONS if isinstance(edit, ScaleNeurons) else ATTENTION
        places |= {(layer, kind) for layer in edit.layers_used()}
    return places


def _on_input(
    edit: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}


def _on_output(edit: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


def _refuse_attentions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_attentions")
    if wanted or (wanted is None and getattr(module.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True is not possible on a patched model: its attention weights are never formed; "
            "use emocircuits.measure.attention_weights, or ask for them outside patch()"
        )


def _generate(patched: Patched, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``model.generate`` of a patched model: refuses what a plan cannot follow, and marks the steps as generation."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or patched.model.generation_config
    for name in ("num_beams", "num_beam_groups"):
        value = kwargs.get(name, getattr(config, name, 1)) or 1
        if value > 1:
            raise NotImplementedError(
                f"{name}={value} is not supported on a patched model yet; use {name}=1 (greedy or sampling)"
            )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if kwargs.get(name, getattr(config, name, None)) is not None:
            raise NotImplementedError(f"{name} is not supported on a patched model; leave it out")
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        _refuse_attentions(patched.model, {"output_attentions": True})
    if kwargs.get("past_key_values") is None:
        patched.context.reset()
    patched.context.generating = patched.context.expects_prompt = True
    try:
        return generate(*args, **kwargs)
    finally:
        patched.context.generating = False
