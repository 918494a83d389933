"""One pass over prompts under many plans, in which rows part only where their plans do.

Plans that do the same to the layers up to one give the same residual stream there. So every prompt enters the model
once, images included, and a layer takes as many rows of it as there are different plans so far: all that is below the
first edit is shared by all of them, and a pass in which nothing acts (edits of what is generated alone) by all of it.

The same holds of columns. Those before the text that follows an image see nothing of it, so plans that differ in the
attention of that text alone, such as strengths of VEE, share all columns of the image, in every layer: these run as
rows of their own, and the keys and values that they leave are then spread over the rows of the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from emocircuits.attention import OVER_STOCK
from emocircuits.sweep.rowplans import SHARED, RowPlans, picked
from emocircuits.sweep.trace import BY_COLUMN
from emocircuits.tables import LayerTables
from emokernels import Role, Routes

BY_ROW = {
    "attention_mask": 0, "position_embeddings": -3, "position_ids": -2, "text_position_ids": -2, "token_type_ids": 0,
}  # fmt: skip
"""Arguments of a decoder layer that have an entry for every row, and in which dimension."""
PROMPT = tuple(role for role in Role if role != Role.GENERATED)
FRONT = (Role.PAD, Role.SYSTEM, Role.VISUAL)
"""Roles of the columns before the text that follows an image."""
NO_ROWS = ("cache_position", "logits_to_keep", "past_key_values", "past_key_value", "layer_past")


@dc.dataclass(frozen=True)
class Branch:
    """The rows of one layer.

    Attributes:
        parents: of each row, the row of the layer before.
        prompts: of each row, its prompt.
        plans: of each row, a plan that does to this layer, and to those below, what all plans of the row do.
        rows: of every row at the end, its row here.
        grows: whether there are more rows than in the layer before.
    """

    parents: Tensor
    prompts: Tensor
    plans: Tensor
    rows: Tensor
    grows: bool


def branches(
    tables: dict[int, LayerTables], layers: int, rows: Sequence[tuple[int, int]], device: torch.device,
    kinds: Sequence[Role] = PROMPT,
) -> list[Branch]:  # fmt: skip
    """The rows of every layer.

    Args:
        tables: of all plans, by layer.
        layers: how many.
        rows: (prompt, plan) of every row at the end; every prompt from 0 on is there.
        device: of the model.
        kinds: of the columns that are run.
    """
    classes = [prompt for prompt, _ in rows]
    found = []
    for layer in range(layers):
        keys: list[Any] = list(classes)
        if layer in tables:
            own = in_prompt(tables[layer], kinds)
            keys = [(c, own[plan]) for c, (_, plan) in zip(classes, rows, strict=True)]
        first: dict[Any, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        number = {key: n for n, key in enumerate(first)}
        parents, index = [classes[i] for i in first.values()], [number[key] for key in keys]
        grows = parents != list(range(1 + max(classes)))
        made = (parents, [rows[i][0] for i in first.values()], [rows[i][1] for i in first.values()], index)
        of_parents, prompts, plans, at = (torch.tensor(x, device=device) for x in made)
        found.append(Branch(of_parents, prompts, plans, at, grows))
        classes = index
    return found


def in_prompt(tables: LayerTables, kinds: Sequence[Role] = PROMPT) -> list[bytes]:
    """What each plan does to columns of these kinds in one layer: equal bytes, equal edits."""
    parts = [part.flatten(1).contiguous().cpu() for part in _of_kinds(tables, kinds)]
    count = max((len(p) for p in parts), default=1)
    return [b"".join(p[min(i, len(p) - 1)].view(torch.uint8).numpy().tobytes() for p in parts) for i in range(count)]


def _of_kinds(table: Any, kinds: Sequence[Role]) -> Iterator[Tensor]:
    routes = isinstance(table, Routes)
    for field in dc.fields(table):
        value = getattr(table, field.name)
        if not field.init or field.name in SHARED or field.name == "step":
            continue
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, Tensor):
                dim = 2 if routes else 1
                yield part.index_select(dim, torch.tensor([int(k) for k in kinds], device=part.device))
            elif dc.is_dataclass(part):
                yield from _of_kinds(part, kinds)


class Branching(RowPlans):
    """``patch`` with many plans, and prompts whose rows part where the plans do."""

    whole: Tensor
    """Roles of the prompts' columns."""

    def __enter__(self) -> Branching:
        super().__enter__()
        return self

    def rows(self, chosen: Sequence[tuple[int, int]], kinds: Sequence[Role] = PROMPT) -> list[Branch]:
        """The rows of every layer; see :func:`branches`."""
        return branches(self.compiled(), len(self.handle.layers), chosen, self._device, kinds)

    @contextlib.contextmanager
    def parting(self, chosen: Sequence[tuple[int, int]], keep: int) -> Iterator[list[Branch]]:
        """A pass over prompts within gives as many rows as the last layer has, of the last columns.

        The cache then holds of every layer its own rows (:func:`gather`).

        Args:
            chosen: (prompt, plan) of every row at the end.
            keep: the first column whose output is wanted.
        """
        found, prompts = self.rows(chosen), 1 + max(p for p, _ in chosen)
        self.follow(found[0].plans.new_zeros(prompts))
        kinds = {type(layer) for layer in self.handle.layers}
        names = {kind: list(inspect.signature(kind.forward).parameters)[1:] for kind in kinds}
        front: list[Branch] = []
        state = _Front()

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int) -> Any:
            if state.inside:
                return None
            branch, given = found[layer], dict(zip(names[type(module)], args, strict=False)) | kwargs
            name = names[type(module)][0]
            hidden = given.pop(name)
            if layer == 0:
                assert self.context.columns is not None
                self.whole, state.columns = self.context.columns.roles, hidden.shape[1]
                front[:] = self.rows(chosen, FRONT)
                state.end = self._end(given, hidden.shape[1], keep, found, front)
                state.hidden, hidden = hidden[:, : state.end], hidden[:, state.end :]
            if state.end:
                first = front[layer]
                self._at(first, layer, 0, state.end)
                state.inside = True
                try:
                    of_front = _arguments(given, first, prompts, slice(0, state.end), slice(0, state.end))
                    output = module(state.hidden[first.parents], **of_front)
                finally:
                    state.inside = False
                state.hidden = output[0] if isinstance(output, tuple) else output
                (cache,) = (v for v in given.values() if isinstance(v, DynamicCache))
                rows = torch.empty_like(branch.plans)
                rows[branch.rows] = first.rows
                cache.layers[layer].batch_select_indices(rows)
            self._at(branch, layer, state.end, state.columns)
            rest = _arguments(given, branch, prompts, slice(state.end, None), slice(None)) if state.end else {
                k: _spread(k, v, branch, prompts) for k, v in given.items()
            }  # fmt: skip
            if state.end and rest.get("attention_mask") is None:
                rest["attention_mask"] = _causal(state.end, state.columns, hidden.device)
            return (hidden[branch.parents] if branch.grows else hidden,), rest

        hooks = []
        try:
            for number, layer in enumerate(self.handle.layers):
                hook = lambda m, a, k, n=number: enter(m, a, k, n)  # noqa: E731
                # Rows part before anything is edited: what leaves the layer below may be edited where this one begins.
                hooks.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            yield found
        finally:
            for handle in hooks:
                handle.remove()

    def _end(
        self, given: dict[str, Any], columns: int, keep: int, found: list[Branch], front: list[Branch]
    ) -> int:  # fmt: skip
        """How many columns run as rows of their own; 0 where that gains nothing or is not exact."""
        roles = self.whole[:, :columns]
        later = (roles == int(Role.QUERY)) | (roles == int(Role.LAST))
        end = int(later.int().argmax(1).min())
        fewer = any(len(a.prompts) < len(b.prompts) for a, b in zip(front, found, strict=True))
        if not fewer or end < 2 or columns - end < 2 or keep < end or any(w is not None for w in self.handle.windows):
            return 0
        caches = [v for v in given.values() if isinstance(v, DynamicCache)]
        if len(caches) != 1 or any(type(layer) is not DynamicLayer for layer in caches[0].layers):
            return 0
        mask = given.get("attention_mask")
        if mask is None:
            return end if self.handle.text_config._attn_implementation in ("sdpa", OVER_STOCK) else 0
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2:] != (columns, columns):
            return 0
        ahead = mask[:, :, :end, end:]
        sees = ahead if ahead.dtype == torch.bool else ahead > torch.finfo(ahead.dtype).min / 2
        return 0 if bool(sees.any()) else end

    def _at(self, branch: Branch, layer: int, first: int, seen: int) -> None:
        """Roles and tables are those of the rows of one layer, and of what leaves the one before."""
        context = self.context
        assert context.columns is not None
        context.columns.roles = self.whole[branch.prompts]
        context.query_roles = context._kinds = None
        context._keys = {}
        context.first, context.seen = first, seen
        compiled = self.compiled()
        self.state.tables = {k: picked(compiled[k], branch.plans) for k in (layer - 1, layer) if k in compiled}


