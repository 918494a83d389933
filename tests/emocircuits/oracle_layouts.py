"""Where the oracle finds the parts of each family: names read off the modeling files, not taken from the package."""

from __future__ import annotations

import dataclasses as dc


@dc.dataclass(frozen=True)
class Layout:
    """Attribute paths of one decoder layer, and of its layers in the text decoder."""

    layers: str = "layers"
    attention: str = "self_attn"
    out: str = "self_attn.o_proj"
    down: str | None = "mlp.down_proj"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    # The decoder adds features to the residual stream between layers: what leaves a layer is what the next one gets.
    between: bool = False


NORMS_BEFORE_ADDING = Layout(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
EXPERTS = Layout(down=None)
# By the model type of the text decoder; every other one is laid out like Llama.
LAYOUTS = {
    "gemma2": NORMS_BEFORE_ADDING,
    "gemma3_text": NORMS_BEFORE_ADDING,
    "olmo2": NORMS_BEFORE_ADDING,
    "gpt2": Layout("h", "attn", "attn.c_proj", "mlp.c_proj", "attn", "mlp"),
    "gpt_neox": Layout("layers", "attention", "attention.dense", "mlp.dense_4h_to_h", "attention", "mlp"),
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_vl_text": Layout(between=True),
    "qwen3_vl_moe_text": dc.replace(EXPERTS, between=True),
}
# Where the text decoder is, the first that exists.
DECODERS = ("model.language_model", "model.text_model", "transformer", "gpt_neox", "model")


def at(module, path):
    """The module at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def decoder(model):
    """The text decoder of a model."""
    return next(found for path in DECODERS if (found := at(model, path)) is not None)


def layout(text) -> Layout:
    """The layout of a text decoder's layers."""
    return LAYOUTS.get(text.config.model_type, Layout())
