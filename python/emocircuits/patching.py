"""``with patch(model, plan):`` puts a plan into a Hugging Face model, and takes it out again, bit for bit.

While a model is patched, three things differ from the model left alone, all undone on exit:

- if the plan edits attention, the decoder uses our attention function, which hands unedited layers to the stock one;
- modules that the plan edits carry a hook, a site or a wrapped forward; modules it does not edit carry nothing;
- the backbone's forward is wrapped, to find the roles of the tokens first (:mod:`emocircuits.context`), and
  ``generate`` marks its steps and refuses what a plan cannot follow (:mod:`emocircuits.generation`).

Where edits act during a forward pass is in :mod:`emocircuits.sites`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits import attention as hf_attention
from emocircuits.caches import edit_cache, edits_cache, require_cache
from emocircuits.context import Context
from emocircuits.devices import device_of, dtype_of, moved
from emocircuits.families import Handle, open_model
from emocircuits.folding import Folding
from emocircuits.generation import generate, refuse_attentions, refuse_paged, refused_methods
from emocircuits.plan import Plan
from emocircuits.positions import select
from emocircuits.sites import ATTENTION, NEURONS, Place, Reader, State, Tap, Tapped, install, install_tap, places
from emocircuits.tables import check, compile_plan
from emocircuits.training import keep_for_backward, refuse_dropout
from emocircuits.undo import Changes
from emokernels import Role
from emokernels.backends import resolve

__all__ = ["Patched", "Tapped", "patch"]

log = logging.getLogger(__name__)

MARK = "_emocircuits_patched"


class Patched:
    """A model with a plan in it; what ``with patch(...) as patched`` binds.

    Attributes:
        model: the model, edited while the context is open.
        plan: the plan in force.
        backend: the attention backend that edited layers run on.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        backend: str,
        roles: Tensor | None,
        tap: Tap | None,
        fold: bool = False,
        fuse_mlp: bool | None = None,
    ) -> None:
        self.handle: Handle = open_model(model)
        self.folding = Folding(self.handle) if fold else None
        # Adapters (PEFT) are wrapped around the model that is patched.
        self.model, self.plan, self.backend = self.handle.model, plan, backend
        self._check(plan)
        refuse_paged(self.handle.text_config._attn_implementation)
        self._devices: set[torch.device] = set()
        self._device, self._dtype = device_of(self.handle.text), dtype_of(self.handle.text)
        resolved = resolve(backend, torch.empty(0, device=self._device, dtype=self._dtype))
        self.context = Context(self.handle.placeholder_ids(), roles)
        self.state = State(self.context, resolved, fuse_mlp=fuse_mlp)
        self._tap = tap
        self._filled: tuple[Any, ...] | None = None
        self._changes, self._at_places = Changes(), Changes()
        self._installed: set[Place] = set()

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
                "the model is already patched; leave the outer patch() first, or patch once with plan_a + plan_b "
                "(capture() patches a model with an empty plan: open it inside patch())"
            )
        if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
            raise ValueError(
                "the model was compiled before patch(); patch the plain model and call torch.compile inside"
            )
        try:
            self._changes.set(model, MARK, self)
            self._install()
            self.state.open = True
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
            self._changes.undo()
        finally:
            self.state.open = False
            self.state.tables, self.state.readers, self.state.begins = {}, {}, ()
            self._filled, self._installed = None, set()
            self.context.reset()

    def _install(self) -> None:
        model, changes = self.model, self._changes
        self._devices = {device_of(layer) for layer in self.handle.layers}
        backbone = self.handle.backbone
        # A hook would send every call down torch's slow path, and graphs compiled without it would not notice it.
        forward = functools.update_wrapper(functools.partial(self._forward, backbone.forward), backbone.forward)
        changes.set(backbone, "forward", forward)
        if hasattr(model, "generate"):
            original = getattr(model, "generate")  # noqa: B009
            changes.set(model, "generate", functools.partial(generate, model, self.context, self._fits, original))
        for name, refuse in refused_methods(model):
            changes.set(model, name, refuse)
        changes.callback(self._at_places.undo)
        if self.folding is not None:
            changes.callback(self.folding.undo)
        self._install_places(self._unfolded(self.plan))
        if self._tap is not None:
            self.state.readers = {(layer, ATTENTION): (self._tap,) for layer in range(self.handle.geometry.layers)}
            self._install_taps(self.state.readers, changes)
        if not self.plan.per_batch():
            self._fill(1)

    def _switch_attention(self) -> None:
        config = self.handle.text_config
        old = config._attn_implementation
        if old in (hf_attention.OVER_STOCK, hf_attention.OVER_EAGER):
            return
        saved = [(c, c.__dict__.get("_attn_implementation_internal")) for c in _configs(self.model)]
        capped = self.handle.softcap is not None  # SDPA has no cap of logits
        new = hf_attention.key_over("eager" if capped else old)
        name = next(
            (n for n in getattr(self.model.config, "sub_configs", {}) if getattr(self.model.config, n, None) is config),
            None,
        )

        def undo() -> None:
            for c, value in saved:
                c._attn_implementation_internal = value

        self._changes.callback(undo)
        getattr(self.model, "set_attn_implementation")(new if name is None else {name: new})  # noqa: B009
        if config._attn_implementation != new:
            raise NotImplementedError(
                f"{type(self.model).__name__} keeps its attention ({config._attn_implementation}); it cannot be patched"
            )
        if old not in ("sdpa", "eager"):
            stock = "eager attention" if capped else "SDPA"
            log.info("unedited layers run on %s while the model is patched (it was loaded with %s)", stock, old)

    def _install_places(self, plan: Plan) -> None:
        """Sites and hooks on the modules that ``plan`` edits and on no other."""
        wanted = places(plan)
        if any(kind == ATTENTION for _, kind in wanted - self._installed):
            self._switch_attention()
        for place in sorted(wanted - self._installed):
            install(place, self.handle, self.state, self._at_places)
        self._installed |= wanted
        self._stamp()

    def _stamp(self) -> None:
        """Compiled graphs read this: one that was made with hooks elsewhere must not serve."""
        self.state.stamp = f"{id(self)} {sorted(self._installed)} {sorted(self.state.readers)}"

    def _follow_modules(self) -> None:
        """Move to modules that were put in place of patched ones: adapters that were added inside the block."""
        path = self.handle.family.down_projection
        edited = {layer for layer, kind in self._installed if kind == NEURONS}
        if self.folding is not None:
            edited |= self.folding.layers
        if all(self.handle.layers[i].get_submodule(path) is self.handle.down_projections[i] for i in edited):
            return
        if self.folding is not None:
            raise ValueError(
                "modules of the patched model were replaced while gains are folded into their weights; add adapters "
                "before patch(), or patch with fold=False"
            )
        installed, self._installed = self._installed, set()
        self._at_places.undo()
        self.handle = open_model(self.model)
        for place in sorted(installed):
            install(place, self.handle, self.state, self._at_places)
        self._installed = installed

    # -- reading along -------------------------------------------------------------------------------------------
    def _install_taps(self, read: Mapping[Place, Any], changes: Changes) -> None:
        layers = sorted(layer for layer, kind in read if kind == ATTENTION)
        if layers:
            self._switch_attention()
        for layer in layers:
            install_tap(layer, self.handle, self.state, changes)

    @contextlib.contextmanager
    def reading(self, readers: Mapping[Place, Reader], begin: Callable[[], None]) -> Iterator[None]:
        """Call ``readers`` with what their places hold as the plan leaves it, while the block lasts.

        A reader of neurons or of a vector site gets a tensor, one of attention a :class:`Tapped`. ``begin`` is called
        before all of them in every forward pass, when its roles are known. What the model computes does not change.
        """
        changes, before, handle = Changes(), (self.state.readers, self.state.begins), self.handle
        own = {place for place in readers if place[1] != ATTENTION} - self._installed
        try:
            for place in sorted(own):
                install(place, self.handle, self.state, changes)
            self._install_taps(readers, changes)
            self._installed |= own
            self.state.readers = self.state.with_readers(readers)
            self.state.begins = (*self.state.begins, begin)
            self._stamp()
            yield
        finally:
            self.state.readers, self.state.begins = before
            changes.undo()
            if handle is self.handle:  # else they were installed anew, to stay
                self._installed -= own
            # A plan that came in meanwhile may need places that were there to be read.
            self._install_places(self._unfolded(self.plan))

    # -- during a forward pass -----------------------------------------------------------------------------------
    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The backbone's forward."""
        given = {"input_ids": args[0], **kwargs} if args else kwargs
        if torch.compiler.is_compiling():
            if self.state.stamp and len(self.state.begins) == 0 and self.context.may_step_compiled(given):
                self.context.step_compiled()
                return forward(*args, **kwargs)
            prompt = self._begin_outside(given)
        else:
            prompt = self._begin(given)
        caching = prompt and edits_cache(self.state.tables)
        if caching:
            require_cache(given, self.handle.text_config, self.state.tables)
        output = forward(*args, **kwargs)
        if prompt and given.get("past_key_values") is None:
            self.context.met(getattr(output, "past_key_values", None))
        if caching:
            cache = given.get("past_key_values")
            cache = getattr(output, "past_key_values", None) if cache is None else cache
            edit_cache(cache, self.state.tables, self.context)
        return output

    @torch.compiler.disable(reason="prompts, and steps inside capture(), run uncompiled")
    def _begin_outside(self, kwargs: dict[str, Any]) -> bool:
        return self._begin(kwargs)

    def _begin(self, kwargs: dict[str, Any]) -> bool:
        """Roles of a prompt are found, and tables filled, outside of compiled graphs."""
        if kwargs.get("output_attentions"):
            refuse_attentions(self.handle.backbone, kwargs)
        prompt = self.context.begin(kwargs)
        if prompt:
            refuse_attentions(self.handle.backbone, kwargs)
            self._require_visual()
            self._ready()
            self._fill(self.context.batch, self.context.expand)
        for begin in self.state.begins:
            begin()
        return prompt

    def _ready(self) -> None:
        """What may have changed since the block was entered."""
        handle = self.handle
        self.context.look_from(self._devices)
        self._follow_modules()
        if handle.text.training:
            refuse_dropout(handle.text)
            keep_for_backward(handle, self.state, self._changes)
        ours = (hf_attention.OVER_STOCK, hf_attention.OVER_EAGER)
        implementation = handle.text_config._attn_implementation
        if any(kind == ATTENTION for _, kind in self._installed) and implementation not in ours:
            raise ValueError(
                f"the attention implementation was set to {implementation!r} inside patch(), which takes its edits "
                "away; set it before"
            )

    def _fits(self, batch: int) -> None:
        needed = self.plan.batch_rows()
        if needed is not None and needed > batch:
            raise ValueError(
                f"the plan names batch row {needed - 1}, but the batch has {batch} rows (0 to {batch - 1})"
            )

    def _require_visual(self) -> None:
        if Role.VISUAL not in self.plan.roles_used():
            return
        missing = self.context.without(Role.VISUAL)
        for i, edit in enumerate(self.plan):
            rows = [r for r in missing if edit.rows is None or r in edit.rows]
            if Role.VISUAL in edit.roles_used() and rows:
                raise ValueError(
                    f"edit {i} ({type(edit).__name__}) needs visual tokens, but the prompt of batch row "
                    f"{rows[0]} has none; "
                    "give an image with every prompt, or name the rows that have one (rows=[...])"
                )

    def _fill(self, batch: int, expand: int = 1) -> None:
        """Compile the plan for a batch of this size, ``expand`` rows for each of the plan's, unless that was done."""
        whole = self.plan.expanded(expand)
        selection = select(whole, self.context.columns.roles[:, : self.context.seen]) if self.context.columns else None
        extra: tuple[Any, ...] = ()
        if selection is not None:
            extra = (selection.extra, selection.key_extra)
        self.context.select(*((None, None) if selection is None else (selection.kinds, selection.keys)))
        key = (self.plan, batch, expand, extra) if self.plan.per_batch() else (self.plan, None, 1, ())
        if self._filled is not None and self._filled == key:
            return
        plan = self.plan if self.folding is None else self.folding.put(self.plan)
        layers = self.handle.layers
        # Tables outlive this call; made in inference mode they could not serve a gradient later.
        with torch.inference_mode(False):
            new = compile_plan(plan.expanded(expand), self.handle.geometry, batch, self._device, self._dtype, *extra)
            for layer, device in ((layer, device_of(layers[layer])) for layer in new):
                if device != self._device:
                    new[layer] = moved(new[layer], device)
        # Tables of the same form are refilled where they are: compiled graphs hold them.
        if not torch.is_grad_enabled():
            old = self.state.tables
            for layer in old.keys() & new.keys():
                if old[layer].refill(new[layer]):
                    new[layer] = old[layer]
        self.state.tables = new
        self._filled = key

    def _unfolded(self, plan: Plan) -> Plan:
        """What tables and hooks have to do of a plan: all of it, or what is not folded into the weights."""
        return plan if self.folding is None else self.folding.rest(plan)

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
    fuse_mlp: bool | None = None,
) -> Patched:
    """Put ``plan`` into ``model`` for the length of a ``with`` block.

    >>> with patch(model, plan) as patched:
    ...     model.generate(**inputs)

    Roles of the tokens are found from ``input_ids`` when a prompt comes in and stay frozen for its generation. Leaving
    the block, also by an exception, restores the model bit for bit.

    Args:
        model: a supported Hugging Face model (``emocircuits.families``), on any devices, in any float dtype, with or
            without adapters (a PeftModel) and quantised projections.
        plan: what to change. An empty plan changes nothing.
        backend: attention backend for edited layers: ``"auto"``, or a name from ``emokernels.backends()``, which then
            never falls back.
        roles: ``[B, N]`` uint8 of :class:`emokernels.Role`, instead of finding them (needed with ``inputs_embeds``).
        tap: called with a :class:`Tapped` at every attention call.
        fold: put the factors of ScaleNeurons edits into the weights of the down projections, instead of multiplying
            activations: no cost at run time, other rounding (:mod:`emocircuits.folding`).
        fuse_mlp: compute gated MLPs with neuron edits in one pass (:mod:`emocircuits.gated`); None: on a GPU.

    Raises:
        TypeError: ``model`` or ``plan`` is not one.
        ValueError: the plan names what the model does not have, or the model is already patched or compiled; with
            ``fold``, a ScaleNeurons edit that is not the same for all rows, roles and phases, or weights that cannot be
            scaled (quantised, shared).
        NotImplementedError: the model's family, or the backend, is not available.
        ValueError, NotImplementedError: inside the block, for what a patched model cannot do: ``output_attentions``,
            ways of generating that it cannot follow (:mod:`emocircuits.generation`), dropout, a batch whose rows do
            not fit the plan, a visual edit on a prompt without an image.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is {type(plan).__name__}: expected a Plan, such as Plan([BoostRoute(...)]) or Plan.load(path)"
        )
    return Patched(model, plan, backend, roles, tap, fold, fuse_mlp)


def _configs(model: nn.Module) -> list[Any]:
    """Every config object in the model, once."""
    found = (getattr(m, "config", None) for m in model.modules())
    return list({id(c): c for c in found if c is not None}.values())
