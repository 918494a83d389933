"""A plan as these contenders need it: by layer, which heads change how much between which columns of the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emocircuits.edits import BoostRoute, Reading, ScaleNeurons
from emocircuits.families import Handle
from emocircuits.plan import Plan
from emokernels import Role

Columns = slice | Tensor


class Block(NamedTuple):
    """Attention of ``heads`` from ``rows`` of the prompt (None: from generated rows) to ``keys`` changes by ``by``."""

    heads: Tensor
    rows: Columns | None
    keys: Columns
    by: float


def routes(plan: Plan, roles: Tensor, reading: Reading) -> dict[int, list[Block]]:
    """The attention edits of a plan by layer.

    Raises:
        NotImplementedError: the plan has an edit that this way of editing attention does not express.
    """
    found: dict[int, list[Block]] = {}
    for edit in plan:
        if isinstance(edit, ScaleNeurons):
            continue
        if not isinstance(edit, BoostRoute) or edit.reading != reading or edit.rows is not None:
            raise NotImplementedError(f"{type(edit).__name__} is not something this contender can do")
        keys = _columns(roles, [Role[name.upper()] for name in edit.source])
        prompt = [role for role in edit.destinations() if role != Role.GENERATED]
        rows = _columns(roles, prompt) if prompt else None
        for layer in sorted(edit.layers_used()):
            heads = torch.tensor(sorted(head for at, head in edit.heads if at == layer), device=roles.device)
            blocks = found.setdefault(layer, [])
            if rows is not None:
                blocks.append(Block(heads, rows, keys, edit.by))
            if Role.GENERATED in edit.destinations():
                blocks.append(Block(heads, None, keys, edit.by))
    return found


def _columns(roles: Tensor, wanted: Sequence[Role]) -> Columns:
    """Where the prompt has these roles: a slice where they are one run, which is read without a copy."""
    at = torch.isin(roles, torch.tensor([int(role) for role in wanted], device=roles.device)).nonzero().flatten()
    if at.numel() and int(at[-1] - at[0]) + 1 == at.numel():
        return slice(int(at[0]), int(at[-1]) + 1)
    return at


@contextlib.contextmanager
def neurons(handle: Handle, plan: Plan) -> Iterator[None]:
    """The neuron gains of a plan, as a forward pre-hook on every down projection that has some.

    Raises:
        NotImplementedError: a gain that is not the same for every row and phase.
    """
    weight = next(handle.text.parameters())
    factors: dict[int, Tensor] = {}
    for edit in plan:
        if isinstance(edit, ScaleNeurons):
            if edit.rows is not None or set(edit.destinations()) != set(Role):
                raise NotImplementedError("neuron gains of some rows only are not something this contender can do")
            for layer, index in edit.neurons:
                if layer not in factors:
                    factors[layer] = torch.ones(handle.geometry.neurons, device=weight.device, dtype=weight.dtype)
                factors[layer][list(index)] *= edit.by
    with contextlib.ExitStack() as undo:
        for layer, factor in factors.items():
            module = handle.down_projections[layer]
            undo.callback(module.register_forward_pre_hook(_Scale(factor)).remove)
        yield


class _Scale:
    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.factor, *args[1:])


def use_attention(model: nn.Module, handle: Handle, name: str) -> None:
    """Switch the text decoder to an attention implementation; the vision tower keeps its own.

    Raises:
        NotImplementedError: the model does not take it; the reason is the one transformers gives.
    """
    config: Any = model.config
    part = next((n for n in getattr(config, "sub_configs", {}) if getattr(config, n, None) is handle.text_config), None)
    try:
        model.set_attn_implementation(name if part is None else {part: name})  # type: ignore[operator]
    except (ImportError, ValueError, RuntimeError) as error:
        raise NotImplementedError(" ".join(str(error).split())) from error
    if handle.text_config._attn_implementation != name:
        raise NotImplementedError(f"{type(model).__name__} does not take attn_implementation={name!r}")
