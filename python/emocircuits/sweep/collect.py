"""Running a sweep: what is on disk is not computed again, what comes in goes there, a bar tells how long it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from emocircuits.sweep import progress as telling
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.store import Patch, Store

V = TypeVar("V", bound=Patch)
FIELDS = {"layer": "layer", "pos": "column", "draw": "draw", "patch": "patch"}


def collect(
    evaluate: Callable[[Sequence[V]], Iterator[tuple[slice, Tensor]]], variants: Sequence[V], *, axes: tuple[str, ...],
    labels: dict[str, list[Any]], clean: float, corrupt: float, meta: Mapping[str, Any] | None = None,
    store: Store | None = None, costs: Sequence[float] | None = None, progress: bool = True,
    said: Callable[[V], Any] | None = None,
) -> SweepResult:  # fmt: skip
    """Evaluate all variants that the store does not have, and put the table together.

    Args:
        evaluate: gives metric values of the variants it is handed, chunk by chunk: a slice into them, and ``[n]``.
        variants: one for every cell of the table.
        axes: of the result; "layer", "pos" where variants have a column, and the unit's name where they have a unit.
        labels: by axis, what its entries are. A unit is found among its labels, or, where these are names, by number.
        clean, corrupt: the baselines.
        meta: for the result.
        store: where values are kept while they come in.
        costs: of every variant, in any unit: the bar counts these, so that the time it tells is true though variants of
            low layers take longer.
        progress: show a bar on standard error.
        said: gives the text that the value of a variant, just evaluated, is a score of; they are kept with the values,
            and are the list ``meta["texts"]["patched"]`` of the result, in the order of ``values.flatten()``.

    Raises:
        ValueError: the variants do not fill the table, each cell once, or ``evaluate`` left some out.
    """
    cells = _cells(variants, axes, labels)
    weights = list(costs) if costs is not None else [1.0] * len(variants)
    # Variants that cost nothing still move the bar.
    total = sum(weights)
    weights = [w + 1e-6 * (total / len(variants) or 1.0) for w in weights]
    total = sum(weights)
    table = torch.full(tuple(len(labels[a]) for a in axes), float("nan"), dtype=torch.float64)
    result = SweepResult(table, clean, corrupt, axes, labels, dict(meta or {}))
    telling.table(result, total)
    with contextlib.ExitStack() as stack:
        done = {} if store is None else dict(stack.enter_context(store).done)
        texts = {} if store is None else dict(store.texts)
        todo = [i for i in range(len(variants)) if i not in done]
        name = str((meta or {}).get("target", "sweep"))
        bar = stack.enter_context(telling.bar(name, total, len(variants), progress))
        bar.has(sum(weights[i] for i in done), len(done))
        for part, values in evaluate([variants[i] for i in todo]) if todo else ():
            chunk = todo[part]
            numbers = values.detach().to("cpu", torch.float64).flatten().tolist()
            new = list(zip(chunk, numbers, strict=True))
            if any(i in done for i in chunk):
                raise ValueError("the engine gave a variant twice")
            done.update(new)
            heard = {} if said is None else {i: said(variants[i]) for i in chunk}
            texts |= heard
            if store is not None:
                store.texts |= heard
                store.add(new)
            bar.add(sum(weights[i] for i in chunk), len(chunk))
    missing = len(variants) - len(done)
    if missing:
        raise ValueError(f"the engine left {missing} of {len(variants)} variants out")
    for i, cell in enumerate(cells):
        table[cell] = done[i]
    if said is not None:
        order = sorted(range(len(variants)), key=cells.__getitem__)
        result.meta["texts"] = {**result.meta.get("texts", {}), "patched": [texts[i] for i in order]}
    return result


def _cells(variants: Sequence[Patch], axes: tuple[str, ...], labels: Mapping[str, list[Any]]) -> list[tuple[int, ...]]:
    """Where each variant goes in the table."""
    where = {axis: {label: i for i, label in enumerate(labels[axis])} for axis in axes}
    cells = []
    for v in variants:
        found = [(getattr(v, FIELDS.get(axis, "unit")), where[axis], len(labels[axis])) for axis in axes]
        cell = []
        for axis, (value, known, size) in zip(axes, found, strict=True):
            named = axis not in ("layer", "pos") and any(isinstance(k, str) for k in known)
            at = value if named and isinstance(value, int) and 0 <= value < size else known.get(value)
            if at is None:
                raise ValueError(f"{v}: its {axis} {value!r} is not among the labels of that axis")
            cell.append(int(at))
        cells.append(tuple(cell))
    size = 1
    for axis in axes:
        size *= len(labels[axis])
    if len(set(cells)) != len(cells) or len(cells) != size or not cells:
        raise ValueError(
            f"{len(variants)} variants fill {len(set(cells))} cells of a table of {size}: expected each once"
        )
    return cells
