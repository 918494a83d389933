"""Which problems are measured: layers of real models, in groups that run and are saved one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Model:
    """The attention and MLP sizes of one layer, and how a prompt of it is laid out."""

    name: str
    heads: int
    key_heads: int
    dim: int
    system: int
    """Tokens before the image; after it comes the query."""
    visual: int
    """Tokens of the image ..."""
    visual_share: float = 0.0
    """... or this share of the prompt where that is more: images of any resolution."""

    def visual_tokens(self, keys: int) -> int:
        return max(self.visual, int(self.visual_share * keys))


LLAVA = Model("LLaVA-1.5-7B", 32, 32, 128, 35, 576)
QWEN = Model("Qwen3-VL-8B", 32, 8, 128, 15, 256, 0.6)
ONEVISION = Model("LLaVA-OneVision-7B", 28, 4, 128, 14, 6144)
TINY = Model("tiny", 4, 2, 16, 3, 16)

BOOSTED = 10
"""Heads of a layer that a VEENA-like plan boosts (fewer where a layer has fewer)."""


@dataclass(frozen=True)
class Attention:
    """``rows`` queries on ``keys`` keys for each of ``batch`` rows; the last `rows` keys are the queries' own.

    With ``prefix`` the first that many keys are shared by the batch. With ``backward`` the gradient is timed.
    ``compiled`` says whether contenders take part that compile for seconds before they run.
    """

    model: Model
    keys: int
    rows: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    prefix: int = 0
    backward: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        m = self.model
        parts = [m.name, f"{m.heads}/{m.key_heads} heads of {m.dim}", f"{self.keys} keys"]
        if self.batch > 1 or self.rows < self.keys:
            parts.append(f"batch {self.batch}")
        if self.prefix:
            parts.append(f"{self.prefix} of them shared")
        if self.backward:
            parts.append("gradient")
        if self.dtype != torch.bfloat16:
            parts.append(dtype_name(self.dtype))
        return ", ".join(parts)

    @property
    def causal(self) -> bool:
        """One query sees every key there is; more see those up to their own."""
        return self.rows > 1

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head of one batch row."""
        return self.rows * self.keys - (self.rows * (self.rows - 1) // 2 if self.causal else 0)

    @property
    def flops(self) -> int:
        """Two products a pair; the gradient needs five."""
        return (10 if self.backward else 4) * self.batch * self.model.heads * self.model.dim * self.pairs

    @property
    def bytes(self) -> int:
        """Every input read once, every output written once; a shared prefix is read once for all rows."""
        m = self.model
        cached = (self.batch * (self.keys - self.prefix) + self.prefix) * m.key_heads * m.dim * 2
        queries = self.batch * self.rows * m.heads * m.dim
        # The gradient also reads z and its gradient, and writes dq, dk and dv.
        return self.dtype.itemsize * (2 * cached + 4 * queries if self.backward else cached + 2 * queries)


@dataclass(frozen=True)
class Activation:
    """``act(gate) * up`` of ``tokens`` rows of ``width`` neurons."""

    width: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.width} neurons, {self.tokens} token{'s' if self.tokens > 1 else ''}"

    @property
    def edits(self) -> int:
        """One neuron in a hundred is edited."""
        return max(1, self.width // 100)

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return 3 * self.width * self.tokens * self.dtype.itemsize


@dataclass(frozen=True)
class Flow:
    """Attention mass (or saliency) per route of a whole prompt."""

    model: Model
    keys: int
    saliency: bool
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.keys} keys, {'saliency' if self.saliency else 'mass'}"

    @property
    def attention(self) -> Attention:
        return Attention(self.model, self.keys, self.keys, dtype=self.dtype)

    @property
    def flops(self) -> int:
        """Logits once for the softmax and once for the sums; the saliency needs a product with v as well."""
        return self.attention.flops * (3 if self.saliency else 2) // 2

    @property
    def bytes(self) -> int:
        m = self.model
        kinds = (2 * m.heads + 2 * m.key_heads) if self.saliency else (m.heads + m.key_heads)
        return kinds * self.keys * m.dim * self.dtype.itemsize


