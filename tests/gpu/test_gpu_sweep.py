"""Sweeps on the GPU: the tables of a CPU in float64, bfloat16 as good as plain hooks, activations in pinned memory."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from on_device import DEVICE, needs_gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "emocircuits"))

pytestmark = pytest.mark.gpu

SIZE, HEADS, COLUMNS = 16, 4, 40
UNITS = [slice(SIZE * h, SIZE * h + SIZE) for h in range(HEADS)]
A, B = 11, 23
KINDS = ["llama", "qwen2", "llama-padded"]


def case(kind):
    """A model in float64 on the CPU, and a pair that first differs in the fourth of its own columns."""
    import models

    name, _, padded = kind.partition("-")
    over = dict(hidden_size=SIZE * HEADS, intermediate_size=160, num_attention_heads=HEADS, num_key_value_heads=2)
    model = models.build("text", name, dtype=torch.float64, **over)
    ids = torch.randint(8, 60, (1, COLUMNS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5], mask[0, :5] = models.PAD, 0
    clean = {"input_ids": ids, "attention_mask": mask}
    corrupt = {"input_ids": ids.clone(), "attention_mask": mask}
    corrupt["input_ids"][0, [8, 20]] = torch.tensor([61, 62])
    return model, clean, corrupt


def on(device, dtype, model, *prompts):
    moved = [{name: x.to(device) for name, x in prompt.items()} for prompt in prompts]
    return (copy.deepcopy(model).to(device, dtype), *moved)


def difference(logits):
    return logits[0, -1, A].double() - logits[0, -1, B].double()


def sweep(*parts, **options):
    from emocircuits.sweep import Sweep, logit_diff

    return Sweep(*parts, logit_diff(A, B), progress=False, **options)


TABLES = [("heads", "all"), ("heads", [9, 25, -1]), ("residual", [9, 25, -1])]


def table(model, clean, corrupt, target, positions):
    """What plain hooks give, one patch at a time."""
    import sweep_oracle as oracle

    columns = positions if positions == "all" else [p % COLUMNS for p in positions]
    return oracle.sweep(model, corrupt, clean, target, difference, columns, UNITS if target == "heads" else None)


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "positions"), TABLES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_a_gpu_gives_what_a_cpu_gives(kind, target, positions, dtype, bound):
    parts = case(kind)
    expected = table(*parts, target, positions)
    found = getattr(sweep(*on("cuda", dtype, *parts)), target)(positions=positions)
    spread = max(float(expected.max() - expected.min()), abs(found.gap))
    assert float((found.values - expected).abs().max()) <= bound * spread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "positions"), TABLES)
def test_bfloat16_is_as_near_to_float64_as_plain_hooks(kind, target, positions):
    """Within twice the larger of two noises: the loop's rounding, and what another batch size changes in the loop."""
    low = on(DEVICE, torch.bfloat16, *case(kind))
    truth = table(low[0].double().cpu(), *({n: x.cpu() for n, x in p.items()} for p in low[1:]), target, positions)
    low = on(DEVICE, torch.bfloat16, *case(kind))
    loop = table(*low, target, positions)
    many = [{name: x.expand(8, -1).contiguous() for name, x in prompt.items()} for prompt in low[1:]]
    again = table(low[0], *many, target, positions)
    noise = max(rms(loop - truth), rms(again - loop))
    assert rms(truth) > 5 * noise  # or nothing could be seen
    assert rms(getattr(sweep(*low), target)(positions=positions).values - truth) <= 2 * noise


def rms(x):
    return float(x.pow(2).mean().sqrt())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pinned_activations_give_the_same(dtype, monkeypatch):
    from emocircuits.sweep import memory

    parts = on("cuda", dtype, *case("llama"))
    here = sweep(*parts, activations="device")
    monkeypatch.setattr(memory, "free", lambda device: 0)
    there = sweep(*parts)
    monkeypatch.undo()
    assert here.base.host is None
    assert there.base.host is not None
    assert all(x.is_pinned() for x in there.base.host._kept.values())
    for target, positions in TABLES:
        a, b = (getattr(s, target)(positions=positions).values for s in (here, there))
        assert torch.equal(a, b)
    assert len({layer for layer, _ in there.base.host.resident}) <= 2


@needs_gpu
def test_a_batch_takes_what_was_estimated():
    from emocircuits.sweep.engine import Run
    from emocircuits.sweep.targets import Target, Variant

    made = sweep(*on("cuda", torch.bfloat16, *case("llama")))
    variants = [Variant(0, None, h) for h in range(HEADS)] * 64
    with torch.inference_mode():
        run = Run(made, Target("heads"))
        run.values(variants)
        sizes = [run.size(v) for v in variants]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run.values(variants)
        taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 1.15 * run.demand.bytes(sum(sizes), len(sizes), (sum(sizes), len(sizes)))
