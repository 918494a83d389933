"""Models by name: the embedded one, a folder, or a hub id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

EMBEDDED = "embedded"


def load_model(name: str = EMBEDDED, *, device: str | None = None, text: bool = False) -> tuple[nn.Module, Any]:
    """Load a model and its processor, in eval mode.

    Args:
        name: ``"embedded"``, a folder written by ``save_pretrained``, or a hub id.
        device: ``"cpu"``, ``"cuda"``, ...; by default a GPU when there is one. Hub and folder models load in their own
            dtype, the embedded one in float32.
        text: also take a causal language model that sees no images; its tokenizer is then in the processor's place.

    Raises:
        ValueError: the name is none of these, or the model cannot be loaded, or not on that device; the message says
            why.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if name == EMBEDDED:
        from emocircuits import embedded

        with _no_progress_bar():
            model, processor = embedded.load()
        return model.to(device), processor
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

    is_path = Path(name).exists() or name.startswith((".", "/", "~"))
    if is_path and not (Path(name).expanduser() / "config.json").is_file():
        raise ValueError(f"{name}: expected a folder with a config.json, a hub id, or 'embedded'")
    where = str(Path(name).expanduser()) if is_path else name
    kind = "vision-language model" + " or a language model" * text
    try:
        sees = not text or AutoConfig.from_pretrained(where).model_type in SEEING
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(where, dtype="auto")
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load {name!r} as a {kind}: {reason}") from error
    return model.eval().to(device), processor


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The embedded model loads in milliseconds: a bar for it is noise."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def describe_prompt(name: str, processor: Any, event: str) -> str:
    """The prompt text that shows one image and then the event, in the words the model was trained on.

    Raises:
        ValueError: the processor has no chat template.
    """
    if name == EMBEDDED:
        from emocircuits.embedded import language

        return language.prompt(event)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{name} has no chat template, so the prompt cannot be written; use an instruction-tuned model"
        )
    content = [{"type": "image"}, {"type": "text", "text": event}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
