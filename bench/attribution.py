"""How far attribution ranks patches as the exact engine does, and what either costs.

    python bench/attribution.py [--targets heads,neurons,...] [--rounds 3] [--json FILE]

Two models: the embedded one on a happy and a neutral face, and a random Llama (8 layers, d=256, 8 heads, 4 key-value
heads, 32 tokens that first differ at the fifth, weights with a deviation of 1/sqrt(d)). Every target is patched at each
position. Agreement is Spearman's rank correlation of magnitudes over all patches that can have an effect, and the share
of the strongest 32 patches that are among the 64 strongest estimates. Times are CPU time of the process, one thread,
the median of rounds that take turns; the two runs of the prompts, which all share, are not in them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from emocircuits import embedded
from emocircuits.embedded import faces, language
from emocircuits.environment import provenance
from emocircuits.sweep import Sweep, logit_diff

TARGETS = ("heads", "neurons", "residual", "attn_out", "mlp_out", "qkv")
METHODS = ("atp", "atp*", "ig")
STRONGEST, WITHIN = 32, 64


def of_embedded():
    model, processor = embedded.load()
    words = language.prompt("my mom said that the report is ready.") + " i feel"
    sides = [
        processor(images=faces.face(101_900, mood, strength), text=words, return_tensors="pt")
        for mood, strength in (("happy", 1.0), ("neutral", 0.0))
    ]
    glad, calm = processor.tokenizer.convert_tokens_to_ids(["happy", "calm"])
    return model, *sides, logit_diff(glad, calm)


def of_random():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=256**-0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(8, 1024, (1, 32))
    other = ids.clone()
    other[0, [4, 9, 17, 25]] += 1
    return model, {"input_ids": ids}, {"input_ids": other}, logit_diff(11, 23)


def spent(run):
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def measure(name, sweep, targets, rounds):
    rows = []
    for target in targets:
        jobs = {"exact": lambda t=target: getattr(sweep, t)(positions="each")}
        jobs |= {m: lambda t=target, m=m: sweep.attribute(t, m, "each") for m in METHODS}
        times = {job: [] for job in jobs}
        tables = {}
        for turn in range(rounds):
            for job in list(jobs)[:: 1 if turn % 2 else -1]:
                tables[job], seconds = spent(jobs[job])
                times[job].append(seconds)
        exact = (tables["exact"].values - sweep.corrupt).abs().flatten()
        live = exact > 0
        row = {
            "model": name, "target": target, "patches": exact.numel(), "with_effect": int(live.sum()),
            "exact_seconds": statistics.median(times["exact"]),
        }  # fmt: skip
        best = set(exact.argsort(descending=True)[:STRONGEST].tolist())
        for m in METHODS:
            guess = (tables[m].values - sweep.corrupt).abs().flatten()
            found = set(guess.argsort(descending=True)[:WITHIN].tolist())
            row[m] = {
                "rank": float(spearmanr(guess[live], exact[live]).statistic), "found": len(best & found) / len(best),
                "seconds": statistics.median(times[m]),
            }  # fmt: skip
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row):
    told = "  ".join(
        f"{m} rank {row[m]['rank']:.2f} found {row[m]['found']:.2f} {row[m]['seconds']:.2f} s" for m in METHODS
    )
    return f"{row['model']:9} {row['target']:9} {row['patches']:6} patches  exact {row['exact_seconds']:.2f} s  {told}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"some of {', '.join(TARGETS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, edges = [], []
    for name, given in (("embedded", of_embedded()), ("random", of_random())):
        sweep = Sweep(*given, progress=False)
        rows += measure(name, sweep, args.targets.split(","), args.rounds)
        for method in ("eap", "eap-ig"):
            found, seconds = spent(lambda m=method, s=sweep: s.edges(m))
            edges.append({"model": name, "method": method, "edges": found.edges, "seconds": seconds})
            print(f"{name:9} {method:6} {found.edges} edges {seconds:.2f} s")
    if args.json:
        command = "python bench/attribution.py " + " ".join(sys.argv[1:])
        record = {"command": command.strip(), "threads": 1, "rows": rows, "edges": edges, **provenance("cpu")}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
