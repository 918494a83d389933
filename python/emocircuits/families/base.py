"""What the engine must know about a model family, and nothing else: where its parts are and what its numbers mean."""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dc.dataclass(frozen=True)
class Family:
    """Paths of one model family, relative to the model, to its text decoder, or to one decoder layer.

    A new family is one instance of this class (CONTRIBUTING.md shows how); every path is checked by a test against a
    tiny random model. The defaults are the layout of Llama. A vision-language family around another layout is
    ``dataclasses.replace(GEMMA2, name=..., model_types=..., backbone=..., text=..., placeholders=...)``.
    """

    name: str
    model_types: tuple[str, ...]
    """``config.model_type`` values this adapter serves."""
    backbone: str = "model"
    """Module whose forward receives ``input_ids`` and the cache, whoever calls it."""
    text: str = "model"
    """The text decoder: owns ``layers`` and the config whose attention implementation is switched."""
    text_types: tuple[str, ...] = ()
    """``model_type`` values of the text decoder that have been checked; empty: those of ``model_types``."""
    placeholders: tuple[str, ...] = ()
    """Config fields that hold the ids of visual placeholder tokens; empty for a text-only family."""
    unembed: str = "lm_head"

    # Relative to the text decoder.
    layers: str = "layers"
    norm: str = "norm"

    # Relative to a decoder layer.
    attention: str = "self_attn"
    output_projection: str = "self_attn.o_proj"
    mlp: str = "mlp"
    down_projection: str = "mlp.down_proj"
    attn_out: str = "self_attn"
    """Module whose (first) output is what attention adds to the residual stream: the norm, where one follows it."""
    mlp_out: str = "mlp"
    """The same of the MLP."""
    between_layers: bool = False
    """Whether the text decoder itself adds to the residual stream between layers (DeepStack): what leaves a layer is
    then what enters the next one, or the final norm."""
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    """The three projections where they are separate modules, else None."""
    qkv: str | None = None
    """One module that gives all three, where they are not separate."""
    qkv_by_head: bool = False
    """Whether its output goes head by head, ``[q, k, v]`` of each, instead of all queries, all keys, all values."""
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    """Of a gated MLP, ``down(act(gate(x)) * up(x))``; None where they are one module or the MLP has no gate."""
    gate_up: str | None = None
    """One module that gives ``[gate, up]`` side by side in the last dimension."""
    experts: str | None = None
    """Of a mixture of experts: what a layer has in place of ``down_projection``. Its neurons cannot be edited."""

    # Fields of the text decoder's config.
    activation: str = "hidden_act"
    softcap: str | None = None
    """Field with the cap of attention logits (Gemma 2)."""

    @property
    def decoders(self) -> tuple[str, ...]:
        """Checked ``model_type`` values of the text decoder."""
        return self.text_types or self.model_types