class _Front:
    """The columns that run as rows of their own, during one pass."""

    hidden: Tensor
    end = columns = 0
    inside = False


def gather(cache: DynamicCache, found: Sequence[Branch]) -> None:
    """Give every layer of a cache the rows at the end."""
    for layer, branch in zip(cache.layers, found, strict=True):
        layer.batch_select_indices(branch.rows)


def _arguments(given: dict[str, Any], branch: Branch, prompts: int, own: slice, seen: slice) -> dict[str, Any]:
    """Arguments of a layer for its rows in the columns ``own``, which see those of ``seen``."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and name in BY_COLUMN:
            return tuple(cut(name, part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if name == "attention_mask":
            return value[:, :, own, seen]
        if name not in BY_COLUMN:
            return value
        start, stop, _ = own.indices(value.shape[BY_COLUMN[name]])
        return value.narrow(BY_COLUMN[name], start, stop - start)

    return {name: cut(name, _spread(name, value, branch, prompts)) for name, value in given.items()}


def _causal(start: int, columns: int, device: torch.device) -> Tensor:
    """The mask ``[1, 1, columns - start, columns]`` of the columns from ``start`` on, True where a key is seen."""
    at = torch.arange(columns, device=device)
    return (at[None, :] <= at[start:, None])[None, None]


def _spread(name: str, value: Any, branch: Branch, prompts: int) -> Any:
    """An argument of a layer for its rows.

    Raises:
        NotImplementedError: a tensor of which it is not known whether it has rows.
    """
    if isinstance(value, tuple) and name in BY_ROW:
        return tuple(_spread(name, part, branch, prompts) for part in value)
    if not isinstance(value, Tensor) or name in NO_ROWS or not value.ndim:
        return value
    if name not in BY_ROW:
        raise NotImplementedError(f"a decoder layer takes {name}, of which it is not known how it goes with rows")
    dim = BY_ROW[name]
    shared = value.ndim < -dim or value.shape[dim] != prompts
    return value if shared else value.index_select(dim, branch.prompts)
