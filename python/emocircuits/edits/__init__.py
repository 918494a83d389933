"""The edits a Plan is made of: plain, frozen, hashable values that name what changes and by how much.

Every edit says *where* (layers, heads or neurons), *which rows* (``to``: roles of the destination tokens, ``phase``,
and ``rows`` of the batch) and *what* (a factor or a vector). Nothing here touches a model or a device.
"""

from __future__ import annotations

from emocircuits.edits.arrays import FrozenArray
from emocircuits.edits.base import ATTENTION, NEURONS, PHASES, ROLE_NAMES, Edit, Phase
from emocircuits.edits.gates import GateHeads, GateRoute
from emocircuits.edits.heads import READINGS, AddHead, BoostRoute, HeadEdit, Reading, ReplaceHead, ScaleHead
from emocircuits.edits.neurons import AddNeurons, NeuronEdit, ReplaceNeurons, ScaleNeurons
from emocircuits.edits.vectors import (
    CACHE_SITES,
    NORMS,
    SITES,
    AddVector,
    Norm,
    ProjectOut,
    ReplaceVector,
    Site,
    VectorEdit,
)

__all__ = [
    "ATTENTION",
    "CACHE_SITES",
    "EDITS",
    "NEURONS",
    "NORMS",
    "PHASES",
    "READINGS",
    "ROLE_NAMES",
    "SITES",
    "AddHead",
    "AddNeurons",
    "AddVector",
    "BoostRoute",
    "Edit",
    "FrozenArray",
    "GateHeads",
    "GateRoute",
    "HeadEdit",
    "NeuronEdit",
    "Norm",
    "Phase",
    "ProjectOut",
    "Reading",
    "ReplaceHead",
    "ReplaceNeurons",
    "ReplaceVector",
    "ScaleHead",
    "ScaleNeurons",
    "Site",
    "VectorEdit",
]

EDITS: dict[str, type[Edit]] = {
    c.__name__: c
    for c in (
        BoostRoute, GateRoute, GateHeads, ScaleHead, AddHead, ReplaceHead, ScaleNeurons, AddNeurons, ReplaceNeurons,
        AddVector, ProjectOut, ReplaceVector,
    )
}  # fmt: skip
"""Every kind of edit by its name in JSON."""
