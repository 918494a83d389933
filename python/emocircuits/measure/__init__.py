"""Measurements on a forward pass: activations and attention weights, patched or not."""

from emocircuits.measure.attention import attention_weights
from emocircuits.measure.capture import capture
from emocircuits.measure.images import images_once

__all__ = ["attention_weights", "capture", "images_once"]
