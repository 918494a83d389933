"""One pass over prompts under many plans, in which rows part only where their plans do.

Plans that do the same to the layers up to one give the same residual stream there. So every prompt enters the model
once, images included, and a layer takes as many rows of it as there are different plans so far: all that is below the
first edit is shared by all of them, and a pass in which nothing acts (edits of what is generated alone) by all of it.
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

from emocircuits.sweep.rowplans import SHARED, RowPlans, picked
from emocircuits.tables import LayerTables
from emokernels import Role, Routes

BY_ROW = {
    "attention_mask": 0, "position_embeddings": -3, "position_ids": -2, "text_position_ids": -2, "token_type_ids": 0,
}  # fmt: skip
"""Arguments of a decoder layer that have an entry for every row, and in which dimension."""
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
    tables: dict[int, LayerTables], layers: int, rows: Sequence[tuple[int, int]], device: torch.device
) -> list[Branch]:
    """The rows of every layer.

    Args:
        tables: of all plans, by layer.
        layers: how many.
        rows: (prompt, plan) of every row at the end; every prompt from 0 on is there.
        device: of the model.
    """
    classes = [prompt for prompt, _ in rows]
    found = []
    for layer in range(layers):
        keys: list[Any] = list(classes)
        if layer in tables:
            own = in_prompt(tables[layer])
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


def in_prompt(tables: LayerTables) -> list[bytes]:
    """What each plan does to the rows of a prompt in one layer: equal bytes, equal edits."""
    parts = [part.flatten(1).contiguous().cpu() for part in _prompt_rows(tables)]
    count = max((len(p) for p in parts), default=1)
    return [b"".join(p[min(i, len(p) - 1)].view(torch.uint8).numpy().tobytes() for p in parts) for i in range(count)]


def _prompt_rows(table: Any) -> Iterator[Tensor]:
    routes = isinstance(table, Routes)
    for field in dc.fields(table):
        value = getattr(table, field.name)
        if not field.init or field.name in SHARED or field.name == "step":
            continue
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, Tensor):
                dim = 2 if routes else 1
                kinds = [k for k in range(part.shape[dim]) if k != int(Role.GENERATED)]
                yield part.index_select(dim, torch.tensor(kinds, device=part.device))
            elif dc.is_dataclass(part):
                yield from _prompt_rows(part)


class Branching(RowPlans):
    """``patch`` with many plans, and prompts whose rows part where the plans do."""

    whole: Tensor
    """Roles of the prompts' columns."""

    def __enter__(self) -> Branching:
        super().__enter__()
        return self

    def rows(self, chosen: Sequence[tuple[int, int]]) -> list[Branch]:
        """The rows of every layer; see :func:`branches`."""
        return branches(self.compiled(), len(self.handle.layers), chosen, self._device)

    @contextlib.contextmanager
    def parting(self, found: list[Branch], prompts: int) -> Iterator[None]:
        """Passes over `prompts` rows within give as many as the last layer has.

        The cache then holds of every layer its own rows (:func:`gather`).
        """
        self.follow(found[0].plans.new_zeros(prompts))
        names = {
            type(layer): list(inspect.signature(type(layer).forward).parameters)[1:] for layer in self.handle.layers
        }

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int) -> Any:
            branch = found[layer]
            self._at(branch, layer)
            if len(branch.prompts) == prompts and not branch.grows:
                return None
            hidden, *_ = names[type(module)]
            given = dict(zip(names[type(module)], args, strict=False)) | kwargs
            changed = {
                name: value.index_select(0, branch.parents) if name == hidden else _spread(name, value, branch, prompts)
                for name, value in given.items()
            }
            return (changed.pop(hidden),), changed

        hooks = []
        try:
            for number, layer in enumerate(self.handle.layers):
                hook = lambda m, a, k, n=number: enter(m, a, k, n)  # noqa: E731
                # Rows part before anything is edited: what leaves the layer below may be edited where this one begins.
                hooks.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _at(self, branch: Branch, layer: int) -> None:
        """Roles and tables are those of the rows of one layer, and of what leaves the one before."""
        context = self.context
        assert context.columns is not None
        if layer == 0:
            self.whole = context.columns.roles
        context.columns.roles = self.whole[branch.prompts]
        context.query_roles = context._kinds = None
        context._keys = {}
        compiled = self.compiled()
        self.state.tables = {k: picked(compiled[k], branch.plans) for k in (layer - 1, layer) if k in compiled}


def gather(cache: DynamicCache, found: Sequence[Branch]) -> None:
    """Give every layer of a cache the rows at the end."""
    for layer, branch in zip(cache.layers, found, strict=True):
        layer.batch_select_indices(branch.rows)


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
