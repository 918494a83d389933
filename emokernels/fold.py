"""A constant neuron gain folded into the weight that reads the neuron: no run-time cost, and a way back.

``W (g a) = (W g) a``: a gain that is the same for all rows and steps is a factor on columns of the down projection.
The product is rounded to the weight's dtype here and to the activation's dtype in `gated_activation`, so the two agree
to within rounding, not bit for bit; both exist for that reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from .errors import message, require_tensor

_FOLDABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_open: weakref.WeakSet[Folded] = weakref.WeakSet()


class Folded:
    """A gain that is in a weight until `undo`; a context manager too, which undoes it on the way out.

    Attributes:
        weight: the weight that was changed in place.
        index: ``[n]`` int64, the neurons.
        dim: the dimension of weight that counts neurons.
    """

    def __init__(self, weight: Tensor, index: Tensor, gain: Tensor, dim: int) -> None:
        self.weight, self.index, self.dim = weight, index, dim
        with _writable(weight):
            kept = weight.index_select(dim, index)
            wide = torch.promote_types(weight.dtype, torch.float32)
            by = gain.to(wide).unsqueeze(1 - dim)
            scaled = (kept.to(wide) * by).to(weight.dtype)
            if bool((kept.isfinite() & ~scaled.isfinite()).any()):
                raise ValueError(
                    message(
                        "scale",
                        f"gains that keep the weight finite in {weight.dtype}",
                        f"up to {float(gain.abs().max()):g}, which overflows it",
                        "Use smaller gains, or NeuronEdits, which scale in float32.",
                    )
                )
            weight.index_copy_(dim, index, scaled)
        self._kept: Tensor | None = kept
        _open.add(self)

    @property
    def active(self) -> bool:
        """Whether the gain is in the weight now."""
        return self._kept is not None

    def undo(self) -> None:
        """Put back the columns as they were, bit for bit. Does nothing the second time.

        The weight may have been moved to another device or dtype in between, as `Module.to` does.
        """
        if self._kept is None:
            return
        with _writable(self.weight):
            self.weight.index_copy_(self.dim, self.index.to(self.weight.device), self._kept.to(self.weight))
        self._kept = None
        _open.discard(self)

    def __enter__(self) -> Folded:
        if not self.active:
            raise ValueError(
                message("fold_gain", "a gain that is still folded", "one that was undone", "Call fold_gain again.")
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def fold_gain(weight: Tensor, index: Tensor, scale: Tensor | float, *, dim: int = 1) -> Folded:
    """Multiply the columns of a down projection that read some neurons by their gains, in place and reversibly.

    >>> down = torch.nn.Linear(8, 4, bias=False)
    >>> before = down.weight.clone()
    >>> with fold_gain(down.weight, torch.tensor([2, 5]), 1.6):
    ...     amplified = down(torch.ones(8))
    >>> torch.equal(down.weight, before)
    True

    Gradients of the weight that are taken while a gain is folded are those of the folded weight. Who drops the result
    keeps the gain for good.

    Args:
        weight: ``[d_model, F]`` float32, bfloat16, float16 or float64, such as ``down_proj.weight``; changed in place.
            Only the edited columns are kept for the way back: ``n * d_model`` elements.
        index: ``[n]`` int64, neurons, each once, on weight's device.
        scale: gains, a float tensor ``[n]`` or one number for all; used in float32 and rounded once.
        dim: the dimension of weight that counts neurons: 1 in ``nn.Linear``, 0 in GPT-2's ``Conv1D`` (``[F, d]``).

    Returns:
        Folded, in force at once; ``.undo()`` or leaving its ``with`` block restores the weight bit for bit.

    Raises:
        TypeError: an argument has the wrong type or dtype; a quantised weight, which cannot be scaled by columns.
        ValueError: a shape, number or device does not fit, a neuron appears twice or is folded already, or the scaled
            weight would overflow.
        NotImplementedError: weight is a tensor subclass (sharded or quantised), or has no memory ("meta").
    """
    _check_weight(weight, dim)
    require_tensor("index", index, "Give neuron numbers as torch.tensor([...]).")
    if index.dtype != torch.int64:
        raise TypeError(message("index", "int64", index, "Convert with index.long()."))
    if index.dim() != 1 or index.numel() == 0 or index.device != weight.device:
        raise ValueError(message("index", f"shape [n], n >= 1, on {weight.device}", index, "Fold nothing for n = 0."))
    numbers = index.tolist()
    width = weight.shape[dim]
    wrong = [i for i in numbers if not 0 <= i < width]
    if wrong:
        raise ValueError(
            message("index", f"numbers from 0 to {width - 1}", f"{wrong[0]}", "Check layer, model and dim.")
        )
    if len(set(numbers)) != len(numbers):
        twice = next(i for i in numbers if numbers.count(i) > 1)
        raise ValueError(message("index", "every neuron once", f"neuron {twice} twice", "Multiply its gains first."))
    gain = _gain(scale, index)
    for folded in _open:
        shared = set(numbers) & set(folded.index.tolist()) if _same_columns(folded, weight, dim) else set()
        if shared:
            raise ValueError(
                message(
                    "index",
                    "neurons that are not folded already",
                    f"neuron {min(shared)}, which is",
                    "Undo the other fold first, or fold the product of both gains.",
                )
            )
    return Folded(weight, index.clone(), gain, dim)


def _check_weight(weight: Tensor, dim: int) -> None:
    require_tensor("weight", weight, "Pass down_proj.weight.")
    if weight.dtype not in _FOLDABLE:
        raise TypeError(
            message(
                "weight",
                "float32, bfloat16, float16 or float64",
                weight,
                "A quantised weight cannot be scaled by columns and restored; use NeuronEdits instead.",
            )
        )
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device.type == "meta":
        kind = f"{type(weight).__name__} on {weight.device}"
        raise NotImplementedError(
            message("weight", "a plain tensor with memory", kind, "Use NeuronEdits for quantised or sharded weights.")
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(message("weight", "shape [d_model, F]", weight, "Pass down_proj.weight."))
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(message("dim", "1 (nn.Linear) or 0 (Conv1D)", dim, "Name the dimension that counts neurons."))


def _gain(scale: Tensor | float, index: Tensor) -> Tensor:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Tensor)):
        raise TypeError(message("scale", "a float tensor [n] or a number", scale, "Give one gain per neuron."))
    if not isinstance(scale, Tensor):
        return torch.full(index.shape, float(scale), dtype=torch.float64).to(index.device)
    if not scale.is_floating_point():
        raise TypeError(message("scale", "a float tensor [n] or a number", scale, "Convert with scale.float()."))
    if scale.shape != index.shape or scale.device != index.device:
        raise ValueError(
            message("scale", f"shape [n={index.numel()}] on {index.device}", scale, "Give one gain per neuron.")
        )
    if scale.requires_grad:
        raise ValueError(
            message("scale", "gains that need no gradient", scale, "Detach them, or learn NeuronEdits.scale instead.")
        )
    return scale


def _same_columns(folded: Folded, weight: Tensor, dim: int) -> bool:
    """Whether a column number means the same memory in both."""
    other = folded.weight
    return (
        other.data_ptr() == weight.data_ptr()
        and other.device == weight.device
        and (folded.dim, other.stride()) == (dim, weight.stride())
    )


@contextmanager
def _writable(weight: Tensor) -> Iterator[None]:
    """No gradient is recorded; a tensor made in inference mode may be written in inference mode only."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield
