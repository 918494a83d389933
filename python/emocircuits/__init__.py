"""Interventions in Hugging Face models: plans, patching, VEENA and the analyses around them."""

from emokernels import Role
from emokernels._version import __version__

from emocircuits.circuit import Circuit
from emocircuits.edits import AddVector, BoostRoute, ReplaceHead, ReplaceVector, ScaleHead, ScaleNeurons
from emocircuits.patching import Patched, patch
from emocircuits.plan import Plan
from emocircuits.veena import VEENA

__all__ = [
    "VEENA",
    "AddVector",
    "BoostRoute",
    "Circuit",
    "Patched",
    "Plan",
    "ReplaceHead",
    "ReplaceVector",
    "Role",
    "ScaleHead",
    "ScaleNeurons",
    "__version__",
    "patch",
]
