"""``emocircuits bench``: what an intervention costs on a model, beside the ways people do it today.

Every contender is a model object of its own on the same weights, with the intervention installed; all stay installed
side by side. Before anything is timed, contenders that compute the same must give the same logits. Then each is timed
next to the untouched model, A B B A, one whole ``generate`` at a time, and the ratio is the median over the pairs.
"""

from emocircuits.overhead.agreement import Disagreement
from emocircuits.overhead.contenders import Contender, choose, contenders
from emocircuits.overhead.generation import Settings
from emocircuits.overhead.run import measure
from emocircuits.overhead.shapes import SHAPES, Shape
from emocircuits.overhead.subject import Subject, make

__all__ = [
    "SHAPES",
    "Contender",
    "Disagreement",
    "Settings",
    "Shape",
    "Subject",
    "choose",
    "contenders",
    "make",
    "measure",
]
