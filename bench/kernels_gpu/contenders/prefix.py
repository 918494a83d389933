"""Decoding rows that share a prefix: read once for all rows, or once for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from emokernels.attention import run
from emokernels.composed.stock import Refused, stock_with_lse

from ..inputs import Inputs
from ..timing import Call
from . import Contender, Prepare, Unavailable, attention, need

SHARED = "fused, shared prefix"
BOOSTED = "fused, shared prefix, gain in 10 heads"
COPIED = "fused, prefix copied for every row"


def shared(variant: str) -> Prepare:
    """The prefix as an argument of its own."""

    def prepare(inputs: Inputs) -> Call:
        need("fused")
        options = attention.options_of(inputs, "fused", variant)
        return lambda: run(inputs.q, *inputs.own, prefix=inputs.prefix, **options)[0]

    return prepare


def cascade(inputs: Inputs) -> Call:
    """The same idea from stock parts: all rows as queries of one long prefix, each row on its own keys, merged."""
    if inputs.prefix is None or inputs.case.rows != 1:
        raise Unavailable("needs a shared prefix and one query a row")
    k, v = inputs.prefix

    def call() -> Tensor:
        together = inputs.q.squeeze(2).transpose(0, 1).unsqueeze(0)
        head, first = (x[0].transpose(0, 1).unsqueeze(2) for x in stock_with_lse(together, k, v, False, inputs.scale))
        own, second = stock_with_lse(inputs.q, *inputs.own, False, inputs.scale)
        weight = torch.sigmoid(first - second).unsqueeze(-1)
        return (head * weight + own * (1 - weight)).to(own.dtype)

    try:
        call()
    except Refused as error:
        raise Unavailable("no stock kernel here returns a log-sum-exp for this call") from error
    return call


def contenders() -> list[Contender]:
    copied = "prefix copied for every row"
    return [
        Contender(SHARED, "plain", shared("plain"), ours=True),
        Contender(BOOSTED, "boost", shared("boost"), ours=True),
        Contender(COPIED, "plain", attention.ours("fused", "plain"), ours=True),
        Contender("stock kernels merged by log-sum-exp", "plain", cascade),
        Contender(attention.FLASH, "plain", attention.sdpa(SDPBackend.FLASH_ATTENTION, "plain"), note=copied),
        Contender(attention.CUDNN, "plain", attention.sdpa(SDPBackend.CUDNN_ATTENTION, "plain"), note=copied),
    ]
