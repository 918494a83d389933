"""The engine against a hook loop: every family, target, position and direction, in float64 and float32."""

from __future__ import annotations

import functools

import pytest
import sweep_oracle as oracle
import torch
from models import BOS, VOCAB, batch, build, prompt
from transformers import GPT2Config, GPT2LMHeadModel

from emocircuits.sweep.api import Sweep
from emocircuits.sweep.metrics import logit_diff

A, B = 11, 23
FAMILIES = ("llama", "qwen2", "gpt2", "llava", "llama-padded", "llava-padded")


@functools.cache
def model_of(kind, dtype=torch.float64):
    if kind == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=BOS, eos_token_id=2,
            initializer_range=0.3, attn_implementation="sdpa",
        )  # fmt: skip
        return GPT2LMHeadModel(config).to(dtype).eval()
    if kind == "llava":
        return build("llava", dtype=dtype)
    return build("text", kind, dtype=dtype)


def pair(kind, dtype=torch.float64):
    """A model and two prompts that first differ at the fourth column, or at the image."""
    name, _, padded = kind.partition("-")
    model = model_of(name, dtype)
    if name == "llava":
        clean, corrupt = (prompt(model, 2, 3, seed=s) for s in (0, 0))
        corrupt["pixel_values"] = -clean["pixel_values"] + 0.5
    else:
        clean = prompt(model, 8, 0, sizes=[]) if name != "gpt2" else _words(9)
        corrupt = {k: v.clone() for k, v in clean.items()}
        corrupt["input_ids"][0, [3, 6]] = torch.tensor([50, 51])
    if padded:
        clean, corrupt = (batch([x, _longer(x)]) for x in (clean, corrupt))
        clean, corrupt = ({k: v[:1] for k, v in x.items()} for x in (clean, corrupt))
    return model, clean, corrupt


def _longer(x):
    more = {**x}
    for name, fill in (("input_ids", 9), ("attention_mask", 1)):
        more[name] = torch.cat([torch.full((1, 3), fill), x[name]], 1)
    return more


def _words(n):
    g = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(8, VOCAB, (1, n), generator=g),
        "attention_mask": torch.ones(1, n, dtype=torch.long),
    }


def difference(logits):
    return logits[0, -1, A] - logits[0, -1, B]


def agree(found, expected, tolerance, gap=0.0):
    """Within ``tolerance`` of the metric's range, which must not be nothing."""
    spread = max(float(expected.max() - expected.min()), abs(gap))
    assert spread > 1e-2
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * spread


HEADS = [slice(8 * h, 8 * h + 8) for h in range(4)]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("target", ["heads", "residual"])
def test_families(kind, positions, target):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    found = getattr(sweep, target)(positions=positions)
    units = HEADS if target == "heads" else None
    layers = [0, 2] if "llava" in kind and positions == "each" else None
    expected = oracle.sweep(model, corrupt, clean, target, difference, positions, units, layers=layers)
    values = found.values if layers is None else found.values[layers]
    agree(values, expected, 1e-10, found.gap)
    assert found.axes == ("layer", *(["pos"] if positions == "each" else []), *(["head"] if units else []))
