"""The planner's arithmetic, against what torch counts in a model, and against the least work counted by hand."""

import models
import pytest
import torch
from sweep_fakes import Variant
from torch.utils.flop_counter import FlopCounterMode

from emocircuits.families import open_model
from emocircuits.sweep import Sweep, logit_diff
from emocircuits.sweep.engine import Run
from emocircuits.sweep.planner import KINDS, LEAST, NONE, Savings, Shape, Work, forecast, measure, outside
from emocircuits.sweep.resume import Decoder
from emocircuits.sweep.targets import Target

BENCH = dict(
    layers=8, heads=8, kv_heads=8, head_dim=64, d_model=512, neurons=1408, vocabulary=8192, gated=True, first=4, rows=2
)


def bench(columns):
    return Shape(**BENCH, columns=columns, reads=(columns - 1,))


def patches(job, columns):
    if job == "heads":
        return [Variant(l, None, h) for l in range(8) for h in range(8)]
    if job == "heads each":
        return [Variant(l, p, h) for l in range(8) for p in range(columns) for h in range(8)]
    if job == "residual":
        return [Variant(l, p, None) for l in range(8) for p in range(columns)]
    return [Variant(l, None, g) for l in range(8) for g in range(16)]


@pytest.mark.parametrize(
    ("columns", "job", "times"),
    [
        (64, "heads", 3.00), (64, "heads each", 8.14), (64, "residual", 6.12), (64, "neurons", 3.64),
        (256, "heads", 2.87), (256, "heads each", 7.56), (256, "residual", 5.64), (256, "neurons", 3.47),
    ],
)  # fmt: skip
def test_naive_over_least_is_what_was_counted_elsewhere(columns, job, times):
    """The ratios of a count written independently, for a Llama of 8 layers of width 512."""
    size = 88 if job == "neurons" else 1
    found = forecast(bench(columns), job.split()[0], patches(job, columns), size=size)
    assert found.naive / found.least == pytest.approx(times, abs=0.005)
    assert found.flops == found.least


