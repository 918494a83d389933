"""Measure the model on held-out identities: ``python -m emocircuits.embedded.evaluate [--json] [--write]``.

An answer's emotion is its first emotion word. ``hit`` = the face's, ``prior`` = the event's (an emotional hallucination
when the event contradicts the face). Events contradict the face unless said otherwise: their group is another emotion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .data import HELD_OUT
from .faces import EMOTIONS, LABELS, face
from .language import CLAUSES, first_emotion, make_event, prompt

INTENSITIES = (0.15, 0.25, 0.35, 0.5, 0.75, 1.0)
IDENTITIES = range(HELD_OUT, HELD_OUT + 150)
RESULTS = Path(__file__).parent / "weights" / "evaluation.json"
Case = tuple[Image.Image, str, str, str]  # picture, its emotion, the event's group, the event


@torch.no_grad()
def generate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    events: Sequence[str],
    max_new_tokens: int = 12,
    batch: int = 64,
    progress: str | None = None,
) -> list[str]:
    """Greedy answers, one per (image, event). 12 tokens reach the emotion word of every template."""  # fmt: skip
    if len(images) != len(events):
        raise ValueError(f"{len(images)} images but {len(events)} events: expected one event per image")
    out: list[str] = []
    for i in tqdm(range(0, len(images), batch), desc=progress, disable=progress is None, mininterval=5):
        text = [prompt(e) for e in events[i : i + batch]]
        inputs = processor(images=list(images[i : i + batch]), text=text, return_tensors="pt", padding=True)
        tokens = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        out += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def event_for(group: str, *key: int) -> str:
    """The event of this group with this number."""
    rng = np.random.default_rng([14, LABELS.index(group), *key])
    return make_event(CLAUSES[group][rng.integers(len(CLAUSES[group]))], rng)


def contradicting(identities: Sequence[int], intensity: float) -> list[Case]:
    """Every emotion on every identity, each with one event of another emotion."""
    cases = []
    for i in identities:
        for k, emotion in enumerate(EMOTIONS):
            shift = 1 + int(np.random.default_rng([15, i, k, round(100 * intensity)]).integers(len(EMOTIONS) - 1))
            group = EMOTIONS[(k + shift) % len(EMOTIONS)]
            cases.append((face(i, emotion, intensity), emotion, group, event_for(group, i, k)))
    return cases


def with_group(identities: Sequence[int], intensity: float, group: str | None) -> list[Case]:
    """Every emotion on every identity with an event of one group; None: of the face's own emotion."""
    return [
        (face(i, e, intensity), e, group or e, event_for(group or e, i, k))
        for i in identities
        for k, e in enumerate(EMOTIONS)
    ]


def neutral_faces(identities: Sequence[int]) -> list[Case]:
    """Every neutral twin with one event of each of the seven groups."""
    return [(face(i, "neutral", 0.0), "neutral", g, event_for(g, i)) for i in identities for g in LABELS]


def score(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, float]:
    """Shares of answers that say the face's emotion, the event's, neutral, another one, none."""
    said = [first_emotion(a) for a in answers]
    n = len(cases)
    other = sum(s not in (None, "neutral", c[1], c[2]) for s, c in zip(said, cases, strict=True))
    return {
        "hit": round(sum(s == c[1] for s, c in zip(said, cases, strict=True)) / n, 4),
        "prior": round(sum(s == c[2] != c[1] for s, c in zip(said, cases, strict=True)) / n, 4),
        "neutral": round(sum(s == "neutral" for s in said) / n, 4),
        "other": round(other / n, 4),
        "none": round(sum(s is None for s in said) / n, 4),
        "n": n,
    }


