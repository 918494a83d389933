"""One whole generation, as `model.generate` runs it, with the times of its two phases."""

from __future__ import annotations

import dataclasses as dc
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CompileConfig, LogitsProcessor

PHASES = ("prefill", "decode", "whole")


@dc.dataclass(frozen=True)
class Settings:
    """How a model generates.

    Args:
        tokens: generated tokens, at least 2: the first one is the prefill's.
        cache: ``"dynamic"`` or ``"static"``.
        compiled: decode steps run compiled (static cache only; on a GPU as CUDA graphs).
        clock: ``"wall"``, or ``"cpu"``: processor time of this process, for a CPU that others use at the same time.
        compiler: what compiles them; another one than Inductor is for tests.
    """

    tokens: int
    cache: str = "dynamic"
    compiled: bool = False
    clock: str = "wall"
    compiler: str = "inductor"

    def now(self) -> float:
        """Seconds on the clock."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        found: dict[str, Any] = dict(
            max_new_tokens=self.tokens, do_sample=False, use_cache=True, disable_compile=not self.compiled
        )
        if self.cache == "static":
            found["cache_implementation"] = "static"
        if self.compiled:
            config = CompileConfig() if self.compiler == "inductor" else CompileConfig(backend=self.compiler, mode=None)
            config._compile_all_devices = True
            found["compile_config"] = config
        return found


class Times(NamedTuple):
    """Seconds: until the first logits (vision tower and prompt), for one later token, and of the generation."""

    prefill: float
    decode: float
    whole: float


class _Watch(LogitsProcessor):
    """Notes when the first logits are there."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.device, self.settings = device, settings
        self.first: float | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.first is None:
            synchronize(self.device)
            self.first = self.settings.now()
        return scores


class _Dictate(LogitsProcessor):
    """Chooses given tokens, so that the logits of several models are about the same text."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = input_ids.shape[1] - self.prompt
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter(1, self.tokens[:, step : step + 1], 0.0)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(model: nn.Module, inputs: dict[str, Tensor], settings: Settings) -> Times:
    """Generate and take the times."""
    device = inputs["input_ids"].device
    watch = _Watch(device, settings)
    options = settings.options()
    synchronize(device)
    begin = settings.now()
    model.generate(**inputs, **options, logits_processor=[watch])  # type: ignore[operator]
    synchronize(device)
    end = settings.now()
    assert watch.first is not None
    return Times(watch.first - begin, (end - watch.first) / (settings.tokens - 1), end - begin)


def logits(model: nn.Module, inputs: dict[str, Tensor], settings: Settings, tokens: Tensor) -> Tensor:
    """Logits ``[B, steps, vocabulary]`` in float32 on the CPU, at every step of generating ``tokens [B, steps]``."""
    dictate = _Dictate(tokens, inputs["input_ids"].shape[1])
    out = model.generate(  # type: ignore[operator]
        **inputs, **settings.options(), logits_processor=[dictate], output_logits=True, return_dict_in_generate=True
    )
    return torch.stack([step.float().cpu() for step in out.logits], 1)
