"""Function verification: whether a model needs its circuit, and more of it does more (arXiv 2605.21980).

Critical heads are ablated (``z * 0``) and enhanced (``z * g``), and so are the circuit's neurons, on both sides of the
pairs; the answers are generated. Beside each stand random members of the same layers, once with the same factor, and
once with the factor that changes what they write by as much (the mean norm of the change of the residual stream).
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from emocircuits.circuit import Circuit
from emocircuits.circuits.answering import say
from emocircuits.circuits.controls import Change, Member, Random, against, change, corrected, random_sets
from emocircuits.circuits.pairs import SIDES, Pairs, Side
from emocircuits.circuits.subject import Subject
from emocircuits.edits import Edit, ScaleHead, ScaleNeurons
from emocircuits.files import read_json, write_json
from emocircuits.measure import capture
from emocircuits.plan import Plan

FORMAT = "emocircuits.verification/1"
FILE = "verification.json"
SAME, NORM = "the same factor", "a change of equal norm"


@dc.dataclass(frozen=True)
class Check:
    """One intervention on one side.

    Attributes:
        what: "heads" or "neurons".
        action: "ablate" or "enhance".
        factor: on the members.
        side: "emotional" (X+) or "neutral" (X-).
        hits: of each pair, 1 or 0.
        effect: against the model left alone.
        random: against random members: with the same factor, and with a change of equal norm.
    """

    what: str
    action: str
    factor: float
    side: str
    hits: tuple[float, ...]
    effect: Change
    random: tuple[Random, ...]


@dc.dataclass(frozen=True)
class Verification:
    """All interventions.

    Attributes:
        base: hits of each pair left alone, by side.
        checks: see there.
        emotions: of each pair.
        settings: numbers, members and the random sets.
    """

    base: dict[str, tuple[float, ...]]
    checks: tuple[Check, ...]
    emotions: tuple[str, ...]
    settings: dict[str, Any]

    def of(self, what: str, action: str, side: str) -> Check:
        """One of them."""
        return next(c for c in self.checks if (c.what, c.action, c.side) == (what, action, side))

    def save(self, folder: str | Path) -> Path:
        """Write ``verification.json``."""
        record = {"format": FORMAT, "average_over": "pairs", "n": len(self.emotions), **dc.asdict(self)}
        return write_json(Path(folder) / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Verification:
        """Read what :meth:`save` wrote."""
        path = Path(folder) / FILE
        record: Any = read_json(path, "function verification")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not function verification (expected format {FORMAT!r})")
        checks = tuple(
            Check(
                **{**c, "hits": tuple(c["hits"]), "effect": Change(**c["effect"])}
                | {"random": tuple(Random(**{**r, "values": tuple(r["values"])}) for r in c["random"])}
            )
            for c in record["checks"]
        )
        base: dict[str, tuple[float, ...]] = {side: tuple(hits) for side, hits in record["base"].items()}
        return cls(base, checks, tuple(record["emotions"]), record["settings"])


@torch.no_grad()
def verify(
    subject: Subject, circuit: Circuit, pairs: Pairs, *, enhance: float = 2.0, heads: int | None = None,
    neurons: int | None = None, draws: int = 10, batch: int | None = None, seed: int = 0, progress: bool = True,
) -> Verification:  # fmt: skip
    """Ablate and enhance a circuit's heads and neurons, beside random ones.

    Args:
        subject: the model that the circuit was found in.
        circuit: its heads are needed, its neurons are taken if it has any.
        pairs: others than those the circuit was found on.
        enhance: factor g of the enhancement, above 1.
        heads, neurons: how many of the circuit's to take (None: all).
        draws: random sets, at least 10.
        batch: answers decoded together (None: what memory allows).
        seed: of the random sets and the bootstrap.
        progress: show bars.

    Raises:
        ValueError: no heads, too few draws, a factor of at most 1, or a circuit of another model.
    """
    handle = subject.handle
    geometry = handle.geometry
    circuit.require(subject.model, handle.config.model_type, geometry.layers)
    if not enhance > 1:
        raise ValueError(f"enhance={enhance}: expected a factor above 1")
    members: dict[str, tuple[Member, ...]] = {"heads": circuit.heads[:heads]}
    if circuit.neurons[:neurons]:
        members["neurons"] = circuit.neurons[:neurons]
    counts = {"heads": geometry.heads, "neurons": geometry.neurons}
    sets = {what: random_sets(of, counts[what], draws, seed) for what, of in members.items()}
    factors = {"ablate": 0.0, "enhance": float(enhance)}
    keys = [(what, action) for what in members for action in factors]
    norms = {what: written(subject, pairs, what, layers=sorted({l for l, _ in of})) for what, of in members.items()}
    plans = [Plan()]
    equal: dict[tuple[str, str], list[float]] = {}
    for what, action in keys:
        factor = factors[action]
        plans.append(Plan(scaled(what, members[what], factor)))
        plans += [Plan(scaled(what, drawn, factor)) for drawn in sets[what]]
        far = total(norms[what], members[what])
        # What writes nothing cannot be made to.
        equal[what, action] = [
            1 + (factor - 1) * far / total(norms[what], drawn) if total(norms[what], drawn) > 0 else factor
            for drawn in sets[what]
        ]
        plans += [Plan(scaled(what, drawn, own)) for drawn, own in zip(sets[what], equal[what, action], strict=True)]
    hits = {
        side: say(subject, pairs, side, plans, batch=batch, progress=progress).rates(
            lambda texts: subject.hits(texts, pairs.emotions)
        )
        for side in tqdm(SIDES, desc="sides", disable=not progress)
    }
    checks = _checks(keys, factors, hits, pairs, draws, seed)
    settings = {
        "members": {what: [list(m) for m in of] for what, of in members.items()},
        "random": {what: [[list(m) for m in drawn] for drawn in of] for what, of in sets.items()},
        "random_factors": {f"{what} {action}": values for (what, action), values in equal.items()},
        "enhance": float(enhance), "draws": draws, "seed": seed, "rows": "all, prompt and answer",
        "lexicon": subject.lexicon.name, "limit": subject.limit, "correction": "Benjamini-Hochberg over all checks",
    }  # fmt: skip
    base: dict[str, tuple[float, ...]] = {side: tuple(rates[0].tolist()) for side, rates in hits.items()}
    return Verification(base, checks, tuple(pairs.emotions), settings)


def _checks(
    keys: Sequence[tuple[str, str]], factors: dict[str, float], hits: dict[Side, np.ndarray], pairs: Pairs, draws: int,
    seed: int,
) -> tuple[Check, ...]:  # fmt: skip
    """Compare, and correct over all sides and interventions: once for the effects, once for the controls."""
    where, effects, randoms = [], [], []
    for side, rates in hits.items():
        base = rates[0]
        for i, key in enumerate(keys):
            start = 1 + i * (1 + 2 * draws)
            value, drawn = rates[start], rates[start + 1 : start + 1 + 2 * draws]
            where.append((*key, side, value))
            effects.append(change(base, value, pairs, seed=seed))
            randoms += [against(SAME, base, value, drawn[:draws]), against(NORM, base, value, drawn[draws:])]
    effects, randoms = corrected(effects), corrected(randoms)
    return tuple(
        Check(what, action, factors[action], side, tuple(value.tolist()), effects[i], tuple(randoms[2 * i : 2 * i + 2]))
        for i, (what, action, side, value) in enumerate(where)
    )


def scaled(what: str, members: Iterable[Member], factor: float) -> list[Edit]:
    """Edits that scale heads or neurons, in all rows."""
    if what == "heads":
        return [ScaleHead(tuple(members), factor)]
    by_layer: dict[int, list[int]] = {}
    for layer, neuron in members:
        by_layer.setdefault(layer, []).append(neuron)
    return [ScaleNeurons(tuple((layer, tuple(index)) for layer, index in sorted(by_layer.items())), factor)]


def total(norms: dict[int, np.ndarray], members: Iterable[Member]) -> float:
    """Sum of what members write."""
    return float(sum(norms[layer][i] for layer, i in members))


@torch.no_grad()
def written(subject: Subject, pairs: Pairs, what: str, *, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Layer -> ``[H]`` or ``[I]``: mean norm of what each head (neuron) adds to the residual stream.

    Over the real rows of the prompts of X+. Of a head ``|W_O^h z_h|``, through the Gram matrix of ``W_O^h``; of a
    neuron ``|a_i| |W_down[:, i]|``.
    """
    handle = subject.handle
    geometry = handle.geometry
    site = "z" if what == "heads" else "neurons"
    projections = handle.output_projections if what == "heads" else handle.down_projections
    weights = {l: handle.weight(projections[l]).detach().float() for l in layers}  # [d_model, H * D] or [d_model, I]
    sums: dict[int, Any] = dict.fromkeys(layers, 0.0)
    count = 0
    for _, part in pairs.batches(16):
        inputs = part.inputs(subject, "emotional")
        real = inputs["attention_mask"].bool()
        count += int(real.sum())
        with capture(subject.model, [site], layers=layers) as seen:
            subject.model(**inputs, use_cache=False, logits_to_keep=1)
        for layer in layers:
            values = seen[site, layer][real].float()  # [rows, H, D] or [rows, I]
            if what == "heads":
                split = weights[layer].unflatten(1, (geometry.heads, -1))
                gram = torch.einsum("ohd,ohe->hde", split, split)
                size = torch.einsum("bhd,hde,bhe->bh", values, gram, values).clamp_min(0).sqrt()
            else:
                size = values.abs() * weights[layer].norm(dim=0)
            sums[layer] = sums[layer] + size.double().sum(0).cpu().numpy()
    return {layer: value / count for layer, value in sums.items()}