@torch.no_grad()
def attention_to_image(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, cases: Sequence[Case], said: str
) -> list[list[float]]:
    """Mean attention mass on the image tokens at the last row of prompt + ``said``, [layers][heads]."""
    old = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        total: torch.Tensor | None = None
        for i in range(0, len(cases), 32):
            part = cases[i : i + 32]
            text = [prompt(c[3]) + said for c in part]
            inputs = processor(images=[c[0] for c in part], text=text, return_tensors="pt", padding=True).to(
                model.device
            )
            visual = (inputs["input_ids"] == model.config.image_token_id)[:, None, :]
            layers = model(**inputs, output_attentions=True).attentions
            mass = torch.stack([(a[:, :, -1] * visual).sum(-1).sum(0) for a in layers])
            total = mass if total is None else total + mass
    finally:
        model.set_attn_implementation({"text_config": old})
    if total is None:
        raise ValueError("cases is empty: expected at least one")
    return [[round(float(v), 3) for v in row] for row in total / len(cases)]


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    identities: Sequence[int] = IDENTITIES,
    intensities: Sequence[float] = INTENSITIES,
    attention: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """All numbers of the model card except the third-party faces."""  # fmt: skip

    def run(cases: list[Case], name: str) -> list[str]:
        return generate(
            model, processor, [c[0] for c in cases], [c[3] for c in cases], progress=name if progress else None
        )

    result: dict[str, Any] = {"identities": [identities[0], identities[-1]], "by_intensity": {}, "hit_by_emotion": {}}
    for t in intensities:
        cases = contradicting(identities, t)
        answers = run(cases, f"contradicting, t={t}")
        result["by_intensity"][str(t)] = score(cases, answers)
        result["hit_by_emotion"][str(t)] = {
            e: score(*zip(*[(c, a) for c, a in zip(cases, answers, strict=True) if c[1] == e], strict=True))["hit"]
            for e in EMOTIONS
        }
        if t == intensities[-1]:
            result["answers_starting_i_feel"] = round(sum(a.startswith("i feel") for a in answers) / len(answers), 4)
    weak = intensities[0]
    for name, group in (("agreeing", None), ("neutral_event", "neutral")):
        for t in (weak, intensities[-1]):
            cases = with_group(identities, t, group)
            result.setdefault(name, {})[str(t)] = score(cases, run(cases, f"{name}, t={t}"))
    cases = neutral_faces(identities)
    answers = run(cases, "neutral faces")
    result["neutral_faces"] = score(cases, answers)
    result["neutral_by_event"] = {
        g: score(*zip(*[(c, a) for c, a in zip(cases, answers, strict=True) if c[2] == g], strict=True))["hit"]
        for g in LABELS
    }
    if attention:
        sample = [c for t in (0.25, 1.0) for c in contradicting(identities[:20], t)]
        result["attention_to_image"] = {
            "row_that_emits_the_emotion_word": attention_to_image(model, processor, sample, " i feel"),
            "last_prompt_row": attention_to_image(model, processor, sample, ""),
        }
    return result


def show(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = ["intensity   hit   prior neutral other  (events of another emotion)"]
    for t, r in result["by_intensity"].items():
        shares = " ".join(f"{r[k]:6.3f}" for k in ("hit", "prior", "neutral", "other"))
        lines.append(f"{t:>9} {shares}   {result['hit_by_emotion'][t]}")
    for name in ("agreeing", "neutral_event"):
        lines += [f"{name}, t={t}: {r}" for t, r in result[name].items()]
    lines += [f"neutral faces: {result['neutral_faces']}", f"neutral said, by event: {result['neutral_by_event']}"]
    lines.append(f"answers that start 'i feel': {result['answers_starting_i_feel']}")
    for name, rows in result.get("attention_to_image", {}).items():
        lines.append(f"attention to the image, {name}, per layer: " + " ".join(f"{np.mean(r):.2f}" for r in rows))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    from . import PATH, load

    parser = argparse.ArgumentParser(prog="python -m emocircuits.embedded.evaluate", description=__doc__)
    parser.add_argument("--path", type=Path, default=PATH, help="model folder (default: the committed one)")
    parser.add_argument("--identities", type=int, default=len(IDENTITIES), help="how many held-out identities")
    parser.add_argument("--first", type=int, default=IDENTITIES[0], help="the first of them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write", action="store_true", help="also write evaluation.json and README.md in the model folder"
    )
    a = parser.parse_args()
    model, processor = load(a.path)
    result = evaluate(model, processor, range(a.first, a.first + a.identities), progress=True)
    print(json.dumps(result, indent=1) if a.json else show(result))
    if a.write:
        from .card import write

        write(a.path, evaluation=result)


if __name__ == "__main__":
    main()
