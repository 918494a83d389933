"""What exact activation patching of a 7B model costs on one GPU: the sweep engine, batched hooks, nnsight.

    python bench/sweep_gpu.py [--columns 640] [--rounds 3] [--seconds 420] [--results DIR] [--commit C] [--tiny]

A Llama of 32 layers, 4096, 32 heads, 11008 neurons and 32000 words, random bfloat16 weights, prompts of 640 tokens that
first differ at column 4, a logit difference at the last column. Two jobs: every head of every layer at all positions
(1024 patches), and head x position on a sample (all heads of four layers at eight columns, 1024 patches).

Before anything is timed, every contender patches a sample, and so do plain hooks, one patch at a time, on the model
and on a float32 copy of it (40 GiB of GPU memory in all). A contender must be at most twice as far from float32, root
mean square, as the plain hooks in bfloat16 are. Then contenders take turns. Times are by CUDA events around all the
work of a turn, the engine's runs of both prompts included; the engine always runs the whole job, others, whose patches
all cost the same, a slice of it. FLOPs are counted (emocircuits.sweep.planner), and told as a share of a large
product's rate in the same run.

Without a GPU it says so and exits with 0. --tiny runs it all on a small model, on a CPU too; its times mean nothing.
"""

# ruff: noqa: E402 - the environment is set before torch is imported
from __future__ import annotations

import os

os.environ.setdefault("PIP_NO_INDEX", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import dataclasses as dc
import gc
import math
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "python")]

import torch
from sweep_contenders import Batched, Contender, Hooks, NNsight, Patch, Unavailable, Workload, by_layer
from torch import Tensor

from bench.kernels_gpu import ceilings, machine, timing
from emocircuits.families import open_model
from emocircuits.files import write_json
from emocircuits.sweep import Sweep, logit_diff
from emocircuits.sweep.planner import Shape, forecast

SIZES = dict(layers=32, width=4096, heads=32, kv_heads=32, neurons=11008, vocabulary=32000)
TINY = dict(layers=4, width=64, heads=4, kv_heads=4, neurons=160, vocabulary=128)
JOBS = ("heads", "heads-each")
AGAIN = 2
"""How many times as far from float32 as plain hooks a contender may be."""


