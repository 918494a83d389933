"""``emocircuits localize``: find the circuit of a model, step by step, into a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from emocircuits.circuits.heads import Reads
from emocircuits.circuits.heads import Rows as HeadRows
from emocircuits.circuits.settings import READINGS_OF, Objective, Settings
from emocircuits.files import read_json
from emocircuits.loading import EMBEDDED, load_model
from emocircuits.sweep.steering import READINGS, ROWS

FACES = 20


def options(parser: argparse.ArgumentParser) -> None:
    """Add what ``emocircuits localize`` takes."""
    default = Settings()
    add = parser.add_argument
    add("--pairs", type=Path, metavar="FILE", help="manifest of contrastive pairs (see emocircuits data); the embedded "
        "model has drawn faces where none is given")  # fmt: skip
    add("--faces", type=int, default=FACES, metavar="N", help=f"drawn identities in each split (default {FACES})")
    add("--seed", type=int, default=default.seed, help="of faces, halves, random controls and bootstrap (default 0)")
    add("--fresh", action="store_true", help="find everything again, whatever the folder holds")
    add("--allow-unlicensed", action="store_true", help="take pairs that name no licence")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU where there is one)")

    asking = parser.add_argument_group("how the model is asked (not for the embedded one)")
    asking.add_argument("--question", metavar="TEXT", help="after the event")
    asking.add_argument("--answer", default="", metavar="TEXT", help="beginning of an answer, for log-odds")
    asking.add_argument(
        "--lexicon", type=Path, metavar="FILE", help="JSON: emotion -> words (default: our English one)"
    )
    asking.add_argument("--limit", type=int, default=40, metavar="N", help="longest answer in tokens (default 40)")

    reading = parser.add_argument_group("readings and numbers; run.json names those that were used")
    add = reading.add_argument
    add("--tau", type=float, default=default.tau, help="keep pairs with a hit rate above this (default 0.5)")
    add("--pooled", action="store_true", help="one steering vector for all emotions")
    add("--alphas", default=",".join(f"{a:g}" for a in default.alphas), metavar="LIST",
        help="strengths of injection (default %(default)s; the paper's is 0.1)")  # fmt: skip
    add("--inject-rows", choices=ROWS, default=default.inject_rows, help="rows that are steered (default all)")
    add("--inject-reading", choices=READINGS, default=default.inject_reading, help="of alpha (default raw)")
    add("--answered", type=int, default=default.answered, metavar="N",
        help=f"pairs of each emotion that answers are generated for (default {default.answered})")  # fmt: skip
    add("--draws", type=int, default=default.draws, metavar="N", help="random controls, at least 10 (default 10)")
    add("--l-emo", type=int, metavar="LAYER", help="in place of the layer with the largest effect")
    add("--head-reads", choices=get_args(Reads), default=default.head_reads, help="what patching is read by")
    add(
        "--head-rows", choices=get_args(HeadRows), default=default.head_rows, help="rows that are patched (default all)"
    )
    add("--top", type=int, default=default.top, metavar="N", help="candidates for critical heads (default 10)")
    add("--margin", type=float, default=default.margin, help="over random heads, a share of the gap (default 0.01)")
    add("--level", type=float, default=default.level, help="of the corrected test (default 0.05)")
    add("--prescreen", choices=("atp", "atp*"), help="attribution patching first; for large models")
    add("--confirm", type=int, default=default.confirm, metavar="N", help="patches run after it (default 64)")
    add("--k", type=int, default=default.k, metavar="N", help="heads of each emotion that are compared (default 10)")
    add("--neurons", type=int, default=default.neurons, metavar="N", help="candidates of each type (default 30)")
    add("--no-fold-norm", action="store_true", help="leave the final norm's gain out of the vocabulary projection")
    add("--look", type=int, default=default.look, metavar="N", help="tokens of a projection that count (default 20)")
    add("--explicit-k", type=int, metavar="N", help="emotion words among them in an explicit-state neuron")
    for name, kind in READINGS_OF.items():
        add("--" + name.replace("_", "-"), choices=get_args(kind), default=getattr(default, name),
            help=f"default {getattr(default, name)!r}")  # fmt: skip
    add("--enhance", type=float, default=default.enhance, help="factor when functions are verified (default 2)")
    add("--no-tune", action="store_true", help="choose no strengths of VEENA")
    add("--objective", choices=get_args(Objective), default=default.objective, help="that they are chosen by")
    add("--questions", type=Path, metavar="FILE", help="not about feelings, JSONL; a strength that loses them is not "
        "chosen (the embedded model has its own)")  # fmt: skip


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings of a command line.

    Raises:
        ValueError: strengths that are not numbers.
    """
    try:
        alphas = tuple(float(a) for a in args.alphas.split(","))
    except ValueError as error:
        raise ValueError(f"--alphas {args.alphas}: expected numbers such as 0.1,1") from error
    return Settings(
        seed=args.seed, tau=args.tau, pooled=args.pooled, alphas=alphas, inject_rows=args.inject_rows,
        inject_reading=args.inject_reading, answered=args.answered, draws=args.draws, l_emo=args.l_emo,
        head_reads=args.head_reads, head_rows=args.head_rows, top=args.top, margin=args.margin, level=args.level,
        prescreen=args.prescreen, confirm=args.confirm, k=args.k,
        neurons=args.neurons, fold_norm=not args.no_fold_norm, look=args.look,
        explicit_k=args.explicit_k, enhance=args.enhance,
        tune=not args.no_tune, objective=args.objective, **{name: getattr(args, name) for name in READINGS_OF},
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command. Returns what ``--json`` prints.

    Raises:
        ValueError: bad input; see :func:`emocircuits.circuits.localize.localize`.
    """
    from emocircuits.circuits.localize import faces, localize

    if args.out is None:
        raise ValueError("--out is missing: name a folder for the results")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")
    settings, progress = settings_of(args), not args.json
    if args.pairs is None and args.model != EMBEDDED:
        raise ValueError(f"--pairs is missing: {args.model} needs a manifest of contrastive pairs (docs/data.md)")
    if settings.seed < 0:
        raise ValueError(f"--seed {settings.seed}: expected 0 or more")
    subject = _subject(args)
    settings.require(subject)
    pairs = args.pairs or faces(args.out, identities=args.faces, seed=settings.seed, progress=progress)
    circuit = localize(
        subject, pairs, args.out, settings, name=args.model, questions=_questions(args, subject),
        allow_unlicensed=args.allow_unlicensed, fresh=args.fresh,
        progress=progress,
    )  # fmt: skip
    record: Any = read_json(args.out / "run.json", "a run")
    result = {
        "circuit": circuit.to_dict(), "file": str(args.out / "circuit.json"), "seconds": record["total_seconds"],
        "steps": {name: step["says"] for name, step in record["steps"].items()}, "skipped": record["skipped"],
    }  # fmt: skip
    if not args.json:
        print(f"l_emo {circuit.l_emo}; heads {_listed(circuit.heads)}; neurons {_listed(circuit.neurons)}")
    return result


def _listed(places: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{layer}.{i}" for layer, i in places) or "none above chance"


def _questions(args: argparse.Namespace, subject: Any) -> list[Any]:
    from emocircuits.circuits.questions import embedded_questions, questions_file

    if args.questions is not None:
        return questions_file(subject, args.questions)
    return embedded_questions() if args.model == EMBEDDED else []


def _subject(args: argparse.Namespace) -> Any:
    from emocircuits.circuits.lexicon import Lexicon
    from emocircuits.circuits.subject import QUESTION, Subject

    if args.model == EMBEDDED:
        if args.question or args.answer or args.lexicon:
            raise ValueError(
                "--question, --answer, --lexicon: not for the embedded model, which is asked as it was trained"
            )
        subject = Subject.embedded()
        if args.device:
            subject.model.to(args.device)
        return subject
    model, processor = load_model(args.model, device=args.device)
    lexicon = None
    if args.lexicon is not None:
        words: Any = read_json(args.lexicon, "a lexicon")
        if not isinstance(words, dict) or not all(isinstance(w, list) for w in words.values()):
            raise ValueError(f"{args.lexicon}: not a lexicon; expected an object from each emotion to its words")
        lexicon = Lexicon(words, name=args.lexicon.name)
    return Subject.of(
        model, processor, question=args.question or QUESTION, lexicon=lexicon, answer=args.answer, limit=args.limit
    )
