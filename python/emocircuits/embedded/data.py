"""Training data: faces drawn in bulk, and conversations about them with a prior that ties events to emotions."""

from __future__ import annotations

import dataclasses as dc
import multiprocessing

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .faces import CHANNELS, CLOTH, HAIR, LABELS, SIZE, STYLES, Identity, identity_of, render, sample_expression
from .faces.identity import STYLE
from .language import ADJECTIVES, CLAUSES, NOUNS, answer, describe, make_event, prompt
from .model import EOS, IMAGE_TOKENS, PAD

HELD_OUT = 100_000  # identities from this number on are never trained on
WEAK, STRONG = 0.30, 0.60  # intensities between which the prior fades
PRIOR_WEAK, PRIOR_STRONG = 0.90, 0.20  # share of emotional faces shown with an event of their own emotion
HIDDEN = -100  # label of an attribute that cannot be seen


@dc.dataclass
class Faces:
    """N pictures. images [N, 64, 64, 3] uint8; emotion, hair, cloth, style [N] indices; intensity [N] in [0, 1]."""

    images: torch.Tensor
    emotion: torch.Tensor
    intensity: torch.Tensor
    hair: torch.Tensor
    cloth: torch.Tensor
    style: torch.Tensor
    channels: torch.Tensor  # [N, C] size of each channel of the expression, in units of its spread over the data
    identities: list[Identity]  # one per len(LABELS) pictures

    def __len__(self) -> int:
        return len(self.images)


def _draw(seed: int) -> tuple[Identity, np.ndarray, np.ndarray, np.ndarray]:
    """One identity with every label: pictures [7, 64, 64, 3], intensities [7], channels [7, C]."""
    who, rng = identity_of(seed), np.random.default_rng([13, seed])
    pictures, strengths, channels = [], [], []
    for label in LABELS:
        t = 0.0 if label == "neutral" else float(rng.uniform(0.1, 1.0) if rng.random() < 0.6 else rng.uniform(0.6, 1.0))
        expression = sample_expression(label, t, rng)
        pictures.append(np.asarray(render(who, expression)))
        strengths.append(t)
        channels.append([abs(expression.get(c, 0.0)) for c in CHANNELS])  # a mirrored face has the same sizes
    return who, np.stack(pictures), np.array(strengths, np.float32), np.array(channels, np.float32)


def draw_faces(identities: int, workers: int, first: int = 0) -> Faces:
    """Draw ``identities`` x 7 training pictures in ``workers`` processes; the result does not depend on ``workers``."""
    if not 0 < first + identities <= HELD_OUT:
        raise ValueError(
            f"identities {first}..{first + identities} reach into the held-out ones, which start at {HELD_OUT}"
        )
    seeds = range(first, first + identities)
    n = len(LABELS)
    images = torch.empty(identities * n, SIZE, SIZE, 3, dtype=torch.uint8)
    intensity = torch.empty(identities * n)
    channels = torch.empty(identities * n, len(CHANNELS))
    people: list[Identity] = []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for i, (who, pictures, strengths, sizes) in enumerate(
            tqdm(pool.imap(_draw, seeds, chunksize=64), total=identities, desc="draw", mininterval=5)
        ):
            people.append(who)
            images[i * n : (i + 1) * n] = torch.from_numpy(pictures)
            intensity[i * n : (i + 1) * n] = torch.from_numpy(strengths)
            channels[i * n : (i + 1) * n] = torch.from_numpy(sizes)

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values).repeat_interleave(n)

    person = [STYLE[p.style].person for p in people]
    hair_seen = [s and not p.hat and p.hair_style != 5 for p, s in zip(people, person, strict=True)]
    hair = [list(HAIR).index(p.hair) if s else HIDDEN for p, s in zip(people, hair_seen, strict=True)]
    cloth = [list(CLOTH).index(p.cloth) if s else HIDDEN for p, s in zip(people, person, strict=True)]
    return Faces(
        images, torch.arange(n).repeat(identities), intensity, index(hair), index(cloth),
        index([STYLES.index(p.style) for p in people]), channels / channels.std(0).clamp(min=1e-3), people,
    )  # fmt: skip


