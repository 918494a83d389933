"""The two prompts of a sweep, checked: a position must be the same place in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

PICTURES = ("pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw")
SAME = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


def of_one(given: object, side: str) -> Mapping[str, Any]:
    """Model inputs of one prompt, a copy: what is written into the caller's later is not what was run.

    Raises:
        TypeError: no mapping with ``input_ids``.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("input_ids"), Tensor):
        raise TypeError(f"{side} is {type(given).__name__}: expected a dict of model inputs with input_ids")
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}


def check(clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> int:
    """Check a pair of model inputs, one row each.

    Returns:
        The number of columns.

    Raises:
        ValueError: other than one row a side, different token length, padding or positions that differ, or inputs
            (such as an image) on one side only.
    """
    for side, inputs in (("clean", clean), ("corrupt", corrupt)):
        shape = tuple(inputs["input_ids"].shape)
        if len(shape) != 2 or shape[0] != 1 or not shape[1]:
            raise ValueError(
                f"{side}: input_ids are {list(shape)}, expected [1, tokens]; for several "
                "pairs give lists with a dict for each prompt, or batches of rows on both sides"
            )
        if inputs.get("past_key_values") is not None:
            raise ValueError(f"{side} continues on a cache; give the whole prompt")
    given = {side: {k for k, v in inputs.items() if v is not None} for side, inputs in _both(clean, corrupt)}
    single = sorted(given["clean"] ^ given["corrupt"])
    if single:
        name = next((n for n in single if n in PICTURES), single[0])
        has, lacks = ("clean", "corrupt") if name in given["clean"] else ("corrupt", "clean")
        what = "an image" if name in PICTURES else "an input"
        raise ValueError(f"{name} is in the {has} inputs and not in the {lacks} ones: {what} on one side only")
    a, b = (int(inputs["input_ids"].shape[1]) for inputs in (clean, corrupt))
    if a != b:
        raise ValueError(
            f"clean has {a} tokens, corrupt {b}: pairs of different token length have no common positions; write "
            "prompts of one length"
        )
    for name in SAME:
        left, right = clean.get(name), corrupt.get(name)
        if isinstance(left, Tensor) and isinstance(right, Tensor) and not torch.equal(left, right.to(left.device)):
            raise ValueError(f"{name} differs between clean and corrupt: a column is not the same place in both")
    return a


def _both(clean: Mapping[str, Any], corrupt: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("clean", clean), ("corrupt", corrupt)


def numbers(given: Any, name: str) -> list[int]:
    """Whole numbers of a list or a tensor.

    Raises:
        TypeError: something else: a single number, floats, or a mask of booleans.
    """
    found = given.tolist() if hasattr(given, "tolist") else given
    found = list(found) if isinstance(found, Iterable) else None
    if found is None or any(isinstance(n, bool) or not hasattr(n, "__index__") for n in found):
        raise TypeError(f"{name}={given!r}: expected a list of whole numbers")
    return [int(n) for n in found]
