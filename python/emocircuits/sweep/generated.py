"""What a patched prompt makes the model say: greedy decoding from patched keys and values, scored as text.

A patch acts in the pass over the prompt alone. Its keys and values of later layers and columns are kept from that pass
(all others are the base run's), and the tokens that follow are the model's own work on them (:mod:`.decoding`).
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emocircuits.families import Handle
from emocircuits.sweep.decoding import Prompt, Stop, decode, prepare
from emocircuits.sweep.engine import Run, tokens
from emocircuits.sweep.keys import span
from emocircuits.sweep.metrics import Metric
from emocircuits.sweep.readout import Finish, Readout
from emocircuits.sweep.resume import Group
from emocircuits.sweep.targets import Target, Variant
from emocircuits.sweep.trace import Trace

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

Said = str | list[int]
ROWS = 128
"""Rows that are decoded together, where memory allows: more gain little."""
SHARE = 0.25
"""Of the free memory of a GPU, what their caches may take."""
CPU_BYTES = 1 << 30


@dc.dataclass(frozen=True)
class Generated(Metric):
    """A score of what the model says after the prompt.

    Attributes:
        score: from the text, or from the token ids without a tokenizer, to one number.
        limit: new tokens at most.
        stop: where a text ends besides the model's own end; see :func:`generated`.
        vocabulary: SHA-256 of the tokenizer's, "" without one.
        tokenizer: makes text of token ids.
    """

    score: Callable[[Any], Any] = float
    limit: int = 16
    stop: tuple[int, ...] | tuple[str, ...] | None = None
    vocabulary: str = ""
    tokenizer: dc.InitVar[Any] = None

    def __post_init__(self, tokenizer: Any) -> None:
        """Keep the tokenizer out of what identifies the metric."""
        object.__setattr__(self, "_tokenizer", tokenizer)

    def prompt(self, handle: Handle, inputs: Any) -> Prompt:
        """See :func:`~.decoding.prepare`."""
        return prepare(handle.model, inputs, limit=self.limit, stop=self.stop, tokenizer=self.__dict__["_tokenizer"])

    def said(self, ids: Sequence[int]) -> Said:
        """The text of new tokens, without special ones; the tokens themselves where there is no tokenizer."""
        tokenizer = self.__dict__["_tokenizer"]
        return list(ids) if tokenizer is None else str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def of(self, said: Said) -> float:
        """The score.

        Raises:
            ValueError: it is not one finite number.
        """
        value = torch.as_tensor(self.score(said))
        if value.numel() != 1 or not math.isfinite(float(value)):
            raise ValueError(f"the score of {said!r} is {value.tolist()}, expected one finite number")
        return float(value)

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """Scores are what is read, ``[n, 1, 1]``: they are made where the texts are."""
        return read[:, 0, 0]


def generated(
    score: Callable[[Any], Any], *, limit: int = 16, stop: Stop | None = None, tokenizer: Any = None
) -> Metric:
    """A score of what the model says after the patched prompt, decoded greedily.

    A patch acts in the pass over the prompt alone: the tokens that follow come from the model as it is, on the patched
    keys and values. The texts are in the result's ``texts``, those of the two prompts in its ``meta["texts"]``.

    Args:
        score: from the text to one number, such as :func:`contains`; without a tokenizer it gets the list of token ids.
            Equal texts are scored once.
        limit: new tokens at most.
        stop: token ids at which a text ends in place of the model's own end of sequence, or strings, besides it.
        tokenizer: of the model, or its processor.

    Raises:
        ValueError: a limit below 1.
        TypeError: a score that cannot be called.
    """
    if not callable(score):
        raise TypeError(f"score is {type(score).__name__}: expected a function from the generated text to one number")
    if isinstance(score, Contains) and tokenizer is None:
        raise ValueError("contains(...) reads words: give tokenizer=")
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1 token")
    ends: Any = None if stop is None else (stop,) if isinstance(stop, int | str) else tuple(stop)
    words = getattr(tokenizer, "tokenizer", tokenizer)
    known = "" if words is None else json.dumps(sorted(words.get_vocab().items()))
    digest = hashlib.sha256(known.encode()).hexdigest() if known else ""
    return Generated(-1, score, int(limit), ends, digest, words)


@dc.dataclass(frozen=True)
class Contains:
    """1.0 for a text in which one of the words stands by itself, whatever its case, else 0.0."""

    words: tuple[str, ...]

    def __call__(self, text: str) -> float:  # noqa: D102
        return float(any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in self.words))


def contains(words: str | Sequence[str]) -> Contains:
    """A score for :func:`generated`: 1.0 when any of the words is in the text, as a whole word in any case, else 0.0.

    Raises:
        ValueError: no words.
    """
    chosen = (words,) if isinstance(words, str) else tuple(words)
    if not chosen or not all(isinstance(w, str) and w.strip() for w in chosen):
        raise ValueError(f"words are {words!r}: expected at least one word")
    return Contains(tuple(w.strip() for w in chosen))


class Continuation(Readout):
    """What the model says after each prompt of a pair, and scores of it, in place of logits.

    Attributes:
        prompts: by side.
        said: texts, by side of the pair and by variant.
    """

    def __init__(self, sweep: Sweep, clean: Trace, finish: Finish) -> None:
        assert isinstance(sweep.metric, Generated)
        self.generated = sweep.metric
        sides = {"clean": sweep.clean_inputs, "corrupt": sweep.corrupt_inputs}
        self.prompts = {side: sweep.metric.prompt(sweep.handle, inputs) for side, inputs in sides.items()}
        self.said: dict[Any, Said] = {}
        self._scores: dict[tuple[int, ...], tuple[Said, float]] = {}
        self._base: dict[str, Tensor] = {}
        _check(self.prompts["clean"], clean)
        super().__init__(sweep.handle, sweep.metric, clean, sweep.base, finish)
        config: Any = sweep.handle.model.generation_config
        self.identity = {"generation": config.to_diff_dict()}

    def of(self, run: Trace) -> Tensor:
        """The score of what the model says after an unpatched prompt, ``[1, 1, 1]``."""
        if run.side not in self._base:
            prompt = self.prompts[run.side]
            cache = prompt.cache([r.k for r in run.layers], [r.v for r in run.layers])
            (ids,) = decode(prompt, cache, self.logits(run.layers[-1].resid_post[-1:]))
            self.said[run.side], score = self.scored(ids)
            self._base[run.side] = torch.tensor([[[score]]], dtype=torch.float64, device=ids.device)
        return self._base[run.side]

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``[n, V]`` of what leaves the last layer."""
        return super().read(x)

    def read(self, x: Tensor) -> Tensor:
        """Refuse to score one pass.

        Raises:
            NotImplementedError: always: texts are made in many passes.
        """
        raise NotImplementedError(
            "generated text is not read from one pass over a prompt, and has no gradient; use a metric of logits here"
        )

    def scored(self, ids: Tensor) -> tuple[Said, float]:
        """The text of new tokens ``[n]``, and its score."""
        key = tuple(ids.tolist())
        if key not in self._scores:
            said = self.generated.said(key)
            self._scores[key] = said, self.generated.of(said)
        return self._scores[key]

    def take(self, variant: Any) -> Said:
        """What a variant said, heard once."""
        return self.said.pop(variant)