def count(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_plain_pass_is_what_torch_counts(kind):
    model = models.build("text", kind)
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 12)[None]
    shape = Shape.of(open_model(model), 9)
    # Torch computes whole matrices of scores, of which causal attention needs half.
    whole = sum(4 * 32 * 9 for _ in range(9)) - sum(4 * 32 * (i + 1) for i in range(9))
    rotary = 2 * 9 * (8 // 2)  # the angles are a product too
    counted = count(model, {"input_ids": ids, "use_cache": False})
    assert Work(shape).forward + 3 * whole == pytest.approx(counted, abs=rotary)


def test_images_are_counted_once_a_plain_pass():
    model = models.build("llava")
    handle = open_model(model)
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 7, *[models.IMAGE] * models.TOKENS, 8, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, models.SIDE, models.SIDE, generator=g)}
    found = outside(handle, inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    tower = sum(
        sum(counter.get_flop_counts()[k].values())
        for k in counter.get_flop_counts()
        if k.endswith(("vision_tower", "projector"))
    )
    assert 0.7 * tower < found <= tower, "linear layers and convolutions, not attention"
    assert not [m for m in model.modules() if m._forward_hooks and isinstance(m, torch.nn.Linear)]
    assert outside(open_model(models.build("text")), {"input_ids": ids}) == 0
    s = Shape.of(handle, ids.shape[1], images=found)
    assert Work(s).forward - Work(Shape.of(handle, ids.shape[1])).forward == found


def brute(shape, kind, patch):
    """Work without any identity: layers from the patched one on, columns from the patched one on, one by one."""
    s = shape
    width, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    linear = 2 * s.d_model * (2 * width + 2 * kv) + (6 if s.gated else 4) * s.d_model * s.neurons
    start = s.first if patch.column is None else patch.column
    first = patch.layer if kind == "residual" else patch.layer + 1
    total = 2 * s.d_model * s.rows * len(s.reads)
    for layer in range(first, s.layers):
        for column in range(start, s.columns):
            seen = column + 1
            if s.windows and s.windows[layer] is not None:
                seen = min(seen, s.windows[layer])
            total += linear + 4 * width * seen
    return total


@pytest.mark.parametrize("windows", [(), (None, 3, None, 3)])
def test_without_savings_it_is_a_sum_over_layers_and_columns(windows):
    s = Shape(4, 4, 2, 8, 32, 48, 64, True, 10, 2, (9,), 2, windows)
    for layer in range(4):
        for column in (None, 2, 5, 9):
            for kind in ("residual", "mlp_out"):
                v = Variant(layer, column, None)
                assert Work(s, NONE).patch(kind, v) == brute(s, kind, v), (kind, v)


@pytest.mark.parametrize("kind", KINDS)
def test_every_saving_saves(kind):
    s = Shape(4, 8, 2, 64, 512, 1408, 1000, True, 40, 2, (39,), 2)
    variants = [Variant(l, p, 0) for l in range(4) for p in (0, 2, 20, 39)] + [Variant(l, None, 0) for l in range(4)]
    names = list(LEAST.__dataclass_fields__)
    costs = [
        forecast(s, kind, variants, savings=Savings(*[k < n for k in range(5)])).flops for n in range(len(names) + 1)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]
    assert forecast(s, kind, variants).least == costs[-1]


def test_no_ops():
    s = Shape(3, 4, 4, 8, 32, 48, 64, False, 10, 4, (9,), 2)
    w = Work(s)
    for kind in KINDS:
        assert not w.changes(kind, Variant(0, 3, 0)), "before the first difference"
        assert w.changes(kind, Variant(0, 4, 0))
        assert w.changes(kind, Variant(2, 9, 0))
        assert w.changes(kind, Variant(2, None, 0))
    assert not w.changes("heads", Variant(2, 5, 0)), "the last layer writes into another column than the metric's"
    assert w.changes("residual", Variant(2, 5, None)), "which the metric's column attends to"
    early = Shape(3, 4, 4, 8, 32, 48, 64, False, 10, 4, (2,), 2)
    assert not Work(early).changes("heads", Variant(0, None, 0)), "a metric before the first difference"
    same = Shape(3, 4, 4, 8, 32, 48, 64, False, 10, 10, (9,), 2)
    assert not Work(same).changes("heads", Variant(0, None, 0)), "two equal prompts"


def test_queries_act_where_they_are_and_keys_later():
    s = Shape(3, 4, 2, 8, 32, 48, 64, True, 10, 2, (9,), 2)
    w, mlp = Work(s), 6 * 32 * 48
    rest = 2 * 8 * 32 + mlp  # of one head in one column
    assert w.patch("qkv", Variant(1, 5, 0)) == 4 * 8 * 6 + rest + w.point(2, 5)
    # A key serves two query heads in columns 5 to 9, one product more and one less each.
    assert w.patch("qkv", Variant(1, 5, 4)) == 5 * (2 * 6 * 8 + 2 * 2 * 8 * 32 + mlp) + w.dense(2, 5)
    assert w.patch("qkv", Variant(2, 5, 0)) == 0, "the last layer's query of a column that nobody reads"
    assert w.patch("qkv", Variant(2, 5, 4)) == 2 * 6 * 8 + 2 * 2 * 8 * 32 + mlp + w.head


def test_all_logits_cost_all_rows():
    handle = open_model(models.build("text"))
    declared = Shape.of(handle, 8, reads=(-1,), rows=2)
    free = Shape.of(handle, 8, reads=None, rows=None)
    assert free.reads == tuple(range(8))
    v = Variant(2, None, 0)
    assert Work(free).patch("mlp_out", v) == 2 * 32 * models.VOCAB * 8
    assert Work(declared).patch("mlp_out", v) == 2 * 32 * 2


def test_the_lines():
    lines = forecast(bench(64), "heads", patches("heads each", 64), rate=1e9).lines
    assert "4,096 patches, 728 of which" in lines[0]
    assert "8.1 times as much" in lines[2]
    assert "1.00 of it" in lines[3]
    assert "expected" in lines[4]


def test_what_cannot_be_counted_is_refused():
    handle = open_model(models.build("text"))
    with pytest.raises(ValueError, match="inside a prompt of 8"):
        Shape.of(handle, 8, reads=(8,))
    with pytest.raises(ValueError, match="expected one of heads"):
        Work(bench(64)).patch("logits", Variant(0, None, 0))


def test_the_rate_is_flops_over_seconds():
    assert measure(lambda: None, 1000, seconds=0.01) > 1e6


def test_a_sweep_says_what_it_will_do(capsys):
    model = models.build("llava")
    ids = torch.tensor([[1, 7, *[models.IMAGE] * models.TOKENS, 8, 9]])
    pixels = torch.randn(1, 3, models.SIDE, models.SIDE, generator=torch.Generator().manual_seed(0))
    other = {"input_ids": ids, "pixel_values": pixels * 0.5}
    sweep = Sweep(model, clean={"input_ids": ids, "pixel_values": pixels}, corrupt=other, metric=logit_diff(11, 23))
    sweep.heads(positions="each")
    said = capsys.readouterr().err
    assert "240 patches, " in said, "3 layers, 20 columns, 4 heads"
    assert "one patch at a time it would be" in said
    assert "expected" in said
    assert said.index("expected") < said.index("240/240 patches")
    plain = sweep.forecast(Target("heads"), [Variant(0, 5, 0)])
    seen = sweep.forecast(Target("heads"), [Variant(0, 5, 0)], images=outside(sweep.handle, other))
    assert seen.naive > plain.naive
    assert seen.flops == plain.flops
    quiet = Sweep(model, clean=sweep.clean_inputs, corrupt=other, metric=logit_diff(11, 23), progress=False)
    quiet.heads()
    assert capsys.readouterr().err == ""


def test_the_planner_knows_what_the_engine_skips():
    """Patches that the engine answers without running them are those that are counted as free."""
    model = models.build("text", "qwen2")
    clean = torch.tensor([[3, 8, 9, 10, 11, 12]])
    corrupt = torch.tensor([[3, 8, 19, 10, 11, 12]])
    for pos in (-1, 3):
        sweep = Sweep(
            model,
            clean={"input_ids": clean},
            corrupt={"input_ids": corrupt},
            metric=logit_diff(11, 23, pos),
            progress=False,
        )
        g = sweep.handle.geometry
        units = {"heads": range(g.heads), "qkv": range(g.heads + 2 * g.kv_heads)}
        for kind in KINDS:
            target = Target(kind, ((0, 1), (2, 3))) if kind == "neurons" else Target(kind)
            names = list(units.get(kind, range(2) if kind == "neurons" else [None]))
            for positions in ("all", "each"):
                variants, _, _ = sweep.variants(target, names, positions, None)
                run = Run(sweep, target)
                free = [cost == 0 for cost in sweep.forecast(target, variants).costs]
                with torch.inference_mode():
                    skipped = [run.columns(v) == () for v in variants]
                wrong = [v for v, a, b in zip(variants, free, skipped, strict=True) if a != b]
                assert not wrong, (kind, pos, positions, wrong)


def test_queries_of_one_column_go_on_from_one_column(monkeypatch):
    """As they are counted; keys and values of a column change all later ones."""
    model = models.build("text", "qwen2")
    clean, corrupt = ({"input_ids": torch.tensor([[3, 8, word, 10, 11, 12]])} for word in (9, 19))
    sweep = Sweep(model, clean, corrupt, logit_diff(11, 23), progress=False)
    entered, real = {True: 0, False: 0}, Decoder.run

    def run(self, layer, packed):
        entered[packed.point] += sum(g.count for g in packed.groups)
        assert not packed.point or all(len(g.columns) == 1 for g in packed.groups)
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    g = sweep.handle.geometry
    sweep.qkv(positions=[2, 3], layers=[0])
    assert entered == {True: 2 * g.heads, False: 2 * 2 * g.kv_heads}
