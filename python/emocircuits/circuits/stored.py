"""Results in a run folder: a JSON record, and a safetensors file whose digest the record holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from emocircuits.files import read_json, write_bytes


def write_tables(file: Path, tables: Mapping[str, np.ndarray]) -> str:
    """Write arrays; returns the digest that :func:`read_tables` asks for."""
    data = save({name: np.ascontiguousarray(table) for name, table in tables.items()})
    write_bytes(file, data)
    return hashlib.sha256(data).hexdigest()


def read_tables(file: Path, digest: str) -> dict[str, np.ndarray]:
    """Read arrays.

    Raises:
        ValueError: the file is missing, damaged, or not the one of the digest.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot read the tables ({error.strerror or error})") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{file}: damaged or cut off, {len(data)} bytes that are not what the record beside it says; measure again"
        )
    found: dict[str, np.ndarray] = load(data)
    return found


def read_record(path: Path, form: str, what: str) -> dict[str, Any]:
    """Read a JSON record of a certain format; ``ValueError`` where it is something else."""
    record: Any = read_json(path, what)
    if not isinstance(record, dict) or record.get("format") != form:
        raise ValueError(f"{path}: not {what} (expected format {form!r})")
    return record
