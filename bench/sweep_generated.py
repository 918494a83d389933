# ruff: noqa: E402 - the environment is set before torch is imported
"""What a sweep of generated text costs: the engine, and ``model.generate`` with hooks, one patch at a time and batched.

    python bench/sweep_generated.py [--limit 8] [--rounds 3] [--batch 32] [--columns 44,60,76] [--json FILE]

The embedded model (LLaVA, fp32) looks at a happy and at a neutral face; every head of every layer is patched in turn,
in all columns at once or in each of ``--columns``, and the model goes on for ``--limit`` tokens. All contenders must
say the same, token for token, before anything is timed: also with heads overwritten by noise in all columns, for the
clean face's head outputs alone change no word here. They take turns on one thread; times are CPU time of the process,
the engine's with both runs of the two prompts. "batched" patches as many heads in one ``generate`` as ``--batch`` says,
each row its own.
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
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "python")]
warnings.filterwarnings("ignore")

import torch

from emocircuits import embedded
from emocircuits.embedded import faces, language
from emocircuits.environment import provenance
from emocircuits.families import open_model
from emocircuits.sweep import Sweep, generated


def ids(said: list[int]) -> float:
    """A score without a tokenizer."""
    return float(sum(said))


class Hooks:
    """Heads patched by hooks on the output projections, in the pass over the prompt alone."""

    def __init__(
        self, model: Any, clean: dict[str, Any], corrupt: dict[str, Any], limit: int, at: list[int] | None
    ) -> None:  # fmt: skip
        self.model, self.corrupt, self.limit, self.at = model, corrupt, limit, at
        self.handle = open_model(model)
        self.columns, self.size = clean["input_ids"].shape[1], self.handle.geometry.head_dim
        self.kept: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Any:
            return lambda module, args: self.kept.__setitem__(layer, args[0][0].clone())

        hooks = [m.register_forward_pre_hook(keep(l)) for l, m in enumerate(self.handle.output_projections)]
        with torch.no_grad():
            model(**clean)
        for hook in hooks:
            hook.remove()

    def say(self, patches: list[tuple[int, slice, int]]) -> list[list[int]]:
        """What the model says under each patch, all in one batch."""

        def change(layer: int) -> Any:
            def hook(module: Any, args: Any) -> Any:
                if args[0].shape[1] != self.columns:
                    return None
                z = args[0].clone()
                for row, (l, columns, head) in enumerate(patches):
                    if l == layer:
                        at = slice(head * self.size, (head + 1) * self.size)
                        z[row, columns, at] = self.kept[layer][columns, at]
                return (z,)

            return hook

        layers = sorted({l for l, _, _ in patches})
        hooks = [self.handle.output_projections[l].register_forward_pre_hook(change(l)) for l in layers]
        inputs = {k: v.repeat(len(patches), *[1] * (v.ndim - 1)) for k, v in self.corrupt.items()}
        try:
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.limit)
        finally:
            for hook in hooks:
                hook.remove()
        end = self.model.generation_config.eos_token_id
        found = []
        for row in out[:, self.columns :].tolist():
            found.append(row[: row.index(end) + 1] if end in row else row)
        return found

    def loop(self, batch: int) -> list[list[int]]:
        """Every head of every layer."""
        g = self.handle.geometry
        columns = [slice(None)] if self.at is None else [slice(c, c + 1) for c in self.at]
        patches = [(l, c, h) for l in range(g.layers) for c in columns for h in range(g.heads)]
        return [said for at in range(0, len(patches), batch) for said in self.say(patches[at : at + batch])]


def main() -> None:
    """Check that all agree, then time them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--columns", help="patched one at a time (default all at once)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    at = None if args.columns is None else [int(c) for c in args.columns.split(",")]
    torch.set_num_threads(1)
    model, processor = embedded.load()
    words = language.prompt("my mom said that the report is ready.")
    clean, corrupt = (
        dict(processor(images=faces.face(101_900, emotion, by), text=words, return_tensors="pt"))
        for emotion, by in (("happy", 1.0), ("neutral", 0.0))
    )

    metric = generated(ids, limit=args.limit)

    def engine(patch: Any = "clean", at: list[int] | None = at) -> list[list[int]]:
        sweep = Sweep(model, clean, corrupt, metric, patch_with=patch, progress=False)
        return sweep.heads("all" if at is None else at).texts or []

    hooks = Hooks(model, clean, corrupt, args.limit, at)
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "engine": engine,
        "batched": lambda: hooks.loop(args.batch),
        "one at a time": lambda: hooks.loop(1),
    }
    said = {name: run() for name, run in contenders.items()}
    g = hooks.handle.geometry
    noise = 8 * torch.randn(g.heads, g.head_dim, generator=torch.Generator().manual_seed(0))
    noisy = Hooks(model, clean, corrupt, args.limit, None)
    noisy.kept = {l: noise.flatten().expand(hooks.columns, -1) for l in range(g.layers)}
    loud = {"engine": engine(noise, None), "batched": noisy.loop(args.batch), "one at a time": noisy.loop(1)}
    for name in contenders:
        if said[name] != said["one at a time"] or loud[name] != loud["one at a time"]:
            raise SystemExit(f"{name} says something else than the hook loop: nothing is timed")
    patches, lengths = len(said["engine"]), [len(t) for t in said["engine"]]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        order = list(contenders)[turn % 3 :] + list(contenders)[: turn % 3]
        for name in order:
            begin = time.process_time()
            contenders[name]()
            times[name].append(time.process_time() - begin)
    slow = times["one at a time"]
    record: dict[str, Any] = {
        "patches": patches, "at": at, "columns": hooks.columns, "limit": args.limit, "tokens": sum(lengths) / patches,
        "different texts under noise": len({tuple(t) for t in loud["engine"]}), "batch": args.batch,
        **provenance("cpu"),
    }  # fmt: skip
    print(
        f"{patches} heads, prompt of {hooks.columns} tokens, {record['tokens']:.1f} tokens said on average; "
        f"{record['different texts under noise']} different texts under noise, all the same for all contenders"
    )
    for name, seconds in times.items():
        ratio = statistics.median(slow) / statistics.median(seconds)
        each = 1000 * statistics.median(seconds) / patches
        record[name] = {"ms a patch": each, "times as fast": ratio, "seconds": seconds}
        print(f"{name:>14}  {each:7.2f} ms a patch  {ratio:5.2f}x")
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
