"""Several prompt pairs in one sweep: one after the other, one forecast, one bar, one table with the mean.

Every pair is a sweep of its own, with its own runs of the model and its own folder. The runs of the first pairs stay in
memory while they are small; of the others one pair's are there at a time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from emocircuits.roles import prompt_roles
from emocircuits.sweep import progress
from emocircuits.sweep.attribution.prescreen import Pool, Screen
from emocircuits.sweep.identity import hash_inputs
from emocircuits.sweep.planner import Forecast, announce
from emocircuits.sweep.results import SweepResult

if TYPE_CHECKING:
    from emocircuits.sweep.api import Sweep

M = TypeVar("M", bound=Callable[..., Any])
KEPT = 512 << 20
"""Bytes of activations of pairs that are kept, so that they need not run again for the next table."""
# Inputs with one row a prompt, whatever the model; rows of pictures are not always one a prompt.
BY_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


def one_or_several(init: M) -> M:
    """``Sweep.__init__`` for one pair: given several, it makes a sweep of each, and this one goes over them."""

    @functools.wraps(init)
    def start(self: Sweep, model: Any, clean: Any, corrupt: Any, metric: Any, *args: Any, **more: Any) -> None:
        pairs = split(clean, corrupt, metric)
        if pairs is None:
            init(self, model, clean, corrupt, metric, *args, **more)
            return
        given = inspect.signature(init).bind(self, model, clean, corrupt, metric, *args, **more).arguments
        options = {k: v for k, v in given.items() if k not in ("self", "model", "clean", "corrupt", "metric")}
        self.several = Several(type(self), model, pairs, options)
        self.clean, self.corrupt = self.several.baselines

    return start  # type: ignore[return-value]


def over_pairs(method: M) -> M:
    """For a public method of ``Sweep`` that gives a table: of several pairs, the mean of their tables.

    A model that has changed since the sweep ran its prompts is refused.
    """

    @functools.wraps(method)
    def whole(self: Sweep, *args: Any, **more: Any) -> Any:
        if self.several is None:
            self.weights.check()
            return method(self, *args, **more)
        return self.several.run(method, args, more)

    return whole  # type: ignore[return-value]


def split(clean: Any, corrupt: Any, metric: Any) -> list[tuple[Any, Any, Any]] | None:
    """The pairs (clean, corrupt, metric) of what a sweep was given; None for one pair that is given as such.

    Raises:
        ValueError: not as many clean as corrupt prompts, or metrics; none; batches whose rows cannot be told apart.
    """
    sides = {"clean": _prompts(clean, "clean"), "corrupt": _prompts(corrupt, "corrupt")}
    if all(prompts is None for prompts in sides.values()):
        if isinstance(metric, list | tuple):
            raise ValueError(f"{len(metric)} metrics for one pair: expected one metric, or lists of as many prompts")
        return None
    single = [side for side, prompts in sides.items() if prompts is None]
    if single:
        other = "corrupt" if single == ["clean"] else "clean"
        raise ValueError(
            f"{other} is of several prompts, {single[0]} of one: sweep one pair at a time, or give as many of both"
        )
    cleans, corrupts = sides["clean"] or [], sides["corrupt"] or []
    if not cleans or len(cleans) != len(corrupts):
        raise ValueError(f"clean has {len(cleans)} prompts, corrupt {len(corrupts)}: expected as many, at least one")
    metrics = list(metric) if isinstance(metric, list | tuple) else [metric] * len(cleans)
    if len(metrics) != len(cleans):
        raise ValueError(f"{len(metrics)} metrics for {len(cleans)} pairs: expected one, or one for each pair")
    pairs = list(zip(cleans, corrupts, metrics, strict=True))
    for i, pair in enumerate(pairs, 1):
        if split(*pair) is not None:
            raise ValueError(f"pair {i} of {len(pairs)} is of several prompts itself: give a dict of one row for each")
    return pairs


def _prompts(given: Any, side: str) -> list[Any] | None:
    """A list of prompts, or the rows of a batch; None for one prompt."""
    if isinstance(given, list | tuple):
        return list(given)
    ids = given.get("input_ids") if isinstance(given, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) < 2:
        return None
    present = {k: v for k, v in given.items() if v is not None}
    odd = [k for k, v in present.items() if k not in BY_ROW or not isinstance(v, Tensor) or len(v) != len(ids)]
    if odd:
        raise ValueError(
            f"{side} is a batch of {len(ids)} prompts with {odd[0]}, whose rows need not be one a prompt: give a list "
            "with a dict of inputs for each prompt"
        )
    return [{k: v[i : i + 1] for k, v in present.items()} for i in range(len(ids))]


class Several:
    """Sweeps over pairs.

    Args:
        make: the class of a sweep of one pair.
        model: for all.
        pairs: clean and corrupt inputs, and the metric, of each.
        options: of a sweep; with ``out`` each pair has a folder in it, ``0001``, ``0002``, ...

    Attributes:
        baselines: mean metric of the clean and of the corrupt prompts.
        identity: a hash of all prompts, in their order; in the ``meta`` of results.

    Raises:
        TypeError, ValueError, NotImplementedError: a pair that cannot be swept; the message says which one.
    """

    def __init__(
        self, make: type[Sweep], model: Any, pairs: Sequence[tuple[Any, Any, Any]], options: Mapping[str, Any]
    ) -> None:
        self.make, self.model, self.pairs = make, model, list(pairs)
        self.options = dict(options)
        self.out, self.progress = self.options.pop("out", None), bool(self.options.pop("progress", True))
        self._kept: dict[int, Sweep] = {}
        self._room = 1
        self._hashes: dict[int, str] = {}
        self._alike: list[Any] = []
        both = []
        # All are run once before the first one is swept: a pair that is refused is refused now.
        for i in range(len(self.pairs)):
            one = self.sweep(i)
            both.append((one.clean, one.corrupt))
            self._alike.append(_alike(one))
            del one  # else it is still there while the next one is made
        clean, corrupt = torch.tensor(both, dtype=torch.float64).mean(0).tolist()
        self.baselines: tuple[float, float] = (clean, corrupt)
        self.identity = hashlib.sha256(" ".join(self._hashes.values()).encode()).hexdigest()

    def sweep(self, i: int) -> Sweep:
        """The sweep of one pair. As many are kept, with all their activations, as :data:`KEPT` bytes hold."""
        clean, corrupt, metric = self.pairs[i]
        known, now = self._hashes.setdefault(i, self._hash(i)), self._hash(i)
        if known != now:
            raise ValueError(f"pair {i + 1} of {len(self.pairs)}: its inputs were written into since the first run")
        if i not in self._kept:
            if len(self._kept) >= self._room:
                self._kept.popitem()  # its memory, before the next one needs as much; the first ones stay
            out = None if self.out is None else Path(self.out) / f"{i + 1:04d}"
            with self._named(i):
                one = self.make(self.model, clean, corrupt, metric, out=out, progress=False, **self.options)
            if not self._kept:
                self._room = max(1, KEPT // max(1, one.base.bytes + one.source.bytes))
            self._kept[i] = one
        else:
            with self._named(i):
                self._kept[i].weights.check()
        return self._kept[i]

    def _hash(self, i: int) -> str:
        clean, corrupt, _ = self.pairs[i]
        # What is no mapping is refused where the pair is made.
        return " ".join(hash_inputs(side) if isinstance(side, Mapping) else "" for side in (clean, corrupt))

    @contextlib.contextmanager
    def _named(self, i: int, pool: Pool | None = None) -> Iterator[None]:
        """Errors say of which pair they are, and screened tables are of it."""
        try:
            with contextlib.nullcontext() if pool is None else pool.pair(i):
                yield
        except (ValueError, TypeError, NotImplementedError) as error:
            if len(self.pairs) == 1 or type(error) not in (ValueError, TypeError, NotImplementedError):
                raise
            raise type(error)(f"pair {i + 1} of {len(self.pairs)}: {error}") from error

    def run(self, method: Callable[..., SweepResult], args: Sequence[Any], more: Mapping[str, Any]) -> SweepResult:
        """The mean of what a method of a sweep gives for each pair."""
        pool = self._screened(method, args, more)
        plans, results = self._plan(method, args, more, pool)
        with _meant():
            name = SweepResult.mean([plan.table for plan in plans]).meta.get("target", "sweep")
        patches = sum(plan.table.values.numel() for plan in plans)
        bar = progress.Bar(str(name), sum(plan.cost for plan in plans), patches, self.progress)
        with contextlib.closing(bar.bar):
            for i, plan in enumerate(plans):
                with progress.together(progress.Telling(bar=bar, expected=plan.cost)) as telling, self._named(i, pool):
                    if i not in results:
                        results[i] = method(self.sweep(i), *args, **more)
                    bar.add(telling.expected, 0)  # what did not come as a table
                SweepResult.mean([results[0], results[i]])  # refuses what planning could not see
        mean = SweepResult.mean([results[i] for i in range(len(plans))])
        mean.meta["of_pairs"] = self.identity
        if pool is not None:
            mean.meta["prescreen"] = pool.report(mean)
        return mean

    def _screened(
        self, method: Callable[..., SweepResult], args: Sequence[Any], more: Mapping[str, Any]
    ) -> Pool | None:
        """Of a prescreened sweep the estimates of all pairs, and what is run in all of them."""
        if more.get("prescreen") is None:
            return None
        pool = Pool(cast(Screen, {k: v for k, v in more.items() if k in Screen.__annotations__}))
        # Those that are in memory first: of the others one replaces the other.
        for i in sorted(range(len(self.pairs)), key=lambda i: i not in self._kept):
            one = self.sweep(i)
            with self._named(i, pool):
                method(one, *args, **more)
            del one
        with _meant():
            pool.choose()
        return pool

    def _plan(
        self, method: Callable[..., SweepResult], args: Sequence[Any], more: Mapping[str, Any], pool: Pool | None
    ) -> tuple[list[progress.Planned], dict[int, SweepResult]]:
        """Of every pair what will run, and what need not run again. Pairs of one form are planned once."""
        known: dict[Any, tuple[progress.Planned, list[Forecast]]] = {}
        results: dict[int, SweepResult] = {}
        for i in sorted(range(len(self.pairs)), key=lambda i: i not in self._kept):
            if self._alike[i] in known:
                continue
            one = self.sweep(i)
            one.progress = self.progress
            with progress.together(progress.Telling(planning=True)) as telling, self._named(i, pool):
                try:
                    # What is not computed table by table is there at once.
                    results[i] = method(one, *args, **more)
                    known[self._alike[i]] = progress.Planned(results[i], 1.0), telling.forecasts
                except progress.Planned as planned:
                    # Its traceback would keep the sweep, with all activations.
                    known[self._alike[i]] = planned.with_traceback(None), telling.forecasts
                finally:
                    one.progress = False
                    del one
        forecasts = [f for alike in self._alike for f in known[alike][1]]
        if forecasts and self.progress:
            clean = self.pairs[0][0]
            with torch.no_grad(), self.sweep(next(iter(self._kept), 0)).products:
                announce(Forecast.sum(forecasts), lambda: self.model(**clean))
        return [known[alike][0] for alike in self._alike], results


@contextlib.contextmanager
def _meant() -> Iterator[None]:
    """Errors are of a mean over pairs."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"of these pairs no mean can be taken: {error}") from error


def _alike(one: Sweep) -> tuple[Any, ...]:
    """What decides the patches of a pair and their work: equal for pairs of one form."""
    ids = one.corrupt_inputs["input_ids"]
    roles = prompt_roles(ids, one.real[None].to(ids.device), one.handle.placeholder_ids())[0]
    return one.columns, one.first, one.readout.columns, tuple(roles.tolist())