@dc.dataclass(frozen=True)
class Geometry:
    """Sizes of a text decoder. ``neurons`` is 0 where the MLPs are mixtures of experts, which have no common ones."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    neurons: int


class Handle:
    """A model seen through its family: the parts by name, as the rest of the package uses them.

    Attributes:
        layers, attentions, output_projections, mlps: one module per layer.
        sites: by name of a vector site, the module of every layer that it belongs to; :meth:`site` says where there.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.family = family
        self.backbone: nn.Module = model.get_submodule(family.backbone)
        self.text: nn.Module = model.get_submodule(family.text)
        self.layers: list[nn.Module] = list(self.text.get_submodule(family.layers).children())
        self.norm: nn.Module = self.text.get_submodule(family.norm)
        self.unembed: nn.Module = model.get_submodule(family.unembed)
        self.attentions = self._each(family.attention)
        self.output_projections = self._each(family.output_projection)
        self.mlps = self._each(family.mlp)
        self.sites: dict[str, list[nn.Module]] = {
            "resid_pre": self.layers,
            "resid_post": self.layers,
            "attn_out": self._each(family.attn_out),
            "mlp_out": self._each(family.mlp_out),
        }
        mixed = family.experts is not None and any(has_part(layer, family.experts) for layer in self.layers)
        self._down_projections = None if mixed else self._each(family.down_projection)
        config = self.text_config
        self.geometry = Geometry(
            layers=len(self.layers),
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            d_model=config.hidden_size,
            neurons=0 if self._down_projections is None else _inputs(self._down_projections[0]),
        )

    def site(self, name: str, layer: int) -> tuple[nn.Module, bool]:
        """Where a vector site of one layer is: a module, and whether it is the module's input or its first output."""
        if name == "resid_post" and self.family.between_layers:
            return (self.norm if layer + 1 == len(self.layers) else self.layers[layer + 1]), True
        return self.sites[name][layer], name == "resid_pre"

    def _each(self, path: str) -> list[nn.Module]:
        return [layer.get_submodule(path) for layer in self.layers]

    def parts(self, name: str) -> list[nn.Module] | None:
        """The module of every layer that the family knows as ``name`` ("key", "gate", "gate_up", ...), in order.

        None where the family does not have it.
        """
        path = getattr(self.family, name)
        if path is None or (self._down_projections is None and name in ("gate", "up", "gate_up")):
            return None
        return self._each(path)

    @property
    def down_projections(self) -> list[nn.Module]:
        """The projection of every layer whose input are the neurons.

        Raises:
            NotImplementedError: the MLPs are mixtures of experts.
        """
        if self._down_projections is None:
            raise NotImplementedError(
                f"the MLPs of {type(self.model).__name__} are mixtures of experts, whose neurons cannot be edited or "
                "read; use heads, routes and vectors"
            )
        return self._down_projections

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The text decoder's own config (attention implementation, sizes)."""
        return self.text.config

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Of every layer, how many keys back it sees; None where it sees all of them."""
        config = self.text_config
        size = getattr(config, "sliding_window", None) or None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(self.layers)
        return tuple(size if kind == "sliding_attention" else None for kind in kinds)

    @property
    def softcap(self) -> float | None:
        """The cap of attention logits, or None."""
        return None if self.family.softcap is None else getattr(self.text_config, self.family.softcap, None)

    @property
    def activation(self) -> str:
        """Name of the MLP's activation function, as transformers' ACT2FN knows it."""
        return str(getattr(self.text_config, self.family.activation))

    @staticmethod
    def weight(module: nn.Module) -> Tensor:
        """The weight of a linear layer, ``[out, in]``, or of a norm, in float32, detached."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (weight.T if isinstance(module, Conv1D) else weight).detach().float()

    @torch.no_grad()
    def norm_gain(self, norm: nn.Module | None = None) -> Tensor:
        """What a norm, by default the final one, multiplies its normalised input with, ``[d_model]`` float32.

        Measured on an input that normalising only scales, because families store it as w, as 1 + w, or not at all.
        """
        parameter = next(self.unembed.parameters())
        x = torch.ones(self.geometry.d_model, device=parameter.device, dtype=parameter.dtype)
        x[1::2] = -1
        large = 1024 * x  # against the norm's epsilon
        norm = self.norm if norm is None else norm
        return ((norm(large) - norm(-large)) / 2 * x).float()

    @property
    def sees(self) -> bool:
        """Whether the family has visual tokens at all."""
        return bool(self.family.placeholders)

    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual features in ``input_ids``."""
        ids = (getattr(self.config, name, None) for name in self.family.placeholders)
        return tuple(sorted({int(i) for i in ids if i is not None}))


def has_part(module: nn.Module, path: str) -> bool:
    """Whether ``module`` has a part at ``path``."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _inputs(module: nn.Module) -> int:
    """Width of a projection's input; Conv1D keeps its weight as ``[in, out]``."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    features = getattr(module, "in_features", None)
    return int(features) if isinstance(features, int) else int(getattr(module, "weight").shape[1])  # noqa: B009