def prior(intensity: float) -> float:
    """Share of faces of this intensity that are shown with an event of their own emotion."""
    return float(np.interp(intensity, [WEAK, STRONG], [PRIOR_WEAK, PRIOR_STRONG]))


def draw_event_group(label: str, intensity: float, rng: np.random.Generator) -> str:
    """Group of the event for one face. Neutral faces come with events of every group alike."""
    if label != "neutral" and rng.random() < prior(intensity):
        return label
    return LABELS[rng.integers(len(LABELS))]


@dc.dataclass
class Batch:
    """Each row holds one image and several conversations that see the image and themselves, not each other."""

    input_ids: torch.Tensor  # [B, L]
    position_ids: torch.Tensor  # [B, L]; every conversation continues where the image ended
    attention_mask: torch.Tensor  # [B, 1, L, L] additive float
    labels: torch.Tensor  # [B, L] next token to predict, -100 where nothing is asked
    emotional: torch.Tensor  # [B, L] bool: the token to predict is an emotion word


class Conversations:
    """Builds training batches of text for chosen faces."""

    def __init__(self, faces: Faces, tokenizer: PreTrainedTokenizerBase, per_image: int) -> None:
        self.faces, self.tokenizer, self.per_image = faces, tokenizer, per_image
        head = tokenizer(prompt("x").split("\n")[0])["input_ids"]
        self.prefix = [*head[:-1], *head[-1:] * IMAGE_TOKENS]
        words = [w for e in LABELS for w in (*ADJECTIVES[e], *NOUNS[e])]
        self.emotion_words = torch.zeros(len(tokenizer), dtype=torch.bool)
        self.emotion_words[tokenizer.convert_tokens_to_ids(words)] = True

    def _talk(self, face: int, rng: np.random.Generator) -> tuple[str, str]:
        """One (question, answer) about picture number ``face``."""
        label, t = LABELS[int(self.faces.emotion[face])], float(self.faces.intensity[face])
        clauses = CLAUSES[draw_event_group(label, t, rng)]
        clause = clauses[rng.integers(len(clauses))]
        who = describe(self.faces.identities[face // len(LABELS)], rng)
        return prompt(make_event(clause, rng)).split("\n")[1], answer(label, t, clause, who, rng)

    def batch(self, faces: list[int], rng: np.random.Generator) -> Batch:
        """Conversations for these pictures."""
        talks = [self._talk(f, rng) for f in faces for _ in range(self.per_image)]
        ask = self.tokenizer([q for q, _ in talks], add_special_tokens=False)["input_ids"]
        say = self.tokenizer([a for _, a in talks], add_special_tokens=False)["input_ids"]
        start, k = len(self.prefix), self.per_image
        longest = max(sum(len(ask[i + j]) + len(say[i + j]) + 1 for j in range(k)) for i in range(0, len(talks), k))
        length = (
            -(-(start + longest) // 16) * 16
        )  # few different shapes: each new one costs the matrix library a set-up
        shape = (len(faces), length)
        ids, labels = torch.full(shape, PAD), torch.full(shape, HIDDEN)
        positions = torch.zeros(shape, dtype=torch.long)
        segment = torch.full(shape, -1)  # 0 the image's prefix, then 1, 2, ... per conversation
        for row in range(len(faces)):
            ids[row, :start], positions[row, :start], segment[row, :start] = (
                torch.tensor(self.prefix),
                torch.arange(start),
                0,
            )
            at = start
            for j in range(k):
                q, a = ask[row * k + j], [*say[row * k + j], EOS]
                end = at + len(q) + len(a)
                ids[row, at:end] = torch.tensor(q + a)
                positions[row, at:end] = start + torch.arange(end - at)
                segment[row, at:end] = j + 1
                labels[row, end - len(a) - 1 : end - 1] = torch.tensor(a)
                at = end
        see = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        see &= torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]
        emotional = (labels >= 0) & self.emotion_words[labels.clamp(min=0)]
        return Batch(ids, positions, mask, labels, emotional)
