"""``emocircuits sweep``: patch every head, neuron group or position over a file of prompt pairs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from emocircuits.environment import provenance
from emocircuits.sweep import Sweep, command_targets
from emocircuits.sweep.generated import contains, generated
from emocircuits.sweep.metrics import kl, log_prob, logit_diff
from emocircuits.sweep.pairs import Prepared, Prompt, prepare, prepare_prompts, read_pairs, read_prompts
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.targets import KINDS, PATCHES

METRICS = ("logit_diff", "log_prob", "kl", "generated")
DEEPEST = 100_000  # a layer beyond it is a typing error, and its range would not fit into memory
EPILOG = """\
A pairs file holds one JSON object a line: {"clean": "...", "corrupt": "...", "answer": "...", "wrong": "..."}, two
prompts of as many tokens each, the answer of the clean one and that of the corrupt one; with "clean_image" and
"corrupt_image" for prompts about images. Of several pairs the table is the mean, with a bootstrap interval over them.
A file for --resample holds lines {"prompt": "..."}, as long as the pairs' own, with "image" where these have images.
With --out the results are written while they come in, one folder a pair, and the same command goes on where a killed
one stopped."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add what ``emocircuits sweep`` takes."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="the prompt pairs, JSONL")
    targets = (*KINDS, *command_targets.TARGETS)
    parser.add_argument("--target", choices=targets, default="heads", help="what is patched (default heads)")
    parser.add_argument(
        "--positions", default="all", metavar="WHICH",
        help="all at once (default), each, a role (system, visual, query, last), or columns such as 3,5,-1",
    )  # fmt: skip
    parser.add_argument(
        "--metric", choices=METRICS, default="logit_diff",
        help="read at the last position; generated: 1 where what the model goes on to say has one of --words, else 0",
    )  # fmt: skip
    parser.add_argument("--words", metavar="LIST", help="of --metric generated, comma-separated (default the answer)")
    parser.add_argument("--limit", type=int, metavar="N", help="tokens that are generated at most (default 16)")
    parser.add_argument(
        "--direction", choices=("denoise", "noise"), default="denoise", help="clean into corrupt, or back"
    )
    parser.add_argument(
        "--patch-with", choices=PATCHES, default="clean",
        help="values of the other prompt (default clean), zero, their mean, or those of the prompts of --resample",
    )  # fmt: skip
    parser.add_argument(
        "--resample", type=Path, metavar="FILE", help="of --patch-with resample: prompts to draw from, JSONL"
    )
    parser.add_argument("--draws", type=int, metavar="N", help="of --patch-with resample: for each patch (default 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="of --patch-with resample: of the draws (default 0)")
    parser.add_argument("--layers", metavar="LIST", help="such as 0-5,8 (default all)")
    parser.add_argument("--groups", type=int, metavar="N", help="groups of neurons in a layer (default 16)")
    parser.add_argument("--batch", type=int, metavar="N", help="patches at a time (default: what memory allows)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    command_targets.options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command. Returns what ``--json`` prints."""
    from emocircuits.loading import load_model

    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")
    command_targets.check(args)
    for name in ("words", "limit"):
        if getattr(args, name) is not None and args.metric != "generated":
            raise ValueError(f"--{name} is for --metric generated, not {args.metric}")
    if args.words is not None:
        contains(args.words.split(","))
    for name in ("groups", "batch", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    positions, layers = _positions(args.positions), _layers(args.layers)
    drawn = _resample(args)
    pairs = read_pairs(args.pairs)
    model, processor = load_model(args.model, device=args.device, text=True)
    device = next(model.parameters()).device
    prepared = prepare(
        pairs, processor, needs_wrong=args.metric == "logit_diff", device=device, path=args.pairs
    )  # fmt: skip
    _same_length(prepared, positions, args.pairs)
    resample: dict[str, Any] = {} if drawn is None else {
        "resample": prepare_prompts(drawn, processor, device=device, path=args.resample),
        "draws": args.draws or 1, "seed": args.seed or 0,
    }  # fmt: skip
    sweep = Sweep(
        model, clean=[p.clean for p in prepared], corrupt=[p.corrupt for p in prepared],
        metric=[_metric(args, p, processor) for p in prepared], direction=args.direction, patch_with=args.patch_with,
        batch=args.batch, out=args.out, progress=not args.json, **resample,
    )  # fmt: skip
    mean = command_targets.table(sweep, args, positions, layers)
    ids = [p.pair.id for p in prepared]
    mean.meta["ids"] = ids
    # The words of the run that is patched, where all pairs have the same.
    patched = [p.corrupt if args.direction == "denoise" else p.clean for p in prepared]
    if "pos" in mean.axes and all(torch.equal(p["input_ids"], patched[0]["input_ids"]) for p in patched):
        mean = mean.with_tokens(processor, patched[0])
    record = report(mean, args, ids) | command_targets.more(mean)
    if args.out is not None:
        mean.save(args.out)
        mean.plot(args.out / "sweep.html")
        record["written"] = [str(args.out / name) for name in ("sweep.json", "sweep.html")]
    if not args.json:
        print(text(record))
    return record


def report(result: SweepResult, args: argparse.Namespace, ids: list[str]) -> dict[str, Any]:
    """The result as JSON."""
    effects = result.effects if result.measurable else None
    record: dict[str, Any] = {
        "model": args.model, "target": args.target, "positions": args.positions, "metric": args.metric,
        **{k: result.meta[k] for k in ("direction", "patch_with")}, "pairs": ids, "clean": result.clean,
        "corrupt": result.corrupt, "axes": list(result.axes), "labels": result.labels, "values": _json(result.values),
        "effects": None if effects is None else _json(effects), "top": _finite(result.top(10)),
        "command": args.command_line, **provenance(str(args.device or "")),
    }  # fmt: skip
    if "texts" in result.meta:
        record["texts"] = result.meta["texts"]
    if effects is not None and result.pairs is not None:
        low, high = result.interval()
        record["effects_low"], record["effects_high"] = _json(low), _json(high)
    return record


def text(record: dict[str, Any]) -> str:
    """What the command prints."""
    lines = [
        f"{record['target']} of {record['model']}, {len(record['pairs'])} pair{'s' * (len(record['pairs']) != 1)}, "
        f"{record['metric']}: clean {record['clean']:.4g}, corrupt {record['corrupt']:.4g}"
    ]
    if record["effects"] is None:
        lines.append("the two prompts do not differ in this metric: there are no effects, only values")
    lines += command_targets.lines(record)
    axes = record["axes"]
    sampled = bool(record["top"]) and "effect_low" in record["top"][0]
    head = [*axes, "value", "effect", *(["95 %"] if sampled else [])]
    rows = [
        [
            *(str(place[a]) for a in axes),
            _shown(place["value"], ".4g"),
            _shown(place["effect"], "+.3f"),
            *([f"[{', '.join(_shown(place[f'effect_{k}'], '+.3f') for k in ('low', 'high'))}]"] if sampled else []),
        ]
        for place in record["top"]
    ]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    found = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
    said = ["", *(f"  {place['text']!r}" if "text" in place else "" for place in record["top"])]
    lines += [a + b for a, b in zip(found, said, strict=True)]
    lines += [f"{side} says {said!r}" for side, said in record.get("texts", {}).items() if side != "patched"]
    if "written" in record:
        lines.append("written: " + "  ".join(record["written"]))
    return "\n".join(lines)


def _metric(args: argparse.Namespace, pair: Prepared, processor: Any) -> Any:
    name = args.metric
    if name == "generated":
        words = [pair.pair.answer] if args.words is None else args.words.split(",")
        return generated(contains(words), limit=16 if args.limit is None else args.limit, tokenizer=processor)
    if name == "logit_diff":
        assert pair.wrong is not None
        return logit_diff(pair.answer, pair.wrong)
    return log_prob(pair.answer) if name == "log_prob" else kl()


def _resample(args: argparse.Namespace) -> list[Prompt] | None:
    """The prompts of --resample; options that do not go together are refused before a model is loaded."""
    if args.patch_with != "resample":
        for name in ("resample", "draws", "seed"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is for --patch-with resample, not {args.patch_with}")
        return None
    if args.resample is None:
        raise ValueError("--patch-with resample needs --resample FILE, the prompts to draw from")
    if args.prescreen is not None:
        raise ValueError("--prescreen estimates no patches that are drawn from other prompts; leave it out")
    prompts = read_prompts(args.resample)
    if args.draws is not None and not 1 <= args.draws <= len(prompts):
        raise ValueError(f"--draws {args.draws}: expected 1 to {len(prompts)}, the prompts of {args.resample}")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected at least 0")
    return prompts


def _positions(given: str) -> str | list[int]:
    if not given.replace(",", "").replace("-", "").replace(" ", "").isdigit():
        return given
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise ValueError(f"--positions {given}: expected all, each, a role, or columns such as 3,5,-1") from error


def _layers(given: str | None) -> list[int] | None:
    if given is None:
        return None
    found: list[int] = []
    for part in given.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or not (last or first).strip().isdecimal():
            raise ValueError(f"--layers {given}: expected numbers and ranges such as 0-5,8")
        if int(last or first) > DEEPEST:
            raise ValueError(f"--layers {given}: no model has so many layers")
        found += range(int(first), int(last or first) + 1)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"--layers {given}: expected each layer once, such as 0-5,8")
    return found


def _same_length(prepared: list[Prepared], positions: str | list[int], path: Path) -> None:
    """A mean over pairs column by column needs prompts of one length; roles and columns from the end do not."""
    if isinstance(positions, list):
        anywhere = all(p < 0 for p in positions)
    else:
        anywhere = positions != "each"
    lengths = {p.clean["input_ids"].shape[-1]: p.pair.line for p in reversed(prepared)}
    if len(lengths) > 1 and not anywhere:
        told = ", ".join(f"{n} tokens (line {line})" for n, line in sorted(lengths.items(), key=lambda x: x[1])[:3])
        raise ValueError(
            f"{path}: prompts of {told}: positions of one pair are not those of another; use --positions all, a "
            "role or columns from the end (-1), or a file for each length"
        )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _json(values: torch.Tensor) -> Any:
    """Nested lists; NaN becomes None."""
    return values.tolist() if bool(values.isfinite().all()) else _finite(values.tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
