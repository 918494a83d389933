"""The gradient of causal attention with respect to q, k and v (and to the tables, where they are asked for)."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.attention import SDPBackend

import emokernels as emo

from ..inputs import Inputs
from ..timing import Call
from . import Contender, Prepare, Unavailable, attention

PLAIN, ROUTES, BOOST = attention.PLAIN, attention.ROUTES, attention.BOOST
TABLES = "fused, bias and gain in all heads, their gradients too"


def gradient(forward: Prepare, variant: str = "plain", tables: bool = False) -> Prepare:
    """The gradient of a forward contender; its forward pass runs once, beforehand."""

    def prepare(inputs: Inputs) -> Call:
        wanted = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        changed = dict(inputs.tables)
        routes = changed[variant]
        if tables and routes is not None:
            learnt = {name: table.detach().requires_grad_() for name, table in routes.tables()}
            changed[variant] = emo.Routes(**learnt)
            wanted += learnt.values()
        q, k, v = wanted[:3]
        with torch.enable_grad():
            z = forward(dataclasses.replace(inputs, q=q, k=k, v=v, tables=changed))()
        if not z.requires_grad:
            raise Unavailable("its output has no gradient")
        return lambda: torch.autograd.grad(z, wanted, inputs.grad, retain_graph=True)

    return prepare


def flex(inputs: Inputs) -> Call:
    """A compiled backward may otherwise reuse the memory of what it saved, and run only once."""
    from torch._functorch import config

    config.donated_buffer = False
    return gradient(attention.flex)(inputs)


def contenders() -> list[Contender]:
    ours, sdpa = attention.ours, attention.sdpa
    return [
        Contender(PLAIN, "plain", gradient(ours("fused", "plain")), ours=True),
        Contender(ROUTES, "routes", gradient(ours("fused", "routes")), ours=True),
        Contender(TABLES, "routes", gradient(ours("fused", "routes"), "routes", True), ours=True),
        Contender(attention.BOOST, "boost", gradient(ours("fused", "boost")), ours=True),
        Contender("composed, gain in 10 heads", "boost", gradient(ours("composed", "boost")), ours=True),
        Contender(attention.FLASH, "plain", gradient(sdpa(SDPBackend.FLASH_ATTENTION, "plain"))),
        Contender(attention.CUDNN, "plain", gradient(sdpa(SDPBackend.CUDNN_ATTENTION, "plain"))),
        Contender(attention.FLEX, "bias", flex),
        Contender("eager", "plain", gradient(attention.eager("plain"))),
    ]


def references() -> list[Contender]:
    """What a smoke run on a CPU adds: the definition."""
    plain, every = attention.ours("reference", "plain"), attention.ours("reference", "every")
    return [
        Contender("reference", "plain", gradient(plain), ours=True),
        Contender("reference, tables too", "every", gradient(every, "every", True), ours=True),
    ]
