"""What a grid of VEENA's strengths costs on many prompts, beside ``patch()`` and ``model.generate`` for each strength.

    python bench/veena_grid.py [--prompts 32] [--limit 12] [--rounds 3] [--json FILE]

The embedded model and its circuit, faces of as many people, 5 betas and 4 gammas. The other way runs all prompts as
one batch under each strength. Both say the same texts, token for token, which is checked. Times are CPU time of the
process, one thread, the median of rounds that take turns.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import torch

from emocircuits import embedded, patch
from emocircuits.circuit import Circuit
from emocircuits.embedded import faces, language
from emocircuits.environment import provenance
from emocircuits.sweep import contains, generated, log_prob
from emocircuits.veena import VEENA, veena_grid

BETAS, GAMMAS = (1.0, 1.5, 2.0, 3.0, 4.0), (1.0, 1.25, 1.6, 2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = embedded.load()
    circuit = Circuit.load(embedded.PATH / "circuit.json")
    words = language.prompt("my mom said that the report is ready.")
    prompts = [
        processor(images=faces.face(101_900 + i, ("happy", "sad")[i % 2], 0.5), text=words, return_tensors="pt")
        for i in range(args.prompts)
    ]
    batch = {name: torch.cat([p[name] for p in prompts]) for name in prompts[0]}
    columns, token = batch["input_ids"].shape[1], processor.tokenizer.convert_tokens_to_ids("happy")
    said = generated(contains("happy"), limit=args.limit, tokenizer=processor)

    def grid(metric):
        return veena_grid(model, prompts, circuit, BETAS, GAMMAS, metric, progress=False)

    @torch.no_grad()
    def one_by_one(texts):
        found = []
        for beta, gamma in itertools.product(BETAS, GAMMAS):
            with patch(model, VEENA(circuit, beta, gamma).plan()):
                if texts:
                    ids = model.generate(**batch, do_sample=False, max_new_tokens=args.limit)
                    found.append(processor.batch_decode(ids[:, columns:], skip_special_tokens=True))
                else:
                    logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
                    found.append(logits.log_softmax(-1)[:, token].tolist())
        return [row for prompt in zip(*found, strict=True) for row in prompt]

    jobs = {
        "generated": (lambda: grid(said).texts, lambda: one_by_one(True)),
        "log_prob": (lambda: grid(log_prob(token)).pairs.flatten().tolist(), lambda: one_by_one(False)),
    }
    rows = []
    for name, both in jobs.items():
        times, found = ([], []), [None, None]
        for turn in range(args.rounds + 1):  # the first one does not count
            for i, run in enumerate(both):
                start = time.process_time()
                found[i] = run()
                if turn:
                    times[i].append(time.process_time() - start)
        if name == "generated":
            assert found[0] == found[1], "the texts differ"
        else:
            torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=0, atol=1e-3)
        ours, theirs = (statistics.median(t) for t in times)
        rows.append({"metric": name, "grid_seconds": ours, "one_by_one_seconds": theirs, "ratio": theirs / ours})
        print(
            f"{name}: grid {ours:.2f} s, one strength at a time {theirs:.2f} s: {theirs / ours:.1f} times", flush=True
        )
    if args.json:
        settings = {"prompts": args.prompts, "limit": args.limit, "rounds": args.rounds, "cells": 20}
        record = {"settings": settings, "rows": rows, **provenance("cpu")}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
