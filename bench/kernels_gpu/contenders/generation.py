"""Whole generations of a LLaVA with random weights: with a VEENA-like plan, and left alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shapes import TINY, Generation
from ..timing import Call
from . import Contender

UNTOUCHED = "untouched, SDPA"
VEENA = "VEENA-like plan"
IMAGE, VOCABULARY = 5, 32000
PROMPT = (35, 576, 60)
BOOSTED_HEADS, EDITED_NEURONS = 10, 30
"""Of the whole model, as the paper has it for its 36 layers."""


@dataclass(frozen=True)
class Prepared:
    """A model, its inputs, the plan, and how it generates."""

    model: Any
    inputs: dict[str, Tensor]
    plan: Any
    options: dict[str, Any]


def make(case: Generation, device: str, seed: int) -> Prepared:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from emocircuits import BoostRoute, Plan, ScaleNeurons

    small = case.hidden <= 64
    vocabulary = 64 if small else VOCABULARY
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=case.hidden, intermediate_size=case.hidden * 11008 // 4096,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.heads,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    side, patch, width = (16, 4, 32) if small else (336, 14, 1024)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2 if small else 4,
        num_attention_heads=width // 16, image_size=side, patch_size=patch, projection_dim=width,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    torch.manual_seed(seed)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(case.dtype)
        try:
            model = LlavaForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None
    before, visual, after = (TINY.system, (side // patch) ** 2, 5) if small else PROMPT
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(8, vocabulary, (case.batch, before + visual + after), generator=generator)
    words[:, before : before + visual] = IMAGE
    pixels = torch.randn(case.batch, 3, side, side, generator=generator).to(case.dtype)
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": pixels}
    heads = [(number % case.layers, (7 * number) % case.heads) for number in range(min(BOOSTED_HEADS, case.heads))]
    neurons: dict[int, list[int]] = {}
    for number in range(min(EDITED_NEURONS, case.hidden)):
        neurons.setdefault(number % case.layers, []).append(number)
    plan = Plan(
        [
            BoostRoute(heads, to=["query", "generated"], source="visual", by=1.4, reading="weight"),
            ScaleNeurons(tuple((layer, tuple(found)) for layer, found in neurons.items()), by=1.6),
        ]
    )
    options: dict[str, Any] = dict(max_new_tokens=case.tokens, min_new_tokens=case.tokens, do_sample=False)
    if case.static:
        options["cache_implementation"] = "static"
    return Prepared(model, {name: value.to(device) for name, value in inputs.items()}, plan, options)


def untouched(prepared: Prepared) -> Call:
    return lambda: prepared.model.generate(**prepared.inputs, **prepared.options)


def patched(prepared: Prepared) -> Call:
    """A copy of the model that stays patched, so that the two can take turns."""
    from emocircuits import patch

    model = copy.deepcopy(prepared.model)
    patch(model, prepared.plan).__enter__()
    return lambda: model.generate(**prepared.inputs, **prepared.options)


def contenders() -> list[Contender]:
    return [Contender(UNTOUCHED, "", untouched), Contender(VEENA, "", patched, ours=True)]
