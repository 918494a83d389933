"""The command line: ``emocircuits doctor | demo | veena | data | localize | report | sweep | bench``.

Results go to standard output, progress to standard error. Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emokernels._version import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="emocircuits", description="Interventions in vision-language models.")
    parser.add_argument("--version", action="version", version=f"emocircuits {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--model", default="embedded", help="a hub id, a folder, or 'embedded' (default)")
        sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        sub.add_argument("--out", type=Path, metavar="PATH", help="where to write results")
        return sub

    command("doctor", _doctor, "What runs here: versions, devices, backends with reasons.")
    demo = command("demo", _demo, "The whole story on the embedded model: circuit, VEENA, controls, cost, and a page.")
    demo.add_argument("--seed", type=int, default=0, help="seed of events, controls and bootstrap (default 0)")
    demo.add_argument("--quick", action="store_true", help="a fifth of the identities: a minute, wide intervals")
    veena = command("veena", _veena, "Describe an image with and without VEENA.")
    veena.add_argument("--image", required=True, metavar="FILE", help="an image file")
    veena.add_argument("--event", required=True, metavar="TEXT", help="a sentence of what happened")
    veena.add_argument("--circuit", type=Path, metavar="FILE", help="circuit.json of the model")
    veena.add_argument("--plan", type=Path, metavar="FILE", help="a plan to use instead of a circuit")
    veena.add_argument("--beta", type=float, help="strength of VEE (default: as chosen for the circuit)")
    veena.add_argument("--gamma", type=float, help="strength of ENA (default: as chosen for the circuit)")
    veena.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="longest answer (default 40)")
    from emocircuits.overhead import command as overhead

    bench = command("bench", overhead.run, "What an intervention costs: time and memory beside other ways to do it.")
    overhead.options(bench)
    from emocircuits.data import command as pairs

    pairs.options(command("data", pairs.run, "Contrastive pairs: check a manifest, draw faces, count."))
    from emocircuits.circuits import command as localizing

    localizing.options(
        command("localize", _localize, "Find the circuit of a model from contrastive pairs, step by step, and a page.")
    )
    report = command("report", _report, "The page of a localisation, from the files of its folder.")
    report.add_argument("folder", type=Path, metavar="RUN", help="the folder that localize wrote")
    from emocircuits.sweep import command as sweeping

    sweep = command("sweep", sweeping.run, "Patch every head, neuron group or position over prompt pairs, exactly.")
    sweep.set_defaults(make_plans=_veena_plans)
    sweeping.options(sweep)
    return parser


def _doctor(args: argparse.Namespace) -> dict[str, Any]:
    from emocircuits import doctor

    _check_file(args.out)
    report = doctor.examine()
    if not args.json:
        print(doctor.text(report))
    if args.out:
        _write(args.out, report)
    return report


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from emocircuits.demo import story, summary
    from emocircuits.report.demo import save

    if args.model != "embedded":
        raise ValueError(f"the demo tells the story of the embedded model, not of {args.model!r}; leave --model out")
    out = args.out or Path("demo-out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    people = {name: max(4, n // 5) for name, n in story.PEOPLE.items()} if args.quick else None
    result = story.tell(seed=args.seed, people=people, progress=not args.json, say=_quiet if args.json else _tell)
    paths = save(result, out)
    if not args.json:
        print(summary.text(result))
        print(f"The page: {paths['page']}   the numbers: {paths['json']}   {result['seconds']:.0f} s")
    return result


def _veena(args: argparse.Namespace) -> dict[str, Any]:
    from emocircuits.describe import describe

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    _check_file(args.out)
    result = describe(
        args.image, args.event, model=args.model, circuit=args.circuit, plan=args.plan, beta=args.beta,
        gamma=args.gamma, tokens=args.max_new_tokens,
    )  # fmt: skip
    if not args.json:
        print(f"without: {result['without']}\nwith:    {result['with']}")
    if args.out:
        _write(args.out, result)
    return result


def _veena_plans(model: Any, name: str, circuit: Path | None) -> Callable[..., Any]:
    """Plans of VEENA by strength, for ``emocircuits sweep --target veena``."""
    from emocircuits.describe import veena_of

    return veena_of(name, circuit).strengths(model)


def _localize(args: argparse.Namespace) -> dict[str, Any]:
    from emocircuits.circuits import command
    from emocircuits.report.localization import save

    result = command.run(args)
    result["page"] = str(save(args.out))
    if not args.json:
        print(f"The circuit: {result['file']}   the page: {result['page']}   {result['seconds']:.0f} s")
    return result


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from emocircuits.report.localization import save

    _check_file(args.out)
    result = {"page": str(save(args.folder, args.out))}
    if not args.json:
        print(f"The page: {result['page']}")
    return result


def _check_file(out: Path | None) -> None:
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")


def _write(path: Path, value: Any) -> None:
    from emocircuits.files import write_json

    write_json(path, value)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _quiet(line: str) -> None:
    """Say nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for bad input, 1 when ``bench --check`` finds a bound exceeded."""
    args = _parser().parse_args(arguments)
    args.command_line = shlex.join(["emocircuits", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        result = args.run(args)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"emocircuits: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("emocircuits: interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result))
    return int(any(not bound["kept"] for bound in result.get("bounds", ())))


if __name__ == "__main__":
    sys.exit(main())
