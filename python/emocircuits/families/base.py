"""What the engine must know about a model family, and nothing else: where its parts are and what its numbers mean."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

from torch import Tensor, nn


@dc.dataclass(frozen=True)
class Family:
    """Paths of one model family, relative to the model or to one of its layers.

    A new family is one instance of this class (CONTRIBUTING.md shows how); every path is checked by a test against a
    tiny random model.
    """

    name: str
    model_types: tuple[str, ...]
    """``config.model_type`` values this adapter serves."""
    backbone: str
    """Module whose forward receives ``input_ids`` and the cache, whoever calls it."""
    text: str
    """The text decoder: owns ``layers`` and the config whose attention implementation is switched."""
    text_types: tuple[str, ...]
    """``model_type`` values of the text decoder that have been checked."""
    placeholders: tuple[str, ...] = ()
    """Config fields that hold the ids of visual placeholder tokens; empty for a text-only family."""
    layers: str = "layers"
    norm: str = "norm"
    unembed: str = "lm_head"
    attention: str = "self_attn"
    output_projection: str = "self_attn.o_proj"
    mlp: str = "mlp"
    down_projection: str = "mlp.down_proj"


@dc.dataclass(frozen=True)
class Geometry:
    """Sizes of a text decoder."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    neurons: int


class Handle:
    """A model seen through its family: the parts by name, as the rest of the package uses them."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.family = family
        self.backbone: nn.Module = model.get_submodule(family.backbone)
        self.text: nn.Module = model.get_submodule(family.text)
        self.layers: list[nn.Module] = list(self.text.get_submodule(family.layers).children())
        self.norm: nn.Module = self.text.get_submodule(family.norm)
        self.unembed: nn.Module = model.get_submodule(family.unembed)
        self.attentions = [layer.get_submodule(family.attention) for layer in self.layers]
        self.output_projections = [layer.get_submodule(family.output_projection) for layer in self.layers]
        self.mlps = [layer.get_submodule(family.mlp) for layer in self.layers]
        self.down_projections = [layer.get_submodule(family.down_projection) for layer in self.layers]
        config = self.text_config
        self.geometry = Geometry(
            layers=len(self.layers),
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            d_model=config.hidden_size,
            neurons=config.intermediate_size,
        )

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The text decoder's own config (attention implementation, sizes)."""
        return self.text.config

    @staticmethod
    def weight(module: nn.Module) -> Tensor:
        """The weight of a linear layer or a norm in float32, detached."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()

    @property
    def sees(self) -> bool:
        """Whether the family has visual tokens at all."""
        return bool(self.family.placeholders)

    def placeholder_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual features in ``input_ids``."""
        ids = (getattr(self.config, name, None) for name in self.family.placeholders)
        return tuple(sorted({int(i) for i in ids if i is not None}))
