"""Where a critical head gets the emotion from: its source token, the neurons there, and the heads that write there.

Stage II.3 of arXiv 2605.21980. The contribution of a head in row N is ``c = <z_h[N], u>`` with
``u = W_O^h^T S/|S|``, which is ``sum_t A[N,t] <W_O^h v_t, S/|S|>``. Its source token is the t with the largest term
in the run on X+. What a neuron there is worth is ``(a+ - a-)[t*] * dc/da``, with exact gradients of the unmodified
model, along every path from t* to the head: values, keys and what lies between. A head that writes to t* is worth
``(z+ - z-)[t*] . dc/dz``; it is followed in turn, with ``u = dc/dz[t*]``, so that all scores of a tree are shares of
what its root changes by.

Trees are grown on one half of the pairs. Their scores are those of the other half.
"""

from __future__ import annotations

import collections
import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from emocircuits.circuits.heads import halves
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.passes import run
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.visits import Visit
from emocircuits.circuits.vocabulary import writes
from emocircuits.files import read_json, write_json

FORMAT = "emocircuits.tracing/1"
FILE = "tracing.json"
SHOWN = 8
"""Source tokens that are named for each node."""
CHANGE = 1e-3
"""A root whose contribution changes by less than this share of its size is not traced: there is nothing to explain."""
SourceToken = Literal["signed", "attention", "gradient"]
Score = Literal["gradient", "screen"]
Follow = Literal["gradient", "steering"]
By = Literal["all", "emotion"]
At = Literal["both", "emotional", "neutral"]
SIDES: dict[str, tuple[float, float]] = {"both": (0.5, 0.5), "emotional": (1.0, 0.0), "neutral": (0.0, 1.0)}
"""Weights of the gradients on X+ and X-."""


class NothingToTrace(ValueError):
    """What the heads write along S is the same with both pictures."""


@dc.dataclass(frozen=True)
class Source:
    """A token that a head reads the emotion from.

    Attributes:
        token, role: what it is.
        frequency: share of the pairs in which it is the source token.
        share: what comes from it of the head's contribution on X+, mean over these pairs.
    """

    token: str
    role: str
    frequency: float
    share: float


@dc.dataclass(frozen=True)
class Upstream:
    """A neuron at a head's source token.

    Attributes:
        layer, neuron: where.
        rank_score, score: share of the root's change, on the ranking and on the testing half.
        frequency: share of all pairs in which it is among the first of that pair.
    """

    layer: int
    neuron: int
    rank_score: float
    score: float
    frequency: float


@dc.dataclass(frozen=True)
class Node:
    """A head of a tree.

    Attributes:
        id, parent: numbers; a root has no parent.
        depth: 0 of a root.
        layer, head: where.
        rank_score, score: share of the root's change that it writes to its parent's source token, on the ranking and
            on the testing half; 1 for a root.
        frequency: share of all pairs in which it is among the first of that pair; 1 for a root.
        change: of a root, ``c+ - c-``, mean over the testing half, in the units of the residual stream.
        sources: its source tokens, most frequent first.
        roles: share of the pairs by the role of the source token.
        neurons: at the source token, strongest on the ranking half first.
    """

    id: int
    parent: int | None
    depth: int
    layer: int
    head: int
    rank_score: float
    score: float
    frequency: float
    change: float | None
    sources: tuple[Source, ...]
    roles: dict[str, float]
    neurons: tuple[Upstream, ...]


