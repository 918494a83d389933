"""Greedy decoding of many continuations of one prompt, from caches that somebody else has filled.

``model.generate`` decodes until its last row is done, and makes its caches itself. Here rows leave the batch when they
are finished, and what was read of the prompt is given. All else is the model's own: positions, masks, stopping and
processors are what ``generate`` prepares for this prompt, and every step is its forward pass.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

Stop = int | str | Sequence[int] | Sequence[str]

ROWS = {"attention_mask": 0, "position_ids": -2, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs of a decoding step with an entry for each row, and in which dimension."""
PROCESSORS = (
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor", "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty", "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)  # fmt: skip
"""Those that look at the tokens of a row and remember nothing."""
CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria")


@dc.dataclass(frozen=True)
class Prompt:
    """A prompt as ``model.generate`` prepares it, from :func:`prepare`.

    Attributes:
        model: what decodes.
        ids: tokens ``[R, T]``; R is 1, or one row for each that is decoded.
        arguments: of the forward pass, ``past_key_values`` an empty cache of the kind the model decodes with.
        processors: from tokens ``[B, n]`` and float32 logits ``[B, V]`` to scores.
        criteria: from tokens ``[B, n]`` and None to the rows that are finished, ``[B]`` bool.
    """

    model: Any
    ids: Tensor
    arguments: Mapping[str, Any]
    processors: Callable[[Tensor, Tensor], Tensor]
    criteria: Callable[[Tensor, Any], Tensor]

    def cache(self, keys: Sequence[Tensor] = (), values: Sequence[Tensor] = ()) -> DynamicCache:
        """A cache of the model's own kind, holding what each layer's attention saw of the prompt.

        Args:
            keys, values: of every layer ``[B, H_kv, T, D]``, after rotary embedding; layers with a sliding window keep
                its columns only.
        """
        found: DynamicCache = copy.deepcopy(self.arguments["past_key_values"])
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            found.update(key, value, layer)
        return found

    def rows(self, index: Tensor) -> Prompt:
        """The prompt of other rows: of each its number here, ``[B]``."""
        own = torch.zeros_like(index)  # of what all rows share
        arguments = _by_row(
            self.arguments, lambda x, dim: x.index_select(dim, own if x.shape[dim] == 1 else index)
        )  # fmt: skip
        return dc.replace(self, ids=self.ids[index], arguments=arguments)

    def prefill(self) -> tuple[DynamicCache, Tensor]:
        """The model's own pass over the prompt: the filled cache, and logits ``[R, V]`` of the last column."""
        arguments = {**self.arguments, "past_key_values": self.cache()}
        step = self.model.prepare_inputs_for_generation(self.ids, is_first_iteration=True, **arguments)
        with torch.no_grad():
            output = self.model(**step, return_dict=True)
        return output.past_key_values, output.logits[:, -1]


