"""Attribution in every family: against autograd through one hook on the unmodified model."""

from __future__ import annotations

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import sweep_oracle as oracle
import torch
from test_sweep_families import A, B, pair, place

from emocircuits.sweep import Sweep, logit_diff

LAYER = 1


def slope(model, base, kind, own, new, entries):
    """``d m / d t`` at 0, where a site is ``own + t (new - own)`` in all columns."""
    module, enters = place(model, kind, LAYER)
    t = torch.zeros((), dtype=own.dtype, requires_grad=True)

    def change(x):
        more = torch.zeros_like(own)
        more[:, entries] = (new - own)[:, entries]
        return x + t * more

    def before(m, a, k):
        return ((change(a[0]), *a[1:]), k) if a else (a, {**k, "hidden_states": change(k["hidden_states"])})

    def after(m, a, o):
        return (change(o[0]), *o[1:]) if isinstance(o, tuple) else change(o)

    hook = module.register_forward_pre_hook(before, with_kwargs=True) if enters else module.register_forward_hook(after)
    try:
        logits = model(**base, use_cache=False).logits
    finally:
        hook.remove()
    return float(torch.autograd.grad(logits[0, -1, A] - logits[0, -1, B], t)[0])


NAMES = [n if n in harness.TEXT else pytest.param(n, marks=pytest.mark.slow) for n in harness.BUILDERS]


@pytest.mark.parametrize("name", NAMES)
def test_family(name):
    model, _, make_inputs, tolerance = harness.built(name)
    clean, corrupt = pair(model, make_inputs)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for kind in ("heads", "residual", "mlp_out"):
        entries = slice(0, sweep.handle.geometry.head_dim) if kind == "heads" else slice(None)
        own, new = (oracle.record(model, x, kind, place, [LAYER])[LAYER] for x in (corrupt, clean))
        expected = slope(model, corrupt, kind, own, new, entries)
        found = float(sweep.attribute(kind, layers=[LAYER]).values.flatten()[0]) - sweep.corrupt
        assert abs(expected) > 1e-4
        assert abs(found - expected) <= 10 * tolerance * max(abs(expected), abs(sweep.clean - sweep.corrupt))
    assert bool(sweep.attribute("qkv", "atp*", layers=[LAYER]).values.isfinite().all())
