"""Draw docs/img/demo.png from a demo result: ``python docs/make_picture.py demo-out/demo.json``."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "img" / "demo.png")
    args = parser.parse_args()
    r = json.loads(args.result.read_text())
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), width_ratios=[1.15, 1.15, 0.9, 0.9], layout="constrained")

    ax = axes[0]
    effects = np.array(r["localization"]["head_effects"])
    limit = np.abs(effects).max()
    picture = ax.imshow(effects, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    for layer, head in r["attention"]["heads"]:
        ax.plot(head, layer, "o", ms=12, mfc="none", mec="black", mew=1.6)
    ax.set(title="effect of patching each head\n(rings: the heads VEENA boosts)", xlabel="head", ylabel="layer")
    figure.colorbar(picture, ax=ax, shrink=0.85)

    ax = axes[1]
    for variant, colour, name in (("baseline", "#6b7280", "untouched"), ("veena", "#c2410c", "VEENA")):
        t, hit, prior = np.array(r["by_intensity"][variant]).T
        ax.plot(t, hit, "-o", color=colour, ms=4, label=f"{name}: says the face")
        ax.plot(t, prior, ":o", color=colour, ms=4, label=f"{name}: says the event")
    ax.set(title="events that contradict the face", xlabel="intensity of the expression", ylim=(0, 1))
    ax.legend(fontsize=7, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)

    attention = r["attention"]
    image = np.array(attention["image"], np.uint8)
    top = max(np.max(attention[k]["map"]) for k in ("before", "after"))
    for ax, key in zip(axes[2:], ("before", "after"), strict=True):
        ax.imshow(image, extent=(0, 8, 8, 0))
        ax.imshow(np.array(attention[key]["map"]), extent=(0, 8, 8, 0), cmap="inferno", alpha=0.5, vmin=0, vmax=top)
        said = " ".join(attention["said"][key].split()[:3])
        ax.set_title(
            f'{key}: "{said} ..."\n{attention["case"]["emotion"]} face, event suggests {attention["case"]["suggests"]}',
            fontsize=9,
        )
        ax.axis("off")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