def prepare(
    model: nn.Module, inputs: Mapping[str, Any], *, limit: int, stop: Stop | None = None, tokenizer: Any = None
) -> Prompt:
    """Have ``model.generate`` prepare greedy decoding of a prompt, and run nothing.

    Args:
        model: a causal language model or vision-language model.
        inputs: model inputs; several rows are padded on the left.
        limit: new tokens at most.
        stop: token ids at which a row ends, in place of the model's own end of sequence, or strings (these need the
            tokenizer), besides it; the token that ends a row is part of it.
        tokenizer: for stop strings.

    Raises:
        ValueError: a limit below 1, or beyond the positions that the model has.
        NotImplementedError: what is not greedy decoding of rows that know nothing of each other; the message names it.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1 token")
    if not hasattr(model, "generate"):
        raise NotImplementedError(f"{type(model).__name__} has no generate(): load it as a model for generation")
    generator: Any = model
    config = generator.config.get_text_config(decoder=True)
    columns, room = int(inputs["input_ids"].shape[1]), getattr(config, "max_position_embeddings", None)
    if room is not None and columns + limit - 1 > room:
        raise ValueError(f"a prompt of {columns} tokens and limit={limit} more go beyond the model's {room} positions")
    options: dict[str, Any] = {}
    if stop is not None:
        words = [stop] if isinstance(stop, int | str) else list(stop)
        strings = [w for w in words if isinstance(w, str)]
        if not words or (strings and len(strings) != len(words)):
            raise ValueError(f"stop is {stop!r}: expected token ids, or strings")
        if strings and tokenizer is None:
            raise ValueError("stop strings need tokenizer=, or give token ids")
        if strings:
            ends = StopStringCriteria(tokenizer, strings)
            options = {"stopping_criteria": StoppingCriteriaList([ends])}
        else:
            options = {"eos_token_id": words}
    kept: list[Prompt] = []

    def take(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **more: Any,
    ) -> Tensor:
        mode = generation_config.get_generation_mode()
        if mode != GenerationMode.GREEDY_SEARCH or generation_config.prefill_chunk_size:
            raise NotImplementedError(f"the model's generation config asks for {mode.value}: only greedy decoding")
        _known(logits_processor, PROCESSORS)
        _known(stopping_criteria, CRITERIA)
        _dynamic(model, more.get("past_key_values"))
        kept.append(Prompt(model, input_ids, more, logits_processor, stopping_criteria))
        return input_ids

    generator.generate(
        **inputs, custom_generate=take, max_new_tokens=limit, do_sample=False, num_beams=1, num_return_sequences=1,
        use_cache=True, cache_implementation="dynamic", return_dict_in_generate=False, **options,
    )  # fmt: skip
    return kept[0]


@torch.no_grad()
def decode(
    prompt: Prompt, cache: DynamicCache, logits: Tensor, keep: Callable[[Tensor], None] | None = None
) -> list[Tensor]:
    """The tokens that follow in every row, as ``model.generate(do_sample=False)`` has them for that row alone.

    Args:
        prompt: from :func:`prepare`, of one row (all rows continue it) or of as many as are decoded.
        cache: filled with the prompt, B rows; it is used up.
        logits: ``[B, V]`` of the prompt's last column.
        keep: told the rows ``[n]`` (numbers in the first batch) that go on, whenever some have left: what the caller
            has for each row must be cut to them.

    Returns:
        For each row its new tokens ``[n]``.
    """
    model, rows, columns = prompt.model, logits.shape[0], prompt.ids.shape[1]
    ids, arguments = prompt.ids, dict(prompt.arguments)
    if ids.shape[0] != rows:
        ids = ids.expand(rows, -1)
        arguments = _by_row(arguments, lambda x, dim: x.expand(*_resized(x.shape, dim, rows)))
    found: list[Tensor] = [ids[0, :0]] * rows
    alive = torch.arange(rows, device=ids.device)
    with getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)():
        while True:
            arguments = model._update_model_kwargs_for_generation(ModelOutput(past_key_values=cache), arguments)
            scores = prompt.processors(ids, logits.to(ids.device, torch.float32, copy=True))
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
            done = prompt.criteria(ids, None)
            if bool(done.any()):
                for row, tokens in zip(alive[done].tolist(), ids[done], strict=True):
                    found[row] = tokens[columns:]
                left = (~done).nonzero().flatten()
                if not len(left):
                    return found
                ids, alive = ids[left], alive[left]
                arguments = _by_row(arguments, lambda x, dim, left=left: x.index_select(dim, left))
                cache.batch_select_indices(left)
                if keep is not None:
                    keep(alive)
            step = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **arguments)
            output = model(**step, return_dict=True)
            cache, logits = output.past_key_values, output.logits[:, -1]


def _by_row(arguments: Mapping[str, Any], change: Callable[..., Tensor]) -> dict[str, Any]:
    return {k: change(v, ROWS[k]) if k in ROWS and isinstance(v, Tensor) else v for k, v in arguments.items()}


def _resized(shape: Sequence[int], dim: int, rows: int) -> list[int]:
    sizes = list(shape)
    sizes[dim] = rows
    return sizes


def _known(parts: Sequence[Any], names: Sequence[str]) -> None:
    for part in parts:
        if type(part).__name__ not in names:
            raise NotImplementedError(
                f"the model's generation config asks for {type(part).__name__}, which is not known to treat each row "
                "by itself; take it out of model.generation_config"
            )


def _dynamic(model: Any, cache: Any) -> None:
    kinds = [type(layer) for layer in getattr(cache, "layers", [])]
    other = [kind.__name__ for kind in kinds if kind not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if type(cache) is not DynamicCache or other or not kinds:
        raise NotImplementedError(
            f"{type(model).__name__} decodes with {other[0] if other else type(cache).__name__}; only caches of keys "
            "and values, whole or of a sliding window, can be filled and cut to rows"
        )
