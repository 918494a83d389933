"""Models by their shapes: configs as published, for timing without weights. Values change no time; shapes do.

``llava-1.5-7b`` is llava-hf/llava-1.5-7b-hf, ``llava-onevision-7b`` llava-hf/llava-onevision-qwen2-7b-ov-hf,
``qwen2.5-vl-7b`` Qwen/Qwen2.5-VL-7B-Instruct, ``qwen3-vl-8b`` Qwen/Qwen3-VL-8B-Instruct: the fields of their
config.json that are not the defaults of transformers. ``llava-0.1b`` and ``llava-0.3b`` are nobody's models: small
enough for a CPU, with an image of 144 tokens.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
from torch import nn


@dc.dataclass(frozen=True)
class Shape:
    """A config that can be built.

    ``config`` holds what ``AutoConfig.for_model(model_type, ...)`` takes; ``grid`` is the size of an image in patches
    (height, width) for models that take any, and unused by those whose vision tower has one size.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    grid: tuple[int, int] = (0, 0)


def _clip(size: int, patch: int, width: int, layers: int, heads: int, projection: int) -> dict[str, Any]:
    return dict(
        model_type="clip_vision_model", image_size=size, patch_size=patch, hidden_size=width,
        intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, projection_dim=projection,
    )  # fmt: skip


def _small(width: int, neurons: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 8192) -> dict[str, Any]:
    text = dict(
        model_type="llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=neurons,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )  # fmt: skip
    return dict(text_config=text, vision_config=_clip(168, 14, 256, 4, 4, 256), image_token_id=5)


_LLAVA_7B = dict(
    text_config=dict(
        model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    vision_config=_clip(336, 14, 1024, 24, 16, 768),
    image_token_id=32000, vision_feature_layer=-2, vision_feature_select_strategy="default",
)  # fmt: skip

_QWEN2_7B: dict[str, Any] = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    max_position_embeddings=32768, rms_norm_eps=1e-6,
)  # fmt: skip

_ONEVISION_7B = dict(
    text_config=dict(
        model_type="qwen2", vocab_size=152000, rope_parameters=dict(rope_type="default", rope_theta=1e6), **_QWEN2_7B,
    ),
    vision_config=dict(
        model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
        num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False,
    ),
    image_token_id=151646, video_token_id=151647, vision_feature_layer=-1, vision_feature_select_strategy="full",
    image_grid_pinpoints=[[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
)  # fmt: skip

_QWEN25_7B = dict(
    text_config=dict(
        vocab_size=152064,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]), **_QWEN2_7B,
    ),
    vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584),
)  # fmt: skip

_QWEN3_8B = dict(
    text_config=dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
    ),
    vision_config=dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096),
)  # fmt: skip

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5-7b", "llava", _LLAVA_7B),
        Shape("llava-onevision-7b", "llava_onevision", _ONEVISION_7B),
        Shape("qwen2.5-vl-7b", "qwen2_5_vl", _QWEN25_7B, grid=(48, 48)),
        Shape("qwen3-vl-8b", "qwen3_vl", _QWEN3_8B, grid=(48, 48)),
        Shape("llava-0.1b", "llava", _small(768, 2048, 12, 12, 12)),
        Shape("llava-0.3b", "llava", _small(1024, 2816, 24, 16, 4)),
    )
}


def find(name: str) -> Shape:
    """A shape by name.

    Raises:
        ValueError: there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"--config {name}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def build(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model of this shape with random weights, made where they stay: there is never a float32 copy.

    Raises:
        NotImplementedError: this transformers does not know the model type.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.for_model(shape.model_type, **shape.config)
    except ValueError as error:
        raise NotImplementedError(
            f"this transformers has no model type {shape.model_type!r}; install a newer one"
        ) from error
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()
