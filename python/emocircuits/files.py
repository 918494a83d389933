"""Writing files so that an interrupted write leaves the old file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` through a temporary file in the same folder and a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        # mkstemp makes private files; give the result the permissions an ordinary open() would.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, value: Any, *, indent: int | None = 1) -> Path:
    """Write ``value`` as JSON; NaN and infinities are refused (``ValueError``)."""
    return write_bytes(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, what: str) -> Any:
    """Read JSON; a missing or broken file is a ``ValueError`` that names ``what`` was expected there."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot read {what} ({error.strerror or error})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not {what}: broken JSON ({error})") from error
