"""What VEENA costs a generation of the embedded model: with / without, in one run, pair by pair.

    python bench/generation.py [--check] [--device cuda] [--json FILE]

The untouched model runs on SDPA, as transformers sets it up. Exit code 1 with --check when the ratio of the largest
batch (the demo's is 32) exceeds 1.05; a token of this small model takes about a millisecond at batch 1, so that a few
dozen microseconds show there.
"""

from __future__ import annotations

import argparse
import sys

import torch

from emocircuits import VEENA, Circuit, embedded
from emocircuits.demo.cases import FIRST, WEAK, Prompts, contradicting
from emocircuits.demo.cost import overhead
from emocircuits.environment import provenance
from emocircuits.files import write_json
from emocircuits.loading import load_model

LIMIT = 1.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default 1 8 32)")
    parser.add_argument("--pairs", type=int, default=21, help="timed pairs (default 21)")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens (default 32)")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when the last ratio exceeds {LIMIT}")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args()
    model, processor = load_model("embedded", device=args.device)
    circuit = Circuit.load(embedded.PATH / "circuit.json")
    plan = VEENA(circuit, **circuit.settings["veena"]).plan(model)
    rows = []
    print(f"VEENA on the embedded model, {args.device}, {torch.get_num_threads()} threads")
    print(f"{args.tokens} tokens, {args.pairs} pairs")
    print(f"{'batch':>6} {'without':>12} {'with':>12} {'ratio':>7}  95 % interval")
    for batch in args.batches:
        cases = contradicting(range(FIRST, FIRST + 4), WEAK, seed=1)[:batch]
        inputs = {name: value.to(args.device) for name, value in Prompts(cases, processor).batches[0].items()}
        o = overhead(model, inputs, plan, tokens=args.tokens, pairs=args.pairs)
        rows.append(o._asdict())
        print(
            f"{batch:>6} {o.without / o.tokens * 1e3:>9.2f} ms {o.with_plan / o.tokens * 1e3:>9.2f} ms "
            f"{o.ratio:>7.3f}  [{o.low:.3f}, {o.high:.3f}]"
        )
    if args.json:
        write_json(
            args.json, {"bench": "generation", "command": "python bench/generation.py", "rows": rows, **provenance()}
        )
    last = rows[-1]["ratio"]
    if args.check and last > LIMIT:
        print(f"the ratio {last:.3f} exceeds {LIMIT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