@dc.dataclass
class OneModel(Workload):
    """A workload whose model is made once, on the device, for all contenders: 7B parameters are not saved anywhere."""

    made: Any = None

    @classmethod
    def on(cls, device: str, args: Any) -> OneModel:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads, intermediate_size=args.neurons, vocab_size=args.vocabulary,
            max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        for layer in model.model.layers:  # sharper attention, so that a patch shows
            layer.self_attn.q_proj.weight.mul_(2.0)
        clean = torch.randint(10, args.vocabulary, (1, args.columns), generator=torch.Generator().manual_seed(0))
        corrupt = clean.clone()
        for column in {4, 5, args.columns // 2, 3 * args.columns // 4}:
            corrupt[0, column] = 10 + (corrupt[0, column] * 7 + 13) % (args.vocabulary - 10)
        return cls(Path(), args, clean.to(device), corrupt.to(device), made=model)

    def model(self, attention: str = "sdpa") -> Any:
        """The same weights in modules of their own: nnsight puts a forward of its own into those it gets."""
        tensors = [*self.made.parameters(), *self.made.buffers()]
        return copy.deepcopy(self.made, {id(x): x for x in tensors})

    def exact(self) -> OneModel:
        """The same in float32."""
        return dc.replace(self, made=copy.deepcopy(self.made).float())

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(self.args.vocabulary)}, unk_token="t3"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")

    def metric(self, logits: Tensor) -> Tensor:
        last = logits[0, -1].float()
        return last[self.answers[0]] - last[self.answers[1]]

    def sample(self) -> tuple[list[int], list[int]]:
        """Layers and columns of head x position."""
        a = self.args
        layers = [i for k in range(4) if (i := (2 * k + 1) * a.layers // 8) < a.layers]
        columns = sorted({4 + (2 * k + 1) * (a.columns - 5) // 16 for k in range(8)})
        return sorted(set(layers)), columns

    def patches(self, job: str) -> list[Patch]:
        if job == "heads":
            return super().patches(job)
        layers, columns = self.sample()
        return [Patch(l, c, h) for l in layers for c in columns for h in range(self.args.heads)]


class Engine(Contender):
    """``emocircuits.Sweep``, the whole job."""

    whole = True

    def prepare(self) -> None:
        self.model = self.work.model()

    def run(self, job: str, patches: Any) -> list[float]:
        work = self.work
        sweep = Sweep(
            self.model, clean={"input_ids": work.clean}, corrupt={"input_ids": work.corrupt},
            metric=logit_diff(*work.answers), progress=False,
        )  # fmt: skip
        if job == "heads":
            return [float(x) for x in sweep.heads().values.flatten()]
        layers, columns = work.sample()
        return [float(x) for x in sweep.heads(positions=columns, layers=layers).values.flatten()]


class Fewer(Batched):
    """Batched hooks of another size: how far the hook loop is from itself."""

    batch, last = 4, True


CONTENDERS: dict[str, Any] = {"engine": Engine, "batched hooks": Batched, "nnsight": NNsight}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, help="tokens of a prompt (default 640)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender at most (default 3)")
    parser.add_argument("--seconds", type=float, default=420, help="no new turn after this time (default 420)")
    parser.add_argument("--slice", type=int, default=128, help="patches of a contender in a turn (default 128)")
    parser.add_argument("--check", type=int, default=24, help="patches that must agree (default 24)")
    parser.add_argument("--batch", type=int, default=16, help="rows of batched hooks (default 16)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the record goes")
    parser.add_argument("--commit", help="what the record says of the code (default: git's answer)")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too; times mean nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = options(arguments)
    if not torch.cuda.is_available() and not args.tiny:
        print("no GPU is visible to torch: the sweep of a 7B model was not timed (--tiny runs a small one here)")
        return 0
    begin, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    sizes = TINY if args.tiny else SIZES
    args.columns = args.columns or (24 if args.tiny else 640)
    if args.columns < 16:
        raise SystemExit("--columns: expected at least 16")
    vars(args).update(sizes)
    with torch.no_grad():
        work = OneModel.on(device, args)
        contenders, left_out = {}, {}
        for name, kind in CONTENDERS.items():
            try:
                contenders[name] = kind(work)
            except Unavailable as reason:
                left_out[name] = str(reason)
                print(f"left out: {name} ({reason})", file=sys.stderr)
            else:
                contenders[name].batch = args.batch
        # A forecast of its rate comes from the same run.
        ceiling = ceilings.measure(timing.Timer(device, 1.5), device, args.tiny)
        exact = known(work.exact(), args)
        gc.collect()
        jobs = [measure(job, contenders, work, args, device, ceiling, begin, exact[job]) for job in JOBS]
    record = {
        "command": " ".join(["python", "bench/sweep_gpu.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "device": machine.device(device), "versions": {**machine.versions(), "nnsight": _version("nnsight")},
        "commit": args.commit or machine.commit(), "sizes": {**sizes, "columns": args.columns, "dtype": "bfloat16"},
        "tiny": args.tiny, "left_out": left_out, "ceilings": ceiling, "jobs": jobs,
        "seconds": time.monotonic() - begin,
    }  # fmt: skip
    name = f"sweep-{'tiny-' if args.tiny else ''}{record['device']['slug']}.json"
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / name, record)
    print(f"written: {args.results / name}")
    return 0 if all(row["agrees"] for job in jobs for row in job["contenders"]) else 1


def checked(work: OneModel, job: str, count: int) -> list[int]:
    """Patches of a job that must agree."""
    total = len(work.patches(job))
    step = max(1, total // count)
    return list(range(step // 2, total, step))[:count]


def known(exact: OneModel, args: Any) -> dict[str, list[float]]:
    """What plain hooks give in float32, by job."""
    found, loop = {}, Hooks(exact)
    for job in JOBS:
        loop.ready(job)
        everything = exact.patches(job)
        found[job] = loop.run(job, [everything[i] for i in checked(exact, job, args.check)])
    return found


def measure(
    job: str, contenders: dict[str, Contender], work: OneModel, args: Any, device: str, ceiling: dict[str, float],
    begin: float, exact: list[float],
) -> dict[str, Any]:  # fmt: skip
    """Agreement, then turns."""
    everything = work.patches(job)
    chosen = checked(work, job, args.check)
    sample = [everything[i] for i in chosen]
    loop, again = Hooks(work), Fewer(work)
    for one in (loop, again, *contenders.values()):
        one.ready(job)

    def far(found: list[float], others: list[float] = exact) -> float:
        return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(found, others, strict=True)))

    plain = loop.run(job, sample)
    noise, error = far(plain, run_batched(again, job, sample)), far(plain)
    allowed = AGAIN * error
    rows, seconds = [], {name: [] for name in contenders}
    for name, one in contenders.items():
        found = one.run(job, everything if one.whole else sample)
        worst = far([found[i] for i in chosen] if one.whole else found)
        rows.append({"contender": name, "agrees": worst <= allowed, "error": worst})
        if worst > allowed:
            print(f"{name} differs from float32 by {worst:.2e}, allowed are {allowed:.2e}: it is not timed")
    timed = [row["contender"] for row in rows if row["agrees"]]
    for turn in range(args.rounds):
        if turn and time.monotonic() - begin > args.seconds:
            break
        start = (turn * args.slice) % max(1, len(everything) - args.slice + 1)
        part = everything[start : start + args.slice]
        for name in timed[turn % max(1, len(timed)) :] + timed[: turn % max(1, len(timed))]:
            patches = everything if contenders[name].whole else part
            seconds[name].append(clock(lambda n=name, p=patches: contenders[n].run(job, p), device) / len(patches))
    shape = Shape.of(open_model(work.model()), args.columns, first=work.first, rows=2)
    counted = forecast(shape, "heads", everything)
    forward = counted.naive / len(everything)
    rate = 1e12 * ceiling["matmul_tflops"]
    for row in rows:
        taken = seconds[row["contender"]]
        if not taken:
            continue
        each = statistics.median(taken)
        flops = counted.flops / len(everything) if row["contender"] == "engine" else forward
        row.update(
            ms_a_patch=1e3 * each, all_ms=[1e3 * t for t in taken], gflop_a_patch=flops / 1e9,
            tflops=flops / each / 1e12, share_of_matmul_rate=flops / each / rate,
            share_of_bound=counted.least / len(everything) / rate / each,
        )  # fmt: skip
    ours = next((r.get("ms_a_patch") for r in rows if r["contender"] == "engine"), None)
    for row in rows:
        if "ms_a_patch" in row:
            if ours is not None:
                row["engine_is_faster_by"] = row["ms_a_patch"] / ours
            print(
                f"{job:11s} {row['contender']:14s} {row['ms_a_patch']:9.3f} ms a patch, {row['tflops']:7.1f} TFLOP/s, "
                f"{100 * row['share_of_matmul_rate']:3.0f} % of a product's, {100 * row['share_of_bound']:3.0f} % "
                f"of the bound; error {row['error']:.1e} (plain hooks {error:.1e})"
            )
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "job": job, "patches": len(everything), "checked": len(sample), "error_of_plain_hooks": error,
        "noise_of_another_batch": noise, "range": max(exact) - min(exact),
        "arithmetic_allows": counted.naive / counted.least, "peak_bytes": peak, "contenders": rows,
    }  # fmt: skip


def run_batched(one: Hooks, job: str, patches: list[Patch]) -> list[float]:
    """Each patch in a batch of its own layer that is filled with repetitions of it."""
    values = [0.0] * len(patches)
    for group in by_layer(patches, 1):
        (at, patch), *_ = group
        values[at] = one.run(job, [patch] * one.batch)[0]
    return values


def clock(call: Any, device: str) -> float:
    """Seconds of device time from before a call to its end."""
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
