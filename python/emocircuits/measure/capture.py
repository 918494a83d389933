"""``with capture(model, [...]) as seen:`` reads what the model computes in the block, as a plan in it leaves it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.measure.captured import Captured
from emocircuits.measure.names import QUANTITIES, wanted
from emocircuits.measure.rows import NAMES as ROW_NAMES
from emocircuits.measure.rows import R, read_rows, route_mass
from emocircuits.measure.sources import Sources
from emocircuits.measure.store import Reduce, Store
from emocircuits.measure.tokens import Choice, Chosen, Index, Steps, Where
from emocircuits.patching import MARK, Patched
from emocircuits.plan import Plan
from emocircuits.sites import Tapped
from emocircuits.undo import Changes

MAX_BYTES = 4 << 30


class _Recorder:
    """Follows the forward passes of a model and fills a store."""

    def __init__(
        self, patched: Patched, layers: dict[str, tuple[int, ...]], choice: Choice, reduce: Reduce, max_bytes: int,
        dtype: torch.dtype | None, device: torch.device | None, detach: bool,
    ) -> None:  # fmt: skip
        self.patched, self.layers, self.choice = patched, layers, choice
        self.max_bytes, self.dtype, self.device, self.detach = max_bytes, dtype, device, detach
        self.reduce = reduce
        self.store = Store(layers, choice, reduce)
        self.chosen: Chosen | None = None
        self.handle = patched.handle
        self._sequence: Any = None
        self._prompt: Any = None
        self._end = self._reach = self._step = 0
        self._read: tuple[int, tuple[dict[str, Tensor], Index | None, Tensor | None]] | None = None

    # -- a forward pass ------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """Choose the tokens of the pass that begins, and see that they fit."""
        context, store, steps = self.patched.context, self.store, self.choice.steps
        store.settle()
        self.chosen = None
        store.begin(None)
        prompt = "prefill" in context.phases and (context.first > 0 or context.prompt is not self._prompt)
        moved = context.columns is not self._sequence
        if prompt or moved:
            self._prompt, self._step = context.prompt, 0 if prompt else 1
            self._end = context.seen if prompt else context.first
        else:
            self._step += 1
        again = context.first == 0 and not prompt
        if steps == "prompt" and not prompt and not moved:
            return
        if (prompt and context.first == 0) or moved:
            self._reach = 0
        if context.first == 0 or moved or steps == "last":
            store.restart()
        elif context.first < self._reach:
            store.rewind(context.first)
        self._sequence = context.columns
        # Generation without a cache computes everything again at every step: a mean takes each token once.
        since = self._reach if again and self.reduce is not None else 0
        self._reach = context.seen
        chosen = self.choice.choose(context, self._end, since, self._step)
        if chosen is None:
            return
        self._fits(chosen)
        self.chosen = chosen
        store.begin(chosen)

    def complete(self, module: nn.Module, args: Any, output: Any) -> None:
        """The decoder has run."""
        self.store.complete()

    def save(self, name: str, layer: int | None, raw: Tensor, view: Callable[[Tensor], Tensor]) -> None:
        """Keep the chosen tokens of ``view(raw) [B, N, ...]``."""
        chosen, context = self.chosen, self.patched.context
        if chosen is None or tuple(view(raw).shape[:2]) != (context.batch, context.seen - context.first):
            return
        if self.detach:
            # In inference mode, too, what is kept is an ordinary tensor.
            with torch.inference_mode(False), torch.no_grad():
                self.store.put(name, layer, self._out(chosen.take(view(raw))))
        else:
            self.store.put(name, layer, self._out(chosen.take(view(raw))))
            self.store.raw[name, layer] = (raw, lambda g: chosen.take(view(g)))

    def attend(self, call: Tapped, names: Sequence[str]) -> None:
        """Keep what is computed from an attention call."""
        chosen = self.chosen
        if chosen is None:
            return
        if call.gated and not {"pattern", "span_mass", "mass"}.isdisjoint(names):
            raise NotImplementedError(
                f"weights of layer {call.layer} cannot be read: the plan gates routes there; "
                "leave the layer out (layers=), or read it with a plan without GateRoute"
            )
        rows, local = chosen.pairs(call.q.device)
        in_rows = ROW_NAMES & set(names)
        if in_rows:
            guard = contextlib.nullcontext() if not self.detach else torch.no_grad()
            with guard:
                found = read_rows(call, rows, local, in_rows, self.patched.context.seen)
            for name, value in found.items():
                with torch.inference_mode(False) if self.detach else contextlib.nullcontext():
                    self.store.put(name, call.layer, self._out(chosen.shaped(value)))
        if "mass" in names:
            flow, count = route_mass(call, rows, local)
            self.store.put_mass(call.layer, flow.to(self.device or flow.device), count)

    def logits(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep logits of the chosen tokens, from the output of the whole model."""
        chosen, context = self.chosen, self.patched.context
        if chosen is None:
            return
        value = output.logits if hasattr(output, "logits") else output[0]
        missing = context.seen - context.first - value.shape[1]
        if int(chosen.pairs()[1].min()) < missing:
            raise ValueError(
                f"logits: the model computed those of the last {value.shape[1]} columns only; capture "
                "roles=['last', 'generated'] or positions=[-1], or run the model with logits_to_keep=0"
            )
        self.save("logits", None, value, lambda x: torch.nn.functional.pad(x, (0, 0, missing, 0)))

    def _out(self, value: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype
        return value.clone().to(self.device or value.device, dtype) if self.detach else value.to(self.device, dtype)

    def _fits(self, chosen: Chosen) -> None:
        need = self.store.held + self._bytes(chosen.tokens)
        if need > self.max_bytes:
            raise ValueError(
                f"capturing {', '.join(self.layers)} of {chosen.tokens} tokens takes {need:,} bytes with what is held "
                f"already, more than max_bytes={self.max_bytes:,}; choose roles=, positions= or layers=, "
                "reduce='mean', a smaller dtype=, or a larger max_bytes="
            )

    def _bytes(self, tokens: int) -> int:
        """Bytes that a pass of this many chosen tokens adds."""
        model = next(self.handle.text.parameters()).dtype
        exact = torch.promote_types(model, torch.float32)
        total = 0
        for name, layers in self.layers.items():
            quantity, width = QUANTITIES[name], self._width(name)
            kept: float = tokens
            if quantity.per == "route":
                kept = 1 if self.reduce is not None else self.patched.context.batch
            elif self.reduce is not None:
                kept = R if self.reduce == "mean_by_role" else 1
            dtype = exact if quantity.exact or self.reduce is not None else model
            total += math.ceil(kept * width * max(1, len(layers)) * (self.dtype or dtype).itemsize)
        return total

    def _width(self, name: str) -> int:
        g = self.handle.geometry
        sizes = {
            "z": g.heads * g.head_dim, "q": g.heads * g.head_dim, "q_proj": g.heads * g.head_dim,
            "k": g.kv_heads * g.head_dim, "v": g.kv_heads * g.head_dim, "k_proj": g.kv_heads * g.head_dim,
            "neurons": g.neurons, "gate": g.neurons, "up": g.neurons,
            "scores": g.heads * self.patched.context.seen, "pattern": g.heads * self.patched.context.seen,
            "span_mass": g.heads * R, "span_logits": g.heads * R, "span_keys": R, "mass": g.heads * R * R,
            "final_scale": 1, "logits": getattr(self.handle.text_config, "vocab_size", 0),
        }  # fmt: skip
        return int(sizes.get(name, g.d_model))

    # -- reading -------------------------------------------------------------------------------------------------
    def now(self, release: bool = False) -> tuple[dict[str, Tensor], Index | None, Tensor | None]:
        """What has been captured so far."""
        store = self.store
        store.settle()
        if self._read is None or self._read[0] != store.version or release:
            with torch.inference_mode(False) if self.detach else contextlib.nullcontext():
                tensors, index = store.tensors(release)
            self._read = (store.version, (tensors, index, store.count if self.reduce is not None else None))
        return self._read[1]

    def gradients(self, loss: Tensor, wanted: Sequence[tuple[str, int | None]]) -> list[Tensor]:
        """Of a loss, with respect to captured tensors of the last pass, in one backward pass."""
        found = []
        for name, layer in wanted:
            if (name, layer) not in self.store.raw:
                raise ValueError(f"{name}: no gradient; it is computed beside the model, or the model has not run")
            if not self.store.raw[name, layer][0].requires_grad:
                raise ValueError(
                    f"{name}: nothing that needs a gradient led to it; run the model with gradients enabled"
                )
            found.append(self.store.raw[name, layer])
        grads = torch.autograd.grad(loss, [raw for raw, _ in found], retain_graph=True, allow_unused=True)
        return [take(torch.zeros_like(raw) if g is None else g) for (raw, take), g in zip(found, grads, strict=True)]


@contextlib.contextmanager
def capture(
    model: nn.Module,
    what: str | Sequence[str] = ("z",),
    columns: Where = None,
    *,
    roles: str | Sequence[str] | None = None,
    positions: Where = None,
    layers: Sequence[int] | int | None = None,
    steps: Steps = "all",
    reduce: Reduce = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    detach: bool = True,
    max_bytes: int = MAX_BYTES,
    token_roles: Tensor | None = None,
) -> Iterator[Captured]:
    """Record what the forward passes in the block compute.

    >>> with capture(model, ["z", "blocks.3.attn.hook_q", "mass"], positions=[0, -1]) as seen:
    ...     model(**inputs)
    >>> seen["z"].shape  # [layers, batch, 2, heads, head_dim]

    The passes of one generation are put together: the prompt, then token by token. A new prompt takes the place of the
    last one, unless ``reduce`` adds them up. The model computes what it would compute without the block, bit for bit;
    inside :func:`emocircuits.patch`, what it computes under the plan.

    Args:
        model: a supported model. To read a patched one, open ``capture`` inside ``patch``.
        what: names, ours (`emocircuits.measure.QUANTITIES`) or TransformerLens' (``blocks.3.attn.hook_z``).
        columns: tokens by column of the sequence, padding included; a number, several, or a slice.
        roles: tokens of these roles only.
        positions: tokens by position in their own row, padding left out. Of both, negative numbers count from the end
            of the prompt, and generated tokens go on counting: ``slice(-1, None)`` is the last prompt token and all
            that follow.
        layers: layers of names without a layer; None: all.
        steps: ``"all"`` passes of a sequence, the ``"last"`` one, or its ``"prompt"`` only.
        reduce: ``"mean"`` over the chosen tokens of all passes in the block, or ``"mean_by_role"``; only running sums
            are held, in at least float32.
        dtype: to keep values in; None: the model's, or float32 (float64) for what is computed from attention.
        device: to keep values on; None: where they are.
        detach: False keeps the graph, and allows ``seen.gradient(loss, name)``.
        max_bytes: refuse a pass after which more would be held.
        token_roles: ``[B, N]`` roles of the prompt, as in :func:`emocircuits.patch`, if the model is not patched.

    Yields:
        A :class:`Captured`, readable in the block after every pass, and after it.

    Raises:
        ValueError: an unknown name (with the nearest), layer, role or position; ``max_bytes`` would be exceeded, with
            the size needed; nothing was run.
        NotImplementedError: the model does not have it, or a combination is not possible (mass and spans of
            ``detach=False``, patterns of ``reduce``).
    """
    patched = model.__dict__.get(MARK) if isinstance(model, nn.Module) else None
    with contextlib.ExitStack() as stack:
        if patched is None:
            patched = stack.enter_context(Patched(model, Plan(), "auto", token_roles, None))
        elif token_roles is not None:
            raise ValueError("token_roles: the model is patched and has its roles; pass patch(..., roles=) instead")
        names = _wanted(what, layers, patched, reduce, detach)
        recorder = _Recorder(
            patched, names, Choice(roles, positions, columns, steps), reduce, max_bytes, dtype,
            None if device is None else torch.device(device), detach,
        )  # fmt: skip
        sources = Sources(patched.handle, names, recorder.save, recorder.attend)
        changes = Changes()
        stack.callback(changes.undo)
        readers = sources.installed(changes)
        changes.hook(patched.handle.backbone.register_forward_hook, recorder.complete)
        if "logits" in names:
            changes.hook(model.register_forward_hook, recorder.logits)
        stack.enter_context(patched.reading(readers, recorder.begin))
        seen = Captured(names, reduce, recorder.now)
        if not detach:
            seen._gradients = recorder.gradients
        yield seen
        recorder.store.settle()
        if not recorder.store.passes:
            raise ValueError("nothing was captured: run the model inside the block, on tokens that were chosen")
        recorder.now(release=True)


def _wanted(
    what: str | Sequence[str], layers: Sequence[int] | int | None, patched: Patched, reduce: Reduce, detach: bool
) -> dict[str, tuple[int, ...]]:
    try:
        names = wanted(what, layers, patched.handle.geometry.layers)
    except ValueError as error:
        raise ValueError(f"what={what if isinstance(what, str) else list(what)}: {error}") from None
    if reduce not in (None, "mean", "mean_by_role"):
        raise ValueError(f"reduce={reduce!r}: expected None, 'mean' or 'mean_by_role'")
    if reduce is not None and names.keys() & {"pattern", "scores"}:
        raise NotImplementedError(f"reduce={reduce!r}: patterns of different rows have different keys; use span_mass")
    if not detach and "mass" in names:
        raise NotImplementedError("mass has no gradient; capture span_mass, or use detach=True")
    return names
