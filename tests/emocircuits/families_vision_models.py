"""Tiny random vision-language models and prompts with images and videos for them; registered in the harness.

A prompt is written as a list: numbers are so many random words, tuples are what is seen: ``("image", (height, width))``
in grid cells of the family, or ``("video", frames)``. Placeholders are counted by the model's own feature functions.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import families_harness as harness
import torch
import transformers
from families_harness import BOS, DIM, PAD, SIZES, VOCAB

END, IMAGE, VIDEO, START = 3, 5, 6, 7
SIDE = 8
SQUARE, WIDE = ("image", (1, 1)), ("image", (1, 2))
CLIP = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE)
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
INPUTS = {"image": "get_image_features", "video": "get_video_features"}


@dc.dataclass
class Seen:
    """One image or video in a prompt: its tokens, their types (0 text, 1 image, 2 video), and what the model gets."""

    ids: list[int]
    types: list[int]
    inputs: dict[str, torch.Tensor]


Look = Callable[[Any, tuple[str, Any], torch.Generator], Seen]


@torch.no_grad()
def features(model: Any, kind: str, inputs: dict[str, torch.Tensor]) -> int:
    """Visual features that the model makes of an image or video."""
    seen, *rest = inputs  # the name of the pixels changed between versions of transformers
    out = getattr(model.model, INPUTS[kind])(
        inputs[seen], **{k: inputs[k] for k in rest}, return_dict=True
    ).pooler_output
    return sum(o.shape[0] for o in out) if isinstance(out, list | tuple) else out.shape[:-1].numel()


def pixels(model: Any, g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(model.dtype)


def run(n: int, kind: str = "image") -> tuple[list[int], list[int]]:
    """Placeholders and their types."""
    return [IMAGE if kind == "image" else VIDEO] * n, [1 if kind == "image" else 2] * n


def between(seen: tuple[list[int], list[int]], before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
    """Placeholders with wrapper tokens around them."""
    ids, types = seen
    return [*before, *ids, *after], [*(0 for _ in before), *types, *(0 for _ in after)]


def square(before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Look:
    """Images of one size."""

    def look(model: Any, item: tuple[str, Any], g: torch.Generator) -> Seen:
        inputs = {"pixel_values": pixels(model, g, 1, 3, SIDE, SIDE)}
        return Seen(*between(run(features(model, "image", inputs)), [*before], [*after]), inputs)

    return look


def tiles(model: Any, item: tuple[str, Any], g: torch.Generator) -> Seen:
    """LLaVA-NeXT: a base view and tiles; videos as stacks of frames."""
    kind, size = item
    if kind == "video":
        inputs = {"pixel_values_videos": pixels(model, g, 1, size, 3, SIDE, SIDE)}
    else:
        h, w = size
        inputs = {
            "pixel_values": pixels(model, g, 1, 1 + h * w, 3, SIDE, SIDE),
            "image_sizes": torch.tensor([[h * SIDE, w * SIDE]]),
        }
    # Of a video, some versions add OneVision's newline after get_video_features.
    stack = kind == "video" and model.config.model_type == "llava_onevision"
    return Seen(*run(size + 1 if stack else features(model, kind, inputs), kind), inputs)


def patches(model: Any, item: tuple[str, Any], g: torch.Generator) -> Seen:
    """Qwen-VL: flat patches of any grid, between vision tokens; Qwen3-VL's frames have timestamps before them."""
    kind, size = item
    t, h, w = (1, 2 + 2 * size[0], 2 + 2 * size[1]) if kind == "image" else (size, 2, 4)
    prefix, suffix = ("image", "") if kind == "image" else ("video", "_videos")
    inputs = {
        f"pixel_values{suffix}": pixels(model, g, t * h * w, 3 * 2 * 4 * 4),
        f"{prefix}_grid_thw": torch.tensor([[t, h, w]]),
    }
    n = features(model, kind, inputs)
    if kind == "video" and model.config.model_type.startswith("qwen3"):
        frame = [between(run(n // t, kind), [*torch.randint(8, VOCAB, (2,), generator=g).tolist(), START], [END])] * t
        return Seen([i for f in frame for i in f[0]], [i for f in frame for i in f[1]], inputs)
    return Seen(*between(run(n, kind), [START], [END]), inputs)


def nested(before: tuple[int, ...], after: tuple[int, ...]) -> Look:
    """Idefics: images by row of the batch, absent ones all zero."""

    def look(model: Any, item: tuple[str, Any], g: torch.Generator) -> Seen:
        inputs = {"pixel_values": pixels(model, g, 1, 1, 3, SIDE, SIDE)}
        return Seen(*between(run(features(model, "image", inputs)), [*before], [*after]), inputs)

    return look


def lines(model: Any, item: tuple[str, Any], g: torch.Generator) -> Seen:
    """Mistral 3: any size; a break after every row of patches, an end after the last."""
    h, w = item[1][0], 1 + item[1][1]
    inputs = {"pixel_values": pixels(model, g, 1, 3, 12, 12), "image_sizes": torch.tensor([[4 * h, 4 * w]])}
    assert features(model, "image", inputs) == h * w
    row = [IMAGE] * w
    ids = [i for n in range(h) for i in [*row, START if n + 1 < h else END]]
    return Seen(ids, [int(i == IMAGE) for i in ids], inputs)


# -- prompts ---------------------------------------------------------------------------------------------------------
def row(model: Any, look: Look, layout: list[Any], seed: int) -> dict[str, Any]:
    """One prompt, not padded: ids, types and the list of what is seen."""
    g = torch.Generator().manual_seed(seed)
    first = model.config.model_type == "paligemma"  # images come before the text, also before its first token
    ids, types, seen = ([], [], []) if first else ([BOS], [0], [])
    for item in layout:
        if isinstance(item, int):
            words = torch.randint(8, VOCAB, (item,), generator=g).tolist()
            ids, types = [*ids, *words], [*types, *(0 for _ in words)]
        else:
            one = look(model, item, g)
            ids, types, seen = [*ids, *one.ids], [*types, *one.types], [*seen, one.inputs]
    return {"ids": ids, "types": types, "seen": seen}


def join(model: Any, rows: list[dict[str, Any]], side: str = "left") -> harness.Inputs:
    """Prompts as one padded batch."""
    length = max(len(r["ids"]) for r in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        more = [fill] * (length - len(values))
        return [*more, *values] if side == "left" else [*values, *more]

    out: harness.Inputs = {
        "input_ids": torch.tensor([pad(r["ids"], PAD) for r in rows]),
        "attention_mask": torch.tensor([pad([1] * len(r["ids"]), 0) for r in rows]),
    }
    types = torch.tensor([pad(r["types"], 0) for r in rows])
    kind = model.config.model_type
    if kind.startswith("qwen"):
        out["mm_token_type_ids"] = types
    elif kind == "gemma3":
        out["token_type_ids"] = types
    elif kind == "paligemma":
        out["token_type_ids"] = torch.zeros_like(types)
    by_row = kind in ("idefics2", "idefics3", "smolvlm")
    for name in dict.fromkeys(n for r in rows for s in r["seen"] for n in s):
        if by_row:
            parts = [torch.cat([s[name] for s in r["seen"]], 1) for r in rows]
        else:
            parts = [s[name] for r in rows for s in r["seen"] if name in s]
        if parts[0].ndim == 5 and name == "pixel_values":
            most = max(p.shape[1] for p in parts)
            parts = [torch.nn.functional.pad(p, (0,) * 7 + (most - p.shape[1],)) for p in parts]
        out[name] = torch.cat(parts)
    return out


def prompts(model: Any, look: Look, second: tuple[str, Any]) -> harness.MakeInputs:
    """Not padded: one image, at another place in every row. Padded: rows with two, one, two images of other sizes.

    Both have the same number of columns, so that one compiled step serves both.
    """
    padded = [[1, SQUARE, 2, second, 2], [2, SQUARE, 1], [second, SQUARE, 2]]
    even = [[1, SQUARE], [4, SQUARE], [0, SQUARE]]
    if model.config.model_type == "paligemma":  # whose processor puts images first
        padded, even = [[SQUARE, second, 4], [SQUARE, 3], [SQUARE, second, 1]], [[SQUARE]] * 3

    def make_inputs(rows: int, padding: str) -> harness.Inputs:
        if padding == "left":
            return join(model, [row(model, look, padded[r % 3], seed=r) for r in range(rows)])
        length = max(len(row(model, look, p, seed=0)["ids"]) for p in padded)
        layouts = [[*e, length - len(row(model, look, e, seed=0)["ids"])] for e in even]
        return join(model, [row(model, look, layouts[r % 3], seed=r) for r in range(rows)])

    return make_inputs


# -- models ----------------------------------------------------------------------------------------------------------
def vision(
    name: str,
    see: dict[str, Any],
    look: Look,
    text: str | None = "LlamaConfig",
    text_over: dict[str, Any] | None = None,
    second: tuple[str, Any] = WIDE,
    **over: Any,
) -> harness.Builder:
    """A builder of ``{name}ForConditionalGeneration`` with a vision tower of sizes ``see``.

    Args:
        name: prefix of the classes in transformers.
        see: the vision config; ``"class"`` names it where it is not the family's own.
        look: makes an image or video for a prompt.
        text: config class of the text decoder; None: the family's own.
        text_over: changes to the sizes of the text decoder.
        second: what the padded prompts show besides a square image.
        **over: fields of the model's config.
    """  # fmt: skip

    def build(dtype: torch.dtype = torch.float64) -> tuple[Any, harness.MakeInputs]:
        torch.manual_seed(0)
        sizes = {k: v for k, v in {**SIZES, **(text_over or {})}.items() if v is not ...}
        text_config: Any = sizes if text is None else getattr(transformers, text)(**sizes)
        tower = {k: v for k, v in see.items() if k != "class"}
        vision_config: Any = getattr(transformers, see["class"])(**tower) if "class" in see else tower
        config = getattr(transformers, f"{name}Config")(text_config=text_config, vision_config=vision_config, **over)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        decoder = model.get_decoder()
        if getattr(decoder, "_can_set_experts_implementation", lambda: False)():
            decoder.set_experts_implementation("batched_mm")  # grouped_mm has no float64
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projection of image features, for one
                parameter.data.normal_(std=0.3)
        model = harness.finish(model, dtype)
        return model, prompts(model, look, second)

    return build


IDS = dict(image_token_id=IMAGE)
INDEX = dict(image_token_index=IMAGE)
CLIP_TOWER = {"class": "CLIPVisionConfig", **CLIP, "patch_size": 4, "projection_dim": 24}
SIGLIP = {"class": "SiglipVisionConfig", **CLIP, "patch_size": 2, "vision_use_head": False}
QWEN2_TOWER = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
QWEN = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]})
QWEN3_TOWER = dict(
    depth=2, hidden_size=24, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=harness.WIDTH,
    num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
)  # fmt: skip
GEMMA = dict(head_dim=DIM, query_pre_attn_scalar=DIM)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
IDEFICS = {**CLIP, "patch_size": 2}
TWO_FRAMES = ("video", 2)

VISION: dict[str, harness.Builder] = {
    "LLaVA 1.5": vision("Llava", CLIP_TOWER, square(), vision_feature_layer=-1, **INDEX),
    "LLaVA-NeXT": vision(
        "LlavaNext", CLIP_TOWER, tiles, "MistralConfig", vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
        **INDEX,
    ),
    "LLaVA-OneVision": vision(
        "LlavaOnevision", {**SIGLIP, "patch_size": 4}, tiles, "Qwen2Config", second=TWO_FRAMES,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_grid_pinpoints=PINPOINTS,
        image_token_index=IMAGE, video_token_index=VIDEO,
    ),
    "LLaVA-NeXT-Video": vision(
        "LlavaNextVideo", CLIP_TOWER, tiles, second=TWO_FRAMES, vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS, image_token_index=IMAGE, video_token_index=VIDEO,
    ),
    "VipLLaVA": vision("VipLlava", CLIP_TOWER, square(), vision_feature_layers=[-1, -2], **INDEX),
    "Qwen2-VL": vision(
        "Qwen2VL", {**QWEN2_TOWER, "embed_dim": 24, "hidden_size": harness.WIDTH, "mlp_ratio": 1}, patches, None,
        MROPE, TWO_FRAMES, **QWEN,
    ),
    "Qwen2.5-VL": vision(
        "Qwen2_5_VL",
        {**QWEN2_TOWER, "hidden_size": 24, "intermediate_size": 32, "out_hidden_size": harness.WIDTH,
         "window_size": 16, "fullatt_block_indexes": [1]},
        patches, None, MROPE, TWO_FRAMES, **QWEN,
    ),
    "Qwen3-VL": vision(
        "Qwen3VL", QWEN3_TOWER, patches, None, {**MROPE, "head_dim": DIM}, TWO_FRAMES, **QWEN
    ),
    "Qwen3-VL-MoE": vision(
        "Qwen3VLMoe", QWEN3_TOWER, patches, None, {**MROPE, **harness.EXPERTS, "head_dim": DIM}, TWO_FRAMES, **QWEN
    ),
    "InternVL": vision(
        "InternVL", {**CLIP, "patch_size": 2}, square((START,), (END,)), "Qwen2Config", image_seq_length=4, **IDS
    ),
    "Gemma 3 (vision)": vision(
        "Gemma3", SIGLIP, square((START,), (END,)), "Gemma3TextConfig",
        {**GEMMA, "sliding_window": 12, "layer_types": SLIDING}, mm_tokens_per_image=4,
        boi_token_index=START, eoi_token_index=END, **INDEX,
    ),
    "PaliGemma": vision(
        "PaliGemma", {**SIGLIP, "patch_size": 4}, square(), "GemmaConfig", dict(head_dim=DIM),
        projection_dim=harness.WIDTH, **INDEX,
    ),
    "PaliGemma 2": vision(
        "PaliGemma", {**SIGLIP, "patch_size": 4}, square(), "Gemma2Config",
        {**GEMMA, "sliding_window": 12, "attn_logit_softcapping": 2.0}, projection_dim=harness.WIDTH, **INDEX,
    ),
    "Idefics2": vision(
        "Idefics2", {**IDEFICS, "patch_size": 4}, nested((START,), (START,)), "MistralConfig", perceiver_config=dict(
            hidden_size=harness.WIDTH, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=4,
            resampler_head_dim=8, num_key_value_heads=2,
        ), **IDS,
    ),
    "Idefics3": vision("Idefics3", IDEFICS, nested((START, 9), (START,)), scale_factor=2, **IDS),
    "SmolVLM": vision("SmolVLM", IDEFICS, nested((START, 9), (START,)), scale_factor=2, **IDS),
    "Mistral 3": vision(
        "Mistral3", {"class": "PixtralVisionConfig", **CLIP, "image_size": 12, "patch_size": 2}, lines, "MistralConfig",
        spatial_merge_size=2, **INDEX,
    ),
    "Aya Vision": vision(
        "AyaVision", SIGLIP, square((START,), (END,)), "Cohere2Config", {"sliding_window": 12, "layer_types": SLIDING},
        **INDEX,
    ),
}  # fmt: skip
harness.BUILDERS.update(VISION)
