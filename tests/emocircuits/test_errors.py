"""What a patched model cannot do is refused in one line that says the way out, and leaves nothing half patched."""

import models
import pytest
import torch
from test_patching import snapshot

from emocircuits import VEENA, AddVector, BoostRoute, Circuit, Plan, ReplaceHead, ScaleHead, ScaleNeurons, patch

VISUAL = Plan([BoostRoute([(0, 0)], to="query", source="visual", by=2.0)])


@pytest.fixture(scope="module")
def model():
    model = models.build("llava")
    model.generate(**models.prompt(model, 2, 3), max_new_tokens=1)
    return model


def refused(model, error, message, plan, use=None, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught, patch(model, plan, **options):
        if use is None:
            model(**models.prompt(model, 3, 5))
        else:
            use(model)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan([ScaleHead([(7, 0)])]), "no layer 7.*0 to 2"),
        (Plan([ScaleHead([(0, 4)])]), "no head 4.*0 to 3"),
        (Plan([BoostRoute([(2, 9)], to="query")]), "no head 9"),
        (Plan([ScaleNeurons({1: [48]})]), "no neuron 48.*0 to 47"),
        (Plan([AddVector([0], torch.ones(31))]), "length 31.*needs 32"),
        (Plan([ReplaceHead([(0, 0)], torch.ones(9))]), "length 9.*needs 8"),
    ],
)
def test_what_the_model_does_not_have(model, plan, message):
    refused(model, ValueError, message, plan)


def test_visual_route_without_an_image(model):
    refused(model, ValueError, "has none.*image", VISUAL, lambda m: m(**models.prompt(m, 3, 5, [])))
    both = [models.prompt(model, 3, 5), models.prompt(model, 3, 5, [])]
    mixed = models.batch([{k: r[k] for k in ("input_ids", "attention_mask")} for r in both])
    mixed["pixel_values"] = both[0]["pixel_values"]
    refused(model, ValueError, "batch row 1", VISUAL, lambda m: m(**mixed))
    with patch(model, Plan([BoostRoute([(0, 0)], to="query", source="visual", by=2.0, rows=[0])])):
        model(**mixed)


def test_visual_plan_on_a_text_only_model():
    text = models.build("text", "qwen2")
    refused(text, ValueError, "text-only", VISUAL)
    with patch(text, Plan([ScaleNeurons({0: [1]}, by=2.0), BoostRoute([(0, 0)], to="last", source="query", by=2.0)])):
        text(**models.prompt(text, 3, 4, []))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "text"])
def test_output_attentions(family):
    model = models.build(family)
    inputs = models.prompt(model, 3, 5, [] if family == "text" else None)
    model.generate(**inputs, max_new_tokens=1)
    plan = Plan([ScaleHead([(0, 0)], by=0.0)])
    refused(model, ValueError, "output_attentions", plan, lambda m: m(**inputs, output_attentions=True))
    options = {"output_attentions": True, "return_dict_in_generate": True}
    refused(model, ValueError, "output_attentions", plan, lambda m: m.generate(**inputs, **options))


def test_wrong_batch_rows(model):
    plan = Plan([ScaleHead([(0, 0)], by=0.0, rows=[2])])
    two = models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 5)])
    refused(model, ValueError, "batch row 2.*2 rows", plan, lambda m: m(**two))
    value = torch.zeros(3, two["input_ids"].shape[1], 1, 8)
    refused(model, ValueError, "3 batch rows.*has 2", Plan([ReplaceHead([(0, 0)], value)]), lambda m: m(**two))

    def shrink(m):
        out = m(**two, use_cache=True)
        m(input_ids=two["input_ids"][:1, -1:], past_key_values=out.past_key_values)

    refused(model, ValueError, "2 batch rows, this step has 1", VISUAL, shrink)


def test_patched_twice_and_compiled(model):
    refused(model, ValueError, "already patched", VISUAL, lambda m: patch(m, Plan()).__enter__())
    compiled = torch.compile(models.build("llava"))
    with pytest.raises(ValueError, match=r"torch.compile inside"), patch(compiled, Plan()):
        pass


def test_backends(model):
    refused(model, ValueError, "expected one of", VISUAL, backend="quick")
    refused(model, NotImplementedError, r"not available|available here", VISUAL, backend="native")


def test_filled_cache_from_outside(model):
    inputs = models.prompt(model, 3, 5)
    cache = model(**inputs, use_cache=True).past_key_values
    refused(
        model, ValueError, "filled cache", VISUAL, lambda m: m(input_ids=torch.tensor([[9]]), past_key_values=cache)
    )


def test_what_is_not_a_model_or_a_plan(model):
    with pytest.raises(TypeError, match="expected a Plan"):
        patch(model, [ScaleHead([(0, 0)])])
    with pytest.raises(TypeError, match=r"Hugging Face model"):
        patch(torch.nn.Linear(2, 2), Plan())
    with pytest.raises(NotImplementedError, match=r"missing: module model\. Known types: llava"):
        from transformers import CTRLConfig, CTRLLMHeadModel

        patch(CTRLLMHeadModel(CTRLConfig(n_layer=1, n_head=2, n_embd=8, dff=8, vocab_size=16)), Plan())
    with pytest.raises(NotImplementedError, match=r"lacks a part"):
        patch(model.model, Plan())


def test_dropout_in_training_mode():
    model = models.build("llava", attention_dropout=0.1).train()
    inputs = models.prompt(model, 3, 5)
    with pytest.raises(NotImplementedError, match="eval"), patch(model, VISUAL):
        model(**inputs)


def test_circuit_of_another_model(model):
    with pytest.raises(ValueError, match="6 layers"):
        VEENA(Circuit("llava", 6, 3, [(1, 1)]), beta=2.0).plan(model)
