"""``emocircuits data check | faces | stats``: contrastive pairs, checked, drawn, counted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emocircuits.data.check import OUTSIDE, TOLERANCE, Report, check
from emocircuits.data.faces import EVENTS, build_faces
from emocircuits.data.hashes import BITS, NEAR
from emocircuits.data.pairs import Manifest
from emocircuits.files import read_json, write_json


def options(parser: argparse.ArgumentParser) -> None:
    """Add what ``emocircuits data`` takes."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|faces|stats")

    def action(name: str, do: Callable[[argparse.Namespace], dict[str, Any]], text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(do=do)
        # Taken before and after the action; not given here, what was given before it holds.
        sub.add_argument("--model", default=argparse.SUPPRESS, help="has no effect on data")
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
        sub.add_argument("--out", type=Path, metavar="PATH", default=argparse.SUPPRESS, help="where to write")
        return sub

    checking = action("check", _check, "Is a manifest fit? Every problem is named; exit code 2 when there is one.")
    checking.add_argument("pairs", type=Path, metavar="PAIRS", help="the manifest, JSONL")
    checking.add_argument(
        "--against", type=Path, action="append", default=[], metavar="SET",
        help="an evaluation set it must not overlap with: a manifest, a folder of pictures and .txt files, or a JSON "
        "file of fingerprints; may be given several times",
    )  # fmt: skip
    checking.add_argument("--lexicon", type=Path, metavar="FILE", help="JSON: emotion -> words (default: six emotions)")
    checking.add_argument("--allow-unlicensed", action="store_true", help="take records that name no licence")
    checking.add_argument(
        "--tolerance", type=int, default=TOLERANCE, metavar="N",
        help=f"levels of 255 in which equal pixels may differ (default {TOLERANCE})",
    )  # fmt: skip
    checking.add_argument(
        "--outside", type=float, default=OUTSIDE, metavar="SHARE",
        help=f"of the pixels outside a mask that may differ by more (default {OUTSIDE})",
    )  # fmt: skip
    checking.add_argument(
        "--near", type=int, default=NEAR, metavar="N",
        help=f"bits of {BITS} in which the hashes of one picture may differ (default {NEAR})",
    )  # fmt: skip

    drawing = action("faces", _faces, "Draw pairs of faces for the embedded model, and an evaluation set.")
    drawing.add_argument("--identities", type=int, default=20, metavar="N", help="in each split (default 20)")
    drawing.add_argument("--emotions", metavar="LIST", help="such as happy,sad (default all six)")
    drawing.add_argument("--intensities", default="1", metavar="LIST", help="such as 0.25,1 (default 1)")
    drawing.add_argument("--events", choices=EVENTS, default=EVENTS[0], help=f"default {EVENTS[0]}")
    drawing.add_argument("--seed", type=int, default=0, help="of the events (default 0)")

    counting = action("stats", _stats, "How many pairs of what are in a manifest.")
    counting.add_argument("pairs", type=Path, metavar="PAIRS", help="the manifest, JSONL")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command. Returns what ``--json`` prints.

    Raises:
        ValueError: bad input, or problems that ``check`` found (they have been printed).
    """
    result: dict[str, Any] = args.do(args)
    return result


def _check(args: argparse.Namespace) -> dict[str, Any]:
    _file(args.out)
    lexicon = None if args.lexicon is None else _lexicon(args.lexicon)
    report = check(
        args.pairs, against=args.against, lexicon=lexicon, allow_unlicensed=args.allow_unlicensed,
        tolerance=args.tolerance, outside=args.outside, near=args.near, progress=not args.json,
    )  # fmt: skip
    result = report.to_dict()
    if args.out is not None:
        write_json(args.out, result)
    if not args.json:
        for kind, lines in (("problem", report.problems), ("look at", report.warnings)):
            for line in lines:
                print(f"{kind}: {line}", file=sys.stderr if kind == "problem" else sys.stdout)
        print(text(report))
    if not report.ok:
        if args.json:
            print(json.dumps(result))
        n = len(report.problems)
        raise ValueError(f"{args.pairs}: {n} problem{'s' * (n != 1)}; not fit for finding a circuit")
    return result


def _faces(args: argparse.Namespace) -> dict[str, Any]:
    if args.out is None:
        raise ValueError("--out is missing: name a folder for the pictures and the manifests")
    more = {} if args.emotions is None else {"emotions": [e.strip() for e in args.emotions.split(",")]}
    try:
        levels = [float(t) for t in args.intensities.split(",")]
    except ValueError as error:
        raise ValueError(f"--intensities {args.intensities}: expected numbers such as 0.25,1") from error
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    built = build_faces(
        args.out, identities=args.identities, intensities=levels, events=args.events, seed=args.seed,
        progress=not args.json, **more,
    )  # fmt: skip
    result: dict[str, Any] = {
        "pairs": str(built.pairs), "evaluation": str(built.evaluation), "identities": built.identities,
        "left_out": built.left_out, "statistics": Manifest.load(built.pairs).statistics(),
    }  # fmt: skip
    if not args.json:
        print(counts(result["statistics"]))
        if built.left_out:
            print(f"left out, for they look like one of another split: {', '.join(map(str, built.left_out))}")
        print(f"written: {built.pairs}  {built.evaluation}")
    return result


def _stats(args: argparse.Namespace) -> dict[str, Any]:
    _file(args.out)
    statistics = Manifest.load(args.pairs).statistics()
    if args.out is not None:
        write_json(args.out, statistics)
    if not args.json:
        print(counts(statistics))
    return statistics


def text(report: Report) -> str:
    """What ``check`` prints after the problems."""
    pictures, settings = report.pictures, report.settings
    lines = [counts(report.statistics)]
    if pictures["changed"]:
        changed = pictures["changed"]
        lines.append(
            f"pictures: {', '.join(f'{size} ({n})' for size, n in pictures['sizes'].items())}; of a picture, "
            f"{changed['least']:.1%} to {changed['most']:.1%} differ from its twin (median {changed['median']:.1%})"
        )
    if settings["unlicensed"] and settings["allow_unlicensed"]:
        lines.append(f"unlicensed records, allowed: {settings['unlicensed']}")
    for name in settings["against"]:
        lines.append(f"compared with {name}")
    lines += [f"not checked by code: {what}" for what in report.unchecked]
    lines.append(
        f"{report.path}: " + ("fit" if report.ok else f"not fit, problems: {len(report.problems)}")
        + (f", to look at: {len(report.warnings)}" if report.warnings else "")
    )  # fmt: skip
    return "\n".join(lines)


def counts(statistics: Mapping[str, Any]) -> str:
    """Statistics of a manifest, in a few lines."""

    def told(values: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in values.items())

    lines = [f"{statistics['records']} records: {told(statistics['emotions'])}"]
    for name, split in statistics["splits"].items():
        lines.append(
            f"{name}: {split['records']} records, {split['pictures']} pictures, {split['events']} events; "
            f"{told(split['emotions'])}"
        )
    lines.append(f"masks {statistics['masks']}; licences: {told(statistics['licences'])}")
    return "\n".join(lines)


def _file(out: Path | None) -> None:
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")


def _lexicon(path: Path) -> dict[str, list[str]]:
    given = read_json(path, "a lexicon")
    if (
        not isinstance(given, dict)
        or not given
        or not all(
            isinstance(words, list) and words and all(isinstance(w, str) for w in words) for words in given.values()
        )
    ):
        raise ValueError(f"{path}: not a lexicon; expected an object from each emotion to a list of its words")
    return given
