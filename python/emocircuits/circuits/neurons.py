"""Stage II.3: the neurons of the circuit, by what they spell and by where they are (method.md; arXiv 2605.21980).

An *explicit-state* neuron spells emotion words: at least k of its top tokens are some. It is looked for in the row that
emits the emotion word. Every other neuron that a critical head gets the emotion from is a *contextual trigger*; it is
found by tracing. Neurons are ranked on one half of the pairs; on the other half each is patched, exactly, beside
random neurons of its layer that are alike in mean activation.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from emocircuits.circuit import CONTEXTUAL, EXPLICIT
from emocircuits.circuits.activations import by_role
from emocircuits.circuits.candidates import Candidates, explicit_candidates, traced_candidates
from emocircuits.circuits.heads import Reads, Rows, halves
from emocircuits.circuits.neuron_effects import Effect, matched, patched_neurons, tested
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.tracing import FILE as TREES
from emocircuits.circuits.tracing import NothingToTrace, Tracing, trace
from emocircuits.circuits.vocabulary import Spelling, emotion_tokens, least_hits
from emocircuits.files import read_json, write_bytes, write_json
from emocircuits.scoring.statistics import intervals

FORMAT = "emocircuits.neurons/1"
FILE, TABLE = "neurons.json", "neurons.parquet"
Row = Literal["answer", "last"]
Activation = Literal["difference", "emotional"]


@dc.dataclass(frozen=True)
class Neuron:
    """The card of one neuron.

    Attributes:
        layer, neuron: where.
        type: "explicit" or "contextual".
        emotion: the one whose pairs give it the largest score on the ranking half; it is tested on these pairs.
        sign: 1 where it fires more with the emotional picture, -1 where it falls silent.
        tokens: what that makes more likely, most of all first.
        hits: how many of them are emotion words.
        head: of a contextual trigger, the critical head that it was traced from.
        rank_score, score, low, high: share of the change that it accounts for, on the ranking half and on the testing
            half with a 95 % bootstrap interval over pairs. Of an explicit-state neuron the change is that of the last
            layer's output along S/|S|, of a contextual trigger that of the head's contribution.
        random: 95th percentile of the scores of its layer's random neurons.
        effect: exact patch on the testing half.
        critical: restores more than the random neurons, by a margin, in the corrected test, and has the larger score.
        activation: mean by side and role of the token.
    """

    layer: int
    neuron: int
    type: str
    emotion: str
    sign: int
    tokens: tuple[str, ...]
    hits: int
    head: tuple[int, int] | None
    rank_score: float
    score: float
    low: float
    high: float
    random: float
    effect: Effect
    critical: bool
    activation: dict[str, dict[str, float]]


@dc.dataclass(frozen=True)
class Neurons:
    """Candidates of both types, ranked, with their tests.

    Attributes:
        neurons: explicit-state neurons, then contextual triggers, best on the ranking half first.
        emotions: of every pair.
        settings: readings and numbers.
        tracing: trees that the contextual triggers are from; None where there were no heads to trace.
    """

    neurons: tuple[Neuron, ...]
    emotions: tuple[str, ...]
    settings: dict[str, Any]
    tracing: Tracing | None = None

    @property
    def explicit(self) -> list[Neuron]:
        """Explicit-state neurons that passed, best first."""
        return [n for n in self.neurons if n.critical and n.type == EXPLICIT]

    @property
    def contextual(self) -> list[Neuron]:
        """Contextual triggers that passed, best first."""
        return [n for n in self.neurons if n.critical and n.type == CONTEXTUAL]

    def for_circuit(self, types: Sequence[str] = (EXPLICIT,), *, critical: bool = True) -> dict[str, Any]:
        """What a :class:`~emocircuits.circuit.Circuit` holds of neurons, as its keyword arguments.

        Args:
            types: which types, in this order.
            critical: those that passed only; else all that were ranked.
        """
        kept = [n for t in types for n in self.neurons if n.type == t and (n.critical or not critical)]
        # A neuron can be of one type only, but be there by both ways of looking for it.
        kept = list({(n.layer, n.neuron): n for n in reversed(kept)}.values())[::-1]
        return {
            "neurons": tuple((n.layer, n.neuron) for n in kept),
            "neuron_effects": tuple(n.effect.effect for n in kept),
            "neuron_types": tuple(n.type for n in kept),
            "neuron_tokens": tuple(n.tokens for n in kept),
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``neurons.parquet`` (a row a neuron), ``tracing.json`` where there are trees, and ``neurons.json``."""
        import pandas as pd

        folder = Path(folder)
        rows = [_flat(n) for n in self.neurons]
        write_bytes(folder / TABLE, pd.DataFrame(rows, columns=None if rows else [*COLUMNS]).to_parquet(index=False))
        if self.tracing is not None:
            self.tracing.save(folder)
        record = {
            "format": FORMAT, "table": TABLE, "tracing": None if self.tracing is None else TREES,
            "settings": self.settings, "average_over": "pairs", "n": len(self.emotions),
            "emotions": list(self.emotions), "neurons": [dc.asdict(n) for n in self.neurons],
        }  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Neurons:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        path = Path(folder) / FILE
        record: Any = read_json(path, "neurons of a circuit")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not neurons of a circuit (expected format {FORMAT!r})")
        neurons = tuple(
            Neuron(**{
                **n, "tokens": tuple(n["tokens"]), "head": None if n["head"] is None else tuple(n["head"]),
                "effect": Effect(**n["effect"]),
            })
            for n in record["neurons"]
        )  # fmt: skip
        tracing = None if record["tracing"] is None else Tracing.load(folder)
        return cls(neurons, tuple(record["emotions"]), record["settings"], tracing)


