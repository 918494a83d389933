"""Rankings of heads and of neurons, all from the ranking identities: one list for every face, whatever it shows."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from emocircuits.circuits.heads import critical_heads
from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.pairs import SIDES, Pairs
from emocircuits.circuits.patch_effects import ranked
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.vocabulary import emotion_tokens, hits, least_hits, top_tokens, writes
from emocircuits.data.pairs import Record
from emocircuits.demo.cases import contradicting
from emocircuits.demo.study.asked import Asked
from emocircuits.demo.study.settings import TOLD, Member, boost, scale
from emocircuits.embedded import faces, language
from emocircuits.measure import capture
from emocircuits.roles import prompt_roles
from emokernels import Role

ALONE, SLOPE = 3.0, 1.05
SCREENED = 120
EMOTIONS = list(faces.EMOTIONS)
PLACES = {"decode": (Role.GENERATED,), "visual": (Role.VISUAL,), "query": (Role.QUERY, Role.LAST)}


def subject_of(model: nn.Module, processor: Any) -> Subject:
    """The embedded model, or one of another seed, as the localisation takes it."""
    return Subject(model, processor, language.prompt, Lexicon.embedded(), answer=" i feel", limit=20)


def pairs_of(people: Sequence[int], seed: int) -> Pairs:
    """Full-intensity faces and their neutral twins, drawn in memory."""
    cases = contradicting(people, [1.0], seed)
    twins = [dc.replace(c, emotion="neutral", intensity=0.0) for c in cases]
    records = tuple(
        Record(f"{c.identity}-{c.emotion}", c.emotion, Path(c.emotion), Path("neutral"), c.event, "analyze")
        for c in cases
    )
    return Pairs(records, tuple(c.image for c in cases), tuple(c.image for c in twins))


# -- heads -----------------------------------------------------------------------------------------------------------
def rank_heads(
    asked: Asked, subject: Subject, pairs: Pairs, steering: SteeringVectors, seed: int, progress: bool
) -> dict[str, list[Member]]:
    """All heads, best first, by ranking.

    ``projection``, ``log-odds`` and ``intention`` are those of :mod:`emocircuits.circuits.heads`, on full-intensity
    pairs, read in the last layer; ``boost`` and ``boost-margin`` are what VEE on that head alone does to weak
    contradicted faces (log-probability of the face's words; the same less that of the event's), with beta 3;
    ``attribution`` is the slope of the first at beta 1.
    """
    last = subject.handle.geometry.layers - 1
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    projected = critical_heads(subject, pairs, steering, last, **options)
    tables = {
        "projection": projected.effects,
        "intention": projected.intention,
        "log-odds": critical_heads(subject, pairs, steering, last, reads="log-odds", **options).effects,
    }
    base = asked.said()
    alone: dict[str, np.ndarray] = {
        n: np.zeros_like(projected.effects) for n in ("boost", "boost-margin", "attribution")
    }
    for place in tqdm(list(np.ndindex(projected.effects.shape)), desc="heads alone", disable=not progress):
        found = asked.said(boost([place], ALONE))
        alone["boost"][place] = (found.face - base.face).mean()
        alone["boost-margin"][place] = (found.margin - base.margin).mean()
        alone["attribution"][place] = (asked.said(boost([place], SLOPE)).face - base.face).mean() / (SLOPE - 1)
    return {name: ranked(table) for name, table in (tables | alone).items()}


# -- neurons ---------------------------------------------------------------------------------------------------------
def rank_neurons(
    asked: Asked, subject: Subject, pairs: Pairs, steering: SteeringVectors, progress: bool
) -> dict[str, list[Member]]:
    """Neurons, best first, by ranking.

    ``steering``: ``(a+ - a-) * <W_down[:, i], S/|S|>`` in the row that emits the word, on full-intensity pairs;
    ``vocabulary``: the same, of explicit-state neurons only. ``margin-P`` and ``probability-P``: ``a * dm / da`` over
    the rows of place P, on weak contradicted faces, where m is how much likelier the face's words are than the event's
    (in logarithms), or their probability; ``alone``: what amplifying that neuron alone, threefold in generated rows,
    does to this probability, of the first by probability-decode. ``told:E``: as steering, on the pairs of emotion E
    only; for a face of emotion E this list knows the answer.
    """
    tables = _steered(subject, pairs, steering)
    steered = tables.sum(0) / len(pairs)
    k = least_hits(len(asked.tokenizer), len(_emotional(subject)), 20)
    explicit = _explicit(subject, steered, k)
    found = {"steering": _positive(steered), "vocabulary": [p for p in _positive(steered) if p in explicit]}
    found |= {name: _positive(table) for name, table in gradients(asked, subject, progress).items()}
    base = np.exp(asked.said().face).mean()
    alone = np.full(steered.shape, -np.inf)
    for place in tqdm(found["probability-decode"][:SCREENED], desc="neurons alone", disable=not progress):
        alone[place] = np.exp(asked.said(scale([place], ALONE, "decode")).face).mean() - base
    found["alone"] = _positive(alone)
    return found | {f"{TOLD}{e}": _positive(t)[:200] for e, t in zip(EMOTIONS, tables, strict=True)}


def _positive(table: np.ndarray) -> list[Member]:
    return [p for p in ranked(table) if table[p] > 0]


def _emotional(subject: Subject) -> Tensor:
    return emotion_tokens(subject.tokenizer, subject.lexicon)


@torch.no_grad()
def _steered(subject: Subject, pairs: Pairs, steering: SteeringVectors) -> np.ndarray:
    """``[emotions, L, I]`` sum over pairs of what the face makes a neuron write along S where the word is emitted."""
    handle = subject.handle
    total = np.zeros((len(EMOTIONS), handle.geometry.layers, handle.geometry.neurons))
    for which, part in pairs.batches(64):
        seen = {}
        for side in SIDES:
            with capture(subject.model, ["neurons"], columns=[-1]) as found:
                subject.model(**part.inputs(subject, side, answer=True), use_cache=False, logits_to_keep=1)
            seen[side] = found["neurons"][:, :, 0].float()
        emotions = [pairs.emotions[i] for i in which]
        for layer in range(total.shape[1]):
            s = torch.stack([steering.of(e)[layer] for e in emotions])
            along = (s / s.norm(dim=-1, keepdim=True)) @ writes(handle, layer).float()
            change = ((seen["emotional"][layer] - seen["neutral"][layer]) * along).double().numpy()
            np.add.at(total[:, layer], [EMOTIONS.index(e) for e in emotions], change)
    return total


@torch.no_grad()
def _explicit(subject: Subject, steered: np.ndarray, k: int) -> set[Member]:
    """Neurons of whose top 20 tokens, at either end, at least k name emotions."""
    found = set()
    for layer in range(len(steered)):
        for sign in (1.0, -1.0):
            ids, _ = top_tokens(subject.model, layer, torch.full((steered.shape[1],), sign))
            spelled = torch.nonzero(hits(ids, _emotional(subject)) >= k).flatten()
            found |= {(layer, int(i)) for i in spelled}
    return found


def gradients(asked: Asked, subject: Subject, progress: bool, *, batch: int = 60) -> dict[str, np.ndarray]:
    """``[L, I]`` by measure and place: mean over cases of ``a * dm / da``, summed over the place's rows.

    The measures are read in the row after " i feel", see :func:`rank_neurons`.
    """
    handle = subject.handle
    shape = handle.geometry.layers, handle.geometry.neurons
    total = {f"{m}-{place}": np.zeros(shape) for m in ("margin", "probability") for place in PLACES}
    begun = torch.tensor(subject.begun)
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Gradients of activations only: the weights ask for none while this lasts.
        a = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()
        seen.append(a)
        return (a, *given[1:])

    wanted = [p for p in subject.model.parameters() if p.requires_grad]
    hooks = [p.register_forward_pre_hook(keep) for p in handle.down_projections]
    try:
        for p in wanted:
            p.requires_grad_(False)
        at = 0
        for whole in tqdm(asked.prompts.batches, desc="gradients", disable=not progress):
            for start in range(0, len(whole["input_ids"]), batch):
                inputs = {k: v[start : start + batch] for k, v in whole.items()}
                n = len(inputs["input_ids"])
                cases = asked.order[at : at + n]
                at += n
                roles = prompt_roles(inputs["input_ids"], inputs["attention_mask"].bool(), handle.placeholder_ids())
                tail = begun.expand(n, -1)
                roles = torch.cat([roles, torch.full_like(tail, int(Role.GENERATED), dtype=torch.uint8)], 1)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
                inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tail)], 1)
                seen.clear()
                logp = asked.emotions(subject.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1])
                rows = torch.arange(n)
                own = logp[rows, asked.faces[cases]]
                measures = {"margin": own - logp[rows, asked.suggests[cases]], "probability": own.exp()}
                for name, m in measures.items():
                    slopes = torch.autograd.grad(m.sum(), seen, retain_graph=name == "margin")
                    for layer, (a, slope) in enumerate(zip(seen, slopes, strict=True)):
                        product = (a.detach() * slope).double()
                        for place, kinds in PLACES.items():
                            mask = torch.isin(roles, torch.tensor([int(r) for r in kinds], dtype=torch.uint8))
                            total[f"{name}-{place}"][layer] += (product * mask[..., None]).sum((0, 1)).numpy()
    finally:
        for hook in hooks:
            hook.remove()
        for p in wanted:
            p.requires_grad_(True)
    return {name: table / len(asked) for name, table in total.items()}
