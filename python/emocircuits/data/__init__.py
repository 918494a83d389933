"""Contrastive pairs: an emotional picture, its neutral twin, and a neutral event; read, checked, drawn."""

from .check import Report, check
from .events import EMOTIONS, event_problems
from .faces import Built, build_faces
from .hashes import NEAR, Fingerprints, Overlap, fingerprints, fingerprints_at, fingerprints_of, overlap
from .pairs import SPLITS, Manifest, Problem, Record
from .pictures import open_image

__all__ = [
    "EMOTIONS", "NEAR", "SPLITS", "Built", "Fingerprints", "Manifest", "Overlap", "Problem", "Record", "Report",
    "build_faces", "check", "event_problems", "fingerprints", "fingerprints_at", "fingerprints_of", "open_image",
    "overlap",
]  # fmt: skip
