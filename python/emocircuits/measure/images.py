"""Running the vision tower once per image instead of once per pass."""

from __future__ import annotations

import contextlib
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
    known: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    def remembered(pixel_values: Tensor, **options: Any) -> Any:
        plain = tuple(sorted((k, v) for k, v in options.items() if not isinstance(v, Tensor)))
        tensors = tuple((k, v.data_ptr(), v._version) for k, v in options.items() if isinstance(v, Tensor))
        key = (pixel_values.data_ptr(), pixel_values._version, tuple(pixel_values.shape), repr(plain), tensors)
        if key not in known:
            # The tensor is kept too, so that its address cannot be given to another one.
            known[key] = (pixel_values, encode(pixel_values=pixel_values, **options))
        return known[key][1]

    own = backbone.__dict__.get("get_image_features")
    backbone.__dict__["get_image_features"] = remembered
    try:
        yield
    finally:
        backbone.__dict__.pop("get_image_features")
        if own is not None:
            backbone.__dict__["get_image_features"] = own
