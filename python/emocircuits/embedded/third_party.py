"""Faces the model was never trained on: ``python -m emocircuits.embedded.third_party --fetch DIR [--group dev]``.

Fetches emoji and avatar packages with npm (by name and version, see third_party_sets.py) into DIR,
draws them with node,
and asks the model what it feels. Nothing fetched belongs into the repository. Chance is 1/7.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .evaluate import event_for, generate
from .faces import LABELS, SIZE
from .language import first_emotion
from .third_party_sets import AVATARS, EMOJI, SETS, TOOLS, Set

EVENTS = 4  # neutral-group events asked about each picture
SEEDS = 4  # hair, clothes and colours per avatar expression


def _chosen(group: str) -> list[Set]:
    chosen = [s for s in SETS if group in ("all", s.group)]
    if not chosen:
        raise ValueError(f"group is {group!r}: expected dev, held-out or all")
    return chosen


def fetch(folder: Path, sets: list[Set]) -> None:
    """Install the packages of these sets into ``folder`` with npm, and draw what is SVG."""
    for tool in ("npm", "node"):
        if shutil.which(tool) is None:
            raise ValueError(
                f"{tool} is not on the PATH: it is needed to fetch third-party faces; install Node.js 18 or newer"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"name": "faces", "private": true, "type": "module"}\n')
    names = [f"{n}@{v}" for n, v in TOOLS.items()] + [f"{s.package}@{s.version}" for s in sets]
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", *names]
    subprocess.run(command, cwd=folder, check=True)
    jobs: list[dict[str, Any]] = []
    for s in sets:
        if s.kind == "icons":
            for label, icons in EMOJI.items():
                for code, *known in icons:
                    out = f"drawn/{s.name}/{label}-{code}.png"
                    jobs.append({"out": out, "icons": s.package, "names": [n for n in known if n]})
        elif s.kind == "avatars":
            for label, combinations in AVATARS[s.name].items():
                for i, parts in enumerate(combinations):
                    for seed in range(SEEDS):
                        options: dict[str, Any] = {k: [v] for k, v in parts.items()}
                        options |= {
                            "seed": f"{label}{i}-{seed}",
                            "backgroundColor": ["ffffff", "b6e3f4"][seed % 2 : seed % 2 + 1],
                        }
                        options |= {"accessoriesProbability": 0, "facialHairProbability": 0, "maskProbability": 0}
                        jobs.append(
                            {"out": f"drawn/{s.name}/{label}-{i}-{seed}.png", "avatar": s.package, "options": options}
                        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(["node", str(Path(__file__).with_suffix(".mjs")), "jobs.json"], cwd=folder, check=True)


def pictures(folder: Path, s: Set) -> list[tuple[str, Image.Image]]:
    """(label, 64 x 64 RGB on white) for every face of the set."""
    if s.kind == "png":
        where = folder / "node_modules" / s.package / "img" / s.name / "64"
        files = [(label, where / f"{code}.png") for label, icons in EMOJI.items() for code, *_ in icons]
    else:
        files = [(f.name.split("-")[0], f) for f in sorted((folder / "drawn" / s.name).glob("*.png"))]
    out = []
    for label, f in files:
        if f.exists():
            image = Image.open(f).convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, image).convert("RGB")
            out.append((label, picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    if not out:
        raise ValueError(f"no pictures of {s.name} in {folder}: fetch them first with --fetch {folder}")
    return out


def evaluate_set(model: Any, processor: Any, folder: Path, s: Set) -> dict[str, Any]:
    """Hit rate over pictures and events, its mean over emotions, and the hit rate per emotion."""
    faces = pictures(folder, s)
    asked = [
        (label, image, event_for("neutral", 7, k, i)) for i, (label, image) in enumerate(faces) for k in range(EVENTS)
    ]
    answers = generate(model, processor, [a[1] for a in asked], [a[2] for a in asked])
    right = np.array([first_emotion(t) == a[0] for t, a in zip(answers, asked, strict=True)])
    labels = np.array([a[0] for a in asked])
    each = {e: round(float(right[labels == e].mean()), 3) for e in LABELS if (labels == e).any()}
    said = {e: sum(first_emotion(t) == e for t in answers) for e in LABELS}
    return {
        "group": s.group, "package": f"{s.package}@{s.version}", "pictures": len(faces),
        "hit": round(float(right.mean()), 3),
        "mean_over_emotions": round(float(np.mean(list(each.values()))), 3), "hit_by_emotion": each, "said": said,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    from . import PATH, load

    parser = argparse.ArgumentParser(prog="python -m emocircuits.embedded.third_party", description=__doc__)
    parser.add_argument(
        "--fetch", type=Path, required=True, metavar="DIR", help="folder for the packages, outside the repository"
    )
    parser.add_argument("--keep", action="store_true", help="use what DIR already holds")
    parser.add_argument("--group", default="all", choices=("dev", "held-out", "all"))
    parser.add_argument("--path", type=Path, default=PATH, help="model folder (default: the committed one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write", action="store_true", help="also write third_party.json and README.md in the model folder"
    )
    a = parser.parse_args()
    sets = _chosen(a.group)
    if not a.keep:
        fetch(a.fetch, sets)
    model, processor = load(a.path)
    result = {s.name: evaluate_set(model, processor, a.fetch, s) for s in sets}
    if a.json:
        print(json.dumps(result, indent=1))
    else:
        for name, r in result.items():
            print(
                f"{name:20} {r['group']:9} {r['hit']:.3f}  macro {r['mean_over_emotions']:.3f}  {r['hit_by_emotion']}"
            )
    if a.write:
        from .card import write

        write(a.path, third_party=result)


if __name__ == "__main__":
    main()
