"""A Plan as device tables: one small tensor per layer and primitive, indexed by batch row and role."""

from emocircuits.tables.build import check, compile_plan
from emocircuits.tables.layer import LayerTables

__all__ = ["LayerTables", "check", "compile_plan"]
