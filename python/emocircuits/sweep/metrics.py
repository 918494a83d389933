"""What a sweep measures. A declared metric says which columns and vocabulary rows it reads: no more is computed.

Any callable on logits ``[1, tokens, vocabulary]`` that gives one number works too, at its price: all logits, for every
patch.
"""

from __future__ import annotations

import dataclasses as dc
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dc.dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes:
        pos: the column that it reads, negative from the end; None: all of them.
        rows: vocabulary rows that it reads; None: all.
        layer: the layer whose output it reads in place of logits, or None.
    """

    pos: int | None = -1

    @property
    def rows(self) -> tuple[int, ...] | None:  # noqa: D102
        return None

    @property
    def depth(self) -> int | None:
        """The layer whose output is read, or None for logits."""
        return None

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """Values ``[n]`` float64.

        Args:
            read: ``[n, columns, rows]`` logits, or ``[n, columns, d_model]`` of the layer read.
            reference: the same of the clean run, ``[1, columns, rows]``.
        """
        raise NotImplementedError

    def columns(self, total: int) -> tuple[int, ...]:
        """Columns of a prompt of ``total`` tokens that are read.

        Raises:
            ValueError: a column outside the prompt.
        """
        if self.pos is None:
            return tuple(range(total))
        if not -total <= self.pos < total:
            raise ValueError(f"the metric reads column {self.pos}, outside a prompt of {total} columns")
        return (self.pos % total,)


@dc.dataclass(frozen=True)
class LogitDiff(Metric):
    """Logit of token ``a`` less that of ``b``."""

    a: int = 0
    b: int = 0

    @property
    def rows(self) -> tuple[int, ...]:  # noqa: D102
        return (self.a, self.b)

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """``[n]``."""
        return (read[..., 0] - read[..., 1]).mean(-1)


@dc.dataclass(frozen=True)
class LogProb(Metric):
    """Log probability of ``token``, in nats."""

    token: int = 0

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """``[n]``."""
        if not 0 <= self.token < read.shape[-1]:
            raise ValueError(f"token {self.token} is outside the vocabulary of {read.shape[-1]}")
        return read.log_softmax(-1)[..., self.token].mean(-1)


@dc.dataclass(frozen=True)
class KL(Metric):
    """``KL(clean || patched)`` of the next token, in nats."""

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """``[n]``."""
        p = reference.log_softmax(-1)
        return (p.exp() * (p - read.log_softmax(-1))).sum(-1).mean(-1)


@dc.dataclass(frozen=True)
class Projection(Metric):
    """Inner product of what leaves ``layer`` with a direction ``[d_model]``, which is not normalised."""

    direction: Tensor = dc.field(default_factory=lambda: torch.zeros(0))
    layer: int = -1

    @property
    def depth(self) -> int:  # noqa: D102
        return self.layer

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """``[n]``."""
        direction = self.direction.to(read)
        if direction.shape != read.shape[-1:]:
            raise ValueError(f"direction is {list(direction.shape)}, expected [{read.shape[-1]}]")
        return (read @ direction).mean(-1)


@dc.dataclass(frozen=True)
class Free(Metric):
    """Any function from logits ``[1, tokens, vocabulary]`` to one number; called once for every patch."""

    pos: int | None = None
    function: Callable[[Tensor], Any] = float

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """``[n]``."""
        values = []
        for one in read:
            # A copy: a function that writes into its logits would write into the base run's.
            value = torch.as_tensor(self.function(one[None].clone()))
            if value.numel() != 1:
                raise ValueError(f"the metric gave {list(value.shape)} for one prompt, expected one number")
            values.append(value.reshape(()).to(device=read.device, dtype=torch.float64))
        return torch.stack(values)


def logit_diff(a: int, b: int, pos: int = -1) -> Metric:
    """Logit of token ``a`` less that of ``b`` at column ``pos``."""
    return LogitDiff(pos, _token(a), _token(b))


def log_prob(token: int, pos: int = -1) -> Metric:
    """Log probability (nats) of ``token`` at column ``pos``."""
    return LogProb(pos, _token(token))


def _token(given: object) -> int:
    try:
        return operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"token {given!r} is a {type(given).__name__}: expected the id of a token") from None


def kl(pos: int = -1) -> Metric:
    """``KL(clean || patched)`` (nats) at column ``pos``: 0 where a patch brings the clean prediction back."""
    return KL(pos)


def projection(direction: Tensor, layer: int = -1, pos: int = -1) -> Metric:
    """Inner product of ``resid_post[layer]`` at column ``pos`` with ``direction`` ``[d_model]``."""
    return Projection(pos, direction.detach(), int(layer))


def declared(metric: object) -> Metric:
    """A metric as the engine reads it.

    Raises:
        TypeError: neither a declared metric nor callable.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise TypeError(
            f"metric is {type(metric).__name__}: expected logit_diff(...), log_prob(...), kl(...), projection(...), "
            "or a function from logits [1, tokens, vocabulary] to one number"
        )
    return Free(None, metric)
