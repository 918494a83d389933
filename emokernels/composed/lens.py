"""The logit lens in blocks of the vocabulary: one pass, memory bounded whatever N and V are.

A block of logits updates three numbers a row, as online softmax does: the maximum m, ``l = sum exp(x - m)`` and
``t = sum exp(x - m) (m - x)``. With a new maximum m', ``t`` becomes ``exp(m - m') (t + (m' - m) l)``. In the end
``lse = m + log l`` and the entropy is ``log l + t / l``: sums of terms that are not negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import host
from .softmax import accumulator

ROWS = 512
"""Rows in one block of logits: enough to read a block of the unembedding from memory once for good products."""
LOGITS = 1 << 19
"""Logits in one block (2 MB of float32)."""
DEVICE_ROWS, DEVICE_LOGITS = 1 << 12, 1 << 24
"""The same on a GPU, which is paid per launch."""
WEIGHTS = 1 << 22
"""Elements of the unembedding converted to float32 at a time."""


def measure_lens(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, sets: Tensor | None, top_k: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy ``[N]``, set probabilities ``[N, S]``, ids and log probabilities ``[N, k]`` of the likeliest tokens.

    hidden ``[N, d]``, unembed ``[V, d]``, bias ``[V]``, sets ``[S, L]`` with -1 for no token, each id once.
    """
    wide = accumulator(hidden.dtype)
    n, vocabulary = hidden.shape[0], unembed.shape[0]
    most, logits = (ROWS, LOGITS) if host.owns(hidden) else (DEVICE_ROWS, DEVICE_LOGITS)
    rows = min(n, most)
    width = max(1, logits // rows)
    if unembed.dtype != wide:
        width = max(1, min(width, WEIGHTS // unembed.shape[1]))
    sums = _SetSums(sets, hidden, wide, range(0, vocabulary, width))
    lens = _Running(hidden, wide, top_k, sums, excludes=bias is not None)
    for start in range(0, vocabulary, width):
        stop = min(start + width, vocabulary)
        weight = unembed[start:stop].to(wide)
        offset = None if bias is None else bias[start:stop].to(wide)
        for first in range(0, n, rows):
            part = slice(first, min(first + rows, n))
            lens.add(_logits(hidden[part].to(wide), weight, offset, softcap), part, start)
    logarithm = lens.mass.log()
    entropy = logarithm + lens.spread / lens.mass
    # Relative to the maximum: lse itself is rounded to the precision of a logit, not of a probability.
    log_prob = lens.value.sub_(lens.top[:, None]).sub_(logarithm[:, None])
    return entropy, sums.mass.div_(lens.mass[:, None]), lens.index, log_prob


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    x = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    return x.div_(softcap).tanh_().mul_(softcap) if softcap else x


class _Running:
    """What is kept per row while the vocabulary goes by."""

    def __init__(self, hidden: Tensor, wide: torch.dtype, top_k: int, sums: _SetSums, excludes: bool) -> None:
        n = hidden.shape[0]
        self.sums, self.excludes = sums, excludes
        self.top = hidden.new_full((n,), -torch.inf, dtype=wide)
        self.mass = hidden.new_zeros(n, dtype=wide)
        self.spread = hidden.new_zeros(n, dtype=wide)
        self.value = hidden.new_full((n, top_k), -torch.inf, dtype=wide)
        self.index = hidden.new_zeros(n, top_k, dtype=torch.int64)

    def add(self, x: Tensor, rows: slice, start: int) -> None:
        """Take in the logits ``x [rows, width]`` of the vocabulary from `start`; x is used up."""
        highest = x.amax(-1)
        if self.value.shape[1]:
            self._rank(x, highest, rows, start)
        before, mass, spread = self.top[rows], self.mass[rows], self.spread[rows]
        top = torch.maximum(before, highest)
        # A row whose tokens are all excluded so far has no maximum to refer to.
        base = top.masked_fill(top == -torch.inf, 0.0)
        x.sub_(base[:, None])
        if self.excludes:
            x.clamp_(min=torch.finfo(x.dtype).min)  # an excluded token: 0 times a finite number
        weight = x.exp()
        fade = torch.exp(before - base)
        moved = (top - before).masked_fill(before == -torch.inf, 0.0)
        spread.add_(moved * mass).mul_(fade).sub_(x.mul_(weight).sum(-1))
        mass.mul_(fade).add_(weight.sum(-1))
        self.sums.add(weight, fade, rows, start)
        before.copy_(top)

    def _rank(self, x: Tensor, highest: Tensor, rows: slice, start: int) -> None:
        """Merge the likeliest tokens of a block into those of the rows; most rows soon have no new ones."""
        chosen = torch.arange(rows.start, rows.stop, device=x.device)
        if host.owns(x):
            better = (highest > self.value[rows, -1]).nonzero().squeeze(1)
            if better.shape[0] == 0:
                return
            chosen, x = chosen[better], x[better]
        top_k = self.value.shape[1]
        value, index = x.topk(min(top_k, x.shape[1]), -1)
        value = torch.cat([self.value[chosen], value], -1)
        index = torch.cat([self.index[chosen], index.add_(start)], -1)
        self.value[chosen], order = value.topk(top_k, -1)
        self.index[chosen] = index.gather(-1, order)


class _SetSums:
    """Mass of each token set, ``[N, S]``, from the very weights of which the mass of the vocabulary is made."""

    def __init__(self, sets: Tensor | None, hidden: Tensor, wide: torch.dtype, starts: range) -> None:
        self.count = 0 if sets is None else sets.shape[0]
        self.mass = hidden.new_zeros(hidden.shape[0], self.count, dtype=wide)
        self._tokens: dict[int, Tensor] = {}
        self._owners: dict[int, Tensor] = {}
        if sets is None:
            return
        tokens, order = sets.flatten().sort()
        owners = order // sets.shape[1]
        edges = torch.tensor([*starts, starts.stop], device=sets.device)
        cuts = torch.searchsorted(tokens, edges).tolist()
        for start, first, last in zip(starts, cuts, cuts[1:], strict=False):
            if first < last:
                self._tokens[start] = tokens[first:last] - start
                self._owners[start] = owners[first:last]

    def add(self, weight: Tensor, fade: Tensor, rows: slice, start: int) -> None:
        """Rescale the sums of `rows` and add the tokens of the block ``weight [rows, width]`` from `start`."""
        mass = self.mass[rows].mul_(fade[:, None])
        if start in self._tokens:
            member = torch.nn.functional.one_hot(self._owners[start], self.count).to(weight.dtype)
            mass.add_(weight[:, self._tokens[start]] @ member)