@dataclass(frozen=True)
class Lens:
    """Entropy and the probability of a token set for ``rows`` hidden states."""

    rows: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.rows} rows, {self.vocabulary} tokens, width {self.hidden}"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.hidden * self.vocabulary

    @property
    def bytes(self) -> int:
        return (self.rows + self.vocabulary) * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Generation:
    """Whole generations of a LLaVA with random weights, with and without a VEENA-like plan."""

    layers: int
    hidden: int
    heads: int
    batch: int
    tokens: int
    static: bool
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        cache = "static cache, compiled decode" if self.static else "dynamic cache"
        return f"LLaVA of {self.layers} layers, width {self.hidden}, batch {self.batch}, {self.tokens} tokens, {cache}"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return 0


Case = Attention | Activation | Flow | Lens | Generation


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prefill(model: Model, keys: int, dtype: torch.dtype = torch.bfloat16) -> Attention:
    return Attention(model, keys, keys, dtype=dtype)


def decode(model: Model, keys: int, batch: int, dtype: torch.dtype = torch.bfloat16) -> Attention:
    return Attention(model, keys, 1, batch, dtype, compiled=model is TINY or (keys == 4096 and batch in (1, 64)))


def _full() -> dict[str, list[Case]]:
    return {
        "prefill": [
            prefill(LLAVA, 1024),
            prefill(QWEN, 4096),
            prefill(LLAVA, 4096),
            prefill(ONEVISION, 8192),
            prefill(QWEN, 16384),
            prefill(QWEN, 1024),
            prefill(QWEN, 4096, torch.float16),
        ],
        "decode": [
            *(decode(QWEN, keys, batch) for keys in (4096, 1024, 16384) for batch in (1, 64, 8, 256)),
            *(decode(LLAVA, keys, batch) for keys in (1024, 4096) for batch in (1, 64)),
            *(decode(ONEVISION, 8192, batch) for batch in (1, 64)),
        ],
        "prefix": [Attention(QWEN, 4096 + 128, 1, 256, prefix=4096)],
        "backward": [
            Attention(QWEN, 4096, 4096, backward=True),
            Attention(LLAVA, 4096, 4096, backward=True),
        ],
        "activation": [
            Activation(width, tokens) for tokens in (8192, 1, 1024, 16) for width in (12288, 11008, 14336, 18944)
        ],
        "flow": [
            Flow(model, keys, saliency) for model, keys in ((QWEN, 4096), (LLAVA, 1024)) for saliency in (False, True)
        ],
        "lens": [Lens(1000, 4096, 151936)],
        "generation": [
            Generation(8, 4096, 32, 1, 32, False),
            Generation(8, 4096, 32, 8, 32, False),
            Generation(4, 4096, 32, 1, 32, True),
        ],
    }


def _quick() -> dict[str, list[Case]]:
    """One or two shapes a group, the ones that the goals are about."""
    full = _full()
    kept: dict[str, list[Case]] = {
        "prefill": [prefill(LLAVA, 1024), prefill(QWEN, 4096)],
        "decode": [decode(QWEN, 4096, 1), decode(QWEN, 4096, 64)],
        "backward": full["backward"][:1],
        "activation": [Activation(12288, 8192), Activation(12288, 1)],
        "flow": full["flow"][:1],
        "generation": [Generation(4, 4096, 32, 1, 16, False)],
    }
    return {group: kept.get(group, cases) for group, cases in full.items()}


def _tiny() -> dict[str, list[Case]]:
    """Small enough for a CPU: exercises every line, says nothing about speed."""
    half, wide = torch.float16, torch.float32
    grad = Attention(TINY, 40, 40, dtype=wide, backward=True)
    return {
        "prefill": [prefill(TINY, 40, wide), prefill(replace(TINY, name="tiny, half"), 40, half)],
        "decode": [decode(TINY, 40, batch, wide) for batch in (1, 3)],
        "prefix": [Attention(TINY, 40, 1, 3, wide, prefix=32)],
        "backward": [grad],
        "activation": [Activation(200, tokens, wide) for tokens in (1, 7)],
        "flow": [Flow(TINY, 40, saliency, wide) for saliency in (False, True)],
        "lens": [Lens(5, 32, 300, wide)],
        "generation": [Generation(2, 32, 4, 2, 3, False, wide)],
    }


SETS = {"full": _full, "quick": _quick, "tiny": _tiny}
"""The sets of cases, by group, the most telling case of a group first."""
SHARES = {
    "prefill": 100, "decode": 85, "prefix": 10, "backward": 40, "activation": 30, "flow": 12, "lens": 12,
    "generation": 50,
}  # fmt: skip
"""The groups in their order, and how they divide the time of a run."""
