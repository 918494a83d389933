"""The table of presets: what each one computes, who published it, and what it needs."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any, Literal, TypeVar

Kind = Literal["plan", "contrast"]
F = TypeVar("F", bound=Callable[..., Any])


@dc.dataclass(frozen=True)
class Preset:
    """One published intervention.

    Attributes:
        name: its key in :data:`PRESETS` and its name in :mod:`emocircuits.presets`.
        function: builds it; its docstring says what of the source was confirmed.
        kind: ``"plan"`` returns a Plan for :func:`emocircuits.patch`, ``"contrast"`` a Contrast to generate with.
        formula: what it computes, in the words of docs/presets.md.
        paper: authors, year, title, arXiv number.
        needs: what the caller has to bring.
    """

    name: str
    function: Callable[..., Any]
    kind: Kind
    formula: str
    paper: str
    needs: str


PRESETS: dict[str, Preset] = {}


def preset(*, formula: str, paper: str, needs: str, kind: Kind = "plan") -> Callable[[F], F]:
    """Enter a function into :data:`PRESETS` under its own name."""

    def enter(function: F) -> F:
        name = function.__name__
        PRESETS[name] = Preset(name, function, kind, formula, paper, needs)
        return function

    return enter
