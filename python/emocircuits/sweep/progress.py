"""What a sweep tells on standard error: one forecast and one bar, also where it goes over several pairs."""

from __future__ import annotations

import contextlib
import dataclasses as dc
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from emocircuits.sweep.planner import Forecast
    from emocircuits.sweep.results import SweepResult

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


class Planned(Exception):
    """In place of running a table: what it would be.

    Attributes:
        table: with nothing in it yet.
        cost: of all its patches, in the units of the bar.
    """

    def __init__(self, table: SweepResult, cost: float) -> None:
        super().__init__("planned, not run")
        self.table, self.cost = table, cost


@dc.dataclass
class Telling:
    """Runs that are told as one.

    Attributes:
        planning: tables are not run: :func:`table` raises :class:`Planned`.
        forecasts: heard while planning.
        bar: that all runs share, or None.
        expected: of the run that goes on, how much of the bar is kept for it.
    """

    planning: bool = False
    forecasts: list[Forecast] = dc.field(default_factory=list)
    bar: Bar | None = None
    expected: float = 0.0


_CURRENT: ContextVar[Telling | None] = ContextVar("telling", default=None)


@contextlib.contextmanager
def together(telling: Telling) -> Iterator[Telling]:
    """Forecasts and bars within go to ``telling``."""
    token = _CURRENT.set(telling)
    try:
        yield telling
    finally:
        _CURRENT.reset(token)


def heard(forecast: Forecast) -> bool:
    """Whether somebody else tells this forecast: it is then one of several, or was told before."""
    telling = _CURRENT.get()
    if telling is None:
        return False
    if telling.planning:
        telling.forecasts.append(forecast)
    return True


def table(empty: SweepResult, cost: float) -> None:
    """Say that a table comes, before it runs.

    Raises:
        Planned: it is only wanted to know what comes.
    """
    telling = _CURRENT.get()
    if telling is not None and telling.planning:
        raise Planned(empty, cost)


class Bar:
    """A bar over patches of different cost, so that the time it tells is true though some take longer."""

    def __init__(self, name: str, total: float, patches: int, shown: bool) -> None:
        self.patches, self.done, self.total = patches, 0, total
        self.bar = tqdm(total=total, desc=name, disable=not shown, bar_format=FORMAT)

    def has(self, cost: float, patches: int) -> None:
        """So much is there already: it says nothing about the time that the rest takes."""
        self.done += patches
        self.bar.n += cost
        if not self.bar.disable:
            self.bar.initial += cost
            self.bar.last_print_n += cost
        self._say(refresh=True)

    def add(self, cost: float, patches: int) -> None:
        """So much was computed."""
        self.done += patches
        self._say(refresh=False)
        # Not beyond the total by a rounding error.
        self.bar.update(min(cost, max(0.0, self.total - self.bar.n)))

    def more(self, cost: float, patches: int) -> None:
        """There is more to do than was said."""
        self.patches += patches
        self.total += cost
        self.bar.total = self.total

    def _say(self, *, refresh: bool) -> None:
        self.bar.set_postfix_str(f"{self.done}/{self.patches} patches", refresh=refresh)


@contextlib.contextmanager
def bar(name: str, total: float, patches: int, shown: bool) -> Iterator[Bar]:
    """The bar of one table: its own, or the one that it shares with others."""
    telling = _CURRENT.get()
    if telling is not None and telling.bar is not None:
        shared = telling.bar
        if total > telling.expected * (1 + 1e-9):
            shared.more(total - telling.expected, 0 if telling.expected else patches)
        telling.expected = max(0.0, telling.expected - total)
        yield shared
        return
    alone = Bar(name, total, patches, shown)
    try:
        yield alone
    finally:
        alone.bar.close()
