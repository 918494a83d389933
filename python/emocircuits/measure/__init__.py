"""Measurements on a forward pass: activations and attention weights, patched or not."""

from emocircuits.measure.attention import attention_weights
from emocircuits.measure.capture import capture
from emocircuits.measure.captured import Captured
from emocircuits.measure.images import images_once
from emocircuits.measure.names import QUANTITIES
from emocircuits.measure.tokens import Index

__all__ = ["QUANTITIES", "Captured", "Index", "attention_weights", "capture", "images_once"]
