"""Sweeps of generated text against a hook loop: prefill with the hook, then the model's own generate."""

from __future__ import annotations

import contextlib
import dataclasses as dc

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import sweep_oracle as oracle
import torch
from test_sweep_engine import HEADS, pair
from test_sweep_families import pair as family_pair
from test_sweep_families import place
from test_sweep_resample import drawn, prompts_of
from test_sweep_routes import edits
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicLayer

from emocircuits import patch
from emocircuits.sweep import Sweep, SweepResult, contains, generated
from emocircuits.sweep.api import DOES
from emocircuits.sweep.decoding import decode, prepare
from emocircuits.sweep.generated import GeneratingRun
from emocircuits.sweep.pattern import residual_between
from emocircuits.sweep.planner import Shape, forecast

LIMIT = 4


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
    # Where generate counts a plain pass from: after the padding.
    positions_of = (source["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    own = {} if where is place else {"position_ids": positions_of}
    kept = oracle.record(model, {**source, **own}, kind, where, layers)
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


KINDS = [(kind, "heads") for kind in ("llama", "qwen2", "gpt2", "llava", "llama-padded", "llava-padded")]
KINDS += [("qwen2", "residual"), ("gpt2-padded", "residual"), ("llava-padded", "residual"), ("llama-padded", "mlp_out")]


@pytest.mark.parametrize(("kind", "target"), KINDS)
def test_targets(kind, target):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False)
    assert sweep.clean == score(alone(model, clean))
    assert sweep.corrupt == score(alone(model, corrupt))
    units = HEADS if target == "heads" else None
    for positions in ("all", [sweep.first - 1, sweep.columns - 4, sweep.columns - 1]):
        found = getattr(sweep, target)(positions=positions)
        same(found, loop(model, corrupt, clean, target, positions, units))
        assert found.meta["texts"]["clean"] == alone(model, clean)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llava-padded"])
def test_the_other_targets_and_directions(kind):
    model, clean, corrupt = pair(kind)
    metric = generated(score, limit=LIMIT)
    sweep = Sweep(model, clean, corrupt, metric, direction="noise", patch_with="zero", progress=False)
    width = sweep.handle.geometry.neurons
    groups = [list(range(width // 2)), list(range(width // 2, width))]
    same(
        sweep.neurons(groups, layers=[0, 1]),
        loop(model, clean, corrupt, "neurons", "all", groups, layers=[0, 1], fill=torch.zeros_like),
    )
    same(
        sweep.attn_out(positions=[2, -1]),
        loop(model, clean, corrupt, "attn_out", [2, sweep.columns - 1], fill=torch.zeros_like),
    )


@pytest.mark.parametrize("positions", ["all", [4, 8]])
def test_queries_keys_and_values(positions):
    """Patched keys and values are those that later tokens meet, in the last layer too."""
    model, clean, corrupt = pair("gpt2")
    sweep = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False)
    found = sweep.qkv(positions=positions, layers=[1, 2])
    units = [slice(8 * i, 8 * i + 8) for i in range(12)]
    same(found, loop(model, corrupt, clean, "qkv", positions, units, layers=[1, 2]))
    model, clean, corrupt = pair("qwen2")  # values of two key-value heads, which are not rotated
    sweep = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False)
    found = sweep.qkv(positions=positions)
    expected = loop(model, corrupt, clean, "v", positions, [slice(0, 8), slice(8, 16)])
    labels = found.labels["qkv"]
    assert [t for i, t in enumerate(found.meta["texts"]["patched"]) if labels[i % len(labels)][0] == "v"] == expected
    assert len({tuple(e) for e in expected}) > 1


@pytest.mark.parametrize("kind", ["qwen2", "llava-padded"])
def test_routes(kind):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False)
    runs = (("clean", clean), ("corrupt", corrupt))
    for run, inputs in runs[1:] if kind.startswith("llava") else runs:
        found = sweep.routes("boost", by=0.0, layers=[0], run=run)
        expected = []
        for head in range(4):
            for label in found.labels["route"]:
                with patch(model, edits(label, 0, head, 0.0, "weight")):
                    expected.append(alone(model, inputs))
        same(found, expected)


def test_heads_together_and_drawn_prompts():
    model, clean, corrupt, others = prompts_of("llama")
    metric = generated(score, limit=LIMIT)
    found = Sweep(model, clean, corrupt, metric, progress=False).combinations([(0, 1), (1, 2), (2, 3)], size=[2, 3])
    kept, total = oracle.record(model, clean, "heads"), clean["input_ids"].shape[1]
    expected = []
    for heads in ([(0, 1), (1, 2)], [(0, 1), (2, 3)], [(1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]):
        with contextlib.ExitStack() as stack:
            for layer, head in heads:
                stack.enter_context(hooked(model, "heads", layer, range(total), HEADS[head], kept[layer], total=total))
            expected.append(alone(model, corrupt))
    same(found, expected)

    sweep = Sweep(model, clean, corrupt, metric, patch_with="resample", resample=others, draws=2, progress=False)
    found = sweep.residual(positions=[4, 8])
    expected = []
    records = [oracle.record(model, other, "residual") for other in others]
    for layer in range(3):
        for column in (4, 8):
            for which in drawn(0, layer, column, None, len(others), 2):
                new = records[which][layer]
                with hooked(model, "residual", layer, [column], slice(None), new, total=total):
                    expected.append(alone(model, corrupt))
    assert found.meta["texts"]["patched"] == expected  # draw by draw of each patch
    assert found.draws.movedim(0, -1).flatten().tolist() == [score(e) for e in expected]


@pytest.mark.parametrize("name", harness.BUILDERS)
def test_every_family(name):
    model, _, make_inputs, _ = harness.built(name)
    clean, corrupt = family_pair(model, make_inputs)
    sweep = Sweep(model, clean, corrupt, generated(score, limit=4), progress=False)
    column = (sweep.first + sweep.columns) // 2
    found = sweep.residual(positions=[column], layers=[0, 1])
    expected = loop(model, corrupt, clean, "residual", [column], layers=[0, 1], where=place, limit=4)
    assert found.meta["texts"]["patched"] == expected
    found = sweep.residual(layers=[1])
    expected = loop(model, corrupt, clean, "residual", "all", layers=[1], where=place, limit=4)
    assert found.meta["texts"]["patched"] == expected


def test_early_ends_and_small_batches():
    """Rows end at different tokens; batches of two rows, and of memory that has run out, say the same."""
    model, clean, corrupt = pair("llama")
    stop = [40, 13, 22, 57, 9, 31, 33, 10, 46, 52, 28]
    whole = Sweep(model, clean, corrupt, generated(score, limit=6, stop=stop), progress=False).heads([3, 5, 8])
    expected = loop(model, corrupt, clean, "heads", [3, 5, 8], HEADS, limit=6, eos_token_id=stop)
    same(whole, expected)
    assert len({len(e) for e in expected}) > 2
    two = Sweep(model, clean, corrupt, generated(score, limit=6, stop=stop), batch=2, progress=False)
    two = two.heads([3, 5, 8])
    assert two.meta["texts"] == whole.meta["texts"]


def test_memory_that_runs_out(monkeypatch):
    model, clean, corrupt = pair("llama")
    seen, values = [], GeneratingRun.values

    def small(self, variants):
        seen.append(len(variants))
        if len(variants) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return values(self, variants)

    expected = Sweep(model, clean, corrupt, generated(score, limit=3), progress=False).heads()
    monkeypatch.setattr(GeneratingRun, "values", small)
    found = Sweep(model, clean, corrupt, generated(score, limit=3), progress=False).heads()
    assert found.meta["texts"] == expected.meta["texts"]
    assert max(seen) == 12
    assert seen[-1] <= 3


def test_texts_and_words(tmp_path):
    class Words:
        """A tokenizer with a word a token."""

        def get_vocab(self):
            return {f"w{i}": i for i in range(64)}

        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return " ".join(f"w{i}" for i in ids)

    model, clean, corrupt = pair("llama")
    calls = []

    def has(text):
        calls.append(text)
        return text.endswith("7")

    sweep = Sweep(model, clean, corrupt, generated(has, limit=LIMIT, tokenizer=Words()), progress=False)
    found = sweep.heads()
    said = [" ".join(f"w{i}" for i in e) for e in loop(model, corrupt, clean, "heads", "all", HEADS)]
    assert found.texts == said
    assert found.values.flatten().tolist() == [float(s.endswith("7")) for s in said]
    assert len(calls) == len(set(calls))
    assert list(found.to_dataframe()["text"]) == said
    assert SweepResult.load(found.save(tmp_path).parent).texts == said
    assert {place["text"] for place in found.top(3)} <= set(said)
    word = said[0].split()[0]
    for words, there in ((word.upper(), True), ([word[:-1] + "x", word], True), (word[:-1], False)):
        assert contains(words)(said[0]) == float(there)


def test_texts_of_several_pairs():
    model, clean, corrupt = pair("llama")
    other = {k: v.clone() for k, v in corrupt.items()}
    other["input_ids"][0, 5] = 44
    metric = generated(score, limit=3)
    both = Sweep(model, [clean, clean], [corrupt, other], metric, progress=False).heads(layers=[1])
    each = [Sweep(model, clean, one, metric, progress=False).heads(layers=[1]) for one in (corrupt, other)]
    assert both.texts == each[0].texts + each[1].texts
    assert torch.equal(both.pairs.flatten(), torch.cat([e.values.flatten() for e in each]))


def killed(monkeypatch, sweep, after):
    """Run heads until so many batches are done."""
    values, count = GeneratingRun.values, iter(range(100))

    def stops(self, variants):
        if next(count) == after:
            raise KeyboardInterrupt
        return values(self, variants)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(GeneratingRun, "values", stops)
        sweep.heads()


def test_a_killed_sweep_goes_on(tmp_path, monkeypatch):
    model, clean, corrupt = pair("llama")

    def sweep(**more):
        metric = generated(more.pop("score", score), **{"limit": 3, **more})
        return Sweep(model, clean, corrupt, metric, batch=2, out=tmp_path, progress=False)

    whole = Sweep(model, clean, corrupt, generated(score, limit=3), progress=False).heads()
    killed(monkeypatch, sweep(), after=2)
    seen, values = [], GeneratingRun.values
    monkeypatch.setattr(GeneratingRun, "values", lambda self, v: (seen.extend(v), values(self, v))[1])
    found = sweep().heads()
    assert len(seen) == 12 - 4
    assert found.meta["texts"] == whole.meta["texts"]
    assert torch.equal(found.values, whole.values)
    again = sweep().heads()
    assert len(seen) == 12 - 4
    assert again.meta["texts"] == whole.meta["texts"]
    for other in ({"limit": 2}, {"stop": [3]}, {"score": len}):
        with pytest.raises(ValueError, match="the metric"):
            sweep(**other).heads()
    model.generation_config.repetition_penalty = 1.5
    try:
        with pytest.raises(ValueError, match="the generation"):
            sweep().heads()
    finally:
        model.generation_config.repetition_penalty = None


def test_the_plan_counts_tokens():
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, generated(score, limit=4), progress=False)
    target, units = sweep.target("heads")
    variants = sweep.variants(target, units, "each", None)[0]
    found = sweep.forecast(target, variants)
    assert any("counted as 4 tokens" in line for line in found.lines)
    prompt = prepare(model, corrupt, limit=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache, logits = prompt.prefill()
        before = counter.get_total_flops()
        decode(prompt, cache, logits)
    once = counter.get_total_flops() - before
    once += 3 * 4 * 32 * sum(range(sweep.columns + 1, sweep.columns + 4))  # attention, which it does not see on a CPU
    without = dc.replace(Shape.of(sweep.handle, sweep.columns, first=sweep.first), generated=0)
    plain = forecast(without, "heads", variants, savings=DOES)
    paid = [a - b for a, b in zip(found.costs, plain.costs, strict=True)]
    ran = [p for p, c in zip(paid, plain.costs, strict=True) if c]
    assert set(ran) == {ran[0]}
    assert ran[0] == once
    assert all(not p for p, c in zip(paid, plain.costs, strict=True) if not c)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: generated(3), TypeError, "a function from the generated text"),
        (lambda: generated(score, limit=0), ValueError, "limit is 0"),
        (lambda: generated(contains("w1")), ValueError, "give tokenizer="),
        (lambda: contains([]), ValueError, "at least one word"),
        (lambda: contains(["a", " "]), ValueError, "at least one word"),
    ],
)
def test_wrong_metrics(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_refusals(monkeypatch):
    model, clean, corrupt = pair("llama")
    for bad in (lambda ids: float("nan"), lambda ids: [1, 2]):
        with pytest.raises(ValueError, match="expected one finite number"):
            Sweep(model, clean, corrupt, generated(bad, limit=2), progress=False)
    sweep = Sweep(model, clean, corrupt, generated(score, limit=2), progress=False)
    with pytest.raises(NotImplementedError, match="generated text"):
        residual_between(sweep)
    with pytest.raises(ValueError, match="not differentiable"):
        sweep.attribute()
    with pytest.raises(NotImplementedError, match="no gradient"):
        sweep.readout.read(sweep.base.layers[-1].resid_post)

    # A layer whose cache is not what attention reads.
    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda self, k, v, *a, **b: update(self, k * 2, v, *a, **b))
    with pytest.raises(NotImplementedError, match="something else in its cache"):
        Sweep(model, clean, corrupt, generated(score, limit=2), progress=False)
