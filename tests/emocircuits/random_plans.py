"""Random plans with every kind of edit, for models of any size."""

from __future__ import annotations

import random

import torch

from emocircuits import (
    AddHead,
    AddNeurons,
    AddVector,
    BoostRoute,
    Plan,
    ProjectOut,
    ReplaceHead,
    ReplaceNeurons,
    ReplaceVector,
    ScaleHead,
    ScaleNeurons,
)

READINGS = {"weight": (0.0, 2.5), "logit-add": (0.2, 3.0), "logit-scale": (0.4, 1.6), "logit-abs": (-0.4, 0.6)}
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


def random_plan(geometry, seed=0, visual=True, rows=None, neurons=None, cache=True):
    """Every kind of edit, reading and site, on random heads, neurons and layers of a model.

    But not ``source_positions``: so many routes at once tell more kinds of keys apart than a kernel can.

    Args:
        geometry: the model's ``emocircuits.families.Geometry``.
        visual: whether the prompts have visual tokens.
        rows: as in every edit.
        neurons: whether neurons are edited; by default where the model has some.
        cache: whether cached keys and values are edited, so that the model needs a cache.
    """
    return Plan(
        _edits(geometry, random.Random(seed), visual, rows, geometry.neurons > 0 if neurons is None else neurons, cache)
    )


def _edits(geometry, rng, visual, rows, neurons, cache):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    places = ["system", "visual", "query", "last", "generated"] if visual else ["query", "last", "generated"]
    sources = places if visual else ["query", "generated"]

    def vector(*shape, size=1.0):
        return size * torch.randn(*shape, generator=generator)

    def where():
        """Roles, or positions of text at the end of the prompt and at its beginning, or both."""
        if rng.random() < 0.3:
            positions = rng.sample([0, 1, -1, -2, -3], rng.randint(1, 3))
            return {"rows": rows, "positions": positions, "to": rng.choice([None, None, ["query"]])}
        return {"rows": rows, "to": rng.choice([None, *([r] for r in places), rng.sample(places, 2)])}

    def prompt():
        chosen = where()
        return {**chosen, "to": None if chosen["to"] == ["generated"] else chosen["to"]}

    def heads(n):
        every = [(layer, head) for layer in range(geometry.layers) for head in range(geometry.heads)]
        return rng.sample(every, n)

    def cells(n):
        layers = rng.sample(range(geometry.layers), min(2, geometry.layers))
        return {layer: rng.sample(range(geometry.neurons), n) for layer in layers}

    edits = []
    for reading, (low, high) in READINGS.items():
        for to in ("generated", rng.choice([None, "query", "last"])):
            source = rng.sample(sources, rng.randint(1, 2))
            by = rng.uniform(low, high)
            edits.append(BoostRoute(heads(2), to=to, source=source, by=by, reading=reading, rows=rows))
    edits += [
        BoostRoute(heads(3), source=sources[0], by=2.0, positions=[0, -1], rows=rows),
        BoostRoute(heads(3), source=sources[:2], by=0.5, reading="logit-add", positions=[-2, -1], rows=rows),
        ScaleHead(heads(2), by=rng.uniform(-1, 2), **where()),
        AddHead(heads(2), vector(2, geometry.head_dim), by=rng.uniform(-1, 1), **where()),
        AddHead(heads(2), vector(geometry.head_dim), by=rng.uniform(-1, 1), phase="decode", rows=rows),
        ReplaceHead(heads(2), vector(2, geometry.head_dim), **where()),
        ReplaceHead(heads(1), vector(geometry.head_dim), to="last", rows=rows),
    ]
    if neurons:
        count = sum(len(index) for index in cells(3).values())
        edits += [
            ScaleNeurons(cells(3), by=rng.uniform(-1, 2), **where()),
            ScaleNeurons(cells(3), by=rng.uniform(-1, 2), phase="decode", rows=rows),
            AddNeurons(cells(3), vector(count), by=0.5, **where()),
            AddNeurons(cells(2), 0.3, rows=rows),
            ReplaceNeurons(cells(3), vector(count), **where()),
            ReplaceNeurons(cells(1), 0.0, phase="decode", rows=rows),
        ]
    layers = list(range(geometry.layers))
    for site in SITES:
        two = rng.sample(layers, min(2, len(layers)))
        edits += [
            AddVector(two, vector(len(two), geometry.d_model, size=0.3), site=site, by=0.5, **where()),
            AddVector([rng.choice(layers)], vector(geometry.d_model), site=site, by=0.2, relative=True, **where()),
            AddVector(two, vector(geometry.d_model, size=0.5), site=site, norm="keep", **where()),
            AddVector(two, vector(geometry.d_model), site=site, norm="keep", by=0.4, relative=True, **where()),
            ProjectOut([rng.choice(layers)], vector(geometry.d_model), site=site, **where()),
            ProjectOut(two, vector(len(two), 2, geometry.d_model), site=site, **where()),
            ReplaceVector(
                [rng.choice(layers)], vector(geometry.d_model), site=site, to=rng.choice(places[-2:]), rows=rows
            ),
        ]
    if cache:
        heads_of = (geometry.kv_heads, geometry.head_dim)
        for site in ("k", "v"):
            two = rng.sample(layers, min(2, len(layers)))
            edits += [
                AddVector(two, vector(len(two), *heads_of, size=0.3), site=site, **prompt()),
                AddVector([rng.choice(layers)], vector(*heads_of), site=site, by=0.5, norm="keep", **prompt()),
                ProjectOut([rng.choice(layers)], vector(*heads_of), site=site, **prompt()),
                ReplaceVector([rng.choice(layers)], vector(*heads_of), site=site, to="last", rows=rows),
            ]
    rng.shuffle(edits)
    return edits
