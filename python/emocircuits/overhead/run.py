"""The measurement: contenders side by side on one set of weights, checked against each other, timed pair by pair."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emocircuits.environment import provenance
from emocircuits.overhead import agreement, memory
from emocircuits.overhead.contenders import BASELINE, Contender, Unavailable
from emocircuits.overhead.generation import PHASES, Settings, Times, logits, timed
from emocircuits.overhead.ratios import Ratio, ratio
from emocircuits.overhead.subject import Subject

SCHEMA = "emocircuits/overhead"
VERSION = 1
CHECKED = 4
"""Generated tokens that contenders are compared on, the prefill's among them."""
FEWEST, MOST = 3, 61
"""Pairs of a contender with the untouched model."""
RECOMPILES = 256


@dc.dataclass
class _Entry:
    """A contender and what is known of it."""

    contender: Contender
    settings: Settings
    model: nn.Module | None = None
    undo: contextlib.ExitStack = dc.field(default_factory=contextlib.ExitStack)
    status: str = "ready"
    reason: str | None = None
    memory: int | None = None
    times: list[Times] = dc.field(default_factory=list)
    pairs: dict[str, tuple[list[Times], list[Times]]] = dc.field(default_factory=dict)
    """By name of the reference: times of this contender, and of the reference beside them."""

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.undo.close()
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(
    subject: Subject,
    competing: Sequence[Contender],
    settings: Settings,
    *,
    seconds: float = 120.0,
    prepare_seconds: float = math.inf,
    fewest: int = FEWEST,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The record of one subject: every contender's times, memory and ratios, or why it has none.

    Args:
        subject: the model, its prompt and the plans.
        competing: the baseline first.
        settings: of the generations.
        seconds: for the timed pairs, all contenders together.
        prepare_seconds: contenders that could only be prepared after this time are left out: compilation takes minutes.
        fewest: pairs that are timed whatever they take.
        quick: leave out contenders that compile for long.
        progress: bars on standard error.

    Raises:
        Disagreement: contenders of one intervention do not give the same logits.
        ValueError: too few tokens, or the baseline is not the first.
    """
    if settings.tokens < CHECKED:
        raise ValueError(f"--new-tokens {settings.tokens}: expected at least {CHECKED}")
    if competing[0].name != BASELINE:
        raise ValueError(f"the first contender is {competing[0].name!r}: expected the baseline, {BASELINE!r}")
    begin = time.perf_counter()
    entries = [_Entry(one, _settings(one, settings)) for one in competing]
    if quick:
        for entry in entries:
            if entry.contender.slow_start:
                entry.drop("skipped", "compiles for longer than a quick run lasts; leave --quick out")
    with contextlib.ExitStack() as stack, _room_for_graphs(), torch.no_grad():
        for entry in entries:
            stack.push(entry.undo)
        seen = _prepare(subject, entries, prepare_seconds, progress)
        agreed = agreement.check(seen, list(competing), next(subject.model.parameters()).dtype)
        del seen
        ready = [entry for entry in entries if entry.status == "ready"]
        stock = [entry for entry in ready if entry.contender.kind == "stock"]
        others = [entry for entry in ready if entry.contender.kind != "stock"]
        # First the untouched models, since the fastest of them is what the others are held against as well.
        share = seconds * len(stock) / max(1, len(ready) + len(others))
        base = entries[0]
        _time([(one, base) for one in stock[1:]], subject, share, fewest, progress, "untouched")
        best = _best(stock)
        pairs = [(one, base) for one in others]
        if best is not base:
            pairs += [(one, best) for one in others if one.contender.kind == "ours"]
        _time(pairs, subject, seconds - share, fewest, progress, "contenders")
        if not base.times:  # nobody to be timed beside
            base.times = [timed(_model(base), subject.inputs, base.settings) for _ in range(fewest)]
        if subject.device.type == "cpu":
            with memory.exact():
                timed(_model(base), subject.inputs, base.settings)  # what stays for good stays from here on
                for entry in ready:
                    _remember(subject, entry, memory.used(subject.device))
        rows = [_row(entry) for entry in entries]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": subject.about(),
        "settings": {**dc.asdict(settings), "seconds": seconds, "quick": quick},
        "memory_method": memory.METHODS.get(subject.device.type, "not measured on this device"),
        "best_stock": best.contender.name,
        "agreement": [one.to_dict() for one in agreed],
        "contenders": rows,
        "seconds": time.perf_counter() - begin,
        **provenance(subject.device.type),
    }


def _settings(contender: Contender, asked: Settings) -> Settings:
    if contender.cache is None or contender.cache == asked.cache:
        return asked
    return dc.replace(asked, cache=contender.cache, compiled=asked.compiled and contender.cache == "static")


@contextlib.contextmanager
def _room_for_graphs() -> Iterator[None]:
    """Every contender compiles the same code on a model object of its own.

    Torch would give up after eight graphs, and by itself does not look at hooks when it chooses one of them: a model
    with hooks would run the graph of the model without.
    """
    with torch._dynamo.config.patch(
        recompile_limit=RECOMPILES, accumulated_recompile_limit=16 * RECOMPILES, skip_nnmodule_hook_guards=False
    ):
        yield


def _prepare(subject: Subject, entries: list[_Entry], seconds: float, progress: bool) -> dict[str, Tensor]:
    """Install, run and measure the memory of every contender; the logits of those that run, for one text."""
    seen: dict[str, Tensor] = {}
    tokens: Tensor | None = None
    begin = time.perf_counter()
    waiting = [entry for entry in entries if entry.status == "ready"]
    for entry in (bar := tqdm(waiting, desc="preparing", disable=not progress, leave=False)):
        bar.set_postfix_str(entry.contender.name)
        if seen and time.perf_counter() - begin > seconds:
            entry.drop("skipped", f"the {seconds:g} s for preparing contenders were used up")
            continue
        try:
            if tokens is None:
                tokens = _text(subject, entry.settings)
            seen[entry.contender.name] = _ready(subject, entry, tokens)
        except (Unavailable, NotImplementedError) as error:
            entry.drop("skipped", _line(error))
        except torch.OutOfMemoryError:
            entry.drop("skipped", "does not fit into the memory of this device")
        except Exception as error:  # whatever a library raises is its result here, except for the baseline
            if entry.contender.name == BASELINE:
                raise
            entry.drop("failed", f"{type(error).__name__}: {_line(error)}")
        if entry.contender.name == BASELINE and entry.status != "ready":
            raise ValueError(f"the untouched model cannot run: {entry.reason}")
    return seen


def _text(subject: Subject, settings: Settings) -> Tensor:
    """What everybody is made to say while compared: any tokens do, these are arbitrary words."""
    g = torch.Generator().manual_seed(0)
    batch = subject.inputs["input_ids"].shape[0]
    return torch.randint(8, 60, (batch, CHECKED), generator=g).to(subject.device)


def _ready(subject: Subject, entry: _Entry, tokens: Tensor) -> Tensor:
    device = subject.device
    before = memory.used(device) if device.type == "cuda" else None  # a CPU's is taken at the end
    model = entry.model = subject.copy()
    entry.undo.enter_context(entry.contender.install(model, subject))
    # Of the same length as the timed generations, so that the same graphs serve; the rest of the text is the last word.
    text = torch.cat([tokens, tokens[:, -1:].expand(-1, entry.settings.tokens - tokens.shape[1])], 1)
    found = logits(model, subject.inputs, entry.settings, text)[:, : tokens.shape[1]]
    if entry.settings.compiled:  # graphs are recorded in the second run at the latest
        timed(model, subject.inputs, entry.settings)
    if before is not None:
        _remember(subject, entry, before)
    if not bool(torch.isfinite(found).all()):
        raise ArithmeticError("its logits are not finite")
    return found


def _remember(subject: Subject, entry: _Entry, before: int | None) -> None:
    peak = memory.peak(lambda: timed(_model(entry), subject.inputs, entry.settings), subject.device)
    if before is not None and peak is not None:
        entry.memory = max(0, peak - before)


def _model(entry: _Entry) -> nn.Module:
    assert entry.model is not None
    return entry.model


def _time(
    pairs: list[tuple[_Entry, _Entry]], subject: Subject, seconds: float, fewest: int, progress: bool, what: str
) -> None:
    """Time pairs in turn until the seconds are used up: A B, then B A, so that drift cancels."""
    if not pairs:
        return
    begin = time.perf_counter()
    with tqdm(total=round(seconds), desc=f"timing, {what}", unit="s", disable=not progress, leave=False) as bar:
        for number in range(MOST):
            for one, other in pairs:
                mine, theirs = one.pairs.setdefault(other.contender.name, ([], []))
                for entry in (one, other) if number % 2 == 0 else (other, one):
                    times = timed(_model(entry), subject.inputs, entry.settings)
                    entry.times.append(times)
                    (mine if entry is one else theirs).append(times)
                bar.n = min(round(seconds), round(time.perf_counter() - begin))
                bar.set_postfix_str(f"{number + 1} pairs")
            elapsed = time.perf_counter() - begin
            # One more round has to fit; and an even number of them, so that each was first as often as second.
            if number + 1 >= fewest and elapsed * (number + 2) / (number + 1) > seconds:
                break


def _best(stock: list[_Entry]) -> _Entry:
    """The untouched model with the shortest generation; the baseline, where nobody is faster beyond doubt."""
    base, *others = stock
    found = {one.contender.name: _ratio(one, base.contender.name, "whole") for one in others}
    faster = [one for one in others if found[one.contender.name].high < 1.0]
    return min(faster, key=lambda one: found[one.contender.name].median, default=base)


def _ratio(entry: _Entry, to: str, phase: str) -> Ratio:
    mine, theirs = entry.pairs[to]
    return ratio([getattr(times, phase) for times in mine], [getattr(times, phase) for times in theirs])


def _row(entry: _Entry) -> dict[str, Any]:
    one = entry.contender
    row: dict[str, Any] = {
        "name": one.name, "title": one.title, "kind": one.kind, "intervention": one.intervention,
        "status": entry.status, "reason": entry.reason, "cache": entry.settings.cache,
        "compiled": entry.settings.compiled,
    }  # fmt: skip
    if entry.status != "ready":
        return row
    row["status"] = "timed"
    row["memory_bytes"] = entry.memory
    row["runs"] = len(entry.times)
    for i, phase in enumerate(PHASES):
        p20, p50, p80 = np.percentile([times[i] for times in entry.times], [20, 50, 80])
        row[phase] = {"p20_s": float(p20), "p50_s": float(p50), "p80_s": float(p80)}
    row["ratios"] = {to: {phase: _ratio(entry, to, phase)._asdict() for phase in PHASES} for to in entry.pairs}
    return row


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
