"""Settings of VEE and ENA, as plans on a list of members, and which of them are tried."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

from emocircuits.edits import BoostRoute, ScaleNeurons
from emocircuits.plan import Plan

Member = tuple[int, int]
TOLD = "told:"
"""Rankings of one emotion are named so; no setting uses them."""
ROWS: dict[str, tuple[str, ...]] = {
    "decode": ("generated",), "query": ("query", "last"), "visual": ("visual",),
    "both": ("query", "last", "generated"), "all": ("visual", "query", "last", "generated"),
}  # fmt: skip
"""Rows that a place stands for."""


def boost(heads: Sequence[Member], beta: float, place: str = "decode") -> Plan:
    """VEE: what these heads read of the image times beta, not renormalised."""
    return Plan([BoostRoute(tuple(heads), ("visual",), beta, "weight", to=ROWS[place])])


def scale(neurons: Sequence[Member], gamma: float, place: str = "decode") -> Plan:
    """ENA: these neurons times gamma."""
    layers = sorted({l for l, _ in neurons})
    groups = tuple((layer, tuple(i for l, i in neurons if l == layer)) for layer in layers)
    return Plan([ScaleNeurons(groups, gamma, to=ROWS[place])])


@dc.dataclass(frozen=True)
class Setting:
    """One way to intervene.

    Attributes:
        half: "vee" or "ena".
        ranking: whose first members are used.
        count: of members.
        strength: beta or gamma.
        place: see ``ROWS``.
    """

    half: str
    ranking: str
    count: int
    strength: float
    place: str

    def plan(self, members: Sequence[Member]) -> Plan:
        """On these members."""
        make = boost if self.half == "vee" else scale
        return make(members, self.strength, self.place)


def vee_settings(rankings: Sequence[str]) -> list[Setting]:
    """Tried of VEE, in generated rows."""
    return [Setting("vee", r, n, beta, "decode") for r in rankings for n in (4, 8, 12) for beta in (2.0, 3.0, 4.0)]


def ena_settings(rankings: Sequence[str]) -> list[Setting]:
    """Tried of ENA: rankings made for rows of the prompt there, others in generated rows, the paper's everywhere."""
    found = []
    for r in rankings:
        place = r.rpartition("-")[2]
        if r.startswith(TOLD):
            continue
        if place in ("visual", "query"):
            found.append(Setting("ena", r, 100, 4.0, place))
            continue
        found += [Setting("ena", r, n, gamma, "decode") for n in (10, 30, 100) for gamma in (1.5, 2.5, 4.0)]
        if r == "vocabulary":
            found.append(Setting("ena", r, 30, 1.6, "all"))
    return found
