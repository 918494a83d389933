"""A text decoder of unknown model type, recognised by what it is made of, or refused with everything that is missing.

Only the layout of Llama and its known variants is recognised: separate q, k, v and o projections whose sizes agree with
the config, attention through transformers' AttentionInterface and nothing between it and the output projection, an MLP
that ends in ``down_proj``, and residual additions without a factor.
"""

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from emocircuits.families.base import Family, has_part
from emocircuits.families.refusals import ATTENTION_TYPES

ATTENTION_PARTS = {
    "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm",
    "key_layernorm", "rotary_emb",
}  # fmt: skip
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn", "activation_fn", "act"}
NORMS_BEFORE = {"input_layernorm", "post_attention_layernorm"}
NORMS_AFTER = {"post_attention_layernorm", "post_feedforward_layernorm"}
NORMS_AROUND = NORMS_BEFORE | NORMS_AFTER | {"pre_feedforward_layernorm"}
LAYERS = {
    frozenset(NORMS_BEFORE): ("self_attn", "mlp"),
    frozenset({"input_layernorm"}): ("self_attn", "mlp"),
    frozenset(NORMS_AFTER): ("post_attention_layernorm", "post_feedforward_layernorm"),
    frozenset(NORMS_AROUND): ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""By the norms of a layer: the modules whose outputs are added to the residual stream."""


def recognise(model: nn.Module, config: Any, known: Iterable[str], around: Family | None = None) -> Family:
    """The family of a model by its structure.

    Args:
        model: a causal language model, or with ``around`` a vision-language model.
        config: its config.
        known: model types that need not be recognised, for the message.
        around: the known vision-language family whose text decoder is not known.

    Raises:
        NotImplementedError: with the list of what is missing.
    """
    described = text_type = config.get_text_config(decoder=True).model_type
    if around is not None:
        described = f"{config.model_type} with text model {text_type}"
    base = around or Family(name=config.model_type, model_types=(config.model_type,))
    missing: list[str] = []
    if around is None and any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio")):
        missing.append("a known family: which tokens stand for images or sound is never guessed")
    for path in (base.text, base.unembed):
        if not has_part(model, path):
            missing.append(f"module {path}")
    family = base
    if not missing:
        text = model.get_submodule(base.text)
        missing += _interface(text)
        missing += [f"module {base.text}.{p}" for p in (base.layers, base.norm) if not has_part(text, p)]
        if not missing:
            family, missing = _layers(base, list(text.get_submodule(base.layers).children()), text.config)
    if missing:
        raise NotImplementedError(
            f"model type {described!r} is not known, and its structure is not one that can be edited safely; "
            f"missing: {'; '.join(dict.fromkeys(missing))}. Known types: {', '.join(dict.fromkeys(known))}"
        )
    return dc.replace(family, text_types=(text_type,))


def _interface(text: nn.Module) -> list[str]:
    kind: Any = type(text)
    supports = getattr(kind, "_supports_attention_backend", False) or getattr(kind, "_supports_sdpa", False)
    can_switch = getattr(kind, "_can_set_attn_implementation", None)
    if supports and can_switch is not None and can_switch():
        return []
    return [f"attention of {kind.__name__} through transformers' AttentionInterface"]


def _layers(base: Family, layers: list[nn.Module], config: Any) -> tuple[Family, list[str]]:
    missing: list[str] = []
    if not layers:
        return base, ["decoder layers"]
    sites, experts, gated = set(), False, True
    for layer in layers:
        parts = _parts(layer)
        needed = [p for p in ("self_attn", "mlp") if p not in parts]
        if needed:
            return base, [f"layer part {p}" for p in needed]
        norms = frozenset(name for name in parts if name not in ("self_attn", "mlp"))
        sites.add(LAYERS.get(norms))
        if LAYERS.get(norms) is None:
            missing.append(f"a known use of the layer parts {', '.join(sorted(norms))}")
        factors = sorted(name for name, value in vars(layer).items() if isinstance(value, float))
        if factors:
            missing.append(f"residual additions without a factor (the layer has {', '.join(factors)})")
        missing += _attention(parts["self_attn"], config)
        if has_part(layer, "mlp.experts"):
            experts = True
            continue
        missing += _mlp(parts["mlp"], config)
        gated = gated and has_part(layer, "mlp.gate_proj")
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_TYPES
    missing += [f"attention instead of layers of type {kind}" for kind in sorted(kinds)]
    if len(sites) > 1:
        missing.append("layers that are all alike")
    activation = next((a for a in ("hidden_act", "hidden_activation") if hasattr(config, a)), None)
    if activation is None:
        missing.append("config.hidden_act")
    if missing:
        return base, missing
    attn_out, mlp_out = sites.pop() or ("self_attn", "mlp")
    family = dc.replace(
        base, attn_out=attn_out, mlp_out=mlp_out, activation=activation or "hidden_act",
        experts="mlp.experts" if experts else None,
        softcap="attn_logit_softcapping" if hasattr(config, "attn_logit_softcapping") else None,
        gate="mlp.gate_proj" if gated else None, up="mlp.up_proj" if gated else None,
    )  # fmt: skip
    return family, []


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_children() if not isinstance(part, nn.Dropout)}


def _attention(attention: nn.Module, config: Any) -> list[str]:
    missing = []
    parts = _parts(attention)
    sizes = {name: getattr(config, name, None) for name in ("hidden_size", "num_attention_heads")}
    absent = [f"config.{name}" for name, value in sizes.items() if not isinstance(value, int)]
    absent += [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj") if p not in parts]
    if absent:
        return absent
    unknown = sorted(parts.keys() - ATTENTION_PARTS)
    unknown += [name for name, _ in attention.named_parameters(recurse=False)]
    if unknown:
        missing.append(f"a known use of self_attn.{', self_attn.'.join(unknown)}")
    width, heads = config.hidden_size, config.num_attention_heads
    try:
        dim = getattr(config, "head_dim", None) or width // heads
        shared = (getattr(config, "num_key_value_heads", None) or heads) * dim
    except Exception:  # transformers raises errors of its own for what differs by layer
        return [*missing, "heads of one size and number in all layers"]
    expected = {
        "q_proj": (width, heads * dim), "k_proj": (width, shared), "v_proj": (width, shared),
        "o_proj": (heads * dim, width),
    }  # fmt: skip
    missing += _shapes("self_attn", parts, expected)
    try:
        source = inspect.getsource(type(attention).forward)
    except (OSError, TypeError):
        return [*missing, f"the source of {type(attention).__name__}.forward"]
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        missing.append(f"{type(attention).__name__} calling transformers' AttentionInterface")
    missing += [
        f"attention without {special}" for special in ("s_aux", "position_bias", "sinks") if special in source
    ]  # fmt: skip
    return missing


def _mlp(mlp: nn.Module, config: Any) -> list[str]:
    parts = _parts(mlp)
    if "down_proj" not in parts:
        return ["mlp.down_proj"]
    if not isinstance(getattr(config, "intermediate_size", None), int):
        return ["config.intermediate_size"]
    unknown = sorted(parts.keys() - MLP_PARTS)
    missing = [f"a known use of mlp.{', mlp.'.join(unknown)}"] if unknown else []
    return missing + _shapes("mlp", parts, {"down_proj": (config.intermediate_size, config.hidden_size)})


def _shapes(where: str, parts: dict[str, nn.Module], expected: dict[str, tuple[int, int]]) -> list[str]:
    found = {p: (getattr(parts[p], "in_features", None), getattr(parts[p], "out_features", None)) for p in expected}
    return [
        f"{where}.{p} from {expected[p][0]} to {expected[p][1]}, as the config says (it is from {i} to {o})"
        for p, (i, o) in found.items()
        if (i, o) != expected[p]
    ]
