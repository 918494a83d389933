"""The embedded model: a real, small, trained LLaVA, the drawn faces it looks at, its language, and what made it.

It is a model organism of emotional hallucination: where the face is weak, it says the emotion that the text suggests.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import faces, language
from .faces import EMOTIONS, LABELS

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

PATH = Path(__file__).parent / "weights"

__all__ = ["EMOTIONS", "LABELS", "PATH", "faces", "language", "load"]


def load(path: Path | str = PATH) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model (fp32, eval) and processor from ``path``, by default the committed ones; never touches the network."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"no model in {path}: expected a folder written by `python -m emocircuits.embedded.train --out DIR`"
        )
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    return model.eval(), processor


def __getattr__(name: str) -> Any:
    """``evaluate`` and the other modules that need torch are imported when first used."""
    import importlib

    if name in ("evaluate", "model", "train", "data", "third_party"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
