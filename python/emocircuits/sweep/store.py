"""Results on disk while a sweep runs: Parquet shards, and a manifest that says of what. A killed one resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch import nn

from emocircuits import environment
from emocircuits.files import read_json, write_bytes, write_json
from emocircuits.sweep.identity import describe, hash_inputs, hash_model

FORMAT = "emocircuits.sweep.shards/1"
MANIFEST, SHARDS, LOCK = "manifest.json", "shards", ".lock"
COMPUTES = ("emokernels", "torch", "transformers")  # other versions may round otherwise: their numbers do not mix


class Patch(Protocol):
    """What is patched: a layer, a column of the prompt (None: all), and a unit (None: the target has none)."""

    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def column(self) -> int | None: ...  # noqa: D102
    @property
    def unit(self) -> int | None: ...  # noqa: D102


class Store:
    """One folder, one sweep: its manifest, and shards of the values computed so far.

    Used as a context manager by one process at a time, which a lock sees to; the system gives the lock back when the
    process is gone. Values are kept in memory for `seconds` before they become a shard, so a killed sweep loses at most
    what it computed in that time.

    Attributes:
        done: values on disk, by number of the variant.
        texts: what generated values are scores of; those of new values are set before :meth:`add`.

    Raises:
        ValueError: the folder holds another sweep (the message says what differs), or shards that cannot be read.
        OSError: another process is at work in it, or the disk is full; what was written stays.
    """

    def __init__(
        self, folder: str | Path, what: Mapping[str, Any], variants: Sequence[Patch], baselines: tuple[float, float], *,
        seconds: float = 10.0,
    ) -> None:  # fmt: skip
        self.folder, self.variants, self.seconds = Path(folder), variants, seconds
        self.done: dict[int, float] = {}
        self.texts: dict[int, Any] = {}
        self._new: list[tuple[int, float]] = []
        self._since = time.monotonic()
        self._lock: int | None = None
        listed = json.dumps([[v.layer, v.column, v.unit] for v in variants])
        self._key: dict[str, Any] = {
            **what,
            "variants": {"count": len(variants), "sha256": hashlib.sha256(listed.encode()).hexdigest()},
            "versions": {k: v for k, v in environment.versions().items() if k in COMPUTES},
        }
        self._baselines = baselines

    def __enter__(self) -> Store:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: is a file; name a folder for the results of the sweep")
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        import fcntl

        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            raise OSError(
                f"{self.folder}: another process is sweeping into this folder; wait for it, or use another folder"
            ) from error
        try:
            self._open_manifest()
            for half in (self.folder / SHARDS).glob(".*"):  # what a killed process was writing
                half.unlink()
            self.done = self._read()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.flush()
        finally:
            self._unlock()

    def add(self, values: Iterable[tuple[int, float]]) -> None:
        """Take values by number of the variant; they are on disk after :attr:`seconds`, or after :meth:`flush`."""
        for index, value in values:
            if index in self.done:
                raise ValueError(f"variant {index} was computed twice")
            self.done[index] = value
            self._new.append((index, value))
        if time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last shard."""
        self._since = time.monotonic()
        if not self._new:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        patches = [self.variants[i] for i, _ in self._new]
        columns = {
            "index": pa.array([i for i, _ in self._new], pa.int64()),
            "layer": pa.array([p.layer for p in patches], pa.int32()),
            "column": pa.array([p.column for p in patches], pa.int32()),
            "unit": pa.array([p.unit for p in patches], pa.int32()),
            "value": pa.array([v for _, v in self._new], pa.float64()),
        }
        if self.texts:
            columns["text"] = pa.array([json.dumps(self.texts[i]) for i, _ in self._new], pa.string())
        table = pa.table(columns)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        path = self.folder / SHARDS / f"{self._new[0][0]:09d}-{len(self._new)}.parquet"
        try:
            write_bytes(path, sink.getvalue().to_pybytes())
        except OSError as error:
            self._no_room(error)
        self._new = []

    def _no_room(self, error: OSError) -> NoReturn:
        saved = len(self.done) - len(self._new)
        for index, _ in self._new:
            self.done.pop(index, None)
        self._new = []
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else str(error.strerror or error)
        raise OSError(
            error.errno,
            f"{self.folder}: {why}; {saved} of {len(self.variants)} patches are saved there: make room and run the "
            "same sweep again, it goes on from them",
        ) from error

    def _open_manifest(self) -> None:
        path = self.folder / MANIFEST
        clean, corrupt = self._baselines
        run = {**environment.provenance(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if not path.exists():
            if any((self.folder / SHARDS).glob("*.parquet")):
                raise ValueError(
                    f"{self.folder}: holds shards but no {MANIFEST}, so nobody knows of what; use another one"
                )
            fresh = {"format": FORMAT, "key": self._key, "clean": clean, "corrupt": corrupt, "runs": [run]}
            write_json(path, fresh)
            return
        record = read_json(path, "the manifest of a sweep")
        whole = isinstance(record, dict) and {"format", "key", "clean", "corrupt", "runs"} <= record.keys()
        if not whole or record["format"] != FORMAT:
            raise ValueError(f"{path}: not the manifest of a sweep (expected format {FORMAT!r}); use another folder")
        different = _differences(record["key"], json.loads(json.dumps(self._key)))
        if different:
            raise ValueError(
                f"{self.folder} holds another sweep: {', '.join(different)} differ{'s' * (len(different) == 1)}; use "
                "another folder, or the same model, inputs, target and versions"
            )
        # Weights and inputs are the same; hooks, adapters or a free metric's own state may not be.
        for name, before, now in (("clean", record["clean"], clean), ("corrupt", record["corrupt"], corrupt)):
            if not math.isclose(before, now, rel_tol=1e-5, abs_tol=1e-2 * abs(record["clean"] - record["corrupt"])):
                raise ValueError(
                    f"{self.folder}: the metric of the {name} prompt was {before:.6g} and is {now:.6g} now: the model "
                    "does not compute what it did (hooks, adapters, another metric?); use another folder"
                )
        write_json(path, {**record, "runs": [*record["runs"], run]})

    def _read(self) -> dict[int, float]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        done: dict[int, float] = {}
        for path in sorted((self.folder / SHARDS).glob("*.parquet")):
            try:
                # Not read_table on the path: a folder's name with "=" in it would become a column.
                table = pq.read_table(pa.BufferReader(path.read_bytes()), page_checksum_verification=True)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(
                    f"{path}: cannot be read ({error}); remove it, and its patches are computed again"
                ) from error
            for index, value in zip(table["index"].to_pylist(), table["value"].to_pylist(), strict=True):
                if index in done or not 0 <= index < len(self.variants):
                    raise ValueError(
                        f"{path}: variant {index} is there twice, or not in this sweep; use another folder"
                    )
                done[index] = value
            if "text" in table.column_names:
                said = map(json.loads, table["text"].to_pylist())
                self.texts |= zip(table["index"].to_pylist(), said, strict=True)
        return done

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_store(
    folder: str | Path, *, model: nn.Module, clean: Mapping[str, Any], corrupt: Mapping[str, Any],
    what: Mapping[str, Any], variants: Sequence[Patch], baselines: tuple[float, float], seconds: float = 10.0,
) -> Store:  # fmt: skip
    """A store for one sweep.

    Args:
        folder: of this sweep alone.
        model: hashed with all its weights and its config.
        clean, corrupt: the inputs, hashed.
        what: target, metric, direction and all else that decides the values; see :func:`~.identity.describe`.
        variants: all of them, in order.
        baselines: the metric of the clean and of the corrupt prompt.
        seconds: between shards.

    Raises:
        TypeError: something in ``what`` cannot be recognised in a later run.
        ValueError: a baseline is not finite.
    """
    if not all(math.isfinite(b) for b in baselines):
        raise ValueError(
            f"the metric is {baselines[0]} on the clean and {baselines[1]} on the corrupt prompt: not finite"
        )
    key = {
        "model": hash_model(model),
        "inputs": {"clean": hash_inputs(clean), "corrupt": hash_inputs(corrupt)},
        **{k: describe(v) for k, v in what.items()},
    }
    return Store(folder, key, variants, baselines, seconds=seconds)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs, in words, with the values where they are short."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        a, b = before.get(name), now.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping) and name in ("model", "inputs", "versions"):
            parts = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
            found.append(f"the {name} ({', '.join(parts)})")
        elif all(isinstance(v, str | int | float | None) for v in (a, b)):
            found.append(f"the {name} ({a} before, {b} now)")
        else:
            found.append(f"the {name}")
    return found
