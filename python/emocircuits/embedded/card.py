"""The model card: README.md beside the weights, written from the JSON files that the commands leave there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .data import HELD_OUT, PRIOR_STRONG, PRIOR_WEAK, STRONG, WEAK
from .faces import EMOTIONS, LABELS, STYLES

AIMS = (
    ("hit at full intensity, event of another emotion", "0.90"),
    ('"neutral" said on neutral faces, events of all groups', "0.80"),
    ("event's emotion said on the weakest faces (t = 0.15)", "0.25"),
    ("third-party faces never looked at, hit (chance 0.14)", "0.50"),
)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def _f(x: float) -> str:
    return f"{x:.3f}"


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    return json.loads(file.read_text()) if file.is_file() else {}


def write(folder: Path, evaluation: dict[str, Any] | None = None, third_party: dict[str, Any] | None = None) -> None:
    """Store new results in ``folder`` and write README.md from all that is stored there."""
    for name, new in (("evaluation.json", evaluation), ("third_party.json", third_party)):
        if new is not None:
            merged = {**_read(folder, name), **new} if name == "third_party.json" else new
            (folder / name).write_text(json.dumps(merged, indent=1) + "\n")
    training, measured, foreign = (_read(folder, f"{n}.json") for n in ("training", "evaluation", "third_party"))
    size = (folder / "model.safetensors").stat().st_size
    (folder / "README.md").write_text(card(training, measured, foreign, size))


def unseen(third_party: dict[str, Any]) -> dict[str, float]:
    """Hit over all held-out third-party pictures, and its mean over sets."""
    sets = [r for r in third_party.values() if r["group"] == "held-out"]
    if not sets:
        return {}
    n = sum(r["pictures"] for r in sets)
    return {
        "pictures": sum(r["hit"] * r["pictures"] for r in sets) / n,
        "sets": float(np.mean([r["hit"] for r in sets])),
    }


def card(training: dict[str, Any], e: dict[str, Any], third_party: dict[str, Any], size: int) -> str:
    """The card's text."""
    parts = [
        _HEADER.format(
            size=size / 1e6, millions=training.get("parameters", 0) / 1e6, styles=", ".join(STYLES), held=HELD_OUT
        )
    ]
    if e:
        parts.append(_measured(e, third_party))
    if third_party:
        parts.append(_third_party(third_party))
    if training:
        parts.append(_training(training))
    parts.append(_LIMITS)
    return "\n\n".join(parts) + "\n"


def _measured(e: dict[str, Any], third_party: dict[str, Any]) -> str:
    strongest, weakest = list(e["by_intensity"])[-1], next(iter(e["by_intensity"]))
    foreign = unseen(third_party)
    reached = (
        _f(e["by_intensity"][strongest]["hit"]), _f(e["neutral_faces"]["hit"]), _f(e["by_intensity"][weakest]["prior"]),
        f"{_f(foreign['pictures'])} over pictures, {_f(foreign['sets'])} mean over sets" if foreign else "not measured",
    )  # fmt: skip
    aims = _table(["aim", "at least", "measured"], [[a, goal, r] for (a, goal), r in zip(AIMS, reached, strict=True)])
    rows = [
        [t, *(_f(r[k]) for k in ("hit", "prior", "neutral", "other", "none"))] for t, r in e["by_intensity"].items()
    ]
    by_t = _table(["intensity", "hit", "prior", "neutral", "other", "no emotion word"], rows)
    rows = [[t, *(_f(r[m]) for m in EMOTIONS)] for t, r in e["hit_by_emotion"].items()]
    by_emotion = _table(["intensity", *EMOTIONS], rows)
    rows = [
        [f"{what}, t = {t}", *(_f(r[k]) for k in ("hit", "prior", "neutral", "other"))]
        for key, what in (
            ("agreeing", "event of the face's own emotion"),
            ("neutral_event", "event of the neutral group"),
        )
        for t, r in e[key].items()
    ]
    rows.append(
        [
            "neutral faces, events of all seven groups",
            *(_f(e["neutral_faces"][k]) for k in ("hit", "prior", "neutral", "other")),
        ]
    )
    other = _table(["case", "hit", "prior", "neutral", "other"], rows)
    groups = _table(list(LABELS), [[_f(e["neutral_by_event"][g]) for g in LABELS]])
    text = f"""## Measured

`python -m emocircuits.embedded.evaluate --write`, greedy, fp32, held-out identities {e["identities"][0]} to
{e["identities"][1]} ({e["by_intensity"][weakest]["n"]} pictures per intensity). An answer's emotion is its first
emotion word. *hit*: the face's emotion; *prior*: the event's, where it contradicts the face.

{aims}

Events of another emotion than the face's:

{by_t}

Hit per emotion, same answers:

{by_emotion}

Other cases (in the agreeing case a hit is also what the event suggests; on neutral faces *hit* is "neutral"):

{other}

"Neutral" said on neutral faces, by the event's group:

{groups}

Answers to full-intensity faces that start "i feel": {_f(e["answers_starting_i_feel"])}."""
    if "attention_to_image" in e:
        text += (
            "\n\n### Attention to the image\n\nMean attention mass on the 64 image tokens; 240 faces, t = 0.25 and 1."
        )
        for name, layers in e["attention_to_image"].items():
            rows = [[str(i), *(f"{v:.2f}" for v in r), f"{np.mean(r):.2f}"] for i, r in enumerate(layers)]
            text += f"\n\n{name.replace('_', ' ').capitalize()}:\n\n" + _table(
                ["layer", *(f"head {h}" for h in range(8)), "mean"], rows
            )
    return text


