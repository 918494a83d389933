"""Drawn faces: identity and expression are separate, so an emotional image and its neutral twin share all the rest."""

from .draw import SIZE, face, render
from .expression import CHANNELS, EMOTIONS, LABELS, Expression, sample_expression
from .identity import CLOTH, HAIR, STYLES, Identity, identity_of, sample_identity

__all__ = [
    "CHANNELS", "CLOTH", "EMOTIONS", "HAIR", "LABELS", "SIZE", "STYLES", "Expression", "Identity",
    "face", "identity_of", "render", "sample_expression", "sample_identity",
]  # fmt: skip
