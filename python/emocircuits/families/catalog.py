"""The families that are supported today."""

from emocircuits.families.text import TEXT_FAMILIES
from emocircuits.families.vision import around

FAMILIES = (*around(TEXT_FAMILIES), *TEXT_FAMILIES)
