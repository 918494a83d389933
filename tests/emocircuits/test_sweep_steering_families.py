"""Steering sweeps of every family against ``patch``: its own resid_post, windows, capped logits, images, experts."""

from __future__ import annotations

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import torch
from test_sweep_engine import A, B, difference
from test_sweep_families import pair
from test_sweep_generated import score
from test_sweep_steering import texts, vectors

from emocircuits import AddVector, Plan, patch
from emocircuits.sweep import Sweep, generated, logit_diff

ALPHAS = (0.5, 2.0)


@pytest.mark.parametrize("name", harness.BUILDERS)
def test_every_family(name):
    model, _, make_inputs, near = harness.built(name)
    clean, corrupt = pair(model, make_inputs)
    s = vectors(3)
    found = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).steering(s, layers=[0, 2], alphas=ALPHAS)
    expected = []
    for layer in (0, 2):
        for alpha in ALPHAS:
            with torch.no_grad(), patch(model, Plan([AddVector([layer], s[layer], by=alpha)])):
                expected.append(float(difference(model(**corrupt).logits)))
    torch.testing.assert_close(
        found.values.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=max(near, 1e-6)
    )
    assert max(expected) - min(expected) > 1e-2
    sweep = Sweep(model, clean, corrupt, generated(score, limit=3), progress=False)
    said = sweep.steering(s, layers=[1], alphas=ALPHAS)
    assert said.texts == texts(model, corrupt, [s], ALPHAS, "all", layers=(1,), limit=3)
