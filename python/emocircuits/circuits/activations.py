"""How neurons fire: means by side and by the role of the token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emocircuits.circuits.pairs import SIDES, Pairs
from emocircuits.circuits.passes import run
from emocircuits.circuits.subject import Subject
from emokernels import Role


def by_role(
    subject: Subject, pairs: Pairs, places: Sequence[tuple[int, int]], *, batch: int = 32
) -> list[dict[str, dict[str, float]]]:
    """Mean activation of each neuron, ``{side: {role: mean}}``, over the tokens of all pairs.

    Roles that no token has are left out; tokens of the beginning of an answer are "generated".
    """
    layers = sorted({l for l, _ in places})
    columns = {l: [i for m, i in places if m == l] for l in layers}
    roles = [r for r in Role if r is not Role.PAD]
    out: list[dict[str, dict[str, float]]] = [{} for _ in places]
    index = {p: i for i, p in enumerate(places)}
    for side in SIDES:
        sums = {l: torch.zeros(len(roles), len(columns[l]), dtype=torch.float64) for l in layers}
        counts = torch.zeros(len(roles), dtype=torch.float64)
        for _, part in pairs.batches(batch):
            with run(subject, part, side, layers, answer=True) as one:
                pass
            masks = torch.stack([one.role_ids == int(r) for r in roles])  # [R, B, N]
            counts += masks.sum((1, 2)).double().cpu()
            for l in layers:
                a = one.neurons(l)[..., columns[l]].double()
                sums[l] += torch.einsum("rbn,bni->ri", masks.to(a), a).cpu()
        for l in layers:
            for j, neuron in enumerate(columns[l]):
                out[index[l, neuron]][side] = {
                    r.name.lower(): float(sums[l][m, j] / counts[m]) for m, r in enumerate(roles) if counts[m]
                }
    return out
