"""Every family the package knows, swept as a hook loop has it."""

from __future__ import annotations

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import sweep_oracle as oracle
import torch

from emocircuits.families import open_model
from emocircuits.sweep import Sweep, logit_diff

A, B = 11, 23


def place(model, kind, layer):
    """Where a site is, by the family's own names."""
    handle = open_model(model)
    if kind == "heads":
        return handle.output_projections[layer], True
    if kind == "neurons":
        return handle.down_projections[layer], True
    return (handle.layers[layer], True) if kind == "residual" else (handle.sites[kind][layer], False)


def pair(model, make_inputs):
    """Two prompts of a family that differ in their image, or in one word."""
    clean = make_inputs(1, "none")
    corrupt = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in clean.items()}
    pictures = [k for k in corrupt if k.startswith("pixel_values")]
    for name in pictures:
        corrupt[name] = 0.5 - corrupt[name]
    if not pictures:
        corrupt["input_ids"][0, 3] = 50
    return clean, corrupt


@pytest.mark.parametrize("name", harness.BUILDERS)
def test_family(name):
    model, _, make_inputs, tolerance = harness.built(name)
    clean, corrupt = pair(model, make_inputs)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    columns = sorted({sweep.first, (sweep.first + sweep.columns) // 2, sweep.columns - 1})
    size = sweep.handle.geometry.head_dim
    neurons = sweep.handle.geometry.neurons
    groups = [list(range(0, neurons, 2)), [1, 2]]
    kinds = {"heads": [slice(0, size), slice(size, 2 * size)], "residual": None, "attn_out": None, "mlp_out": None}
    for kind, units in {**kinds, **({"neurons": groups} if neurons else {})}.items():
        for positions in ("all", columns):
            more = {"groups": groups} if kind == "neurons" else {}
            found = getattr(sweep, kind)(positions=positions, layers=[0, 1], **more).values
            if units:
                found = found[..., :2]
            expected = oracle.sweep(
                model, corrupt, clean, kind, lambda x: x[0, -1, A] - x[0, -1, B], positions, units, layers=[0, 1],
                where=place,
            )  # fmt: skip
            spread = max(float(expected.max() - expected.min()), abs(sweep.clean - sweep.corrupt))
            assert spread > 1e-3
            # Some models round their attention weights to float32 whatever their dtype.
            size_of = max(spread, float(expected.abs().max()))
            assert float((found - expected).abs().max()) <= tolerance * size_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-NeoX", "PaliGemma 2"])
def test_low_precision(name, dtype):
    """In the dtypes models come in, as far from the same weights in float64 as the hook loop is, or about."""
    model, make_inputs = harness.BUILDERS[name](dtype)
    clean, corrupt = pair(model, make_inputs)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    exact = harness.BUILDERS[name](dtype)[0].double()
    wide = [{k: v.double() if v.is_floating_point() else v for k, v in given.items()} for given in (corrupt, clean)]
    columns = [sweep.first, sweep.columns - 1]
    for kind in ("residual", "attn_out"):
        found = getattr(sweep, kind)(positions=columns, layers=[0, 1]).values
        by = [kind, lambda x: (x[0, -1, A] - x[0, -1, B]).double(), columns]
        loop = oracle.sweep(model, corrupt, clean, *by, layers=[0, 1], where=place)
        truth = oracle.sweep(exact, *wide, *by, layers=[0, 1], where=place)
        noise = float((loop - truth).abs().max())
        assert float((found - truth).abs().max()) <= 4 * noise + torch.finfo(dtype).eps * float(truth.abs().max())


@pytest.mark.parametrize("name", ["Gemma 3 (vision)", "PaliGemma"])
def test_patches_reach_back_inside_an_image(name):
    """Where an image attends to all of itself, a patch changes columns before it, the metric's among them."""
    model, _, make_inputs, tolerance = harness.built(name)
    clean, corrupt = pair(model, make_inputs)
    seen = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    start, columns = seen.first, [seen.first + 1, seen.first + 3]
    assert not seen.base.layers[0].mask[0, 0, start, columns[-1]]  # 0: it attends there
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B, pos=start), progress=False)
    for kind in ("residual", "mlp_out"):
        found = getattr(sweep, kind)(positions=columns, layers=[0, 1]).values
        expected = oracle.sweep(
            model, corrupt, clean, kind, lambda x: x[0, start, A] - x[0, start, B], columns, layers=[0, 1], where=place
        )
        assert expected.std() > 1e-3
        assert float((found - expected).abs().max()) <= tolerance * float(expected.max() - expected.min())
