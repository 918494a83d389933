"""Published interventions as plans of a few lines, each with its source and a test against its formula."""

from emocircuits.presets.contrast import Contrast
from emocircuits.presets.decoding import icd, pai_guidance, vcd, vcd_noise
from emocircuits.presets.heads import iti, spin, vseam
from emocircuits.presets.neurons import hones
from emocircuits.presets.registry import PRESETS, Preset
from emocircuits.presets.routes import adhh, knockout, pai, temperature, vaf
from emocircuits.presets.vectors import actadd, caa, vista

__all__ = [
    "PRESETS",
    "Contrast",
    "Preset",
    "actadd",
    "adhh",
    "caa",
    "hones",
    "icd",
    "iti",
    "knockout",
    "pai",
    "pai_guidance",
    "spin",
    "temperature",
    "vaf",
    "vcd",
    "vcd_noise",
    "vista",
    "vseam",
]
