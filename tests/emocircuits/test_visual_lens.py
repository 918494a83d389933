"""The logit lens on visual tokens: against the full softmax in float64, and on the planted circuit."""

import families_harness as harness
import families_vision_models as tiny
import numpy as np
import planted
import pytest
import torch
from circuit_pairs import planted_pairs

from emocircuits.circuits.lens import FILE, GROUPS, TENSORS, Lens, lens_rows, visual_lens
from emocircuits.circuits.lexicon import Lexicon
from emocircuits.circuits.pairs import SIDES
from emocircuits.families import open_model
from emocircuits.roles import prompt_roles
from emokernels import Role

SETS = [[9, 10, 11], [12], [40, 41, 42, 43]]
BUILDERS = {
    "llama": harness.BUILDERS["LLaVA 1.5"],
    "qwen2": tiny.vision("Llava", tiny.CLIP_TOWER, tiny.square(), "Qwen2Config", vision_feature_layer=-1, **tiny.INDEX),
}


def told(logits):
    """Entropy and set probabilities of whole rows of logits."""
    p = logits.double().softmax(-1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
    return entropy, torch.stack([p[..., ids].sum(-1) for ids in SETS], -1)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_the_full_softmax(name, padding):
    model, make_inputs = BUILDERS[name](torch.float64)
    inputs = make_inputs(3, padding)
    kept = []
    hooks = [
        layer.register_forward_hook(lambda m, a, o: kept.append(o[0] if isinstance(o, tuple) else o))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    rows = lens_rows(model, inputs, SETS)
    roles = prompt_roles(inputs["input_ids"], inputs["attention_mask"].bool(), open_model(model).placeholder_ids())
    wanted = torch.isin(roles.long(), torch.tensor([int(Role[g.upper()]) for g in GROUPS]))
    at = wanted.nonzero()
    assert torch.equal(rows.prompt, at[:, 0])
    assert torch.equal(rows.role, roles[wanted].long())
    for layer, hidden in enumerate(kept):
        with torch.no_grad():
            entropy, probability = told(model.lm_head(model.model.language_model.norm(hidden[wanted])))
        assert (rows.entropy[layer] - entropy).abs().max() < 1e-10
        assert (rows.probability[layer] - probability).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["Aya Vision", "Gemma 3 (vision)", "Qwen3-VL", "PaliGemma 2", "InternVL"])
def test_the_last_layer_is_what_the_model_says(name):
    """Whatever it does with its logits: scales, caps, features added between layers."""
    model, _, make_inputs, _ = harness.built(name)
    if name == "Aya Vision":
        assert model.config.text_config.logit_scale != 1
    inputs = make_inputs(2, "left")
    if name == "PaliGemma 2":
        assert model.config.text_config.final_logit_softcapping
    with torch.no_grad():
        entropy, probability = told(model(**inputs).logits[:, -1])
    rows = lens_rows(model, inputs, SETS)
    last = rows.role == int(Role.LAST)
    assert (rows.entropy[-1, last] - entropy).abs().max() < 1e-4
    assert (rows.probability[-1, last] - probability).abs().max() < 1e-5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return planted_pairs(tmp_path_factory.mktemp("pairs"), split="analyze")


@pytest.fixture(scope="module")
def found(pairs):
    return visual_lens(planted.subject(), pairs, batch=5, progress=False)


def test_the_planted_speakers_are_seen_in_the_last_row(found, pairs):
    say = planted.SPEAKERS[0][0]
    last = GROUPS.index("last")
    assert (found.gold[0, :, say, last] > 0.9).all()
    assert (found.gold[0, :, :say, last] < 0.2).all()
    assert (found.gold[1, :, :, last] < 0.2).all()
    assert (found.entropy[0, :, say, last] < 0.5).all()
    assert (found.random[0, :, say, last] < 0.05).all()
    # Visual tokens of the planted model hold no words.
    assert np.abs(found.gold[:, :, :, 0] - found.gold[1, :, :, 0]).max() < 0.05
    assert found.entropy.max() <= np.log(found.settings["vocabulary"]) + 1e-6
    told = found.summary()
    assert told["last"]["emotional"]["random"]["gold_above"][say] == 10
    assert told["last"]["difference"]["gold"]["q"][say] < 0.01
    assert told["visual"]["n"] == len(pairs)
    mean = told["last"]["emotional"]["gold"]
    assert mean["mean"][say] == pytest.approx(found.gold[0, :, say, last].mean())
    assert mean["low"][say] <= mean["mean"][say] <= mean["high"][say]


def test_means_are_those_of_the_rows(found, pairs):
    subject = planted.subject()
    for s, side in enumerate(SIDES):
        inputs = pairs.take([5]).inputs(subject, side)
        roles = subject.roles(inputs)[0]
        kept = []
        hooks = [
            layer.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o))
            for layer in subject.model.model.language_model.layers
        ]
        with torch.no_grad():
            subject.model(**inputs)
        for hook in hooks:
            hook.remove()
        words = planted.WORDS[pairs.emotions[5]]
        others = [w for e in planted.EMOTIONS if e != pairs.emotions[5] for w in planted.WORDS[e]]
        for layer, hidden in enumerate(kept):
            with torch.no_grad():
                p = subject.model.lm_head(subject.model.model.language_model.norm(hidden[0])).double().softmax(-1)
            for g, group in enumerate(GROUPS):
                rows = p[roles == int(Role[group.upper()])]
                for table, several, by in ((found.gold, words, 1), (found.others, others, 3)):
                    ids = subject.tokenizer.convert_tokens_to_ids(list(several))
                    assert table[s, 5, layer, g] == pytest.approx(float(rows[:, ids].sum(-1).mean()) / by, abs=1e-6)


def test_nothing_differs_in_a_model_without_a_circuit(pairs):
    blind = visual_lens(planted.subject("blind"), pairs, progress=False)
    told = blind.summary()
    assert all(q == 1.0 for g in GROUPS for t in ("gold", "entropy") for q in told[g]["difference"][t]["q"])


def test_a_folder_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    again = Lens.load(tmp_path)
    for name in ("entropy", "gold", "others", "random"):
        assert np.array_equal(getattr(again, name), getattr(found, name), equal_nan=True)
    for name in ("ids", "emotions", "sizes", "settings"):
        assert getattr(again, name) == getattr(found, name)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(ValueError, match="cannot read the tables"):
        Lens.load(tmp_path)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match="not a logit lens"):
        Lens.load(tmp_path)


def test_refusals(pairs):
    subject = planted.subject()
    with pytest.raises(ValueError, match="draws=3: expected at least 10"):
        visual_lens(subject, pairs, draws=3, progress=False)
    lexicon = Lexicon({**planted.WORDS, "sad": (*planted.TEXT[3:20],)})
    wide = type(subject)(subject.model, subject.processor, subject.prompt, lexicon)
    with pytest.raises(ValueError, match=r"'sad' has \d+ tokens, but only \d+ of the vocabulary"):
        visual_lens(wide, pairs, progress=False)
