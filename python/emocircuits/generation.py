"""``model.generate`` of a patched model: what a plan cannot follow is refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode

from emocircuits.context import Context

FOLLOWED = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
"""Modes whose steps are a prompt and then one token a row, with rows that stay with their prompt."""

_ASSISTED = "drafted tokens come several in a step and are taken back"
_REFUSED = {
    "custom_generate": "its decoding loop is not known",
    "assistant_model": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "use_mtp": _ASSISTED,
    "prefill_chunk_size": "the roles of a prompt are found from the whole of it",
    "dola_layers": "it contrasts layers by a decoding loop that is not known",
    "penalty_alpha": "contrastive search runs candidates as steps of their own",
    "constraints": "constrained beams are decoded by code that is not known",
    "force_words_ids": "constrained beams are decoded by code that is not known",
}
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def refuse_attentions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse a forward pass that is asked for its attention weights."""
    wanted = kwargs.get("output_attentions")
    if wanted or (wanted is None and getattr(module.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True is not possible on a patched model: its attention weights are never formed; "
            "use emocircuits.measure.attention_weights, or ask for them outside patch()"
        )


def refused_methods(model: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Methods of continuous batching, and what stands in their place: it packs many prompts into one row."""
    for name in _CONTINUOUS:
        if hasattr(model, name):

            def refuse(*args: Any, name: str = name, **kwargs: Any) -> Any:
                raise NotImplementedError(
                    f"{name}() is not supported on a patched model: continuous batching packs many prompts into one "
                    "row with a paged cache; use generate() on a left-padded batch"
                )

            yield name, refuse


def refuse_paged(implementation: str | None) -> None:
    """Refuse a model that was set up for continuous batching."""
    if implementation is not None and implementation.startswith("paged"):
        raise NotImplementedError(
            f"the model's attention is {implementation!r}: a paged cache packs many prompts into one row, which no "
            "plan can follow; call model.set_attn_implementation('sdpa') first"
        )


def generate(
    model: Any,
    context: Context,
    fits: Callable[[int], None],
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``original(*args, **kwargs)``, a model's own generate, with its steps marked as generation in ``context``.

    ``fits`` refuses a number of prompts.

    Raises:
        NotImplementedError: a way of generating that a plan cannot follow; the message names the argument.
        ValueError: attention weights are asked for.
    """
    # Of the class: what stands on the model object may take anything.
    bound = dict(inspect.signature(type(model).generate).bind(model, *args, **kwargs).arguments)
    more = bound.pop("kwargs", {})
    given = {**bound, **more}
    # As generate() itself does it: arguments over the given config over the model's own.
    config, _ = model._prepare_generation_config(given.get("generation_config"), **more)
    expand = _check(model, config, given)
    prompt = given.get("input_ids")
    if prompt is None:
        prompt = given.get("inputs")
    first = prompt if prompt is not None else given.get("inputs_embeds")
    if first is not None and given.get("past_key_values") is None:
        fits(first.shape[0])
    context.announce(expand)
    output: Any = None
    try:
        output = original(*args, **kwargs)
    finally:
        sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        # Beams come out sorted by score, not in the order of their rows in the cache.
        known = config.num_beams == 1 and (prompt is None or prompt.ndim == 2)
        context.finish(sequences if known else None, 0 if prompt is None else prompt.shape[1])
    return output


def _check(model: Any, config: Any, given: dict[str, Any]) -> int:
    """Refuse what a plan cannot follow; returns the rows that generate() makes of each row."""
    for name, reason in _REFUSED.items():
        value = given.get(name) if name in given else getattr(config, name, None)
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{name}={_short(value)} is not supported on a patched model: {reason}; leave it out"
            )
    groups = getattr(config, "num_beam_groups", None) or 1
    if groups > 1:
        raise NotImplementedError(
            f"num_beam_groups={groups} is not supported on a patched model: diverse beams are decoded by code that is "
            "not known; use num_beams alone"
        )
    if (getattr(config, "guidance_scale", None) or 1) != 1:
        raise NotImplementedError(
            f"guidance_scale={config.guidance_scale} is not supported on a patched model: it runs a second prompt "
            "inside every step; run that prompt as extra rows of the batch (emocircuits.presets) or leave it out"
        )
    if config.cache_implementation == "paged":
        raise NotImplementedError(
            "cache_implementation='paged' is not supported on a patched model: continuous batching packs many prompts "
            "into one row; use generate() on a left-padded batch with another cache"
        )
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode not in FOLLOWED:
        raise NotImplementedError(
            f"{mode.value.replace('_', ' ')} is not supported on a patched model; use greedy search, sampling or beams"
        )
    if config.output_attentions:
        refuse_attentions(model, {"output_attentions": True})
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else f"<{type(value).__name__}>"
