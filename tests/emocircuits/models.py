"""Tiny random models of every supported family, and inputs for them. Weights come from configs: nothing is fetched."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

IMAGE, PAD, BOS, EOS, VOCAB = 5, 0, 1, 2, 64
SIDE, PATCH = 16, 4
TOKENS = (SIDE // PATCH) ** 2

TEXT = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def text_config(kind: str = "llama", **over: object):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        initializer_range=0.3, attention_dropout=0.0,
    )  # fmt: skip
    return TEXT[kind][0](**{**sizes, **over})


def build(
    family: str = "llava", text: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **over: object
):
    """A model in eval mode. ``family`` is llava, llava_next, llava_onevision, or text."""
    torch.manual_seed(seed)
    t = text_config(text, **over)
    if family == "text":
        model = TEXT[text][1](t)
    elif family == "llava_onevision":
        v = SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        )
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                vision_config=v,
                text_config=t,
                image_token_id=IMAGE,
                video_token_id=6,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
            )
        )
    else:
        v = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=24,
        )
        if family == "llava":
            model = LlavaForConditionalGeneration(
                LlavaConfig(vision_config=v, text_config=t, image_token_id=IMAGE, vision_feature_layer=-1)
            )
        else:
            model = LlavaNextForConditionalGeneration(
                LlavaNextConfig(
                    vision_config=v,
                    text_config=t,
                    image_token_id=IMAGE,
                    vision_feature_layer=-1,
                    image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
                )
            )
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None  # random models stop at random; tests want a fixed length
    model.generation_config.pad_token_id = PAD
    return model


def image_features(model, sizes: list[tuple[int, int]]) -> int:
    """Visual tokens of an image of ``sizes`` (height, width), counted by running the model's own packing."""
    kind = model.config.model_type
    if kind == "llava":
        return TOKENS
    out = model.model.get_image_features(
        pixel_values=_tiles(model, sizes), image_sizes=torch.tensor(sizes), return_dict=True
    )
    return out.pooler_output[0].shape[0]


def _tiles(model, sizes):
    if model.config.model_type == "llava":
        return torch.zeros(len(sizes), 3, SIDE, SIDE)
    # One base view and the tiles of the best grid: 1x1, 1x2 or 2x1 here.
    n = max(2 if h == w else 3 for h, w in sizes)
    return torch.zeros(len(sizes), n, 3, SIDE, SIDE, dtype=model.dtype)


def prompt(model, before: int, after: int, sizes: list[tuple[int, int]] | None = None, between: int = 0, seed: int = 0):
    """Inputs of one row: text, an image for each of ``sizes`` (text of length ``between`` between them), text."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(SIDE, SIDE)] if sizes is None else sizes

    def words(n: int) -> list[int]:
        return torch.randint(8, VOCAB, (n,), generator=g).tolist()

    ids = [BOS, *words(before)]
    for i, size in enumerate(sizes):
        ids += ([*words(between)] if i else []) + [IMAGE] * image_features(model, [size])
    ids += words(after)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if sizes:
        pixels = torch.randn(_tiles(model, sizes).shape, generator=g).to(model.dtype)
        inputs["pixel_values"] = pixels
        if model.config.model_type != "llava":
            inputs["image_sizes"] = torch.tensor(sizes)
    return inputs


def batch(rows: list[dict], side: str = "left"):
    """Several prompts as one padded batch."""
    length = max(r["input_ids"].shape[1] for r in rows)
    out: dict[str, torch.Tensor] = {}
    for name, fill in (("input_ids", PAD), ("attention_mask", 0)):
        padded = []
        for r in rows:
            pad = torch.full((1, length - r[name].shape[1]), fill, dtype=r[name].dtype)
            padded.append(torch.cat([pad, r[name]] if side == "left" else [r[name], pad], 1))
        out[name] = torch.cat(padded)
    for name in ("pixel_values", "image_sizes"):
        if name in rows[0]:
            tensors = [r[name] for r in rows]
            if name == "pixel_values" and tensors[0].ndim == 5:
                tiles = max(t.shape[1] for t in tensors)
                tensors = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 0, 0, tiles - t.shape[1])) for t in tensors]
            out[name] = torch.cat(tensors)
    return out
