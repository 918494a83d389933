"""Text decoders: one adapter per layout of a decoder layer."""

from __future__ import annotations

import dataclasses as dc

from emocircuits.families.base import Family

LLAMA = Family(
    name="llama",
    model_types=(
        "llama", "qwen2", "qwen3", "mistral", "olmo", "gemma", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text",
    ),
)  # fmt: skip
"""Also Qwen3's q/k norms, OLMo's weightless norms and the positions of the Qwen-VL decoders change no path."""

OLMO2 = Family(
    name="olmo2", model_types=("olmo2",), attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm",
)  # fmt: skip
"""Norms come after attention and MLP: their outputs are what the residual stream gets."""

GEMMA = dc.replace(
    OLMO2, name="gemma", model_types=("gemma2", "gemma3_text"),
    activation="hidden_activation", softcap="attn_logit_softcapping",
)  # fmt: skip
"""Norms before and after attention and MLP; Gemma 2 caps attention logits, Gemma 3 has q/k norms instead."""

PHI3 = Family(
    name="phi3", model_types=("phi3",),
    query=None, key=None, value=None, qkv="self_attn.qkv_proj", gate=None, up=None, gate_up="mlp.gate_up_proj",
)  # fmt: skip

GPT2 = Family(
    name="gpt2", model_types=("gpt2",), backbone="transformer", text="transformer", layers="h", norm="ln_f",
    attention="attn", output_projection="attn.c_proj", attn_out="attn", query=None, key=None, value=None,
    qkv="attn.c_attn", down_projection="mlp.c_proj", gate=None, up=None, activation="activation_function",
)  # fmt: skip
"""Projections are Conv1D, with weights ``[in, out]``."""

GPT_NEOX = Family(
    name="gpt_neox", model_types=("gpt_neox",), backbone="gpt_neox", text="gpt_neox", norm="final_layer_norm",
    attention="attention", output_projection="attention.dense", attn_out="attention", query=None, key=None, value=None,
    qkv="attention.query_key_value", qkv_by_head=True, down_projection="mlp.dense_4h_to_h", gate=None, up=None,
)  # fmt: skip
"""Attention and MLP of a layer usually read the same residual stream (``use_parallel_residual``)."""

MIXTURE = dc.replace(
    LLAMA, name="mixture", model_types=("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text"), experts="mlp.experts"
)  # fmt: skip

TEXT_FAMILIES = (LLAMA, OLMO2, GEMMA, PHI3, GPT2, GPT_NEOX, MIXTURE)
