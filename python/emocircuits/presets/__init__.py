"""Published interventions as plans of a few lines, each with its source and a test against its formula."""

from emocircuits.presets.heads import vseam
from emocircuits.presets.neurons import hones
from emocircuits.presets.registry import PRESETS, Preset
from emocircuits.presets.routes import adhh, knockout, pai, temperature, vaf
from emocircuits.presets.vectors import caa

__all__ = [
    "PRESETS",
    "Preset",
    "adhh",
    "caa",
    "hones",
    "knockout",
    "pai",
    "temperature",
    "vaf",
    "vseam",
]
