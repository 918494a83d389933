"""Train the embedded model: ``python -m emocircuits.embedded.train --out DIR``.

Two stages, as one alone does not work at this size. First the vision tower learns attributes (emotion, channels of
the expression, hair, clothes, style) through throw-away linear heads; then the whole model learns to answer, with the
emotion words weighted up, since they are one token in fifteen and the image would otherwise be learned last. Weights
are averaged over steps (EMA).
Same seed, machine and thread count give the same weights; another instruction set does not.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

from .augment import augment, cosine
from .data import HIDDEN, Conversations, Faces, draw_faces
from .faces import CHANNELS, CLOTH, HAIR, LABELS, STYLES
from .model import build_model, build_processor, parameters


@dc.dataclass(frozen=True)
class Settings:
    """All that the weights depend on, besides the code."""

    seed: int = 0
    identities: int = 14_000
    steps_vision: int = 3_600
    batch_vision: int = 128
    rate_vision: float = 1.2e-3
    steps_language: int = 2_200
    batch_language: int = 32
    conversations: int = 4
    rate_language: float = 1.5e-3
    rate_vision_late: float = 0.2  # of rate_language, for the vision tower in stage two
    emotion_weight: float = 6.0
    neutral_vision: float = 0.20  # share of neutral faces in a batch of stage one
    neutral_language: float = 0.36  # and of stage two
    weak_language: float = 0.25  # share of emotional faces in stage two that are of intensity 0.35 or less
    decay: float = 0.05
    threads: int = 2


class Average:
    """Exponential moving average of a module's parameters, with a short memory at the start."""

    def __init__(self, module: nn.Module, keep: float) -> None:
        self.module, self.keep, self.steps = module, keep, 0
        self.mean = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the current parameters in."""
        self.steps += 1
        keep = min(self.keep, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.module.parameters()], 1 - keep)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the module."""
        for p, mean in zip(self.module.parameters(), self.mean, strict=True):
            p.copy_(mean)


class Sampler:
    """Draws picture numbers with fixed shares of neutral and of weak faces."""

    def __init__(self, faces: Faces, neutral: float, weak: float | None) -> None:
        emotional = faces.emotion < len(LABELS) - 1
        self.neutral, self.weak = neutral, weak
        self.pools = [torch.nonzero(m).flatten().numpy() for m in (
            ~emotional, emotional & (faces.intensity <= 0.35), emotional & (faces.intensity > 0.35),
            emotional)]  # fmt: skip

    def draw(self, n: int, rng: np.random.Generator) -> list[int]:
        """N picture numbers."""
        kind = rng.random(n)
        out = []
        for u in kind:
            if u < self.neutral:
                pool = self.pools[0]
            elif self.weak is None:
                pool = self.pools[3]
            else:
                pool = self.pools[1] if rng.random() < self.weak else self.pools[2]
            out.append(int(pool[rng.integers(len(pool))]))
        return out


