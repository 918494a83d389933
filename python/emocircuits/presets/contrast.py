"""Contrastive decoding: prompts that belong together run as rows of one batch and are combined at the logits.

A sample has several branches, say the same question with the image and with a noised one. All branches of all samples
run in one batch, so nothing runs twice per step; at every step ``sum_b w_b * log p_b`` replaces the scores of the rows
of a sample, and all its rows get the same next token.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LogitsProcessor, LogitsProcessorList

from emocircuits.plan import Plan

Inputs = Mapping[str, Any]
BY_ROW = ("sequences", "sequences_scores", "beam_indices")
BY_STEP = ("scores", "logits")


class Contrast:
    """Branches of a batch of prompts, and how their next-token distributions are combined.

    ``log p = sum_b w_b * log p_b``, restricted to tokens that the first branch gives at least ``plausibility`` times
    the probability of its likeliest one (the adaptive plausibility constraint of Li et al. 2023, arXiv 2210.15097).

    >>> tokens = Contrast(model, [inputs, noised], weights=[2.0, -1.0]).generate(max_new_tokens=32)

    Args:
        model: a Hugging Face model with ``generate``; it may be patched.
        branches: model inputs of every branch, as a processor returns them, each with the same B prompts, left-padded.
            The first branch is the one whose text is returned.
        weights: one number a branch.
        plausibility: beta in [0, 1]; 0 restricts nothing.

    Raises:
        TypeError, ValueError: branches that do not fit together, or a number out of range.
        NotImplementedError: a branch without images, next to one whose processor stores images by batch row.
    """

    def __init__(
        self, model: nn.Module, branches: Sequence[Inputs], weights: Sequence[float], plausibility: float = 0.1
    ) -> None:
        if len(branches) < 2 or len(branches) != len(weights):
            raise ValueError(
                f"{len(branches)} branches and {len(weights)} weights: expected at least two branches and a weight each"
            )
        if not 0.0 <= plausibility <= 1.0:
            raise ValueError(f"plausibility={plausibility!r}: expected a number from 0 (no restriction) to 1")
        self.model: Any = model
        self.branches = len(branches)
        self.weights = tuple(float(w) for w in weights)
        self.plausibility = float(plausibility)
        config: Any = model.generation_config
        self.inputs = stack(branches, config.pad_token_id or 0)
        self.batch = int(branches[0]["input_ids"].shape[0])
        self.prompt = int(branches[0]["input_ids"].shape[1])

    def plan(self, *plans: Plan) -> Plan:
        """One plan for the whole batch: ``plans[b]`` changes branch b, and branches without a plan stay as they are.

        >>> with patch(model, contrast.plan(pai(model))):
        ...     contrast.generate(max_new_tokens=32)
        """
        if len(plans) > self.branches:
            raise ValueError(f"{len(plans)} plans for {self.branches} branches")
        edits = []
        for branch, plan in enumerate(plans):
            for edit in plan:
                rows = range(self.batch) if edit.rows is None else edit.rows
                if max(rows) >= self.batch:
                    raise ValueError(f"plan {branch} names batch row {max(rows)}; there are {self.batch} prompts")
                edits.append(dc.replace(edit, rows=tuple(branch * self.batch + row for row in rows)))
        return Plan(edits)

    def generate(self, generator: torch.Generator | None = None, **options: Any) -> Any:
        """What ``model.generate`` returns for the first branch, decoded from the combined distribution.

        The combination comes before the model's own logits processors and warpers (repetition penalty, temperature,
        top-k, top-p), which see the first branch.

        Args:
            generator: for sampling, on the device of the logits; None is torch's default generator.
            options: of ``generate``, without the inputs. ``max_new_tokens`` instead of ``max_length``.

        Returns:
            ``[B, prompt + new]`` token ids, the prompts as they were given. With ``return_dict_in_generate`` the output
            object of the model: its sequences, scores and logits have the rows of the first branch, other fields
            (caches, hidden states) those of all branches.
        """
        given = sorted(set(options) & (set(self.inputs) | {"inputs", "inputs_embeds"}))
        if given:
            raise ValueError(f"{', '.join(given)}: the branches already hold the inputs; pass options only")
        config = options.get("generation_config") or self.model.generation_config
        for name in ("max_length", "min_length"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} counts padding of the longest branch; use {name.replace('length', 'new_tokens')}"
                )
        sample = bool(options.get("do_sample", config.do_sample))
        if sample and (options.get("num_beams", config.num_beams) or 1) > 1:
            raise NotImplementedError("beams that are sampled differ between branches; use beams or sampling, not both")
        first = _Combine(self.branches, self.weights, self.plausibility)
        last = _Share(self.branches, sample, generator)
        own = self.model.__dict__
        before = own.get("_get_logits_processor")
        own["_get_logits_processor"] = functools.partial(
            _framed, before or type(self.model)._get_logits_processor.__get__(self.model), first, last
        )
        try:
            out = self.model.generate(**self.inputs, **options)
        finally:
            if before is None:
                del own["_get_logits_processor"]
            else:
                own["_get_logits_processor"] = before
        return self._first_branch(out)

    def _first_branch(self, out: Any) -> Any:
        extra = int(self.inputs["input_ids"].shape[1]) - self.prompt
        if isinstance(out, Tensor):
            return out[: out.shape[0] // self.branches, extra:]
        for name in BY_ROW:
            value = out.get(name)
            if isinstance(value, Tensor):
                out[name] = value[: value.shape[0] // self.branches]
        out["sequences"] = out["sequences"][:, extra:]
        for name in BY_STEP:
            if out.get(name) is not None:
                out[name] = tuple(step[: step.shape[0] // self.branches] for step in out[name])
        return out


class _Combine(LogitsProcessor):
    """Scores ``[branches * rows, V]`` to ``sum_b w_b * log p_b``, the same for all branches of a row."""

    def __init__(self, branches: int, weights: Sequence[float], plausibility: float) -> None:
        self.branches, self.weights, self.plausibility = branches, weights, plausibility
        self._weights: Tensor | None = None
        self._cutoff: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._weights is None or self._cutoff is None:
            self._weights = scores.new_tensor(self.weights)
            self._cutoff = scores.new_tensor(self.plausibility).log()
        log_p = scores.log_softmax(-1).unflatten(0, (self.branches, -1))
        combined = torch.einsum("b,brv->rv", self._weights, log_p)
        implausible = log_p[0] < log_p[0].amax(-1, keepdim=True) + self._cutoff
        return combined.masked_fill(implausible, -torch.inf).repeat(self.branches, 1)


class _Share(LogitsProcessor):
    """After all other processors: every branch gets the scores of the first one, or the token drawn from them."""

    def __init__(self, branches: int, sample: bool, generator: torch.Generator | None) -> None:
        self.branches, self.sample, self.generator = branches, sample, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores[: scores.shape[0] // self.branches]
        if self.sample:
            # generate() draws for every row by itself; from one token with all the probability it draws that one.
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
            scores = torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
        return scores.repeat(self.branches, 1)


def _framed(
    original: Callable[..., LogitsProcessorList],
    first: LogitsProcessor,
    last: LogitsProcessor,
    *args: Any,
    **kwargs: Any,
) -> LogitsProcessorList:
    return LogitsProcessorList([first, *original(*args, **kwargs), last])


def stack(branches: Sequence[Inputs], padding: int) -> dict[str, Any]:
    """Model inputs of all branches as one batch: branch after branch, left-padded to one length.

    Tensors of the shape of ``input_ids`` are padded with it; others (pixels, sizes, grids) hold one entry an image or
    patch and are concatenated, padded with zeros where their other sizes differ.
    """
    shapes = []
    for n, branch in enumerate(branches):
        ids = branch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise TypeError(
                f"branch {n} has no input_ids [B, N]; pass the inputs that a processor or tokenizer returns"
            )
        if ids.shape[0] != branches[0]["input_ids"].shape[0]:
            raise ValueError(
                f"branch {n} has {ids.shape[0]} prompts, branch 0 has {branches[0]['input_ids'].shape[0]}; "
                "every prompt needs a row in every branch, in the same order"
            )
        mask = branch.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(f"branch {n} is padded on the right; pad on the left to generate")
        shapes.append(tuple(ids.shape))
    length = max(shape[1] for shape in shapes)
    branches = [{"attention_mask": torch.ones_like(b["input_ids"]), **b} for b in branches]
    names = list(dict.fromkeys(name for branch in branches for name in branch))
    return {name: _joined(name, branches, shapes, length, padding) for name in names}


def _joined(
    name: str, branches: Sequence[Inputs], shapes: Sequence[tuple[int, ...]], length: int, padding: int
) -> Tensor:
    values = [branch.get(name) for branch in branches]
    tensors = [value for value in values if value is not None]
    if not all(isinstance(value, Tensor) for value in tensors):
        raise TypeError(
            f"{name} is not a tensor; ask the processor for return_tensors='pt', and pass options to generate"
        )
    aligned = all(value is None or tuple(value.shape) == shape for value, shape in zip(values, shapes, strict=True))
    if aligned:
        fill = padding if name == "input_ids" else 0
        filled = [
            pad(torch.zeros_like(b["input_ids"]) if v is None else v, (length - shape[1], 0), value=fill)
            for v, b, shape in zip(values, branches, shapes, strict=True)
        ]
        return torch.cat(filled)
    if len(tensors) < len(values) and any("pixel_attention_mask" in branch for branch in branches):
        raise NotImplementedError(
            f"a branch has no {name}, and this processor stores images by batch row; give every branch an image"
        )
    sizes = [max(size) for size in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = [
        pad(t, [n for size, have in zip(reversed(sizes), reversed(t.shape[1:]), strict=True) for n in (0, size - have)])
        for t in tensors
    ]
    return torch.cat(padded)