def _column(name: str) -> str:
    return name if name == "effect" else f"effect_{name}"


COLUMNS = tuple(f.name for f in dc.fields(Neuron) if f.name not in ("effect", "activation")) + tuple(
    _column(f.name) for f in dc.fields(Effect)
)


def _flat(n: Neuron) -> dict[str, Any]:
    row = {f.name: getattr(n, f.name) for f in dc.fields(Neuron) if f.name not in ("effect", "activation")}
    row |= {"tokens": list(n.tokens), "head": None if n.head is None else f"{n.head[0]}.{n.head[1]}"}
    row |= {_column(k): v for k, v in dc.asdict(n.effect).items()}
    return row | {f"{side}_{role}": v for side, roles in n.activation.items() for role, v in roles.items()}


def critical_neurons(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, heads: Sequence[tuple[int, int]], l_emo: int, *,
    row: Row = "answer", activation: Activation = "difference", by: Literal["all", "emotion"] = "all",
    pooled: bool = False, look: int = 20, k: int | None = None, chance: float = 0.01, spelling: Spelling = "words",
    fold_norm: bool = True, top: int = 30, controls: int = 10, reads: Reads = "log-odds",
    patch_rows: Mapping[str, Rows] | None = None, margin: float = 0.01, level: float = 0.05,
    tracing: Mapping[str, Any] | None = None, batch: int = 32, seed: int = 0, progress: bool = True,
) -> Neurons:  # fmt: skip
    """Find explicit-state neurons and contextual triggers, and test them.

    Args:
        subject: the model.
        pairs: of the analyze split, at least four of each emotion.
        steering: of Stage I.
        heads: critical heads, to trace from; none: there are no contextual triggers.
        l_emo: of Stage II.1.
        row: where explicit-state neurons are scored: the row that emits the emotion word ("answer", default), or the
            "last" prompt row.
        activation: their score is ``(a+ - a-) * <W_down[:, i], S/|S|>`` ("difference", default), or a+ alone
            ("emotional"); S is that of the neuron's layer.
        by: rank by the mean over "all" emotions (default), or by the largest mean of one "emotion".
        pooled: one steering vector for all emotions.
        look, k: a neuron is explicit-state when at least k of its first ``look`` tokens are emotion words; k None
            (default): the smallest count that chance reaches with less than ``chance``.
        chance: see k.
        spelling: which tokens are emotion words, see :func:`~.vocabulary.emotion_tokens`.
        fold_norm: fold the final norm's gain into the projection.
        top: candidates of each type.
        controls: random neurons of each layer, at least 10.
        reads: of the exact patches, see :func:`~.neuron_effects.patched_neurons`.
        patch_rows: which rows are patched, by type; default: the last row of explicit-state neurons, all rows of
            contextual triggers.
        margin: by how much a critical neuron restores more than random ones, as a share of the gap.
        level: of the corrected test.
        tracing: options of :func:`~.tracing.trace`.
        batch: pairs at a time.
        seed: of the halves, the random neurons and the bootstrap.
        progress: show progress bars.

    Raises:
        ValueError: fewer than four pairs of an emotion, the two sides do not differ, or all neurons of a layer are
            candidates.
    """
    rows = {EXPLICIT: "last", CONTEXTUAL: "all", **(patch_rows or {})}
    _check(pairs, rows, row, activation, by, top, controls)
    half = halves(pairs.emotions, seed)
    vocabulary = subject.handle.weight(subject.handle.unembed).shape[0]
    emotional = emotion_tokens(subject.tokenizer, subject.lexicon, spelling)
    k = least_hits(vocabulary, len(emotional), look, chance) if k is None else k
    spell: dict[str, Any] = {"count": look, "fold_norm": fold_norm}
    found = [
        explicit_candidates(
            subject, pairs, steering, half, row=row, activation=activation, by=by, pooled=pooled, k=k, top=top,
            emotional=emotional, batch=batch, **spell,
        )
    ]  # fmt: skip
    trees, why = None, "" if heads else "there are no critical heads"
    if heads:
        options = {"l_emo": l_emo, "by": by, "pooled": pooled, "keep": 4 * top, "batch": batch, **(tracing or {})}
        try:
            trees = trace(subject, pairs, steering, heads, half=half, seed=seed, progress=progress, **options)
        except NothingToTrace as error:
            why = str(error)
    if trees is not None:
        found.append(traced_candidates(subject, trees, half, k=k, top=top, emotional=emotional, **spell))
    neurons: list[Neuron] = []
    rng = np.random.default_rng(seed)
    for candidates in found:
        neurons += _judged(
            subject, pairs, steering, l_emo, candidates, half, rng, rows=rows[candidates.type], reads=reads,
            pooled=pooled, controls=controls, margin=margin, level=level, seed=seed, batch=batch, progress=progress,
        )  # fmt: skip
    settings = {
        "row": row, "activation": activation, "direction": "S/|S| of the neuron's layer", "by": by,
        "vectors": "pooled" if pooled else "per emotion", "look": look, "k": k, "emotion_tokens": len(emotional),
        "vocabulary": vocabulary, "spelling": spelling, "fold_norm": fold_norm, "top": top, "controls": controls,
        "random": "neurons of the same layers that are not candidates, alike in mean activation", "reads": reads,
        "l_emo": l_emo, "patched_rows": rows, "margin": margin, "level": level, "seed": seed,
        "test": "one-sided paired t-test on the pairs of the neuron's emotion, Benjamini-Hochberg",
        "ranked_on": int((half == 0).sum()), "tested_on": int((half == 1).sum()),
        "heads": [list(h) for h in heads], "tracing": None if trees is None else trees.settings,
        "not_traced": why,
    }  # fmt: skip
    return Neurons(tuple(neurons), tuple(pairs.emotions), settings, trees)


