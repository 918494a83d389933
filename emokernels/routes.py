"""Roles and routes: which tokens are what, and what attention along (destination role <- source role) becomes.

Source of the formulas: "logit route" and "weight route" of the method, see docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .errors import message, require_tensor


class Role(IntEnum):
    """What a token is. A role describes a token; it never masks it (a mask masks)."""

    PAD = 0
    SYSTEM = 1  # text before the image
    VISUAL = 2  # image or video placeholder
    QUERY = 3  # text after the image, except the last prompt token
    LAST = 4  # last prompt token
    GENERATED = 5


ROLES = len(Role)
"""R, the number of roles: the last two dimensions of every routes table."""

_TABLE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Routes:
    """Changes to attention per (batch row, head, destination role, source role).

    ``s' = scale * s + abs * |s| + bias``, then mask and softmax, then ``p * gain`` without renormalising, where ``s``
    is the scaled and soft-capped attention logit of a query of role ``dst`` and a key of role ``src``.

    Each field is ``None`` (identity) or a table ``[B|1, H, R, R]`` of float32 (or float64), indexed
    ``[row, head, dst role, src role]`` with ``R = len(Role)``; a first dimension of 1 is shared by all rows of the
    batch.

    | field | identity | notes |
    |---|---|---|
    | bias  | 0 | added to the logit, in nats; ``-inf`` masks the route |
    | scale | 1 | multiplies the logit |
    | abs   | 0 | multiplies the logit's absolute value |
    | gain  | 1 | multiplies the softmax weight; 0 masks without renormalising |

    The tables are read at every call, so they may be refilled in place between calls (``routes.gain.fill_(1)``) without
    recompiling a graph that uses them. A row of role PAD has a table row like any other: identity unless set.

    Raises:
        TypeError: a field is not a tensor, or not float32 or float64.
        ValueError: a shape does not fit, fields disagree in rows, heads, dtype or device, or a CPU table holds NaN
            or an infinity other than a bias of ``-inf``.
    """

    bias: Tensor | None = None
    scale: Tensor | None = None
    abs: Tensor | None = None
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        first: tuple[str, Tensor] | None = None
        rows = 1
        for name, table in self.tables():
            _check_table(name, table)
            if first is None:
                first = (name, table)
            other = first[1]
            if table.shape[1] != other.shape[1] or table.dtype != other.dtype or table.device != other.device:
                raise ValueError(
                    message(
                        f"Routes.{name}",
                        f"the heads, dtype and device of Routes.{first[0]} "
                        f"({other.shape[1]} heads, {other.dtype}, {other.device})",
                        table,
                        "Build all tables of one Routes alike; Routes.to(device) moves them together.",
                    )
                )
            if table.shape[0] != 1:
                if rows != 1 and table.shape[0] != rows:
                    raise ValueError(
                        message(
                            f"Routes.{name}",
                            f"1 or {rows} batch rows like the other tables",
                            table,
                            "Give every table the same number of rows, or 1 to share it.",
                        )
                    )
                rows = table.shape[0]

    def tables(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are set, as (name, table)."""
        for field in dataclasses.fields(self):
            table = getattr(self, field.name)
            if table is not None:
                yield field.name, table

    @classmethod
    def identity(
        cls,
        heads: int,
        rows: int = 1,
        *,
        fields: tuple[str, ...] = ("bias", "scale", "abs", "gain"),
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Routes:
        """Tables that change nothing, to be filled in place. Only the named fields are allocated."""
        neutral = {"bias": 0.0, "scale": 1.0, "abs": 0.0, "gain": 1.0}
        unknown = [name for name in fields if name not in neutral]
        if unknown:
            raise ValueError(
                message("fields", f"names among {sorted(neutral)}", repr(unknown), "Name the tables you will fill.")
            )
        shape = (rows, heads, ROLES, ROLES)
        return cls(**{name: torch.full(shape, neutral[name], device=device, dtype=dtype) for name in fields})

    @property
    def rows(self) -> int:
        """Number of batch rows described: 1 when all tables are shared."""
        return max((table.shape[0] for _, table in self.tables()), default=1)

    @property
    def heads(self) -> int | None:
        """Number of query heads, or None when no table is set."""
        return next((table.shape[1] for _, table in self.tables()), None)

    def is_identity(self) -> bool:
        """True when every table that is set holds its identity. Reads the values, so a GPU is waited for."""
        neutral = {"bias": 0.0, "scale": 1.0, "abs": 0.0, "gain": 1.0}
        return all(bool((table == neutral[name]).all()) for name, table in self.tables())

    def to(self, device: torch.device | str) -> Routes:
        """The same routes with every table on `device`."""
        return Routes(**{name: table.to(device) for name, table in self.tables()})

    def select_rows(self, index: Tensor) -> Routes:
        """Routes of the batch rows `index` ([B'] int64), as beams or ``num_return_sequences`` expand a batch."""
        return Routes(
            **{name: table if table.shape[0] == 1 else table.index_select(0, index) for name, table in self.tables()}
        )


def _check_table(name: str, table: Tensor) -> None:
    way_out = "Routes.identity(heads, rows) allocates tables of the right shape."
    require_tensor(f"Routes.{name}", table, way_out)
    if table.dtype not in _TABLE_DTYPES:
        raise TypeError(message(f"Routes.{name}", "float32 (or float64)", table, "Convert with table.float()."))
    if table.dim() != 4 or table.shape[2:] != (ROLES, ROLES) or 0 in table.shape:
        raise ValueError(message(f"Routes.{name}", f"shape [B|1, H, {ROLES}, {ROLES}]", table, way_out))
    if table.device.type == "cpu" and not torch.compiler.is_compiling():
        values = table.detach()
        finite = torch.isfinite(values) | (values == -torch.inf) if name == "bias" else torch.isfinite(values)
        if not bool(finite.all()):
            allowed = "finite values or -inf" if name == "bias" else "finite values"
            raise ValueError(
                message(
                    f"Routes.{name}",
                    allowed,
                    f"{int((~finite).sum())} entries that are NaN or infinite",
                    "Mask a route with bias = -inf, drop its weight with gain = 0.",
                )
            )
