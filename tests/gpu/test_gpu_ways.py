"""On a GPU: beams, samples, chats and CUDA graphs of a patched model give what they give on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from on_device import needs_gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "emocircuits"))

pytestmark = [pytest.mark.gpu, needs_gpu]


def both(run):
    """``run(model, inputs, plan)`` in float64 on the CPU and on the GPU."""
    import models
    from test_patching import everything

    found = []
    for device in ("cpu", "cuda"):
        model = models.build("llava", dtype=torch.float64).to(device)
        inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])
        plan = everything(rows=[1]) + everything(seed=2)
        found.append(run(model, {name: x.to(device) for name, x in inputs.items()}, plan))
    return found


def options():
    from test_generation import OPTIONS

    return dict(OPTIONS, do_sample=False)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ways", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(ways, static):
    from emocircuits import patch

    ways = ways | ({"cache_implementation": "static"} if static else {})

    def run(model, inputs, plan):
        with patch(model, plan):
            return model.generate(**inputs, **options(), **ways).cpu()

    on_cpu, on_gpu = both(run)
    assert torch.equal(on_cpu, on_gpu)


def test_returned_sequences_begin_alike():
    """Three greedy rows of one prompt are three times the same."""
    from emocircuits import patch

    def run(model, inputs, plan):
        with patch(model, plan):
            one = model.generate(**inputs, **options())
            three = model.generate(**inputs, **{**options(), "do_sample": True, "top_k": 1}, num_return_sequences=3)
        assert torch.equal(three, one.repeat_interleave(3, 0))
        return one.cpu()

    on_cpu, on_gpu = both(run)
    assert torch.equal(on_cpu, on_gpu)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chats(kind):
    """generate() compiles the steps on a static cache by itself, and may take steps back before it returns."""
    import test_generation as chats

    from emocircuits import patch

    def run(model, inputs, plan):
        first = {name: x[:1] for name, x in inputs.items()}
        cache = chats.caches(model)[kind]
        with patch(model, chats.CHAT):
            said = model.generate(**first, past_key_values=cache, **options())
            more = torch.cat([said, torch.tensor([[9, 11, 13]], device=said.device)], 1)
            mask = torch.cat([first["attention_mask"], torch.ones_like(more[:, first["input_ids"].shape[1] :])], 1)
            return model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, **options()).cpu()

    on_cpu, on_gpu = both(run)
    assert torch.equal(on_cpu, on_gpu)


def test_cuda_graphs_replay_steps_prompts_and_plans():
    """`reduce-overhead` captures the step; other prompts and refilled tables are followed without another capture."""
    import models
    import test_compiled

    from emocircuits import patch

    model = models.build("llava")
    plans = [test_compiled.plan(), test_compiled.plan(by=0.6, scale=-1.0, neurons=(1, 5))]
    prompts = [test_compiled.prompts(model), test_compiled.prompts(model, more=3)]
    expected = []
    for plan, inputs in zip(plans, prompts, strict=True):
        with patch(model, plan):
            expected.append(test_compiled.generate(model, inputs, model))
    model = model.cuda()
    torch.set_default_device("cuda")
    try:
        with patch(model, plans[0], backend="fused") as patched:
            step = torch.compile(model, fullgraph=True, mode="reduce-overhead")

            def cloned(**kwargs):
                torch.compiler.cudagraph_mark_step_begin()
                out = step(**kwargs)
                out.logits = out.logits.clone()
                return out

            for number, (plan, inputs) in enumerate(zip(plans, prompts, strict=True)):
                patched.replace(plan)
                with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                    found = test_compiled.generate(model, {k: v.cuda() for k, v in inputs.items()}, cloned)
                torch.testing.assert_close(found.cpu(), expected[number], rtol=1e-3, atol=1e-3)
    finally:
        torch.set_default_device(None)


def test_the_host_does_not_wait_for_a_decode_step():
    """A step on a static cache with a plan asks the device for nothing."""
    import models
    from test_patching import everything
    from transformers import StaticCache

    from emocircuits import patch

    model = models.build("llava").cuda()
    inputs = {name: x.cuda() for name, x in models.prompt(model, 3, 5).items()}
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    token = torch.tensor([[9]], device="cuda")
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool, device="cuda")
    mask[..., inputs["input_ids"].shape[1] + 2 :] = False
    position = torch.tensor([[inputs["input_ids"].shape[1]]], device="cuda")
    with patch(model, everything()), torch.no_grad():
        model(**inputs, past_key_values=cache)
        step = dict(input_ids=token, attention_mask=mask, past_key_values=cache)
        model(**step, position_ids=position)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**step, position_ids=position + 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