def _check(pairs: Pairs, rows: Mapping[str, str], row: str, activation: str, by: str, top: int, controls: int) -> None:
    for name, value, known in (
        ("row", row, ("answer", "last")), ("activation", activation, ("difference", "emotional")),
        ("by", by, ("all", "emotion")), *((f"patch_rows[{t!r}]", r, ("all", "last")) for t, r in rows.items()),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if set(rows) != {EXPLICIT, CONTEXTUAL}:
        raise ValueError(f"patch_rows names {', '.join(sorted(rows))}: expected {EXPLICIT!r} and {CONTEXTUAL!r}")
    if top < 1 or controls < 10:
        raise ValueError(f"top={top}, controls={controls}: expected at least 1 candidate and 10 random neurons")
    few = [e for e in dict.fromkeys(pairs.emotions) if pairs.emotions.count(e) < 4]
    if few:
        n = pairs.emotions.count(few[0])
        raise ValueError(f"{few[0]!r} has {n} pairs; neurons are tested on half of them: give four of each emotion")


def _judged(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, l_emo: int, candidates: Candidates, half: np.ndarray,
    rng: np.random.Generator, *, rows: Any, reads: Reads, pooled: bool, controls: int, margin: float, level: float,
    seed: int, batch: int, progress: bool,
) -> list[Neuron]:  # fmt: skip
    """Candidates of one type beside random neurons, on the testing half."""
    if not candidates.places:
        return []
    emotions = np.array(pairs.emotions)
    others = matched(candidates.activity, candidates.places, controls, rng)
    places = [*candidates.places, *others]
    beside = [
        np.array([len(candidates.places) + j for j, o in enumerate(others) if o[0] == layer])
        for layer, _ in candidates.places
    ]
    test = np.flatnonzero(half == 1)
    mine = [np.flatnonzero(emotions[test] == e) for e in candidates.emotions]
    wanted = np.zeros((len(test), len(places)), bool)
    for i, (rows_of, columns) in enumerate(zip(mine, beside, strict=True)):
        wanted[np.ix_(rows_of, np.append(columns, i))] = True
    restored, gaps = patched_neurons(
        subject, pairs.take(test.tolist()), places, wanted, reads=reads, rows=rows, steering=steering, l_emo=l_emo,
        pooled=pooled, progress=progress,
    )  # fmt: skip
    effects = tested(restored, gaps, list(enumerate(mine)), beside, seed)
    activations = by_role(subject, pairs, candidates.places, batch=batch)
    found = []
    for i, (layer, neuron) in enumerate(candidates.places):
        single = candidates.single[test[mine[i]], i]
        low, high = intervals(single, np.ones(len(single)), seed=seed)
        random = float(np.percentile(candidates.random_scores(i, [n for l, n in others if l == layer]), 95))
        score, e = float(single.mean()), effects[i]
        critical = e.q < level and e.effect > e.random + margin and e.low > 0 and score > random
        found.append(
            Neuron(
                layer, neuron, candidates.type, candidates.emotions[i], candidates.signs[i], candidates.tokens[i],
                candidates.hits[i], candidates.heads[i], candidates.rank_scores[i], score, float(low), float(high),
                random, e, bool(critical), activations[i],
            )
        )  # fmt: skip
    return found
