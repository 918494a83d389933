"""A file of prompt pairs: one JSON object a line, read and checked before anything runs.

``{"clean": "...", "corrupt": "...", "answer": "...", "wrong": "..."}``: two prompts, word for word as the
tokenizer gets them, the token that the clean one should give, and the one that the corrupt one suggests (needed by a
logit difference). Prompts about images hold the processor's image token and name a file for each side,
``"clean_image"`` and ``"corrupt_image"``, relative to the pairs file. ``"id"`` is optional.

A file of single prompts, whose activations are drawn (``patch_with="resample"``), has lines ``{"prompt": "..."}``, with
``"image"`` where the pairs have images.
"""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

FIELDS = ("id", "clean", "corrupt", "answer", "wrong", "clean_image", "corrupt_image")
T = TypeVar("T")


@dc.dataclass(frozen=True)
class Pair:
    """One line of a pairs file; `line` counts from 1."""

    line: int
    id: str
    clean: str
    corrupt: str
    answer: str
    wrong: str | None = None
    clean_image: Path | None = None
    corrupt_image: Path | None = None


@dc.dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts."""

    line: int
    text: str
    image: Path | None = None


@dc.dataclass(frozen=True)
class Prepared:
    """A pair as model inputs: one row each, and the tokens of the answers."""

    pair: Pair
    clean: dict[str, Any]
    corrupt: dict[str, Any]
    answer: int
    wrong: int | None


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a pairs file.

    Raises:
        ValueError: it cannot be read, or a line is wrong: every wrong line is named, with what is wrong.
    """
    path = Path(path)
    pairs, wrong = _lines(path, "pairs", _pair)
    names = [pair.id for pair in pairs]
    wrong += [
        f"id {name!r} is there {names.count(name)} times" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    _refuse(path, wrong)
    if not pairs:
        raise ValueError(f"{path}: holds no pairs; expected one JSON object a line")
    return pairs


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts.

    Raises:
        ValueError: it cannot be read, or a line is wrong: every wrong line is named, with what is wrong.
    """
    path = Path(path)
    prompts, wrong = _lines(path, "prompts", _prompt)
    _refuse(path, wrong)
    if not prompts:
        raise ValueError(f"{path}: holds no prompts; expected one JSON object a line")
    return prompts


def _lines(path: Path, what: str, parse: Callable[[int, Any, Path], T]) -> tuple[list[T], list[str]]:
    """What a file holds, one JSON object a line, and what is wrong with its lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the {what} ({getattr(error, 'strerror', None) or error})") from error
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse(number, json.loads(line), path.parent))
        except json.JSONDecodeError as error:
            wrong.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    return found, wrong


def _refuse(path: Path, wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:5])}{more}")


