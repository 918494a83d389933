"""The study: rank, choose, report, on three disjoint ranges of held-out identities; what is done is kept."""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from emocircuits import embedded
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.steering import SteeringVectors, extract
from emocircuits.demo.cases import WEAK, contradicting
from emocircuits.demo.study.asked import Asked
from emocircuits.demo.study.rankings import pairs_of, rank_heads, rank_neurons, subject_of
from emocircuits.demo.study.settings import Member, Setting, ena_settings, vee_settings
from emocircuits.demo.study.trials import Bench, Rankings, choose, report, setting_of, told
from emocircuits.environment import provenance
from emocircuits.files import read_json, write_json
from emocircuits.fingerprint import weights_fingerprint
from emocircuits.measure import images_once

FORMAT = "emocircuits.embedded-study/1"
FIRST = {"rank": 106_000, "choose": 106_300, "report": 106_600}
"""Identities from here on, of each part; nothing else uses them."""
SHOWN = {"vee": 6, "ena": 2}
"""Rankings that are reported, each at its best setting: the chosen one and those after it."""


@dc.dataclass(frozen=True)
class Sizes:
    """How much is measured: identities of each part, draws of controls when reporting and when choosing."""

    rank: int = 25
    choose: int = 20
    report: int = 60
    draws: int = 20
    few: int = 5

    def __post_init__(self) -> None:
        if min(self.rank, self.choose, self.report) < 4 or max(self.rank, self.choose, self.report) > 300:
            raise ValueError(f"{self}: expected 4 to 300 identities in each part")
        if self.draws < 10 or self.few < 1:
            raise ValueError(f"{self}: expected at least 10 draws to report, and 1 to choose")


