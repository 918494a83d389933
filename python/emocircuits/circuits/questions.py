"""General ability: a small set of questions that are not about feelings, asked with and without an intervention."""

from __future__ import annotations

import dataclasses as dc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from emocircuits.circuits.subject import Subject
from emocircuits.data.pictures import open_image
from emocircuits.patching import patch
from emocircuits.plan import Plan

FIRST = 106_000
"""Identities of the embedded model's questions: no pairs have them."""
GREY = (128, 128, 128)


@dc.dataclass(frozen=True, eq=False)
class Question:
    """Something to ask, and the words that the reply must begin with.

    Attributes:
        prompt: the whole prompt text, with one image in it.
        answer: compared without case and punctuation.
        image: what is shown.
        begins: forced beginning of the reply.
    """

    prompt: str
    answer: str
    image: Image.Image
    begins: str = ""

    def right(self, reply: str) -> bool:
        """Whether the first words of a reply are the answer."""
        wanted = _words(self.answer)
        return _words(reply)[: len(wanted)] == wanted


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def embedded_questions(count: int = 40, *, first: int = FIRST) -> list[Question]:
    """What the embedded model can be asked besides feelings: the colour of clothes, and whether it sees a person.

    (It cannot tell colours of hair.)

    Args:
        count: questions, about one resting face each; two of one kind, two of the other, so that
            every second one is a set of both kinds, too.
        first: identity from which on faces are drawn; other sets need others.
    """
    from emocircuits.embedded import faces, language
    from emocircuits.embedded.faces.identity import STYLE

    found: list[Question] = []
    number = first
    clauses = [c for group in language.CLAUSES.values() for c in group]
    while len(found) < count:
        who, rng = faces.identity_of(number), np.random.default_rng(number)
        event = language.make_event(clauses[int(rng.integers(len(clauses)))], rng)
        face = faces.face(number, "neutral", 0.0)
        number += 1
        person, asks_clothes = STYLE[who.style].person, len(found) % 4 < 2
        if asks_clothes and not person:
            continue
        if asks_clothes:
            begins, answer = " i see the person in", who.cloth
        else:
            begins, answer = " i see the", "person" if person else "drawn face"
        found.append(Question(language.prompt(event), answer, face, begins))
    return found


def questions_file(subject: Subject, path: str | Path) -> list[Question]:
    """Questions from a JSONL file, asked through the chat template.

    ``{"question": "What is the capital of France? Answer in one word.", "answer": "Paris", "image": "a.png"}`` a line;
    ``image`` is relative to the file. Without one a grey picture is shown, so that there is something to attend to.

    Raises:
        ValueError: a line that is no question, no lines, a picture that cannot be opened, or no chat template.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read questions ({error})") from error
    if getattr(subject.processor, "chat_template", None) is None:
        raise ValueError("the processor has no chat template, so questions cannot be asked; make Question objects")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is no JSON ({error})") from error
        fields = ("question", "answer", "image")
        if not isinstance(given, dict) or not all(isinstance(given.get(f, ""), str) for f in fields):
            raise ValueError(f'{path}: line {number}: expected {{"question": "...", "answer": "..."}}, image optional')
        if not given.get("question", "").strip() or not _words(given.get("answer", "")):
            raise ValueError(f"{path}: line {number}: a question and an answer with a word in it are needed")
        image = open_image(path.parent / given["image"]) if given.get("image") else Image.new("RGB", (224, 224), GREY)
        content = [{"type": "image"}, {"type": "text", "text": given["question"].strip()}]
        prompt = subject.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        found.append(Question(str(prompt), given["answer"], image))
    if not found:
        raise ValueError(f"{path}: there are no questions")
    return found


@torch.no_grad()
def replies(
    subject: Subject, questions: Sequence[Question], plan: Plan | None = None, *, limit: int = 8, batch: int = 64
) -> list[str]:
    """Greedy replies under a plan, without their forced beginnings; these have the role GENERATED.

    Args:
        subject: the model.
        questions: at least one.
        plan: None for the model left alone.
        limit: new tokens.
        batch: questions at a time.
    """
    said = [""] * len(questions)
    model: Any = subject.model
    for begins in dict.fromkeys(q.begins for q in questions):
        asker = dc.replace(subject, prompt=str, answer=begins)
        which = [i for i, q in enumerate(questions) if q.begins == begins]
        which.sort(key=lambda i: len(questions[i].prompt))
        for start in range(0, len(which), batch):
            part = which[start : start + batch]
            inputs: dict[str, Any] = asker.inputs(
                [questions[i].image for i in part], [questions[i].prompt for i in part], answer=True
            )
            roles = asker.roles(inputs, answer=True)
            with patch(model, plan or Plan(), roles=roles):
                out = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
            texts = subject.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(part, texts, strict=True):
                said[i] = text.strip()
    return said


def ability(subject: Subject, questions: Sequence[Question], plan: Plan | None = None) -> np.ndarray:
    """``[n]`` float64, 1 where a question is answered exactly, under a plan."""
    longest = max(len(subject.tokenizer(q.answer)["input_ids"]) for q in questions)
    said = replies(subject, questions, plan, limit=longest + 2)
    return np.array([q.right(text) for q, text in zip(questions, said, strict=True)], float)
