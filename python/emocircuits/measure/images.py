"""Running the vision tower once per image instead of once per pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from emocircuits.families import open_model


@contextlib.contextmanager
def images_once(model: nn.Module) -> Iterator[None]:
    """Remember image features while the block lasts; the same ``pixel_values`` tensor is encoded only once.

    Plans never edit the vision tower, so the features are those it would compute again. They are kept by tensor, not
    by content: a tensor that is changed in place, or a new one, is encoded anew. Memory: one feature tensor an image.
    """
    backbone: Any = open_model(model).backbone
    encode = backbone.get_image_features
    known: dict[tuple[Any, ...], tuple[list[Tensor], Any]] = {}

    # generate() reads the signature to see which of its inputs the encoder takes.
    @functools.wraps(encode)
    def remembered(*args: Any, **options: Any) -> Any:
        given = [*enumerate(args), *sorted(options.items())]
        tensors = [v for _, v in given if isinstance(v, Tensor)]
        key = tuple(
            (name, v.data_ptr(), v._version, tuple(v.shape)) if isinstance(v, Tensor) else (name, repr(v))
            for name, v in given
        )
        if key not in known:
            # The tensors are kept too, so that their addresses cannot be given to others.
            known[key] = (tensors, encode(*args, **options))
        return known[key][1]

    own = backbone.__dict__.get("get_image_features")
    backbone.__dict__["get_image_features"] = remembered
    try:
        yield
    finally:
        backbone.__dict__.pop("get_image_features")
        if own is not None:
            backbone.__dict__["get_image_features"] = own
