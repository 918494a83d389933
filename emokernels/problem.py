"""One attention problem as the backends see it: tensors and numbers that are already validated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .routes import Routes


class Problem(NamedTuple):
    """Arguments of every attention op, in schema order.

    ``q [B, H, N, D]``, ``k`` and ``v [B, Hkv, K, D]``; ``roles [B|1, K]`` and ``query_roles [B|1, N]`` uint8, present
    when a table is; ``bias``, ``factor`` (Routes.scale), ``magnitude`` (Routes.abs) and ``gain`` ``[B|1, H, R, R]``;
    ``mask`` bool or additive ``[B|1, 1|H, N, K]``; ``lengths [B|1]`` int32, the number of keys that exist yet (the
    rest of a static cache is hidden, and the last query sees key ``lengths - 1``), or None for all K; ``scale`` of the
    logits; ``window`` and ``softcap`` with 0 for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    roles: Tensor | None
    query_roles: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
    magnitude: Tensor | None
    gain: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    causal: bool
    scale: float
    window: int
    softcap: float

    @property
    def routed(self) -> bool:
        """True when at least one table is given."""
        return self.bias is not None or self.factor is not None or self.magnitude is not None or self.gain is not None

    def fold_lengths(self) -> Problem:
        """The same problem with `lengths` (and with it `causal` and `window`) written out as a mask."""
        if self.lengths is None:
            return self
        n, keys = self.q.shape[2], self.k.shape[2]
        j = torch.arange(keys, device=self.q.device)
        end = self.lengths.view(-1, 1, 1)
        seen = (j < end).expand(-1, n, -1)
        i = torch.arange(n, device=self.q.device)[:, None] + end - n
        if self.causal:
            seen = seen & (j <= i)
        if self.window:
            seen = seen & (j > i - self.window)
        seen = seen.unsqueeze(1)
        mask = self.mask
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = torch.where(seen, mask, -torch.inf)
        return self._replace(mask=mask, lengths=None, causal=False, window=0)

    def prepend(self, prefix: tuple[Tensor, Tensor]) -> Problem:
        """The problem of which this one is the tail: keys and values of `prefix` ``[1, Hkv, P, D]`` come first."""
        batch = self.q.shape[0]
        k, v = (
            torch.cat([x.expand(batch, -1, -1, -1), own], 2) for x, own in zip(prefix, (self.k, self.v), strict=True)
        )
        return self._replace(k=k, v=v)


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    roles: Tensor | None,
    query_roles: Tensor | None,
    routes: Routes | None,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    lengths: Tensor | None = None,
) -> Problem:
    """Arguments of `attention` as the ops take them, defaults filled in."""
    bias = factor = magnitude = gain = None
    if routes is not None:
        bias, factor, magnitude, gain = routes.bias, routes.scale, routes.abs, routes.gain
        if query_roles is None and roles is not None:
            query_roles = roles[:, roles.shape[1] - q.shape[2] :]
    if scale is None:
        scale = q.shape[3] ** -0.5
    numbers = (causal, scale, window or 0, softcap or 0.0)
    return Problem(q, k, v, roles, query_roles, bias, factor, magnitude, gain, mask, lengths, *numbers)
