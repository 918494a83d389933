"""One attention problem as the backends see it: tensors and numbers that are already validated."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