def _texts(record: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """Refuse what is no object of texts with these fields."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a {type(record).__name__}, expected an object with {', '.join(needed)}")
    unknown = [k for k in record if k not in known]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(known)}")
    for name, value in record.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} is {value!r}, expected a text")
    lacking = [k for k in needed if k not in record]
    if lacking:
        raise ValueError(f"lacks {' and '.join(lacking)}")


def _prompt(number: int, record: Any, folder: Path) -> Prompt:
    _texts(record, ("prompt", "image"), ("prompt",))
    image = folder / record["image"] if "image" in record else None
    if image is not None and not image.is_file():
        raise ValueError(f"image {image} is not a file")
    return Prompt(number, record["prompt"], image)


def _pair(number: int, record: Any, folder: Path) -> Pair:
    _texts(record, FIELDS, ("clean", "corrupt", "answer"))
    if ("clean_image" in record) != ("corrupt_image" in record):
        raise ValueError("has an image on one side only; a pair needs both, or none")
    images: dict[str, Path] = {}
    for side in ("clean_image", "corrupt_image"):
        if side in record:
            images[side] = folder / record[side]
            if not images[side].is_file():
                raise ValueError(f"{side} {images[side]} is not a file")
    return Pair(
        number, record.get("id", f"line-{number}"), record["clean"], record["corrupt"], record["answer"],
        record.get("wrong"), **images,
    )  # fmt: skip


def prepare(
    pairs: list[Pair], processor: Any, *, needs_wrong: bool = True, device: torch.device | str = "cpu",
    path: str | Path = "pairs",
) -> list[Prepared]:  # fmt: skip
    """Tokenize pairs and read their images.

    Args:
        pairs: from :func:`read_pairs`.
        processor: a processor or a tokenizer, as the model's own.
        needs_wrong: whether the metric compares two answers.
        device: of the inputs.
        path: named in errors.

    Raises:
        ValueError: a pair whose prompts have different numbers of tokens (positions then mean nothing), whose answer is
            not one token, whose image cannot be opened, or that has images and no processor for them.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    done, wrong = [], []
    for pair in pairs:
        try:
            done.append(_prepare(pair, processor, tokenizer, needs_wrong, device))
        except ValueError as error:
            wrong.append(f"line {pair.line}: {error}")
    _refuse(Path(path), wrong)
    return done


def prepare_prompts(
    prompts: list[Prompt], processor: Any, *, device: torch.device | str = "cpu", path: str | Path = "prompts"
) -> list[dict[str, Any]]:
    """Model inputs of prompts, one row each.

    Args:
        prompts: from :func:`read_prompts`.
        processor, device, path: see :func:`prepare`.

    Raises:
        ValueError: an image that cannot be opened, or that the model has no processor for.
    """
    done, wrong = [], []
    for prompt in prompts:
        try:
            done.append(_encode(prompt.text, prompt.image, processor, device, "prompt", "image"))
        except ValueError as error:
            wrong.append(f"line {prompt.line}: {error}")
    _refuse(Path(path), wrong)
    return done


def _encode(
    text: str, image: Path | None, processor: Any, device: torch.device | str, side: str, field: str
) -> dict[str, Any]:
    """Model inputs of one prompt; ``side`` and ``field`` name it and its image in errors."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if image is None:
        found = tokenizer(text, return_tensors="pt")
    elif processor is tokenizer:
        raise ValueError("has images, and the model has a tokenizer only; use a vision-language model")
    else:
        try:
            with Image.open(image) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"{field} {image} cannot be opened ({error})") from error
        try:
            found = processor(images=picture, text=text, return_tensors="pt")
        except (ValueError, IndexError, StopIteration) as error:
            raise ValueError(f"the processor refuses the {side} with its image ({error})") from error
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}
    # Many tokenizers return segment ids that decoders do not take.
    inputs.pop("token_type_ids", None)
    return inputs


def _prepare(pair: Pair, processor: Any, tokenizer: Any, needs_wrong: bool, device: torch.device | str) -> Prepared:
    sides = {
        side: _encode(text, image, processor, device, f"{side} prompt", f"{side}_image")
        for side, text, image in (
            ("clean", pair.clean, pair.clean_image), ("corrupt", pair.corrupt, pair.corrupt_image),
        )
    }  # fmt: skip
    a, b = (int(sides[side]["input_ids"].shape[-1]) for side in ("clean", "corrupt"))
    if a != b:
        raise ValueError(
            f"clean has {a} tokens, corrupt {b}: a position is not the same place in both; write prompts of one length"
        )
    if a == 0:
        raise ValueError("the prompts have no tokens")
    answer = _one_token(tokenizer, "answer", pair.answer)
    if needs_wrong and pair.wrong is None:
        raise ValueError("lacks wrong, the answer to compare with; give it, or choose --metric log_prob or kl")
    other = None if pair.wrong is None else _one_token(tokenizer, "wrong", pair.wrong)
    if other == answer:
        raise ValueError(f"answer {pair.answer!r} and wrong {pair.wrong!r} are the same token")
    return Prepared(pair, sides["clean"], sides["corrupt"], answer, other)


def _one_token(tokenizer: Any, name: str, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        words = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"{name} {text!r} is {len(ids)} tokens ({words}), expected one; mind the space before a word")
    if ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"{name} {text!r} is not in the model's vocabulary")
    return int(ids[0])
