"""Who competes. A contender changes one copy of a model until it is left; its ``intervention`` is what it computes."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emocircuits.edits import ScaleNeurons
from emocircuits.families import open_model
from emocircuits.overhead import peers
from emocircuits.overhead.peers.edits import use_attention
from emocircuits.overhead.subject import Subject
from emocircuits.patching import patch
from emocircuits.plan import Plan

Kind = Literal["stock", "ours", "peer"]
Install = Callable[[nn.Module, Subject], contextlib.AbstractContextManager[Any]]
Peer = Callable[[nn.Module, Plan, Tensor], contextlib.AbstractContextManager[None]]

BASELINE = "sdpa"


class Unavailable(Exception):
    """A contender cannot run here; the text says why."""


@dc.dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        name: short, for options and records.
        title: for people.
        kind: an untouched model, one patched by this package, or another way to patch it.
        intervention: ``none`` or a key of `Subject.plans`; contenders with the same one must give the same logits.
        install: puts it into a copy of the model.
        cache: the cache it needs, where that is not the one asked for.
        slow_start: it compiles for longer than a quick run lasts.
    """

    name: str
    title: str
    kind: Kind
    intervention: str
    install: Install
    cache: str | None = None
    slow_start: bool = False


def contenders(device: str) -> list[Contender]:
    """Everybody, the baseline first, on a device of this type ("cpu" or "cuda")."""
    on_cpu = device == "cpu"
    stock = [
        Contender(BASELINE, "untouched, SDPA", "stock", "none", _stock("sdpa")),
        Contender("eager", "untouched, eager", "stock", "none", _stock("eager")),
    ]
    if not on_cpu:
        stock += [
            Contender("cudnn", "untouched, SDPA on cuDNN", "stock", "none", _cudnn),
            # FlashAttention reads whole caches, so it cannot have one that is longer than its content.
            Contender("flash2", "untouched, FlashAttention-2", "stock", "none", _stock("flash_attention_2"), "dynamic"),
            Contender("flash3", "untouched, FlashAttention-3", "stock", "none", _stock("flash_attention_3"), "dynamic"),
        ]
    own_cache = "static" if on_cpu else None  # peers/flex.py
    return [
        *stock,
        Contender("empty", "ours, empty plan", "ours", "none", _ours(None)),
        Contender("veena", "ours, VEENA", "ours", "veena", _ours("veena")),
        Contender("veena_fold", "ours, VEENA, neuron gains in the weights", "ours", "veena", _folded),
        Contender("hooks", "VEENA: eager, forward hooks", "peer", "veena", _peer(peers.hooks, "veena")),
        Contender("veena_logit", "ours, VEENA on logits", "ours", "veena_logit", _ours("veena_logit")),
        Contender(
            "bias", "VEENA on logits: SDPA, dense bias", "peer", "veena_logit",
            _peer(peers.dense_bias, "veena_logit"),
        ),
        Contender(
            "flex", "VEENA on logits: FlexAttention", "peer", "veena_logit", _peer(peers.flex, "veena_logit"),
            own_cache, slow_start=True,
        ),
        Contender("everything", "ours, every head, 1 % of neurons", "ours", "everything", _ours("everything")),
        Contender(
            "hooks_everything", "the same: eager, forward hooks", "peer", "everything",
            _peer(peers.hooks, "everything"),
        ),
    ]  # fmt: skip


def choose(names: list[str] | None, device: str) -> list[Contender]:
    """The contenders with these names, and the baseline.

    Raises:
        ValueError: an unknown name.
    """
    every = contenders(device)
    if names is None:
        return every
    unknown = sorted(set(names) - {one.name for one in every})
    if unknown:
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(one.name for one in every)}")
    return [one for one in every if one.name in names or one.name == BASELINE]


def _stock(implementation: str) -> Install:
    @contextlib.contextmanager
    def install(model: nn.Module, subject: Subject) -> Iterator[None]:
        reason = _why_not(implementation, subject)
        if reason:
            raise Unavailable(reason)
        use_attention(model, open_model(model), implementation)
        yield

    return install


def _why_not(implementation: str, subject: Subject) -> str | None:
    if not implementation.startswith("flash"):
        return None
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    available = is_flash_attn_2_available if implementation.endswith("2") else is_flash_attn_3_available
    if not available():
        return f"{'flash-attn' if implementation.endswith('2') else 'flash_attn_3'} is not installed"
    if next(subject.model.parameters()).dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    return None


@contextlib.contextmanager
def _cudnn(model: nn.Module, subject: Subject) -> Iterator[None]:
    """Stock SDPA that asks cuDNN first; where cuDNN has no kernel for a call, SDPA takes its next best one."""
    order = [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ]  # fmt: skip
    if not torch.backends.cudnn.is_available():
        raise Unavailable("torch has no cuDNN here")
    generate: Any = model.generate

    @functools.wraps(generate)
    def with_cudnn(*args: Any, **options: Any) -> Any:
        with sdpa_kernel(order, set_priority=True):
            return generate(*args, **options)

    model.__dict__["generate"] = with_cudnn
    try:
        yield
    finally:
        del model.__dict__["generate"]


def _ours(plan: str | None) -> Install:
    return lambda model, subject: patch(model, Plan() if plan is None else subject.plans[plan])


@contextlib.contextmanager
def _folded(model: nn.Module, subject: Subject) -> Iterator[None]:
    """``patch(fold=True)``, on weights of its own: the others must not see scaled ones."""
    modules, plan = open_model(model).down_projections, subject.plans["veena"]
    for layer in {layer for edit in plan if isinstance(edit, ScaleNeurons) for layer, _ in edit.neurons}:
        weight = modules[layer].weight
        assert isinstance(weight, Tensor)
        modules[layer].register_parameter("weight", nn.Parameter(weight.detach().clone(), requires_grad=False))
    with patch(model, plan, fold=True):
        yield


def _peer(put: Peer, plan: str) -> Install:
    return lambda model, subject: put(model, subject.plans[plan], subject.roles)
