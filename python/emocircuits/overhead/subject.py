"""What is timed: a model, a prompt, and the interventions that are put into it."""

from __future__ import annotations

import copy
import dataclasses as dc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from emocircuits.circuit import Circuit
from emocircuits.edits import BoostRoute, Edit, ScaleNeurons
from emocircuits.families import Geometry, Handle, open_model
from emocircuits.overhead import prompts, shapes
from emocircuits.plan import Plan
from emocircuits.roles import prompt_roles
from emocircuits.veena import VEENA
from emokernels import Role

HEADS, NEURONS = 10, 30
"""Size of a circuit that nobody found: the paper's."""
SHARE = 100
"""One neuron of so many is edited by the plan that edits every head."""
STRONG = 8.0
"""Strength on random weights. It changes no time, and what the edits do must stand out from rounding to be checked."""


@dc.dataclass(frozen=True)
class Subject:
    """A model with a prompt and plans.

    Attributes:
        name: the model's.
        inputs: a prompt without padding; every row has the same layout.
        roles: ``[N]`` uint8, of any row.
        plans: by intervention: ``veena``, ``veena_logit`` (the same strengths added to the logits) and ``everything``.
        note: where VEENA's circuit comes from.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    roles: Tensor
    plans: dict[str, Plan]
    note: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def about(self) -> dict[str, Any]:
        """Facts for the record."""
        handle = open_model(self.model)
        parameters = sum(p.numel() for p in self.model.parameters())
        counted = {role.name.lower(): int((self.roles == int(role)).sum()) for role in Role}
        return {
            "name": self.name,
            "model_type": handle.config.model_type,
            "parameters": parameters,
            "device": str(self.device),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "geometry": dc.asdict(handle.geometry),
            "batch": self.inputs["input_ids"].shape[0],
            "prompt": self.inputs["input_ids"].shape[1],
            "roles": {name: n for name, n in counted.items() if n},
            "circuit": self.note,
        }

    def copy(self) -> nn.Module:
        """Another model object on the same weights: contenders stay installed side by side and share no state."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)


def make(
    *,
    model: str | None = None,
    config: str | shapes.Shape | None = None,
    batch: int = 1,
    prompt: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
) -> Subject:
    """Load or build what is to be timed.

    Args:
        model: ``"embedded"``, a folder or a hub id; or
        config: a name in `shapes.SHAPES` or a shape, for random weights.
        batch: rows.
        prompt: tokens of the prompt; None: as many as the model's own prompt, or `prompts.AFTER` after the image.
        dtype: None: the model's own; for random weights bfloat16 on a GPU and float32 elsewhere.
        device: None: a GPU when there is one.
        seed: of random weights, pixels and circuits.

    Raises:
        ValueError: an unknown name, a prompt that is too short, or a model without images.
        NotImplementedError: the model's family is not supported.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config is not None:
        shape = shapes.find(config) if isinstance(config, str) else config
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        loaded = shapes.build(shape, device, dtype, seed)
        name = f"{shape.name}, random weights"
        open_model(loaded)
        inputs = prompts.of_shape(loaded, shape, batch, prompt, seed)
    else:
        from emocircuits.loading import describe_prompt, load_model

        name = model or "embedded"
        loaded, processor = load_model(name, device=device)
        loaded = loaded if dtype is None else loaded.to(dtype)
        event = prompts.EMBEDDED_EVENT if name == "embedded" else prompts.EVENT
        text = describe_prompt(name, processor, event)
        inputs = prompts.of_processor(processor, text, batch, prompt, loaded)
    handle = open_model(loaded)
    if not handle.sees:
        raise ValueError(f"{name} is a text-only model; the interventions timed here act on visual tokens")
    roles = _common_roles(handle, inputs)
    # Fixed lengths and no sampling, whatever the model ships.
    setattr(loaded, "generation_config", GenerationConfig(pad_token_id=0))  # noqa: B010
    circuit, note = circuit_of(handle, name, seed)
    strong = config is not None
    settings: dict[str, Any] = {"beta": STRONG, "gamma": STRONG} if strong else dict(circuit.settings.get("veena", {}))
    weight = dc.replace(VEENA(circuit, **settings), reading="weight")
    logit = dc.replace(weight, reading="logit-add")
    plans = {
        "veena": weight.plan(loaded),
        "veena_logit": logit.plan(loaded),
        "everything": everything(handle.geometry, STRONG if strong else 1.2),
    }
    return Subject(name, loaded, inputs, roles, plans, note + (f"; strengths {STRONG:g}" if strong else ""))


def _common_roles(handle: Handle, inputs: dict[str, Tensor]) -> Tensor:
    real = inputs.get("attention_mask")
    roles = prompt_roles(inputs["input_ids"], None if real is None else real.bool(), handle.placeholder_ids())
    if bool((roles != roles[:1]).any()) or bool((roles == int(Role.PAD)).any()):
        raise ValueError("the rows of a timed batch must have one layout and no padding")
    return roles[0]


def circuit_of(handle: Handle, name: str, seed: int) -> tuple[Circuit, str]:
    """The circuit that ships with a model, or a made-up one of the paper's size."""
    if name == "embedded":
        from emocircuits import embedded

        return Circuit.load(Path(embedded.PATH) / "circuit.json"), "the embedded model's own circuit"
    g = handle.geometry
    made = synthetic(handle.config.model_type, g, seed)
    layers = len({layer for layer, _ in made.heads}), len({layer for layer, _ in made.neurons})
    return made, (
        f"synthetic: nobody has looked for this model's circuit; {len(made.heads)} heads in {layers[0]} layers and "
        f"{len(made.neurons)} neurons in {layers[1]}, l_emo {made.l_emo}"
    )


def synthetic(model_type: str, geometry: Geometry, seed: int = 0) -> Circuit:
    """A circuit of the paper's size: heads spread over the middle half of the layers, neurons from there to the top.

    No two heads share a layer where there are layers enough: the most that so many heads can cost.
    """
    chosen = torch.Generator().manual_seed(seed)

    def spread(count: int, first: int, last: int, width: int) -> tuple[tuple[int, int], ...]:
        at = torch.linspace(first, last, count).round().long().tolist()
        found: dict[tuple[int, int], None] = {}
        for layer in at:
            while (pair := (layer, int(torch.randint(width, (), generator=chosen)))) in found:
                pass
            found[pair] = None
        return tuple(found)

    layers = geometry.layers
    heads = spread(min(HEADS, layers * geometry.heads // 2), layers // 4, (3 * layers) // 4 - 1, geometry.heads)
    neurons = spread(min(NEURONS, layers * geometry.neurons // 2), layers // 4, layers - 1, geometry.neurons)
    return Circuit(model_type, layers, (layers - 1) // 2, heads, neurons)


def everything(geometry: Geometry, by: float) -> Plan:
    """Every head's attention to visual tokens, in prefill and decode, and 1 % of the neurons of every layer."""
    heads = [(layer, head) for layer in range(geometry.layers) for head in range(geometry.heads)]
    edits: list[Edit] = [BoostRoute(heads, "visual", by, to=["query", "last", "generated"])]
    if geometry.neurons:
        step = max(1, round(geometry.neurons / max(1, round(geometry.neurons / SHARE))))
        chosen = tuple(range(0, geometry.neurons, step))
        edits.append(ScaleNeurons(tuple((layer, chosen) for layer in range(geometry.layers)), by))
    return Plan(edits)
