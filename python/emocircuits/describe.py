"""One description of one image, with and without VEENA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from emocircuits import loading
from emocircuits.circuit import Circuit
from emocircuits.families import open_model
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emocircuits.veena import VEENA


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB; ``ValueError`` says what is wrong with it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image file; give a PNG, JPEG or another format that Pillow reads") from error
    except (OSError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot read the image ({reason})") from error


def describe(
    image: str | Path, event: str, *, model: str = loading.EMBEDDED, circuit: str | Path | None = None,
    plan: str | Path | None = None, beta: float | None = None, gamma: float | None = None, tokens: int = 40,
) -> dict[str, Any]:  # fmt: skip
    """Describe ``image`` with ``event`` greedily, with the model left alone and with VEENA.

    Args:
        image: image file.
        event: a sentence of what happened.
        model: ``"embedded"``, a folder or a hub id.
        circuit: circuit file of that model; the embedded model brings its own.
        plan: a plan file to use instead of a circuit.
        beta, gamma: override the strengths that were chosen for the circuit.
        tokens: longest answer.

    Raises:
        ValueError: a file cannot be read, or the circuit or plan does not fit the model.
    """
    picture = open_image(image)
    if not event.strip():
        raise ValueError("the event is empty; give a sentence such as 'my mom said that the report is ready.'")
    if plan is not None and (circuit is not None or beta is not None or gamma is not None):
        raise ValueError("a plan already says everything; give either a plan, or a circuit with beta and gamma")
    given = Plan.load(plan) if plan is not None else veena_of(model, circuit, beta, gamma)
    loaded, processor = loading.load_model(model)
    chosen = given if isinstance(given, Plan) else given.plan(loaded)
    text = loading.describe_prompt(model, processor, event)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    device = next(loaded.parameters()).device
    dtype = next(open_model(loaded).text.parameters()).dtype
    inputs = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    @torch.inference_mode()
    def say() -> str:
        out = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
        return str(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]).strip()

    without = say()
    with patch(loaded, chosen):
        edited = say()
    return {
        "image": str(image),
        "event": event,
        "model": model,
        "without": without,
        "with": edited,
        "plan": chosen.to_dict(),
    }


def veena_of(
    model: str, circuit: str | Path | None, beta: float | None = None, gamma: float | None = None
) -> VEENA:  # fmt: skip
    """VEENA with the settings that a circuit file says, by default that of the embedded model.

    Args:
        model, circuit, beta, gamma: as for :func:`describe`.

    Raises:
        ValueError: no circuit is known for the model, or its file cannot be read.
    """
    if circuit is None:
        if model != loading.EMBEDDED:
            raise ValueError(
                f"no circuit is known for {model!r}; give --circuit FILE, found in this model, or --plan FILE"
            )
        from emocircuits import embedded

        circuit = embedded.PATH / "circuit.json"
    found = Circuit.load(circuit)
    settings = dict(found.settings.get("veena", {}))
    settings |= {k: v for k, v in (("beta", beta), ("gamma", gamma)) if v is not None}
    try:
        return VEENA(found, **settings)
    except TypeError as error:
        raise ValueError(f"{circuit}: settings.veena does not fit this release ({error})") from error
