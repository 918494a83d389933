"""Finding the embedded model's circuit: steering vectors, l_emo, critical heads, explicit-state neurons."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emocircuits.circuit import Circuit
from emocircuits.circuits import SteeringVectors, explicit_state_neurons, head_effects, ranked, steering_vectors
from emocircuits.circuits.explicit import ExplicitNeuron
from emocircuits.demo.cases import Prompts, Scores, answers, contradicting
from emocircuits.edits import AddVector
from emocircuits.embedded import faces, language
from emocircuits.families import open_model
from emocircuits.measure import capture
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emocircuits.roles import prompt_roles
from emokernels import Role

ANSWER = " i feel"
"""Beginning of an answer: the row after it emits the emotion word. Its tokens have the role GENERATED."""


@dc.dataclass(frozen=True)
class Found:
    """What localisation found, with everything the report shows of it."""

    circuit: Circuit
    steering: SteeringVectors
    injection: np.ndarray
    injection_random: np.ndarray
    head_effects: np.ndarray
    layer_effects: np.ndarray
    neurons: list[ExplicitNeuron]
    neuron_k: int
    pairs: int


def with_answer(model: nn.Module, processor: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Append the beginning of an answer to left-padded prompts. Returns the inputs and their roles ``[B, N]``."""
    handle = open_model(model)
    forced = torch.tensor(processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    roles = prompt_roles(ids, mask.bool(), handle.placeholder_ids())
    tail = forced.expand(len(ids), -1)
    extended = {
        **inputs,
        "input_ids": torch.cat([ids, tail], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(tail)], 1),
    }
    return extended, torch.cat([roles, torch.full(tail.shape, int(Role.GENERATED), dtype=torch.uint8)], 1)


class EmotionLogit:
    """Metric: log-odds that the next word names the emotion of its row, ``logit P(words of the emotion)``."""

    def __init__(self, processor: Any, emotions: Sequence[str]) -> None:
        convert = processor.tokenizer.convert_tokens_to_ids
        self.ids = {e: torch.tensor(convert(sorted(language.LEXICON[e]))) for e in faces.LABELS}
        self.rows = [self.ids[e] for e in emotions]

    def __call__(self, logits: Tensor) -> Tensor:
        """``[B, V]`` logits to ``[B]``."""
        logp = logits.float().log_softmax(-1)
        inside = torch.stack([row[ids].logsumexp(-1) for row, ids in zip(logp, self.rows, strict=True)])
        return inside - torch.log1p(-inside.exp().clamp(max=1 - 1e-6))


@torch.no_grad()
def localize(
    model: nn.Module, processor: Any, people: Sequence[int], *, alpha: float = 1.0, seed: int = 0, progress: bool = True
) -> Found:
    """Find the circuit on pairs of these identities: a full-intensity face and its neutral twin with the same event.

    Args:
        model, processor: the embedded model.
        people: identities of the ranking part.
        alpha: factor on the steering vectors when they are injected (the paper uses 0.1).
        seed: of events and of the random direction.
        progress: show progress bars.
    """
    geometry = open_model(model).geometry
    pairs = contradicting(people, [1.0], seed)
    emotions = [c.emotion for c in pairs]
    twins = [dc.replace(c, emotion="neutral", intensity=0.0) for c in pairs]
    plus, minus = (Prompts(c, processor, size=len(pairs)) for c in (pairs, twins))
    in_order = [pairs[i] for i in plus.order]
    emotions = [c.emotion for c in in_order]
    hits = Scores.of(pairs, answers(model, processor, plus)).hit[plus.order].tolist()

    # Stage I: residuals at the last prompt token.
    states = []
    for prompts in (plus, minus):
        with capture(model, ["resid_post"], columns=[-1]) as seen:
            model(**prompts.batches[0], use_cache=False, logits_to_keep=1)
        states.append(seen["resid_post"][:, :, 0])
    steering = steering_vectors(states[0], states[1], emotions, hits)
    direction = torch.stack([steering.of(e) for e in emotions], 1)

    # Everything below is measured on the row that emits the emotion word.
    metric = EmotionLogit(processor, emotions)
    clean, roles = with_answer(model, processor, plus.batches[0])
    corrupt, _ = with_answer(model, processor, minus.batches[0])
    effects, layers = head_effects(model, clean, corrupt, metric, roles=roles, progress=progress)
    injection, control = _injection(model, corrupt, roles, direction, metric, alpha, seed)
    l_emo = int(np.argmax(injection))

    activations = []
    for inputs in (clean, corrupt):
        with capture(model, ["neurons"], columns=[-1]) as seen:
            model(**inputs, use_cache=False, logits_to_keep=1)
        activations.append(seen["neurons"][:, :, 0])
    tokens = processor.tokenizer.convert_ids_to_tokens(range(len(processor.tokenizer)))
    words = set().union(*(language.LEXICON[e] for e in faces.EMOTIONS))
    neurons, k = explicit_state_neurons(model, activations[0], activations[1], direction, tokens, words)

    order = ranked(effects)
    circuit = Circuit(
        model_type=model.config.model_type,  # type: ignore[union-attr, arg-type]
        layers=geometry.layers,
        l_emo=l_emo,
        heads=tuple(order[:12]),
        neurons=tuple((n.layer, n.neuron) for n in neurons[:30]),
        head_effects=tuple(float(effects[h]) for h in order[:12]),
        settings={
            "head_effect": "share of the gap of logit P(emotion word) restored by patching z on text rows",
            "pairs": len(pairs),
            "kept": dict(zip(steering.emotions, steering.kept, strict=True)),
            "alpha": alpha,
            "explicit_state_k": k,
            "seed": seed,
            "identities": [people[0], people[-1]],
        },
    )
    return Found(circuit, steering, injection, control, effects, layers, neurons, k, len(pairs))


def _injection(
    model: nn.Module,
    neutral: dict[str, Tensor],
    roles: Tensor,
    direction: Tensor,
    metric: EmotionLogit,
    alpha: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """P(emotion word) ``[L]`` on neutral faces with the steering vector at each layer, and with a random one."""
    generator = torch.Generator().manual_seed(seed)
    out = np.zeros((2, direction.shape[0]))
    rows = range(direction.shape[1])
    with patch(model, Plan(), roles=roles) as patched:
        for layer in range(direction.shape[0]):
            vectors = direction[layer]
            noise = torch.randn(vectors.shape, generator=generator)
            noise *= vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            for i, chosen in enumerate((vectors, noise)):
                patched.replace(Plan([AddVector([layer], chosen[r], by=alpha, rows=[r]) for r in rows]))
                logits = model(**neutral, use_cache=False, logits_to_keep=1).logits[:, -1]
                out[i, layer] = torch.sigmoid(metric(logits)).mean()
    return out[0], out[1]
