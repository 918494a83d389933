"""Stage patching: which tokens carry the emotion at which depth (arXiv 2605.21980).

In the run on X-, the rows of one role (VISUAL, QUERY or LAST) are set to those of X+ at every layer of one stage, and
the answer is generated. Beside it stand both runs left alone, and rows moved as far in random directions.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from emocircuits.circuits.controls import Change, Random, against, change, corrected, random_directions, require_draws
from emocircuits.circuits.decoupling import stages as stages_of
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.subject import Subject
from emocircuits.edits import ReplaceVector
from emocircuits.files import read_json, write_json
from emocircuits.measure import capture
from emocircuits.plan import Plan
from emokernels import Role

FORMAT = "emocircuits.stages/1"
FILE = "stages.json"
ROLES = ("visual", "query", "last")


@dc.dataclass(frozen=True)
class Cell:
    """One role in one stage.

    Attributes:
        role, stage, layers: what was set.
        hits: of each pair, 1 or 0.
        restored: ``(H - H-) / (H+ - H-)``; None where both sides are hit as often.
        effect: against the X- run left alone.
        random: against rows that were moved as far in random directions.
    """

    role: str
    stage: str
    layers: tuple[int, ...]
    hits: tuple[float, ...]
    restored: float | None
    effect: Change
    random: Random


@dc.dataclass(frozen=True)
class Stages:
    """Hit rates after stage patching.

    Attributes:
        plus, minus: hits of each pair on X+ and X-, left alone.
        gap: X+ against X-.
        cells: every role in every stage.
        emotions: of each pair.
        settings: numbers and readings.
    """

    plus: tuple[float, ...]
    minus: tuple[float, ...]
    gap: Change
    cells: tuple[Cell, ...]
    emotions: tuple[str, ...]
    settings: dict[str, Any]

    def of(self, role: str, stage: str) -> Cell:
        """One cell."""
        return next(c for c in self.cells if (c.role, c.stage) == (role, stage))

    def save(self, folder: str | Path) -> Path:
        """Write ``stages.json``."""
        record = {"format": FORMAT, "average_over": "pairs", "n": len(self.plus), **dc.asdict(self)}
        return write_json(Path(folder) / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Stages:
        """Read what :meth:`save` wrote."""
        path = Path(folder) / FILE
        record: Any = read_json(path, "stage patching")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not stage patching (expected format {FORMAT!r})")
        cells = tuple(
            Cell(
                c["role"], c["stage"], tuple(c["layers"]), tuple(c["hits"]), c["restored"], Change(**c["effect"]),
                Random(**{**c["random"], "values": tuple(c["random"]["values"])}),
            )
            for c in record["cells"]
        )  # fmt: skip
        return cls(
            tuple(record["plus"]), tuple(record["minus"]), Change(**record["gap"]), cells, tuple(record["emotions"]),
            record["settings"],
        )  # fmt: skip


@torch.no_grad()
def stage_patching(
    subject: Subject, pairs: Pairs, *, roles: Sequence[str] = ROLES, draws: int = 10, batch: int = 64, seed: int = 0,
    progress: bool = True,
) -> Stages:  # fmt: skip
    """Set resid_post rows of a role from X+ at every layer of a stage in the X- run, and generate.

    Args:
        subject: the model.
        pairs: of the analyze split. Both pictures of a pair must give as many tokens.
        roles: any of "visual", "query", "last".
        draws: random controls of every cell, at least 10.
        batch: pairs at a time; residual streams of both sides of them are held, all layers and tokens.
        seed: of the controls and the bootstrap. Controls depend on the batch, too.
        progress: show a bar.

    Raises:
        ValueError: an unknown role, too few draws, or two sides of a pair with different tokens.
    """
    if not roles or set(roles) - set(ROLES):
        raise ValueError(f"roles={list(roles)}: expected some of {', '.join(ROLES)}")
    require_draws(draws)
    spans = {name: span for name, span in stages_of(subject.handle.geometry.layers).items() if len(span)}
    keys = [(role, stage) for role in roles for stage in spans]
    hits = {key: np.zeros((1 + draws, len(pairs))) for key in keys}
    sides = {side: np.zeros(len(pairs)) for side in ("emotional", "neutral")}
    generator = torch.Generator().manual_seed(seed)
    parts = list(pairs.batches(batch))
    with tqdm(total=len(parts) * (2 + len(keys) * (1 + draws)), desc="patching stages", disable=not progress) as bar:

        def score(part: Pairs, side: str, plan: Plan) -> np.ndarray:
            # The part is sorted as generate sorts, so rows of the plan are pairs of the part.
            images = part.images("emotional" if side == "emotional" else "neutral")
            said = subject.generate(images, part.events, plan, batch=len(part))
            bar.update()
            return subject.hits(said, part.emotions)

        for which, part in parts:
            for side, values in sides.items():
                values[which] = score(part, side, Plan())
            rows = Rows(subject, part)
            for role, stage in keys:
                span = spans[stage]
                hits[role, stage][0, which] = score(part, "neutral", rows.plan(role, span))
                for draw in range(draws):
                    plan = rows.plan(role, span, generator)
                    hits[role, stage][1 + draw, which] = score(part, "neutral", plan)
    plus, minus = sides["emotional"], sides["neutral"]
    gap = float(plus.mean() - minus.mean())
    effects = corrected([change(minus, hits[key][0], pairs, seed=seed) for key in keys])
    random = corrected([against("rows moved as far", minus, hits[key][0], hits[key][1:]) for key in keys])
    cells = tuple(
        Cell(
            role, stage, tuple(spans[stage]), tuple(hits[role, stage][0].tolist()),
            float(hits[role, stage][0].mean() - minus.mean()) / gap if gap else None, effect, control,
        )
        for (role, stage), effect, control in zip(keys, effects, random, strict=True)
    )  # fmt: skip
    settings = {
        "site": "resid_post", "rows_of": "X+ into the run on X-", "roles": list(roles), "draws": draws, "seed": seed,
        "lexicon": subject.lexicon.name, "limit": subject.limit, "correction": "Benjamini-Hochberg over the cells",
        "random": "each row moved as far as the patch moves it, in a random direction",
    }  # fmt: skip
    return Stages(
        tuple(plus.tolist()), tuple(minus.tolist()), change(minus, plus, pairs, seed=seed), cells,
        tuple(pairs.emotions), settings,
    )  # fmt: skip


class Rows:
    """resid_post of both sides of some pairs, and plans that move rows from one to the other."""

    def __init__(self, subject: Subject, pairs: Pairs) -> None:
        inputs = [pairs.inputs(subject, side) for side in ("emotional", "neutral")]
        plus, minus = inputs
        if plus["input_ids"].shape != minus["input_ids"].shape or not plus["input_ids"].equal(minus["input_ids"]):
            raise ValueError("the two sides of a pair have different tokens, so rows of one are not those of the other")
        states = []
        for side in inputs:
            with capture(subject.model, ["resid_post"]) as seen:
                subject.model(**side, use_cache=False, logits_to_keep=1)
            states.append([seen["resid_post"][l].cpu() for l in range(subject.handle.geometry.layers)])
        self.plus, self.minus = states
        self.roles = subject.roles(plus).cpu()
        self.padding = (plus["attention_mask"] == 0).sum(1).tolist()

    def plan(self, role: str, layers: Sequence[int], generator: torch.Generator | None = None) -> Plan:
        """Set the rows of a role at some layers, to X+ or (with a generator) as far from X- in random directions.

        A direction is drawn for every row and layer.
        """
        values: list[Tensor] = [self.plus[l] for l in layers]  # [B, N, d] each
        if generator is not None:
            values = [
                self.minus[l] + random_directions(value - self.minus[l], generator)
                for l, value in zip(layers, values, strict=True)
            ]
        edits = []
        for row, column in (self.roles == int(Role[role.upper()])).nonzero().tolist():
            vectors = torch.stack([v[row, column] for v in values])
            at = column - self.padding[row]
            edits.append(ReplaceVector(tuple(layers), vectors, to=role, rows=(row,), positions=(at,)))
        return Plan(edits)
