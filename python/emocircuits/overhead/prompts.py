"""What a timed model reads: one image and text around it, as long as asked for, with one layout in every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.overhead.shapes import Shape

Inputs = dict[str, Tensor]

BEFORE, AFTER = 35, 64
"""Text tokens before the image (the system prompt of LLaVA 1.5) and, unless a length is asked for, after it."""
EVENT = "My friend said that the old house was sold. What does this person feel?"
EMBEDDED_EVENT = "my friend said that the old house was sold."
"""In the words that the embedded model knows."""


def of_shape(model: nn.Module, shape: Shape, batch: int, prompt: int | None, seed: int = 0) -> Inputs:
    """Random text and pixels for a model of a known shape.

    Args:
        model: as `shapes.build` made it; decides device and dtype.
        shape: its shape.
        batch: rows.
        prompt: tokens of the prompt, the image's included; None takes ``AFTER`` text tokens after the image.
        seed: of pixels and words.

    Raises:
        ValueError: the prompt is too short for the image.
    """
    config: Any = model.config
    parameter = next(model.parameters())
    g = torch.Generator().manual_seed(seed)
    pixels, visual = _PIXELS[shape.model_type](model, shape.grid, batch, g)
    image = int(config.image_token_id)
    words = torch.randint(100, 4000, (BEFORE + 2,), generator=g)
    ids = torch.cat([words[:BEFORE], torch.full((visual,), image), words[BEFORE:]]).repeat(batch, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == image).int()
    inputs = lengthen(inputs, BEFORE + visual + AFTER if prompt is None else prompt)
    return to_device({**inputs, **pixels}, parameter.device, parameter.dtype)


def lengthen(inputs: Inputs, length: int) -> Inputs:
    """Bring a prompt that ends in text to ``length`` tokens by repeating its last token but one.

    Raises:
        ValueError: the prompt is longer than that already.
    """
    now = inputs["input_ids"].shape[1]
    if length < now:
        raise ValueError(f"--prompt {length}: expected at least {now} tokens, which the image and its prompt take")
    more = [now - 2] * (length - now)
    order = torch.tensor([*range(now - 1), *more, now - 1])
    return {
        name: x[:, order] if x.ndim == 2 and x.shape[1] == now and not x.is_floating_point() else x
        for name, x in inputs.items()
    }


def of_processor(processor: Any, text: str, batch: int, prompt: int | None, model: nn.Module) -> Inputs:
    """One image and ``text`` through the model's own processor, repeated for every row."""
    from PIL import Image

    ramp = torch.arange(336, dtype=torch.float32) / 336 * 255
    image = Image.fromarray(ramp.byte().expand(336, 336).unsqueeze(-1).expand(-1, -1, 3).contiguous().numpy())
    found = processor(images=[image] * batch, text=[text] * batch, return_tensors="pt")
    inputs: Inputs = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    if prompt is not None:
        inputs = lengthen(inputs, prompt)
    parameter = next(model.parameters())
    return to_device(inputs, parameter.device, parameter.dtype)


def to_device(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Inputs where the model is; pixels in its dtype."""
    return {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}


# -- pixels of each model type: what its vision tower takes, and how many visual tokens come out -----------------------
def _vision(model: nn.Module) -> Any:
    config: Any = model.config
    return config.vision_config


def _square(model: nn.Module, grid: tuple[int, int], batch: int, g: torch.Generator) -> tuple[Inputs, int]:
    vision = _vision(model)
    side = vision.image_size
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=g)}, (side // vision.patch_size) ** 2


def _tiles(model: nn.Module, grid: tuple[int, int], batch: int, g: torch.Generator) -> tuple[Inputs, int]:
    side = _vision(model).image_size
    # One base view and one tile; the model says how many tokens its packing makes of them.
    inputs = {
        "pixel_values": torch.randn(batch, 2, 3, side, side, generator=g),
        "image_sizes": torch.tensor([[side, side]] * batch),
    }
    parameter = next(model.parameters())
    one = to_device({name: x[:1] for name, x in inputs.items()}, parameter.device, parameter.dtype)
    with torch.no_grad():
        features = model.model.get_image_features(**one, return_dict=True).pooler_output  # type: ignore[union-attr,operator]
    return inputs, features[0].shape[0]


def _patches(model: nn.Module, grid: tuple[int, int], batch: int, g: torch.Generator) -> tuple[Inputs, int]:
    vision = _vision(model)
    height, width = grid
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(batch * height * width, size, generator=g)
    sizes = torch.tensor([[1, height, width]] * batch)
    return {"pixel_values": pixels, "image_grid_thw": sizes}, height * width // vision.spatial_merge_size**2


_PIXELS = {"llava": _square, "llava_onevision": _tiles, "qwen2_5_vl": _patches, "qwen3_vl": _patches}