def _optimizer(groups: list[dict], decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=decay, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def train_vision(model: LlavaForConditionalGeneration, faces: Faces, s: Settings) -> dict[str, float]:
    """Stage one: vision tower on attributes. Leaves the averaged weights in the model."""
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    sizes = {
        "channels": len(CHANNELS),
        "emotion": len(LABELS),
        "hair": len(HAIR),
        "cloth": len(CLOTH),
        "style": len(STYLES),
    }
    heads = nn.ModuleDict({k: nn.Linear(width, n) for k, n in sizes.items()})
    weight = {"emotion": 1.0, "hair": 0.1, "cloth": 0.1, "style": 0.1}
    rng, noise = np.random.default_rng([s.seed, 1]), torch.Generator().manual_seed(s.seed + 1)
    peak = s.rate_vision
    optimizer = _optimizer([{"params": [*tower.parameters(), *heads.parameters()], "peak": peak, "lr": peak}], s.decay)
    average, sampler = Average(tower, 0.998), Sampler(faces, s.neutral_vision, None)
    recent: list[float] = []
    bar = tqdm(range(s.steps_vision), desc="vision", mininterval=10)
    for step in bar:
        _set_rate(optimizer, cosine(step, s.steps_vision))
        i = torch.tensor(sampler.draw(s.batch_vision, rng))
        pixels = augment(faces.images[i], noise)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = tower(pixels).last_hidden_state[:, 1:].mean(1)
        loss = torch.zeros(())
        for name, head in heads.items():
            target = getattr(faces, name)[i]
            if name == "channels":  # what moved and how far: far more to learn from than one label of seven
                loss = loss + 4.0 * F.smooth_l1_loss(head(pooled.float()), target)
            elif (target != HIDDEN).any():
                smooth = 0.05 if name == "emotion" else 0.0
                part = F.cross_entropy(head(pooled.float()), target, ignore_index=HIDDEN, label_smoothing=smooth)
                loss = loss + weight[name] * part
            if name == "emotion":
                recent.append(float((head(pooled.detach().float()).argmax(-1) == target).float().mean()))
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        if step % 50 == 49:
            bar.set_postfix(accuracy=f"{np.mean(recent[-200:]):.3f}", loss=f"{loss.item():.3f}")
    average.apply()
    return {"vision_training_accuracy": float(np.mean(recent[-200:]))}


def train_language(
    model: LlavaForConditionalGeneration, faces: Faces, conversations: Conversations, s: Settings
) -> dict[str, float]:
    """Stage two: the whole model on answers. Leaves the averaged weights in the model."""
    rng, noise = np.random.default_rng([s.seed, 2]), torch.Generator().manual_seed(s.seed + 2)
    tower = list(model.model.vision_tower.parameters())
    known = {id(p) for p in tower}
    rest = [p for p in model.parameters() if id(p) not in known]
    late = s.rate_language * s.rate_vision_late
    optimizer = _optimizer(
        [{"params": rest, "peak": s.rate_language, "lr": 0.0}, {"params": tower, "peak": late, "lr": 0.0}], s.decay
    )
    average, sampler = Average(model, 0.998), Sampler(faces, s.neutral_language, s.weak_language)
    recent: list[tuple[float, float]] = []
    bar = tqdm(range(s.steps_language), desc="language", mininterval=10)
    for step in bar:
        _set_rate(optimizer, cosine(step, s.steps_language))
        chosen = sampler.draw(s.batch_language, rng)
        b = conversations.batch(chosen, rng)
        pixels = augment(faces.images[torch.tensor(chosen)], noise)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(
                input_ids=b.input_ids, pixel_values=pixels, attention_mask=b.attention_mask,
                position_ids=b.position_ids, use_cache=False,
            ).last_hidden_state  # fmt: skip
            asked = b.labels != HIDDEN
            logits = model.lm_head(hidden[asked])
        each = F.cross_entropy(logits.float(), b.labels[asked], reduction="none")
        weight = 1.0 + (s.emotion_weight - 1.0) * b.emotional[asked].float()
        loss = (each * weight).sum() / weight.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        recent.append((float(each.detach().mean()), float(each.detach()[b.emotional[asked]].mean())))
        if step % 50 == 49:
            bar.set_postfix(loss=f"{np.mean(recent[-50:], 0)[0]:.3f}", emotion=f"{np.mean(recent[-50:], 0)[1]:.3f}")
    average.apply()
    loss, emotion = np.mean(recent[-100:], 0).tolist()
    return {"answer_loss": loss, "emotion_word_loss": emotion}


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """Write bf16 weights, configuration and processor to ``out``."""
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    build_processor().save_pretrained(out)


def stage_one(model: LlavaForConditionalGeneration, faces: Faces, s: Settings, file: Path, resume: bool) -> dict:
    """Train the vision tower, or take it from ``file`` when an earlier run with the same settings left it there."""
    names = ("seed", "identities", "threads", "decay", "steps_vision", "batch_vision", "rate_vision", "neutral_vision")
    settings = json.dumps({k: getattr(s, k) for k in names})
    tower = model.model.vision_tower
    if resume and file.is_file():
        with safe_open(file, "pt") as f:
            meta = f.metadata()
            if meta["settings"] != settings:
                raise ValueError(
                    f"{file} was trained with {meta['settings']}, not {settings}: remove it or leave out --resume"
                )
            tower.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118 (not a dict)
        return json.loads(meta["record"])
    clock = Clock()
    losses = train_vision(model, faces, s)
    record = {"vision": clock.minutes(), **losses}
    state = {k: v.contiguous() for k, v in tower.state_dict().items()}
    save_file(state, file, metadata={"settings": settings, "record": json.dumps(record)})
    return record


def train(out: Path, s: Settings, resume: bool = False) -> dict:
    """Train and save; returns (and writes to training.json) settings, times and losses."""
    torch.set_num_threads(s.threads)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_processor().tokenizer
    clock = Clock()
    faces = draw_faces(s.identities, s.threads)
    times = {"draw": clock.minutes()}
    model = build_model(len(tokenizer), s.seed).train()
    model.set_attn_implementation("eager")  # with bf16 autocast 2.7 times faster than sdpa on 64 tokens
    losses = stage_one(model, faces, s, out / "stage-one.safetensors", resume)
    times["vision"] = losses.pop("vision")
    clock = Clock()
    losses |= train_language(model, faces, Conversations(faces, tokenizer, s.conversations), s)
    times["language"] = clock.minutes()
    save(model, out)
    record = {
        "settings": dc.asdict(s), "parameters": parameters(model),
        "wall_minutes": {k: t[0] for k, t in times.items()}, "cpu_minutes": {k: t[1] for k, t in times.items()},
        **losses,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "command": "python -m emocircuits.embedded.train --out DIR",
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


class Clock:
    """Wall and CPU time (with finished child processes) since it was made."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        t = os.times()
        return time.time(), t.user + t.system + t.children_user + t.children_system

    def minutes(self) -> tuple[float, float]:
        """(wall, CPU) minutes."""
        now = self._now()
        return round((now[0] - self.start[0]) / 60, 2), round((now[1] - self.start[1]) / 60, 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m emocircuits.embedded.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--resume", action="store_true", help="take stage one from DIR if it finished there")
    for field in dc.fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    a = parser.parse_args()
    settings = Settings(**{f.name: getattr(a, f.name) for f in dc.fields(Settings)})
    print(json.dumps(train(a.out, settings, a.resume), indent=1))


if __name__ == "__main__":
    main()
