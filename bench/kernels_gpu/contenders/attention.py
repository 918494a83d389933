"""Forward attention, prefill and decode: ours with and without routes, and everybody else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.attention import SDPBackend, sdpa_kernel

from emokernels import native
from emokernels.attention import run
from emokernels.composed import libraries

from ..inputs import Inputs
from ..timing import Call
from . import Contender, Prepare, Unavailable, need

PLAIN = "fused"
ROUTES = "fused, bias and gain in all heads"
BOOST = "fused, gain in 10 heads"
EVERY = "fused, every route different"
FIRST = "fused, gain in 10 heads, first layer of a pass"
FLASH = "SDPA flash"
CUDNN = "SDPA cuDNN"
FLEX = "FlexAttention, score_mod"
EAGER = "eager, bias mask"


def options_of(inputs: Inputs, backend: str, variant: str) -> dict[str, Any]:
    """Keyword arguments of `emokernels.attention.run` for a variant."""
    options: dict[str, Any] = {"causal": inputs.case.causal, "backend": backend}
    if inputs.tables[variant] is not None:
        options.update(roles=inputs.roles, query_roles=inputs.query_roles, routes=inputs.tables[variant])
    return options


def ours(backend: str, variant: str, *, lengths: bool = False, first: bool = False) -> Prepare:
    """Attention as patched models call it.

    `lengths` says on the device how many keys there are. The layers of a pass share what one of them worked out about
    the roles; with `first` the call is the one that works it out.
    """

    def prepare(inputs: Inputs) -> Call:
        need(backend)
        if backend == "native" and inputs.case.rows > native.MAX_QUERIES:
            raise Unavailable("native attention is for decoding")
        options = options_of(inputs, backend, variant)
        if lengths and inputs.case.rows > 1:
            raise Unavailable("caches that are not full are for decoding")
        if lengths:
            options["lengths"] = torch.tensor([inputs.case.keys], dtype=torch.int32, device=inputs.q.device)
        if not first:
            return lambda: run(inputs.q, inputs.k, inputs.v, **options)[0]
        roles = options["roles"] = inputs.roles.clone()

        def call() -> Tensor:
            increment_version(roles)
            return run(inputs.q, inputs.k, inputs.v, **options)[0]

        return call

    return prepare


def sdpa(kernel: SDPBackend, variant: str, repeat: bool = False) -> Prepare:
    """Torch's attention on one kernel; a variant with a bias gets it as a dense mask in the inputs' dtype."""

    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs.q, inputs.k, inputs.v
        if repeat and inputs.share > 1:
            k, v = (x.repeat_interleave(inputs.share, 1) for x in (k, v))
        mask = None if variant == "plain" else inputs.mask(variant).expand(q.shape[0], -1, -1, -1)
        causal = inputs.case.causal and mask is None
        grouped = k.shape[1] != q.shape[1]

        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

        try:
            call()
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Unavailable(f"torch has no {kernel.name} kernel for this call here") from error
            raise
        return call

    return prepare


def eager(variant: str) -> Prepare:
    """What transformers runs with ``attn_implementation="eager"``: an additive mask, softmax in float32."""

    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs.q, inputs.k, inputs.v
        mask = None if variant == "plain" and not inputs.case.causal else inputs.mask(variant)

        def call() -> Tensor:
            keys, values = (x.repeat_interleave(inputs.share, 1) if inputs.share > 1 else x for x in (k, v))
            scores = q @ keys.mT * inputs.scale
            if mask is not None:
                scores = scores + mask
            return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ values

        return call

    return prepare


def flex(inputs: Inputs, compiled: bool = True) -> Call:
    """FlexAttention with the table of biases looked up in a score_mod; causal by block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    routes = inputs.tables["bias"]
    if routes is None or routes.bias is None:
        raise Unavailable("no biases")
    if compiled and not inputs.q.is_cuda:
        raise Unavailable("compiled for GPUs only")
    if not inputs.case.compiled:
        raise Unavailable("compiled for some cases only: a compilation takes longer than all else of a case")
    table, source, destination = routes.bias[0], inputs.roles[0].long(), inputs.query_roles[0].long()
    offset = inputs.case.keys - inputs.case.rows

    def boosted(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[h, destination[i], source[j]]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + offset

    blocks = None
    if inputs.case.causal:
        blocks = create_block_mask(visible, None, None, inputs.case.rows, inputs.case.keys, device=inputs.q.device)
    function: Any = flex_attention
    if compiled:
        torch._dynamo.reset()  # one shape a compilation: a second one would make it dynamic, and slower
        function = torch.compile(flex_attention, dynamic=False)
    return lambda: function(
        inputs.q, inputs.k, inputs.v, score_mod=boosted, block_mask=blocks, enable_gqa=inputs.share > 1
    )


def library(kernel: libraries.Kernel) -> Prepare:
    """An installed flash-attn, through the adapter that `composed` uses."""

    def prepare(inputs: Inputs) -> Call:
        q, k, v = inputs.q, inputs.k, inputs.v
        causal = inputs.case.causal
        if reason := kernel.missing() or kernel.refuses(q, k, v, causal):
            raise Unavailable(reason)
        return lambda: kernel(q, k, v, causal, inputs.scale)[0]

    return prepare


def forward() -> list[Contender]:
    """Every contender for prefill and decode."""
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    repeated, efficient = "grouped keys repeated beforehand", SDPBackend.EFFICIENT_ATTENTION
    return [
        Contender(PLAIN, "plain", ours("fused", "plain"), ours=True),
        Contender(ROUTES, "routes", ours("fused", "routes"), ours=True),
        Contender(BOOST, "boost", ours("fused", "boost"), ours=True),
        Contender(EVERY, "every", ours("fused", "every"), ours=True),
        Contender(FIRST, "boost", ours("fused", "boost", first=True), ours=True),
        Contender("fused, gain in 10 heads, lengths", "boost", ours("fused", "boost", lengths=True), ours=True),
        Contender("composed", "plain", ours("composed", "plain"), ours=True),
        Contender("composed, gain in 10 heads", "boost", ours("composed", "boost"), ours=True),
        Contender("native", "plain", ours("native", "plain"), ours=True),
        Contender("native, gain in 10 heads", "boost", ours("native", "boost"), ours=True),
        Contender(FLASH, "plain", sdpa(flash, "plain")),
        Contender(CUDNN, "plain", sdpa(cudnn, "plain")),
        Contender("SDPA efficient, bias mask", "bias", sdpa(efficient, "bias", True), note=repeated),
        Contender("SDPA cuDNN, bias mask", "bias", sdpa(cudnn, "bias")),
        Contender(FLEX, "bias", flex, note="gain is beyond a score_mod"),
        Contender("eager", "plain", eager("plain")),
        Contender(EAGER, "bias", eager("bias")),
        *(
            Contender(f"flash-attn {version}", "plain", library(kernel))
            for version, kernel in (
                (2, libraries.FlashAttention2()),
                (3, libraries.FlashAttention3()),
                (4, libraries.FlashAttention4()),
            )
        ),
    ]


def references() -> list[Contender]:
    """What a smoke run on a CPU adds: the definition, and FlexAttention without its compiler."""
    return [
        Contender("reference", "plain", ours("reference", "plain"), ours=True),
        Contender("reference, every route different", "every", ours("reference", "every"), ours=True),
        Contender("FlexAttention, not compiled", "bias", lambda inputs: flex(inputs, compiled=False)),
    ]