class GeneratingRun(Run):
    """Patched prompts of one or several layers, read one after the other, continued together."""

    readout: Continuation

    def tokens(self) -> int:
        """Columns of all rows that are decoded together."""
        record, item = self.sweep.base.layers[0], self.sweep.base.layers[0].k.element_size()
        # Filled, and once more while the model's own cache takes it.
        row = 2 * item * len(self.sweep.base.layers) * (record.k[0, :, 0].numel() + record.v[0, :, 0].numel())
        row *= self.sweep.columns + self.readout.generated.limit
        room = CPU_BYTES
        if record.k.is_cuda:
            room = int(SHARE * torch.cuda.mem_get_info(record.k.device)[0])
        return max(1, min(ROWS, room // row)) * self.sweep.columns

    def size(self, v: Variant) -> int:
        """Columns of its cache; 0 for a variant that changes nothing."""
        return self.sweep.columns if self.columns(v) else 0

    def chunk(self, variants: Sequence[Variant], at: int, budget: int) -> int:
        """Where the rows end that are decoded together."""
        end, used = at, 0
        while end < len(variants):
            used += self.size(variants[end])
            if used > budget and end > at:
                break
            end += 1
        return end

    def values(self, variants: Sequence[Variant]) -> Tensor:
        """Scores ``[n]`` float64; the texts go to the readout."""
        side = self.sweep.base.side
        found = self.readout.value(self.readout.base).expand(len(variants)).clone()
        self.readout.said |= dict.fromkeys(variants, self.readout.said[side])
        todo = [i for i, v in enumerate(variants) if self.columns(v)]
        if not todo:
            return found
        chosen = [variants[i] for i in todo]
        layers = self.sweep.base.layers
        filled = [[x.expand(len(todo), -1, -1, -1).clone() for x in (r.k, r.v)] for r in layers]
        logits, at = [], 0
        while at < len(chosen):
            end = self._piece(chosen, at)
            logits.append(self._read(chosen[at:end], [[x[at:end] for x in both] for both in filled]))
            at = end
        prompt = self.readout.prompts[side]
        # Let go of while the cache takes them.
        cache = prompt.cache(*([filled[i].pop(0) for i in range(len(layers))] for _ in range(2)))
        with self.sweep.products, self.target.steps(self.sweep, chosen, cache) as keep:
            for i, ids in zip(todo, decode(prompt, cache, torch.cat(logits), keep), strict=True):
                self.readout.said[variants[i]], found[i] = self.readout.scored(ids)
        return found

    def _piece(self, variants: Sequence[Variant], at: int) -> int:
        """Where a batch of the pass over the prompt ends: variants of one layer, and one kind of entry."""
        end, used, budget, head = at, 0, tokens(self.sweep), variants[at]
        while end < len(variants):
            v = variants[end]
            used += super().size(v)
            if v.layer != head.layer or (v.column is None) != (head.column is None) or (used > budget and end > at):
                break
            end += 1
        return end

    def _read(self, variants: Sequence[Variant], filled: list[list[Tensor]]) -> Tensor:
        """Logits ``[n, V]`` of the last column; keys and values that the patches change go to ``filled``."""

        def watch(layer: int, groups: tuple[Group, ...], k: Tensor, v: Tensor) -> None:
            row = start = 0
            for g in groups:
                rows, part = slice(row, row + g.count), slice(start, start + g.size)
                for whole, new in zip(filled[layer], (k, v), strict=True):
                    whole[rows, :, span(g.columns)] = new[:, part].unflatten(1, (g.count, -1)).transpose(0, 1)
                row, start = row + g.count, start + g.size

        self.decoder.watch = watch
        try:
            packed = self.patched(variants)
        finally:
            self.decoder.watch = None
        self._set(variants, filled)
        return self.readout.logits(self._last(packed.groups, packed.x, len(variants)))

    def _last(self, groups: Sequence[Group], x: Tensor, rows: int) -> Tensor:
        """The last column ``[rows, d_model]`` of what leaves the last layer, the base run's where it did not change."""
        last = self.sweep.columns - 1
        out = self.sweep.base.layers[-1].resid_post[-1:].expand(rows, -1).clone()
        row = start = 0
        for g in groups:
            if last in g.columns:
                out[row : row + g.count] = x[start : start + g.size].unflatten(0, (g.count, -1))[
                    :, g.columns.index(last)
                ]
            row, start = row + g.count, start + g.size
        return out

    def _set(self, variants: Sequence[Variant], filled: list[list[Tensor]]) -> None:
        """Keys and values that are patched themselves."""
        if self.target.kind != "qkv":
            return
        g = self.sweep.handle.geometry
        for row, v in enumerate(variants):
            assert v.unit is not None
            if v.unit >= g.heads:
                which, head = divmod(v.unit - g.heads, g.kv_heads)
                at, entry = span(self.columns(v)), self.entry(v.layer)
                filled[v.layer][which][row, head, at] = entry.patched[at, v.unit]


def positioned(handle: Handle, metric: Metric, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Model inputs of a padded prompt with the positions that ``model.generate`` gives it, which skip the padding.

    A plain forward pass counts it: the same for rotary embedding, which knows distances only, and not for learned
    positions.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(metric, Generated) or inputs.get("position_ids") is not None or mask is None or bool(mask.all()):
        return inputs
    positions = metric.prompt(handle, inputs).arguments.get("position_ids")
    if positions is None or positions.ndim != 2:
        return inputs  # of three axes and images: found from the mask in every pass
    return {**inputs, "position_ids": positions}


def readout(sweep: Sweep, clean: Trace, finish: Finish) -> Readout:
    """What reads a sweep's metric."""
    if isinstance(sweep.metric, Generated):
        return Continuation(sweep, clean, finish)
    return Readout(sweep.handle, sweep.metric, clean, sweep.base, finish)


def runner(sweep: Sweep, target: Target) -> Run:
    """What runs its patches."""
    return (GeneratingRun if isinstance(sweep.metric, Generated) else Run)(sweep, target)


def _check(prompt: Prompt, run: Trace) -> None:
    """The cache that a prompt leaves must hold what attention saw.

    Raises:
        NotImplementedError: it holds something else.
    """
    cache, _ = prompt.prefill()
    mask = prompt.arguments.get("attention_mask")
    near = 5e-2 if run.layers[0].k.element_size() == 2 else 1e-3
    for i, (layer, record) in enumerate(zip(cache.layers, run.layers, strict=True)):
        for theirs, ours in ((layer.keys, record.k), (layer.values, record.v)):
            kept = theirs.shape[2]
            at: Any = slice(None) if mask is None else mask[0, -kept:].bool()
            same = theirs.shape[:2] == ours.shape[:2] and theirs.shape[3] == ours.shape[3]
            if not same or not torch.allclose(
                theirs[:, :, at], ours[:, :, -kept:][:, :, at], rtol=0, atol=near * float(ours.abs().max())
            ):
                raise NotImplementedError(
                    f"layer {i} of {type(prompt.model).__name__} keeps something else in its cache than the keys and "
                    "values that its attention reads, so decoding cannot go on from patched ones"
                )