@dc.dataclass(frozen=True)
class Tracing:
    """Trees of heads, neurons and tokens.

    Attributes:
        nodes: parents before children.
        untraced: heads without a tree, and why.
        emotions: of every pair.
        settings: readings and numbers.
        visits: scores of all neurons at every node; not in files.
    """

    nodes: tuple[Node, ...]
    untraced: tuple[tuple[int, int, str], ...]
    emotions: tuple[str, ...]
    settings: dict[str, Any]
    visits: tuple[Visit, ...] = dc.field(default=(), repr=False, compare=False)

    @property
    def roots(self) -> list[Node]:
        """Trees."""
        return [n for n in self.nodes if n.parent is None]

    def children(self, node: Node) -> list[Node]:
        """Heads that write to a node's source token, strongest first."""
        return [n for n in self.nodes if n.parent == node.id]

    def save(self, folder: str | Path) -> Path:
        """Write ``tracing.json``."""
        record = {
            "format": FORMAT, "settings": self.settings, "average_over": "pairs", "n": len(self.emotions),
            "emotions": list(self.emotions), "untraced": [list(u) for u in self.untraced],
            "nodes": [dc.asdict(n) for n in self.nodes],
        }  # fmt: skip
        return write_json(Path(folder) / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Tracing:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        path = Path(folder) / FILE
        record: Any = read_json(path, "traced heads")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not traced heads (expected format {FORMAT!r})")
        nodes = tuple(
            Node(**{
                **n, "sources": tuple(Source(**s) for s in n["sources"]),
                "neurons": tuple(Upstream(**u) for u in n["neurons"]),
            })
            for n in record["nodes"]
        )  # fmt: skip
        untraced = tuple((a, b, why) for a, b, why in record["untraced"])
        return cls(nodes, untraced, tuple(record["emotions"]), record["settings"])


def trace(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, heads: Sequence[tuple[int, int]], *,
    l_emo: int | None = None, source: SourceToken = "signed", score: Score = "gradient", follow: Follow = "gradient",
    at: At = "both", by: By = "all", answer: bool = False, pooled: bool = False, depth: int = 2, breadth: int = 3,
    keep: int = 30, least: float = 0.02, half: np.ndarray | None = None, batch: int = 32, seed: int = 0,
    progress: bool = True,
) -> Tracing:  # fmt: skip
    """Follow heads down to the tokens, neurons and heads that they get the emotion from.

    Args:
        subject: the model.
        pairs: of the analyze split, at least two of each emotion.
        steering: of Stage I.
        heads: the roots, (layer, head): the critical heads.
        l_emo: for ``source="gradient"``: where the loss of heads up to this layer is read.
        source: how the source token is chosen: "signed" (default) ``A[N,t] <W_O^h v_t, S/|S|>``; "attention", raw A;
            "gradient", ``A[N,t] dm/dA[N,t]`` with m the projection of the last prompt row on S/|S|, in l_emo for heads
            up to it and in the last layer for heads above. Below a root the head's own u takes the place of m.
        score: of a neuron: "gradient" (default), ``(a+ - a-)[t*] * dc/da``, or "screen", ``a+[t*] * <W_down[:, i],
            S/|S|>`` with S of the neuron's layer.
        follow: what a head below the root is read along: "gradient" (default), ``u = dc/dz[t*]``, or "steering",
            ``u = W_O^h^T S/|S|`` of its own layer.
        at: the run of the gradients: "both" (default), their mean over X+ and X-, which is less misled by what norms
            and softmax saturate; "emotional" or "neutral".
        by: rank by the mean over "all" emotions (default), or by the largest mean of one "emotion".
        answer: read roots in the row that emits the emotion word, in place of the last prompt row.
        pooled: one steering vector for all emotions.
        depth: how many heads one below the other are followed from a root.
        breadth: heads that are followed from each node.
        keep: neurons that are named at each node.
        least: a head is followed if it is worth this share of the root's change.
        half: ``[pairs]`` 0 for the ranking, 1 for the testing half, see :func:`~.heads.halves`; None: drawn.
        batch: pairs at a time.
        seed: of the halves.
        progress: show a progress bar.

    Raises:
        NothingToTrace: no head writes along S what tells the two pictures apart.
        ValueError: there are no heads, a head that the model does not have, or an unknown reading.
    """
    _check(subject, heads, source, score, follow, at, by, depth, breadth, keep)
    half = halves(pairs.emotions, seed) if half is None else half
    layers = subject.handle.geometry.layers
    read = {l: l_emo if l_emo is not None and l <= l_emo else layers - 1 for l, _ in heads}
    frontier = [Visit(l, h, len(pairs), u=written_along(subject, pairs, steering, l, h, pooled)) for l, h in heads]
    untraced: list[tuple[int, int, str]] = []
    done: list[Visit] = []
    while frontier:
        measure(subject, pairs, steering, frontier, read, source, score, at, answer, pooled, batch, progress)
        following: list[Visit] = []
        for visit in frontier:
            if visit.parent is None:
                why = _unchanged(visit, half)
                if why:
                    untraced.append((visit.layer, visit.head, why))
                    continue
            visit.settle(pairs.emotions, half, by, keep, breadth)
            visit.id = len(done)
            done.append(visit)
            if visit.depth < depth:
                for layer, head in visit.followed(breadth, least):
                    u = None if follow == "gradient" else written_along(subject, pairs, steering, layer, head, pooled)
                    following.append(visit.child(layer, head, u))
            visit.drop()
        frontier = following
    if not done:
        told = "; ".join(f"head {l}.{h}: {why}" for l, h, why in untraced)
        raise NothingToTrace(f"there is nothing to trace: {told}")
    settings = {
        "heads": [list(h) for h in heads], "source": source, "score": score, "follow": follow, "by": by,
        "row": "answer" if answer else "last prompt row", "vectors": "pooled" if pooled else "per emotion",
        "gradients_of": at, "l_emo": l_emo, "depth": depth, "breadth": breadth,
        "keep": keep, "least": least, "seed": seed, "ranked_on": int((half == 0).sum()),
        "tested_on": int((half == 1).sum()), "scores": "share of the change of the root's contribution",
    }  # fmt: skip
    nodes = tuple(_node(v, half) for v in done)
    return Tracing(nodes, tuple(untraced), tuple(pairs.emotions), settings, tuple(done))


def _check(
    subject: Subject, heads: Sequence[tuple[int, int]], source: str, score: str, follow: str, at: str, by: str,
    depth: int, breadth: int, keep: int,
) -> None:  # fmt: skip
    g = subject.handle.geometry
    if not heads:
        raise ValueError("there are no heads to trace from; a model without critical heads has no circuit to follow")
    for layer, head in heads:
        if not (0 <= layer < g.layers and 0 <= head < g.heads):
            raise ValueError(f"head {layer}.{head}: the model has {g.layers} layers of {g.heads} heads")
    for name, value, known in (
        ("source", source, ("signed", "attention", "gradient")), ("score", score, ("gradient", "screen")),
        ("follow", follow, ("gradient", "steering")), ("by", by, ("all", "emotion")), ("at", at, tuple(SIDES)),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    for name, number, smallest in (("depth", depth, 0), ("breadth", breadth, 1), ("keep", keep, 1)):
        if number < smallest:
            raise ValueError(f"{name}={number}: expected at least {smallest}")


def written_along(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, layer: int, head: int, pooled: bool
) -> Tensor:
    """``W_O^h^T S/|S|`` of every pair, ``[pairs, D]`` float64."""
    handle = subject.handle
    weight = handle.weight(handle.output_projections[layer]).unflatten(1, (handle.geometry.heads, -1))[:, head]
    return units(pairs.emotions, steering, layer, pooled) @ weight.to("cpu", torch.float64)


def units(emotions: Sequence[str], steering: SteeringVectors, layer: int, pooled: bool) -> Tensor:
    """``S/|S|`` of every pair, ``[pairs, d_model]`` float64."""
    s = torch.stack([steering.of(None if pooled else e)[layer] for e in emotions]).double()
    return s / s.norm(dim=-1, keepdim=True)


def measure(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, visits: Sequence[Visit], read: dict[int, int],
    source: str, score: str, at: str, answer: bool, pooled: bool, batch: int, progress: bool,
) -> None:  # fmt: skip
    """Run all pairs on both sides, and measure some visits of one depth; arguments as of :func:`trace`.

    ``read``: by layer, where the loss of roots is read.
    """
    handle = subject.handle
    top = max(v.layer for v in visits)
    roots = source == "gradient" and visits[0].parent is None
    reads = sorted({read[v.layer] for v in visits}) if roots else []
    down = [writes(handle, l) for l in range(top)] if score == "screen" else []
    bar = tqdm(total=len(pairs) * len(visits), desc=f"tracing, {visits[0].depth} down", disable=not progress)
    with bar:
        for which, part in pairs.batches(batch):
            units_of = [units(part.emotions, steering, l, pooled) for l in range(handle.geometry.layers)]
            with run(subject, part, "emotional", range(top + 1), answer=answer, gradients=True, reads=reads) as plus:
                for visit in visits:
                    loss = None
                    if roots:
                        l = read[visit.layer]
                        last = plus.resid(l)[:, -1]
                        loss = (last * units_of[l].to(last)).sum()
                    visit.read(which, plus, source, loss, SIDES[at][0])
            weight = SIDES[at][1]
            with run(subject, part, "neutral", range(top + 1), answer=answer, gradients=weight > 0) as minus:
                for visit in visits:
                    visit.compare(which, minus, weight, (units_of, down) if down else None)
                    bar.update(len(which))


def _unchanged(visit: Visit, half: np.ndarray) -> str:
    change, size = visit.plus - visit.minus, np.abs(visit.plus).mean()
    means = [change[half == i].mean() for i in (0, 1)]
    if min(np.abs(means)) <= CHANGE * size:
        return "what it writes along S is the same with both pictures"
    if min(means) < 0:
        return "what it writes along S is not more with the emotional picture"
    return ""


def _node(visit: Visit, half: np.ndarray) -> Node:
    groups: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    roles: collections.Counter[str] = collections.Counter()
    n = len(visit.tokens)
    for token, role, share in zip(visit.tokens, visit.roles, visit.shares, strict=True):
        groups[token, role].append(share)
        roles[role] += 1
    sources = sorted(
        (Source(t, r, len(found) / n, float(np.mean(found))) for (t, r), found in groups.items()),
        key=lambda s: (-s.frequency, -s.share),
    )
    neurons = tuple(Upstream(*place, *told) for place, told in zip(visit.kept, visit.told, strict=True))
    change = float((visit.plus - visit.minus)[half == 1].mean()) if visit.parent is None else None
    rank_score, score, frequency = visit.worth
    return Node(
        visit.id, None if visit.parent is None else visit.parent.id, visit.depth, visit.layer, visit.head,
        rank_score, score, frequency, change, tuple(sources[:SHOWN]), {r: c / n for r, c in roles.most_common()},
        neurons,
    )  # fmt: skip