def study(
    out: str | Path, *, weights: str | Path = embedded.PATH, seed: int = 0, sizes: Sizes | None = None,
    progress: bool = True, say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Run the study, or what is left of it.

    Args:
        out: folder of its records; a record that is there, of the same model and settings, is taken as it is.
        weights: folder of the model, by default the committed one.
        seed: of events, draws and halves.
        sizes: of the parts.
        progress: show bars.
        say: told each step when it is done.

    Raises:
        ValueError: ``out`` has records of another model, or of other settings.
    """
    sizes, out = sizes or Sizes(), Path(out)
    model, processor = embedded.load(weights)
    identity = {"format": FORMAT, "model": weights_fingerprint(model), "seed": seed, "sizes": dc.asdict(sizes)}
    people = {part: range(first, first + getattr(sizes, part)) for part, first in FIRST.items()}
    seconds: dict[str, float] = {}

    def step(name: str, make: Callable[[], Any]) -> Any:
        path = out / f"{name}.json"
        if path.exists():
            kept = read_json(path, "a step of the study")
            if not isinstance(kept, dict) or kept.get("identity") != identity:
                raise ValueError(f"{path} is of another model or other settings; name a new folder")
        else:
            start = time.perf_counter()
            found = make()
            kept = {"identity": identity, "seconds": time.perf_counter() - start, "found": found}
            write_json(path, kept)
        seconds[name] = kept["seconds"]
        say(f"{name}: {kept['seconds']:.0f} s")
        return kept["found"]

    with images_once(model):
        parts = Parts(model, processor, people, sizes, seed, progress)
        results: dict[str, Any] = {}
        for half in ("vee", "ena"):
            results[half] = _half(half, parts, step)
        results["told"] = step("ena-told", partial(_told, parts, results["ena"].pop("rankings")))
        setting = setting_of(results["vee"]["chosen"])
        results["places"] = step("vee-places", partial(_places, parts, setting, results["vee"].pop("rankings")))
    result = {
        **identity, "identities": {n: [p[0], p[-1]] for n, p in people.items()}, **results,
        "training_seed": _training_seed(Path(weights)), "seconds": seconds, **provenance("cpu"),
        "command": "python -m emocircuits.demo.study --out DIR",
    }  # fmt: skip
    write_json(out / "study.json", result)
    return result


class Parts:
    """What is asked in each part, made when it is first needed."""

    def __init__(
        self, model: nn.Module, processor: Any, people: dict[str, range], sizes: Sizes, seed: int, progress: bool
    ) -> None:
        self.model, self.processor, self.people, self.sizes = model, processor, people, sizes
        self.options: dict[str, Any] = {"seed": seed, "progress": progress}
        self.seed, self.progress = seed, progress
        self.subject = subject_of(model, processor)

    @cached_property
    def asked(self) -> Asked:
        """Weak contradicted faces of the ranking part."""
        return Asked(self.model, self.processor, contradicting(self.people["rank"], WEAK, self.seed))

    @cached_property
    def pairs(self) -> Pairs:
        """Full-intensity faces and neutral twins of half the ranking part."""
        return pairs_of(self.people["rank"][: max(4, self.sizes.rank // 2)], self.seed + 10)

    @cached_property
    def steering(self) -> SteeringVectors:
        """Of the pairs."""
        return extract(self.subject, self.pairs, progress=self.progress)

    @cached_property
    def choosing(self) -> Bench:
        """Of the choosing part."""
        return Bench(self.model, self.processor, self.people["choose"], self.seed + 20, thin=2)

    @cached_property
    def reporting(self) -> Bench:
        """Of the reporting part."""
        return Bench(self.model, self.processor, self.people["report"], self.seed + 40)

    def count(self, half: str) -> int:
        """Heads or neurons of a layer."""
        geometry = self.subject.handle.geometry
        return geometry.heads if half == "vee" else geometry.neurons

    def ranked(self, half: str) -> dict[str, list[Member]]:
        """Rankings of heads or of neurons."""
        if half == "vee":
            return rank_heads(self.asked, self.subject, self.pairs, self.steering, self.seed, self.progress)
        return rank_neurons(self.asked, self.subject, self.pairs, self.steering, self.progress)


def _half(half: str, parts: Parts, step: Callable[[str, Callable[[], Any]], Any]) -> dict[str, Any]:
    """Rank, choose and report one half of VEENA."""
    found = step("heads" if half == "vee" else "neurons", partial(parts.ranked, half))
    rankings: dict[str, list[Member]] = {name: [(l, i) for l, i in members] for name, members in found.items()}
    settings = (vee_settings if half == "vee" else ena_settings)(list(rankings))
    tried = step(f"{half}-choose", partial(_chosen, half, parts, rankings, settings))
    # Of each ranking its best setting, best first.
    best = list({row["ranking"]: row for row in reversed(tried)}.values())
    best = sorted(best, key=lambda row: -row["value"])[: SHOWN[half]]
    reported = step(f"{half}-report", partial(_reported, half, parts, rankings, [setting_of(row) for row in best]))
    first = {name: [list(m) for m in members[:12]] for name, members in rankings.items()}
    return {**reported, "choosing": tried[:10], "first": first, "rankings": rankings}


def _chosen(half: str, parts: Parts, rankings: Rankings, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    return choose(parts.choosing, rankings, settings, parts.count(half), draws=parts.sizes.few, **parts.options)


def _reported(half: str, parts: Parts, rankings: Rankings, settings: Sequence[Setting]) -> dict[str, Any]:
    count, options = parts.count(half), {"draws": parts.sizes.draws, **parts.options}
    chosen, *others = (
        report(parts.reporting, rankings, s, count, full=i == 0, **options) for i, s in enumerate(settings)
    )
    return {"chosen": chosen, "by_ranking": others}


def _places(parts: Parts, setting: Setting, rankings: Rankings) -> list[dict[str, Any]]:
    """The chosen VEE in rows of the prompt too, on the choosing part: for comparison only."""
    return _chosen("vee", parts, rankings, [dc.replace(setting, place=p) for p in ("query", "both")])


def _told(parts: Parts, rankings: Rankings) -> list[dict[str, Any]]:
    return told(parts.reporting, rankings, ((30, 1.5), (30, 2.5), (100, 2.5)))


def _training_seed(weights: Path) -> int | None:
    path = weights / "training.json"
    return read_json(path, "what trained the model")["settings"]["seed"] if path.exists() else None


def text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = []
    for half, name in (("vee", "VEE"), ("ena", "ENA")):
        for row in (result[half]["chosen"], *result[half]["by_ranking"]):
            r = row["random"]
            lines.append(
                f"{name} {row['ranking']:15} {row['count']:3} x {row['strength']:<4g}{row['place']:7} hit "
                f"{row['untouched']['hit']:.3f} -> {row['hit']:.3f}, random {r['mean']:.3f} (best {r['best']:.3f}), "
                f"above {r['above']} of {r['draws']}; prior {row['untouched']['prior']:.3f} -> {row['prior']:.3f}"
            )
            for kind, c in row.get("cost", {}).items():
                lines.append(f"      {kind:9} {c['baseline']:.3f} -> {c['treated']:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m emocircuits.demo.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records; an interrupted study goes on")
    parser.add_argument("--weights", type=Path, default=embedded.PATH, help="model folder (default: the committed one)")
    parser.add_argument("--seed", type=int, default=0, help="of events, draws and halves")
    parser.add_argument("--json", action="store_true", help="print JSON")
    for field in dc.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default {field.default}")
    a = parser.parse_args()
    try:
        sizes = Sizes(**{f.name: getattr(a, f.name) for f in dc.fields(Sizes)})
        say = (lambda line: None) if a.json else print
        result = study(a.out, weights=a.weights, seed=a.seed, sizes=sizes, say=say)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(result, indent=1) if a.json else text(result))
