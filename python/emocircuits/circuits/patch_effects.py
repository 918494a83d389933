"""Activation patching: put head outputs of the emotional run into the neutral run and see what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emocircuits.edits import ReplaceHead
from emocircuits.families import open_model
from emocircuits.measure import capture
from emocircuits.patching import patch
from emocircuits.plan import Plan

Metric = Callable[[Tensor], Tensor]
TEXT = ("query", "last", "generated")


@torch.no_grad()
def head_effects(
    model: nn.Module, clean: dict[str, Tensor], corrupt: dict[str, Tensor], metric: Metric, *,
    roles: Tensor, to: Sequence[str] = TEXT, progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Share of the clean-corrupt gap that each head restores when its output is patched, one head at a time.

    Args:
        model: a supported vision-language model.
        clean, corrupt: inputs of X+ and X-, same shapes, same text, padded on the left.
        metric: logits ``[B, V]`` of the last column to ``[B]``.
        roles: ``[B, N]`` roles of the tokens (an answer's beginning in the prompt is GENERATED).
        to: roles of the rows that are patched.
        progress: show a progress bar.

    Returns:
        ``(heads [L, H], layers [L])``: effect of each head, and of all heads of a layer at once;
        ``(patched - corrupt) / (clean - corrupt)`` of the metric's means.

    Raises:
        ValueError: the metric does not differ between the clean and the corrupted run.
    """
    geometry = open_model(model).geometry

    def run(inputs: dict[str, Tensor]) -> float:
        return float(metric(model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]).mean())

    with capture(model, ["z"]) as seen:
        top = run(clean)
    base = run(corrupt)
    if abs(top - base) < 1e-6:
        raise ValueError(
            f"the metric is {top:.4g} on the clean and on the corrupted run; patching has nothing to restore"
        )

    def restored(layer: int, heads: Iterable[int]) -> float:
        heads = list(heads)
        plan = Plan([ReplaceHead([(layer, h) for h in heads], seen["z"][layer][:, :, heads], to=tuple(to))])
        patched.replace(plan)
        return (run(corrupt) - base) / (top - base)

    effects = np.zeros((geometry.layers, geometry.heads))
    layers = np.zeros(geometry.layers)
    bar = tqdm(total=geometry.layers * (geometry.heads + 1), desc="patching heads", unit="patch", disable=not progress)
    with patch(model, Plan(), roles=roles) as patched, bar:
        for layer in range(geometry.layers):
            layers[layer] = restored(layer, range(geometry.heads))
            for head in range(geometry.heads):
                effects[layer, head] = restored(layer, [head])
                bar.update()
            bar.update()
    return effects, layers


def ranked(effects: np.ndarray) -> list[tuple[int, int]]:
    """(layer, head) pairs, largest effect first."""
    return [
        (int(i // effects.shape[1]), int(i % effects.shape[1])) for i in np.argsort(-effects, axis=None, kind="stable")
    ]


def random_like(heads: Sequence[tuple[int, int]], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A random control for ``heads``: as many members of each of its layers, out of ``count`` a layer.

    Every set of that shape is equally likely, except ``heads`` itself, so a draw may share members with it.

    Raises:
        ValueError: ``heads`` takes all members of its layers, so that no other set exists.
    """
    sizes = {layer: sum(a == layer for a, _ in heads) for layer in sorted({a for a, _ in heads})}
    if heads and all(n == count for n in sizes.values()):
        raise ValueError(
            f"all {count} members of layers {list(sizes)} are chosen; no random set of the same shape is left"
        )
    while True:
        drawn = [(layer, int(i)) for layer, n in sizes.items() for i in rng.choice(count, n, replace=False)]
        if not heads or set(drawn) != set(heads):
            return drawn
