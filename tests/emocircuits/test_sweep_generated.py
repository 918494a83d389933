"""Sweeps of generated text against a hook loop: prefill with the hook, then the model's own generate."""

from __future__ import annotations

import contextlib

import families_vision_models  # noqa: F401  registers its builders
import pytest
import sweep_oracle as oracle
from test_sweep_engine import HEADS, pair

from emocircuits.sweep import Sweep, SweepResult, generated

LIMIT = 5


def score(ids):
    """Some number that other tokens would change."""
    return sum((i + 1) * t for i, t in enumerate(ids)) % 97


@contextlib.contextmanager
def hooked(model, kind, layer, columns, entries, new, where=oracle.place, total=None):
    """A site of the prompt's pass overwritten; the passes of single tokens are left alone."""
    module, enters = where(model, kind, layer)

    def change(x):
        if x.shape[1] != total:
            return x
        x = x.clone()
        for c in columns:
            x[0, c, entries] = new[c, entries].to(x)
        return x

    def before(m, a, k):
        if a:
            return (change(a[0]), *a[1:]), k
        return a, {**k, "hidden_states": change(k["hidden_states"])}

    def after(m, a, o):
        return (change(o[0]), *o[1:]) if isinstance(o, tuple) else change(o)

    hook = module.register_forward_pre_hook(before, with_kwargs=True) if enters else module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def alone(model, inputs, limit=LIMIT, **options):
    out = model.generate(**inputs, do_sample=False, max_new_tokens=limit, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def loop(model, base, source, kind, positions, units=None, layers=None, where=oracle.place, fill=None, **options):
    """What every patch makes the model say, in the order of the table's cells."""
    kept = oracle.record(model, source, kind, where, layers)
    total = base["input_ids"].shape[1]
    columns = [list(range(total))] if positions == "all" else [[c] for c in positions]
    found = []
    for layer in sorted(kept):
        new = kept[layer] if fill is None else fill(kept[layer])
        for cs in columns:
            for entries in [slice(None)] if units is None else units:
                with hooked(model, kind, layer, cs, entries, new, where, total):
                    found.append(alone(model, base, **options))
    return found


def same(result: SweepResult, expected):
    """Texts token for token, and their scores."""
    assert result.meta["texts"]["patched"] == expected
    assert result.values.flatten().tolist() == [score(e) for e in expected]
    assert len({tuple(e) for e in expected}) > 1, "no patch changes what is said"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava", "llama-padded", "llava-padded"])
@pytest.mark.parametrize("target", ["heads", "residual", "mlp_out"])
def test_targets(kind, target):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False)
    assert sweep.clean == score(alone(model, clean))
    assert sweep.corrupt == score(alone(model, corrupt))
    units = HEADS if target == "heads" else None
    for positions in ("all", [sweep.first - 1, sweep.first, sweep.columns - 3, sweep.columns - 1]):
        found = getattr(sweep, target)(positions=positions)
        same(found, loop(model, corrupt, clean, target, positions, units))
        assert found.meta["texts"]["clean"] == alone(model, clean)
