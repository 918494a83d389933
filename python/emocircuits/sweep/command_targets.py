"""What ``emocircuits sweep`` takes for routes, for sets of heads, and to prescreen the other targets."""

from __future__ import annotations

import argparse
import re
from typing import Any

from emocircuits.edits.heads import READINGS
from emocircuits.sweep import Sweep, SweepResult, command_strengths, interaction
from emocircuits.sweep.attribution.nodes import METHODS
from emocircuits.sweep.targets import KINDS

TARGETS = ("routes", "combinations", *command_strengths.TARGETS)
OPTIONS = {"groups": "neurons", **dict.fromkeys(("edit", "by", "reading", "routes", "edited"), "routes")}
OPTIONS |= dict.fromkeys(("heads", "top", "size"), "combinations")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of these targets."""
    routes = parser.add_argument_group("--target routes: attention of a head along destination <- source")
    routes.add_argument("--edit", choices=("knockout", "boost"), help="default knockout")
    routes.add_argument("--by", type=float, metavar="X", help="strength of a boost")
    routes.add_argument("--reading", choices=READINGS, help="what a boost multiplies or adds to (default weight)")
    routes.add_argument("--routes", metavar="LIST", help="such as query:visual,last:query (default all there are)")
    routes.add_argument("--run", dest="edited", choices=("clean", "corrupt"), help="what is edited (default clean)")
    sets = parser.add_argument_group("--target combinations: sets of heads patched together")
    sets.add_argument("--heads", metavar="LIST", help="layer.head, such as 3.1,4.7 (default the strongest, by a sweep)")
    sets.add_argument("--top", type=int, metavar="N", help="how many of the strongest (default 10)")
    sets.add_argument("--size", type=int, metavar="N", help="heads in a set (default 2)")
    command_strengths.options(parser)
    screen = parser.add_argument_group("prescreening: all patches estimated from gradients, the strongest run exactly")
    screen.add_argument("--prescreen", choices=METHODS, help="how patches are estimated (default: all are run)")
    screen.add_argument("--confirm", type=int, metavar="N", help="how many of the strongest are run (default 64)")
    screen.add_argument("--sample", type=int, metavar="N", help="how many others are run as a check (default 32)")


def check(args: argparse.Namespace) -> None:
    """Refuse options of other targets than the one chosen.

    Raises:
        ValueError: one is given, or one that says nothing here.
    """
    for name, target in OPTIONS.items():
        if getattr(args, name) is not None and args.target != target:
            raise ValueError(f"--{'run' if name == 'edited' else name} is for --target {target}, not {args.target}")
    command_strengths.check(args)
    if args.target == "routes":
        if args.positions != "all":
            raise ValueError("--positions: an edited route acts on all rows of its destination; leave it out")
        if args.direction != "denoise" or args.patch_with != "clean":
            raise ValueError("--direction and --patch-with: routes take nothing from the other prompt; use --run")
    if args.heads is not None and (args.top is not None or args.layers is not None):
        raise ValueError("--heads names the heads; leave --top and --layers out")
    # What cannot be read is refused before the model is loaded.
    if args.routes is not None:
        _routes(args.routes)
    if args.heads is not None:
        _heads(args.heads)
    if args.prescreen is not None and args.target not in KINDS:
        raise ValueError(f"--prescreen is for --target {', '.join(KINDS)}, not {args.target}")
    for name, least in (("confirm", 1), ("sample", 0)):
        given = getattr(args, name)
        if given is not None and (args.prescreen is None or given < least):
            raise ValueError(f"--{name} {given}: expected --prescreen with it, and at least {least}")
    for name in ("top", "size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")


def table(
    sweep: Sweep, args: argparse.Namespace, positions: str | list[int], layers: list[int] | None
) -> SweepResult:  # fmt: skip
    """The table of the chosen target."""
    found: SweepResult
    if args.target == "routes":
        pairs = None if args.routes is None else _routes(args.routes)
        edit: Any = args.edit or "knockout"
        return sweep.routes(edit, args.by, args.reading, routes=pairs, layers=layers, run=args.edited or "clean")
    if args.target == "combinations":
        heads = sweep.heads(positions=positions, layers=layers) if args.heads is None else _heads(args.heads)
        # With the single heads, which interactions are measured from.
        sizes = sorted({1, args.size or 2})
        return sweep.combinations(heads, size=sizes, positions=positions, top=args.top or 10)
    if args.target in command_strengths.TARGETS:
        return command_strengths.table(sweep, args, layers)
    more: dict[str, Any] = {"groups": args.groups or 16} if args.target == "neurons" else {}
    more |= {k: getattr(args, k) for k in ("prescreen", "confirm", "sample") if getattr(args, k) is not None}
    found = getattr(sweep, args.target)(positions=positions, layers=layers, **more)
    return found


def more(result: SweepResult) -> dict[str, Any]:
    """What else is reported: of sets of heads their interaction, in units of the metric where there are no effects.

    Of a prescreened sweep which values are exact, and how good the estimates were.
    """
    if result.exact is not None:
        return {"exact": result.exact.tolist(), "prescreen": result.meta["prescreen"]}
    if "combination" not in result.axes:
        return {}
    return {"interaction": interaction(result, result, of="effects" if result.measurable else "values").tolist()}


def lines(record: dict[str, Any]) -> list[str]:
    """What is printed of it: how a prescreen fared."""
    if "prescreen" not in record:
        return []
    told = record["prescreen"]
    return [
        f"{told['method']}: {told['patches']} patches estimated, the {told['confirmed']} strongest run exactly; "
        f"of {told['sampled']} others run as a check {told['misses']} beat the weakest of these"
    ]


def _routes(given: str) -> list[tuple[str, str]]:
    pairs = [re.split("<-|:", part.strip()) for part in given.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--routes {given}: expected destination:source, such as query:visual,last:query")
    return [(to.strip(), source.strip()) for to, source in pairs]


def _heads(given: str) -> list[tuple[int, int]]:
    parts = [part.strip().split(".") for part in given.split(",")]
    if any(len(part) != 2 or not all(n.isdigit() for n in part) for part in parts):
        raise ValueError(f"--heads {given}: expected layer.head, such as 3.1,4.7")
    return [(int(layer), int(head)) for layer, head in parts]
