"""Interventions in Hugging Face models: plans, patching, VEENA and the analyses around them."""

from emocircuits import presets
from emocircuits.circuit import Circuit
from emocircuits.edits import (
    AddHead,
    AddNeurons,
    AddVector,
    BoostRoute,
    GateHeads,
    GateRoute,
    ProjectOut,
    ReplaceHead,
    ReplaceNeurons,
    ReplaceVector,
    ScaleHead,
    ScaleNeurons,
)
from emocircuits.patching import Patched, patch
from emocircuits.plan import Plan
from emocircuits.veena import VEENA
from emokernels import Role
from emokernels._version import __version__

__all__ = [
    "VEENA",
    "AddHead",
    "AddNeurons",
    "AddVector",
    "BoostRoute",
    "Circuit",
    "GateHeads",
    "GateRoute",
    "Patched",
    "Plan",
    "ProjectOut",
    "ReplaceHead",
    "ReplaceNeurons",
    "ReplaceVector",
    "Role",
    "ScaleHead",
    "ScaleNeurons",
    "__version__",
    "patch",
    "presets",
]
