"""Where on the picture each visual token looks: the grid of patches, and the part of the picture that it covers."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image
from torch import Tensor

from emocircuits.families import Handle
from emokernels import Role


def image_grids(handle: Handle, inputs: dict[str, Tensor], roles: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the visual tokens of prompts with one image each, which come row by row.

    The grid is what ``image_grid_thw`` says, divided by what the model merges, or else a square.

    Args:
        handle: the model.
        inputs: of the prompts.
        roles: ``[B, N]`` uint8.

    Raises:
        NotImplementedError: several images or frames, a picture that is cut into views, or tokens that are no grid.
    """
    name = type(handle.model).__name__
    counts = (roles == int(Role.VISUAL)).sum(1).tolist()
    given, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    if given is not None:
        merged = getattr(handle.config.vision_config, "spatial_merge_size", 1)
        if len(given) != len(counts) or bool((given[:, 0] != 1).any()):
            raise NotImplementedError(f"{name}: attention is drawn on prompts with one image each, not on several")
        grids = [(int(h) // merged, int(w) // merged) for _, h, w in given.tolist()]
    else:
        views = len(counts) if pixels is None else math.prod(pixels.shape[:-3])
        if views != len(counts):
            raise NotImplementedError(
                f"{name} cuts a picture into views ({views} for {len(counts)} prompts), whose tokens are not one grid; "
                "give it smaller pictures, or turn the processor's splitting off"
            )
        grids = [(math.isqrt(n), math.isqrt(n)) for n in counts]
    for (rows, columns), n in zip(grids, counts, strict=True):
        if rows * columns != n or not n:
            raise NotImplementedError(
                f"{name}: {n} visual tokens are not a grid of {rows} x {columns}, so attention cannot be drawn on the "
                "image; masses of heads can be read with capture(model, 'span_mass')"
            )
    return grids


def seen_part(processor: Any, image: Image.Image) -> Image.Image:
    """The part of a picture that the model sees: processors that crop take the middle."""
    images = getattr(processor, "image_processor", None)
    size, crop = getattr(images, "size", None) or {}, getattr(images, "crop_size", None) or {}
    short = size.get("shortest_edge")
    if not getattr(images, "do_center_crop", False) or not short or not crop:
        return image
    scale = min(image.size) / short
    width, height = (min(side, round(crop[k] * scale)) for side, k in zip(image.size, ("width", "height"), strict=True))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
