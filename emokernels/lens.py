"""Logit lens: what a hidden state would say, read through the unembedding, without the [N, vocabulary] matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composed, reference
from .backends import resolve
from .checks import FLOATS, _check_number
from .errors import message, require_tensor
from .forward_only import make_forward_only, refuse_gradients

MAX_FUSED_TOP_K = 32
"""The fused kernel keeps its candidates in registers."""

TokenSets = Mapping[str, Any] | Sequence[Any] | Tensor
Measured = tuple[Tensor, Tensor, Tensor, Tensor]
Lens = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int, float], Measured]


class TopTokens(NamedTuple):
    """The likeliest tokens, likeliest first: ids ``[..., k]`` int64, log_prob ``[..., k]`` (nats)."""

    ids: Tensor
    log_prob: Tensor


class LensOutput(NamedTuple):
    """entropy ``[...]`` in nats; set_prob ``[..., S]``, None without token sets; top, None with ``top_k=0``.

    float32, or float64 for float64 inputs. Sets are in the order in which they were given.
    """

    entropy: Tensor
    set_prob: Tensor | None
    top: TopTokens | None


def logit_lens(
    hidden: Tensor,
    unembed: Tensor,
    *,
    token_sets: TokenSets | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    top_k: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> LensOutput:
    """Entropy, probability of token sets and likeliest tokens of ``softmax(unembed @ norm(hidden) + bias)``.

    One pass over the vocabulary in blocks, as attention is one pass over the keys; the logits of a block live only
    while it is read. The entropy is a sum of terms that are not negative, ``log l + sum_v exp(x_v - m) (m - x_v) / l``
    with ``m = max x`` and ``l = sum_v exp(x_v - m)``, so it is never negative and does not cancel when one token holds
    nearly all the probability, as ``lse - E[x]`` would.

    Args:
        hidden: ``[..., d]`` float32, float64, bfloat16 or float16: residual states, any strides.
        unembed: ``[V, d]`` in the dtype of ``norm(hidden)``: the weight of the model's lm_head, any strides.
        token_sets: sets of token ids: a dict from name to ids, a sequence of ids (each a sequence of ints or an
            integer tensor), or a matrix ``[S, L]`` int64 in which -1 is no token, which costs no copy to a GPU. An id
            that occurs twice in a set counts once. Sets may overlap.
        norm: applied to hidden first, such as the model's final norm. Scales of logits (``logit_scale``) belong here.
        top_k: number of likeliest tokens to return, at most V; at most 32 on the fused backend. Tokens of exactly
            equal logits come in no particular order.
        bias: ``[V]``, added to the logits; -inf excludes a token.
        softcap: ``softcap * tanh(x / softcap)`` on the logits, as Gemma 2 does at the end.
        backend: "auto", "reference", "composed" or "fused" (see `backends()`). "auto" takes composed for more than 32
            tokens.

    Returns:
        LensOutput(entropy, set_prob, top). Logits are accumulated and kept in float32 (float64), also for half
        precision. On a GPU, where ids are not read back, a set with an id outside the vocabulary has probability NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and the way out.
        NotImplementedError: the backend is not available here, or an input wants a gradient (forward only).
    """
    _check_weights(unembed, bias, softcap, top_k)
    rows = _normed(hidden, unembed, norm)
    refuse_gradients("logit_lens", **{"norm(hidden)" if norm else "hidden": rows, "unembed": unembed, "bias": bias})
    chosen = resolve(backend, rows, "logit_lens")
    if chosen == "fused" and top_k > MAX_FUSED_TOP_K:
        if backend == "fused":
            raise NotImplementedError(
                message("top_k", f"at most {MAX_FUSED_TOP_K} for 'fused'", top_k, "Use backend='composed'.")
            )
        chosen = "composed"
    sets, broken = None, None
    if token_sets is not None:
        sets = token_matrix(token_sets, unembed.shape[0], rows.device)
        broken = (sets >= unembed.shape[0]).any(1)
        sets = _without_repeats(sets, unembed.shape[0])
    entropy, set_prob, ids, log_prob = _OPS[chosen](
        rows.reshape(-1, rows.shape[-1]), unembed, bias, sets, top_k, softcap or 0.0
    )
    shape = rows.shape[:-1]
    if broken is not None:
        set_prob = set_prob.masked_fill(broken, torch.nan)
    return LensOutput(
        entropy.view(shape),
        None if sets is None else set_prob.view(*shape, sets.shape[0]),
        TopTokens(ids.view(*shape, top_k), log_prob.view(*shape, top_k)) if top_k else None,
    )


def token_matrix(token_sets: TokenSets, vocabulary: int, device: torch.device | str) -> Tensor:
    """Token sets as ``[S, L]`` int64 on `device`, -1 where a set has fewer than L tokens.

    Make it once for calls in a loop: `logit_lens` takes it as `token_sets`.

    Raises:
        TypeError, ValueError: there is no set, a set is empty, or ids on the CPU are not inside the vocabulary.
    """
    if isinstance(token_sets, Tensor):
        if token_sets.dtype != torch.int64 or token_sets.dim() != 2 or 0 in token_sets.shape:
            kind = TypeError if token_sets.dtype != torch.int64 else ValueError
            raise kind(
                message("token_sets", "a matrix [S, L] int64", token_sets, "Pass a list of tensors for ragged sets.")
            )
        _check_range("token_sets", token_sets, -1, vocabulary)
        return token_sets.to(device)
    if isinstance(token_sets, Mapping):
        named = [(f"token_sets[{name!r}]", ids) for name, ids in token_sets.items()]
    elif isinstance(token_sets, Sequence) and not isinstance(token_sets, str):
        named = [(f"token_sets[{position}]", ids) for position, ids in enumerate(token_sets)]
    else:
        raise TypeError(
            message("token_sets", "a dict, a sequence of ids, or a matrix", token_sets, "Map names to token ids.")
        )
    if not named:
        raise ValueError(message("token_sets", "at least one set", "none", "Pass None for no sets."))
    sets = [_ids(name, ids, vocabulary) for name, ids in named]
    longest = max(ids.shape[0] for ids in sets)
    padded = [torch.nn.functional.pad(ids.to(device), (0, longest - ids.shape[0]), value=-1) for ids in sets]
    return torch.stack(padded)


def _ids(name: str, ids: Any, vocabulary: int) -> Tensor:
    if isinstance(ids, Tensor):
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1:
            raise TypeError(message(name, "a 1-dimensional int64 tensor of token ids", ids, "Flatten it, .long()."))
        tensor = ids.long()
    else:
        if not isinstance(ids, Iterable) or isinstance(ids, str):
            raise TypeError(message(name, "a list or tensor of token ids", ids, "Encode words with the tokenizer."))
        numbers = list(ids)
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
            raise TypeError(message(name, "token ids (ints)", f"{numbers!r}", "Encode words with the tokenizer."))
        tensor = torch.tensor(numbers, dtype=torch.int64)
    if tensor.shape[0] == 0:
        raise ValueError(message(name, "at least one token id", "none", "Leave empty sets out."))
    _check_range(name, tensor, 0, vocabulary)
    return tensor


def _check_range(name: str, ids: Tensor, lowest: int, vocabulary: int) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < lowest or high >= vocabulary:
        raise ValueError(
            message(
                name,
                f"token ids below V={vocabulary} and not negative",
                f"{high if high >= vocabulary else low}",
                "Use the tokenizer of this model.",
            )
        )


def _without_repeats(sets: Tensor, vocabulary: int) -> Tensor:
    """Each set sorted, with repeated and invalid ids replaced by -1, without waiting for the device."""
    ordered = sets.sort(1).values
    again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0), value=False)
    return ordered.masked_fill(again | (ordered >= vocabulary), -1)


def _check_weights(unembed: Tensor, bias: Tensor | None, softcap: float | None, top_k: int) -> None:
    require_tensor("unembed", unembed, "Pass the weight of the lm_head, [V, d].")
    if unembed.dtype not in FLOATS:
        raise TypeError(message("unembed", "float32, bfloat16, float16 or float64", unembed, "Dequantise it first."))
    if unembed.dim() != 2 or 0 in unembed.shape:
        raise ValueError(message("unembed", "a matrix [V, d]", unembed, "Pass lm_head.weight."))
    if bias is not None:
        require_tensor("bias", bias, "Pass the bias of the lm_head, [V], or None.")
        if bias.dtype not in FLOATS:
            raise TypeError(message("bias", "float32, bfloat16, float16 or float64", bias, "Convert with .float()."))
        if tuple(bias.shape) != (unembed.shape[0],) or bias.device != unembed.device:
            raise ValueError(
                message("bias", f"shape [V={unembed.shape[0]}] on {unembed.device}", bias, "Pass lm_head.bias.")
            )
    _check_number("softcap", softcap, positive=True)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(message("top_k", "an int", top_k, "Use 0 for no tokens."))
    if not 0 <= top_k <= unembed.shape[0]:
        raise ValueError(message("top_k", f"0 to V={unembed.shape[0]}", top_k, "Use 0 for no tokens."))


def _normed(hidden: Tensor, unembed: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
    require_tensor("hidden", hidden, "Pass residual states [..., d].")
    if not hidden.is_floating_point():
        raise TypeError(message("hidden", "a floating point tensor", hidden, "Pass residual states, not token ids."))
    if hidden.dim() < 1 or 0 in hidden.shape:
        raise ValueError(message("hidden", "a non-empty tensor [..., d]", hidden, "Skip the call for empty input."))
    if norm is not None and not callable(norm):
        raise TypeError(message("norm", "a callable or None", norm, "Pass the model's final norm module."))
    rows, name = hidden, "hidden"
    if norm is not None:
        rows, name = norm(hidden), "norm(hidden)"
        require_tensor("norm", rows, "norm must map a tensor [..., d] to a tensor [..., d].")
        if rows.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(message("norm", f"to keep the shape {tuple(hidden.shape)}", rows, "Norm the last dim."))
    if rows.dtype != unembed.dtype:
        raise TypeError(
            message(name, f"the dtype of unembed ({unembed.dtype})", rows, "Convert with hidden.to(unembed.dtype).")
        )
    if rows.shape[-1] != unembed.shape[1]:
        raise ValueError(
            message(name, f"last dimension d={unembed.shape[1]} as in unembed", rows, "unembed is [V, d], not [d, V].")
        )
    if rows.device != unembed.device:
        raise ValueError(message(name, f"the device of unembed ({unembed.device})", rows, "Move it with .to()."))
    return rows


def _fused(*args: Any) -> Measured:
    from .fused.lens import measure_lens

    return measure_lens(*args)


def _register(name: str, forward: Lens) -> Any:
    def fake(
        hidden: Tensor, unembed: Tensor, bias: Tensor | None, sets: Tensor | None, top_k: int, softcap: float
    ) -> Measured:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        n = hidden.shape[0]
        return (
            hidden.new_empty(n, dtype=wide),
            hidden.new_empty(n, 0 if sets is None else sets.shape[0], dtype=wide),
            hidden.new_empty(n, top_k, dtype=torch.int64),
            hidden.new_empty(n, top_k, dtype=wide),
        )

    op = torch.library.custom_op(
        f"emokernels::logit_lens_{name}",
        forward,
        mutates_args=(),
        schema="(Tensor hidden, Tensor unembed, Tensor? bias, Tensor? sets, int top_k, float softcap)"
        " -> (Tensor entropy, Tensor set_prob, Tensor ids, Tensor log_prob)",
    )
    op.register_fake(fake)
    make_forward_only(op)
    return op


_OPS: dict[str, Any] = {
    "reference": _register("reference", reference.measure_lens),
    "composed": _register("composed", composed.measure_lens),
    "fused": _register("fused", _fused),
}