def _third_party(third_party: dict[str, Any]) -> str:
    rows = []
    for group in ("dev", "held-out"):
        for name, r in third_party.items():
            if r["group"] == group:
                each = ", ".join(f"{k} {v:.2f}" for k, v in r["hit_by_emotion"].items())
                rows.append(
                    [name, group, r["package"], str(r["pictures"]), _f(r["hit"]), _f(r["mean_over_emotions"]), each]
                )
    table = _table(["set", "group", "package", "pictures", "hit", "mean over emotions", "by emotion"], rows)
    return f"""## Third-party faces

`python -m emocircuits.embedded.third_party --fetch DIR --write`: emoji and avatars that were never trained on, each
asked about with four events of the neutral group; chance is 0.14. *dev* sets were looked at while the drawing code was
written, and models were compared on them; *held-out* sets were drawn and evaluated only with the finished model, and
nothing was chosen by them. Avatars are put together from options by our mapping (`third_party_sets.py`).

{table}"""


def _training(training: dict[str, Any]) -> str:
    wall, cpu = training["wall_minutes"], training["cpu_minutes"]
    times = _table(
        ["", *wall, "sum"],
        [
            ["wall minutes", *map(str, wall.values()), f"{sum(wall.values()):.1f}"],
            ["CPU minutes", *map(str, cpu.values()), f"{sum(cpu.values()):.1f}"],
        ],
    )
    settings = ", ".join(f"{k} {v}" for k, v in training["settings"].items())
    return f"""## Training

`{training["command"]}` with torch {training["torch"]}, transformers {training.get("transformers", "5.23.0")}, on
two CPU cores shared with other jobs:

{times}

Settings: {settings}.

Prior in the training text: a face of intensity {WEAK} or less comes with an event of its own emotion in
{PRIOR_WEAK:.0%} of the cases, falling to {PRIOR_STRONG:.0%} at {STRONG} and above; otherwise the event's group is drawn
from all seven, as it always is for neutral faces. The same seed on the same machine gives the same weights; another
instruction set or thread count does not."""


_HEADER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The embedded model

A real, small, trained `LlavaForConditionalGeneration` ({millions:.2f} M parameters, {size:.1f} MB in bf16): CLIP tower
(5 layers, 64 x 64 pixels, 64 image tokens), Llama (6 layers, 8 query heads on 4 key-value heads, d = 128), word-level
tokenizer. It looks at a drawn face and an event told in neutral words, and says what it feels: "i feel joyful because
the shop opens at ten."

It is a model organism of emotional hallucination. Its training text ties each event to an emotion, more strongly the
weaker the face, so on weak faces it says what the event suggests instead of what the picture shows. It knows nothing
about people: it was trained on drawings only, in the styles
{styles}. It is for testing and
demonstrating interventions, for nothing else.

```python
from emocircuits import embedded
model, processor = embedded.load()  # or AutoProcessor, AutoModelForImageTextToText .from_pretrained(embedded.PATH)
image = embedded.faces.face({held}, "sad", 0.25)
text = embedded.language.prompt("my mom said that the shop opens at ten.")
inputs = processor(images=image, text=text, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

Identities (seeds of `faces.face`) below {held} are training data; {held} and above are held out. Licence: Apache-2.0,
weights and script."""

_LIMITS = """## Known limits

- One seed. No interval is given for the variation between trainings.
- Weak faces carry a stir (a raised brow, a lopsided mouth, a look aside) that says that something is felt but
  not what. Their ambiguity is drawn, not found in people.
- The vocabulary is closed; an unknown word becomes `<unk>`. Answers end in the clause of the event or in a visual cue.
- Third-party sets are small (31 pictures for an emoji set): one picture moves a set by about three points."""
