"""One head of a tree while it is measured: its source tokens, and what neurons and heads there are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emocircuits.circuits.passes import Pass


class Visit:
    """A head, read in one row of every pair along one direction.

    Args:
        layer, head: where.
        pairs: how many.
        rows: ``[pairs]`` columns in which it is read; None: the last ones.
        u: ``[pairs, D]`` what its output is read along.
        parent: the visit that led here.

    Attributes:
        plus, minus: ``[pairs]`` contributions on X+ and X-.
        columns: ``[pairs]`` source tokens; ``tokens``, ``roles``, ``shares`` say what they are.
        rank, test: ``[E, layer, I]`` shares of the root's change, by emotion, of the neurons below this head, mean over
            each half.
        activity: ``[layer, I]`` mean size of the activations at the source tokens on X+, on the ranking half.
        signs: ``[layer, I]`` whether neurons fire more (1) or less (-1) there on X+ than on X-, on the ranking half.
        kept: neurons, strongest on the ranking half first; ``told`` are their rank score, score and frequency, and
            ``single`` ``[pairs, kept]`` the shares of every pair.
        worth: its own rank score, score and frequency.
    """

    def __init__(
        self, layer: int, head: int, pairs: int, *, rows: np.ndarray | None = None, u: Tensor,
        parent: Visit | None = None, worth: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        self.id = -1
        self.layer, self.head, self.rows, self.u, self.parent, self.worth = layer, head, rows, u, parent, worth
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.plus, self.minus = np.zeros(pairs), np.zeros(pairs)
        self.columns = np.zeros(pairs, int)
        self.tokens, self.roles, self.shares = [""] * pairs, [""] * pairs, [0.0] * pairs
        self._there: list[tuple[Tensor, Tensor]] = []
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self.scores: Tensor = torch.empty(0)
        self.active: Tensor = torch.empty(0)
        self.changes: Tensor = torch.empty(0)
        self.head_scores: Tensor = torch.empty(0)
        self.head_gradients: Tensor = torch.empty(0)
        self.rank = self.test = self.activity = self.signs = self.single = np.empty(0)
        self.head_table = self.head_frequencies = np.empty(0)
        self.kept: list[tuple[int, int]] = []
        self.told: list[tuple[float, float, float]] = []

    @property
    def root(self) -> Visit:
        """The head that the tree belongs to."""
        return self if self.parent is None else self.parent.root

    def read(self, which: Sequence[int], plus: Pass, source: str, loss: Tensor | None, weight: float) -> None:
        """Find the source tokens of some of the pairs, and keep what neurons and heads do there on X+.

        Args:
            which: numbers of the pairs.
            plus: their pass on X+, with gradients.
            source: how the source token is chosen.
            loss: of a root and ``source="gradient"``, what A is differentiated with respect to.
            weight: of the gradients on this side.
        """
        contribution, u = self._contribution(which, plus)
        self.plus[which] = size = _numbers(contribution)
        # c is linear in the values, with A[N,t] u in front of v_t: attention weights need not be formed.
        (values,) = plus.gradients(contribution.sum(), [("v", self.layer)])
        group = self.head // plus.group
        square = u.square().sum(-1, keepdim=True).clamp_min(1e-30)
        weights = (values.detach()[:, :, group] @ u[:, :, None])[..., 0] / square
        v = plus.values(self.layer)[:, :, group].detach()
        terms = weights * (v @ u[:, :, None])[..., 0]
        rating = terms
        if source == "attention":
            rating = weights
        elif loss is not None:
            (along,) = plus.gradients(loss, [("z", self.layer)])
            at, rows = self._rows(which, plus)
            rating = weights * (v @ along[at, rows, self.head][:, :, None])[..., 0]
        column = rating.masked_fill(weights <= 0, -torch.inf).argmax(-1).cpu()
        self.columns[which] = column.numpy()
        for i, (number, c) in enumerate(zip(which, column.tolist(), strict=True)):
            self.tokens[number], self.roles[number] = plus.token(i, c)
            self.shares[number] = float(terms[i, c]) / float(size[i]) if size[i] else 0.0
        self._there = self._at_source(which, plus)
        self._gradients = self._weighted(which, plus, weight)

    def compare(
        self, which: Sequence[int], minus: Pass, weight: float, screen: tuple[list[Tensor], list[Tensor]] | None
    ) -> None:
        """Score neurons and heads at the source tokens of the same pairs, by the pass on X-.

        Args:
            which: numbers of the pairs.
            minus: their pass on X-; with gradients where ``weight`` is not 0.
            weight: of the gradients on this side.
            screen: for the fast screen, by layer ``S/|S|`` of every pair and what neurons write.
        """
        self.minus[which] = _numbers(self._contribution(which, minus)[0])
        there, gradients = self._at_source(which, minus), self._weighted(which, minus, weight)
        self._sizes(minus, len(self.plus))
        for l in range(self.layer):
            (a, z), (a_minus, z_minus) = self._there[l], there[l]
            g, g_head = (x + y for x, y in zip(self._gradients[l], gradients[l], strict=True))
            if screen is None:
                score = (a - a_minus) * g
            else:
                units, writes = screen
                score = a * (units[l].to(writes[l]) @ writes[l]).to(a)
            self.scores[which, l], self.active[which, l] = self._like(score), self._like(a.abs())
            self.changes[which, l] = self._like(a - a_minus)
            self.head_scores[which, l] = self._like(((z - z_minus) * g_head).sum(-1))
            self.head_gradients[which, l] = self._like(g_head)
        self._there, self._gradients = [], []

    def _like(self, x: Tensor) -> Tensor:
        return x.to(self.scores)

    def _rows(self, which: Sequence[int], one: Pass) -> tuple[Tensor, Tensor]:
        at = torch.arange(len(which))
        last = torch.full_like(at, one.ids.shape[1] - 1)
        return at, last if self.rows is None else torch.as_tensor(self.rows[list(which)])

    def _contribution(self, which: Sequence[int], one: Pass) -> tuple[Tensor, Tensor]:
        """``c [B]`` and ``u [B, D]``."""
        at, rows = self._rows(which, one)
        z = one.z(self.layer)[at, rows, self.head]
        u = self.u[list(which)].to(z)
        return (z * u).sum(-1), u

    def _at_source(self, which: Sequence[int], one: Pass) -> list[tuple[Tensor, Tensor]]:
        """By layer: neurons ``[B, I]`` and head outputs ``[B, H, D]`` at the source tokens."""
        at, column = torch.arange(len(which)), torch.as_tensor(self.columns[list(which)])
        return [(one.neurons(l).detach()[at, column], one.z(l).detach()[at, column]) for l in range(self.layer)]

    def _weighted(self, which: Sequence[int], one: Pass, weight: float) -> list[tuple[Tensor, Tensor]]:
        """By layer: gradients of c with respect to them, times a weight."""
        at, column = torch.arange(len(which)), torch.as_tensor(self.columns[list(which)])
        below = range(self.layer)
        if not weight or not below:
            zero = torch.zeros((), device=one.ids.device)
            return [(zero, zero) for _ in below]
        wanted = [*(("neurons", l) for l in below), *(("z", l) for l in below)]
        found = one.gradients(self._contribution(which, one)[0].sum(), wanted)
        found = [g.detach()[at, column] * weight for g in found]
        return list(zip(found[: self.layer], found[self.layer :], strict=True))

    def _sizes(self, one: Pass, pairs: int) -> None:
        """Make room for the scores of all pairs."""
        if len(self.scores):
            return
        heads, dim = one.z(self.layer).shape[-2:]
        neurons = one.neurons(0).shape[-1]
        wide = torch.promote_types(one.z(self.layer).dtype, torch.float32)
        self.scores, self.active, self.changes = (torch.zeros(pairs, self.layer, neurons, dtype=wide) for _ in range(3))
        self.head_scores = torch.zeros(pairs, self.layer, heads, dtype=wide)
        self.head_gradients = torch.zeros(pairs, self.layer, heads, dim, dtype=wide)

    def settle(self, emotions: Sequence[str], half: np.ndarray, by: str, keep: int, breadth: int) -> None:
        """Make the tables, when all pairs have been measured.

        Args:
            emotions: of every pair.
            half: of every pair.
            by: ranking by the mean over "all" emotions or by that of one "emotion".
            keep: neurons that are named.
            breadth: neurons and heads of a pair that count for the frequency.
        """
        change = self.root.plus - self.root.minus
        units = [float(change[half == i].mean()) for i in (0, 1)]
        self.rank, self.test = (self._shares(self.scores, emotions, half, i, units[i]) for i in (0, 1))
        first_half = torch.as_tensor(half == 0)
        self.activity = self.active[first_half].double().mean(0).numpy()
        self.signs = self.changes[first_half].mean(0).sign().numpy()
        of_heads = [self._shares(self.head_scores, emotions, half, i, units[i]) for i in (0, 1)]
        self.head_table = np.stack(both(of_heads[0], of_heads[1], by))
        first = _frequencies(self.scores, breadth)
        ranks, tests = both(self.rank, self.test, by)
        self.kept = _first(ranks, keep)
        scale = np.array(units)[half]
        self.single = np.zeros((len(half), len(self.kept)))
        for i, (layer, neuron) in enumerate(self.kept):
            self.single[:, i] = self.scores[:, layer, neuron].double().numpy() / scale
            worth = float(ranks[layer, neuron]), float(tests[layer, neuron])
            self.told.append((*worth, float(first[layer, neuron])))
        self.head_frequencies = _frequencies(self.head_scores, breadth)

    def _shares(self, scores: Tensor, emotions: Sequence[str], half: np.ndarray, which: int, unit: float) -> np.ndarray:
        names, found = list(dict.fromkeys(emotions)), []
        for name in names:
            chosen = [i for i, e in enumerate(emotions) if e == name and half[i] == which]
            found.append(scores[chosen].double().mean(0).numpy() / unit)
        return np.stack(found)

    def followed(self, breadth: int, least: float) -> list[tuple[int, int]]:
        """Heads that write enough to the source tokens, strongest on the ranking half first."""
        table = self.head_table[0]
        return [place for place in _first(table, breadth) if table[place] >= least]

    def child(self, layer: int, head: int, u: Tensor | None) -> Visit:
        """The visit of a head that writes to the source tokens, along ``u`` or else along its gradient there."""
        rank, test = (float(self.head_table[i, layer, head]) for i in (0, 1))
        worth = rank, test, float(self.head_frequencies[layer, head])
        along = self.head_gradients[:, layer, head].clone() if u is None else u
        return Visit(layer, head, len(self.plus), rows=self.columns, u=along, parent=self, worth=worth)

    def drop(self) -> None:
        """Forget what only growing the tree needed."""
        self.scores = self.active = self.changes = self.head_scores = self.head_gradients = torch.empty(0)


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def both(rank: np.ndarray, test: np.ndarray, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Of tables ``[E, ...]`` of both halves: the mean over emotions, or the largest emotion of the ranking half."""
    if by == "all":
        return rank.mean(0), test.mean(0)
    best = rank.argmax(0)[None]
    first, other = (np.take_along_axis(t, best, 0) for t in (rank, test))
    return first.squeeze(0), other.squeeze(0)


def _first(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Places of the largest values of ``[layer, n]``, positive ones only."""
    order = np.argsort(-table, axis=None, kind="stable")[:count]
    places = [(int(i // table.shape[1]), int(i % table.shape[1])) for i in order]
    return [p for p in places if table[p] > 0]


def _frequencies(scores: Tensor, count: int) -> np.ndarray:
    """``[layer, n]``: share of the pairs in which each is among the first ``count`` and positive."""
    flat = scores.flatten(1)
    if not flat.shape[1]:
        return np.zeros(scores.shape[1:])
    best = flat.topk(min(count, flat.shape[1]), dim=1)
    hits = torch.zeros_like(flat).scatter(1, best.indices, (best.values > 0).float())
    return hits.mean(0).view(scores.shape[1:]).double().numpy()
