"""Function verification on the planted circuit, and against plain hooks in float64."""

import dataclasses as dc

import numpy as np
import planted
import pytest
import torch
from circuit_pairs import planted_pairs

from emocircuits.circuit import Circuit
from emocircuits.circuits.answering import Fluency, say, surprise
from emocircuits.circuits.controls import LEAST, against, corrected, paired, random_directions, random_sets
from emocircuits.circuits.verification import FILE, NORM, SAME, Verification, scaled, verify, written
from emocircuits.plan import Plan

CIRCUIT = Circuit("llava", planted.LAYERS, 2, (planted.READER, planted.TELLER), planted.SPEAKERS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return planted_pairs(tmp_path_factory.mktemp("pairs"), split="analyze", first=50)


@pytest.fixture(scope="module")
def found(pairs):
    return verify(planted.subject(), CIRCUIT, pairs, progress=False)


def test_without_the_planted_circuit_nothing_is_hit_and_random_ones_are_not_needed(found):
    assert np.mean(found.base["emotional"]) == 1
    assert np.mean(found.base["neutral"]) == 0
    assert len(found.checks) == 8
    for what in ("heads", "neurons"):
        ablated = found.of(what, "ablate", "emotional")
        assert ablated.factor == 0
        assert ablated.effect.value == 0
        assert ablated.effect.change == ablated.effect.relative == -1
        assert ablated.effect.q < 0.001
        same = next(r for r in ablated.random if r.kind == SAME)
        assert same.values == (1.0,) * LEAST
        assert same.share == 0
        assert same.draw_p == 1 / 11
        assert same.q < 0.01
        kept = found.of(what, "enhance", "emotional")
        assert kept.effect.value == 1
        assert kept.effect.p == 1
        quiet = found.of(what, "enhance", "neutral")
        assert quiet.effect.value == 0
        assert quiet.effect.relative is None
    for drawn in found.settings["random"]["heads"]:
        assert not {tuple(h) for h in drawn} & set(CIRCUIT.heads)
        assert sorted(layer for layer, _ in drawn) == [1, 2]


def test_random_changes_of_equal_norm_are_that(found, pairs):
    subject = planted.subject()
    for what in ("heads", "neurons"):
        members = CIRCUIT.heads if what == "heads" else CIRCUIT.neurons
        norms = written(subject, pairs, what, layers=sorted({l for l, _ in members}))
        far = sum(norms[l][i] for l, i in members)
        for action, factor in (("ablate", 0.0), ("enhance", 2.0)):
            check = found.of(what, action, "emotional")
            assert [r.kind for r in check.random] == [SAME, NORM]
            sets = found.settings["random"][what]
            for drawn, own in zip(sets, found.settings["random_factors"][f"{what} {action}"], strict=True):
                assert (own - 1) * sum(norms[l][i] for l, i in drawn) == pytest.approx((factor - 1) * far)


def test_norms_are_those_of_what_is_written(pairs):
    subject, few = planted.subject(dtype=torch.float64), pairs.take([0, 5])
    layers = subject.model.model.language_model.layers
    kept = {"z": [], "a": []}
    hooks = [
        layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: kept["z"].append(a[0][0])),
        layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: kept["a"].append(a[0][0])),
    ]
    with torch.no_grad():
        for i in range(2):
            subject.model(**few.take([i]).inputs(subject, "emotional"))
    for hook in hooks:
        hook.remove()
    z, a = torch.cat(kept["z"]), torch.cat(kept["a"])
    size = planted.SIZE
    heads = [
        (z[:, h * size : (h + 1) * size] @ layers[1].self_attn.o_proj.weight[:, h * size : (h + 1) * size].T)
        .norm(dim=-1).mean().item()
        for h in range(planted.HEADS)
    ]  # fmt: skip
    neurons = [
        (a[:, [i]] * layers[1].mlp.down_proj.weight[:, i]).norm(dim=-1).mean().item() for i in range(planted.NEURONS)
    ]
    assert np.allclose(written(subject, few, "heads", layers=[1])[1], heads, rtol=1e-4)
    assert np.allclose(written(subject, few, "neurons", layers=[1])[1], neurons, rtol=1e-4)


def test_answers_are_those_of_plain_hooks(pairs):
    subject, few = planted.subject(dtype=torch.float64), pairs.take([0, 5, 10])
    said = say(subject, few, "emotional", [Plan(), Plan(scaled("heads", [planted.READER], 0.0))])
    layer, head = planted.READER
    module = subject.model.model.language_model.layers[layer].self_attn.o_proj

    def ablate(module, args):
        z = args[0].clone()
        z[..., head * planted.SIZE : (head + 1) * planted.SIZE] = 0
        return (z,)

    for p in range(2):
        hook = module.register_forward_pre_hook(ablate) if p else None
        for i in range(len(few)):
            inputs = few.take([i]).inputs(subject, "emotional")
            out = subject.model.generate(**inputs, max_new_tokens=subject.limit, do_sample=False)
            assert tuple(out[0, inputs["input_ids"].shape[1] :].tolist()) == said.ids[p][i]
        if hook is not None:
            hook.remove()
    assert set(said.texts[1]) == {"calm"}


def test_perplexity_is_that_of_teacher_forcing(pairs):
    subject, few = planted.subject(dtype=torch.float64), pairs.take([0, 5, 10])
    said = say(subject, few, "emotional", [Plan(), Plan(scaled("heads", [planted.READER], 0.0))])
    answers = [(30, 2), (36,), (30, 31, 2)]
    nats, each = [], []
    for i, ids in enumerate([*said.ids[1], *answers]):
        inputs = few.take([i % 3]).inputs(subject, "emotional")
        prompt = inputs["input_ids"]
        longer = torch.cat([prompt, torch.tensor([ids])], 1)
        with torch.no_grad():
            logits = subject.model(
                **{**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
            ).logits.log_softmax(-1)
        at = prompt.shape[1] - 1
        value = -sum(float(logits[0, at + k, t]) for k, t in enumerate(ids))
        (nats if i < 3 else each).append(value)
    assert surprise(subject, few, "emotional", answers) == pytest.approx(each, abs=1e-9)
    ppl = Fluency(subject, few, batch=2).perplexity(said)
    assert ppl[1] == pytest.approx(np.exp(sum(nats) / sum(map(len, said.ids[1]))), abs=1e-9)
    assert ppl[1] > ppl[0] >= 1


def test_random_sets_avoid_the_circuit_where_they_can():
    members = [(0, 1), (0, 2), (0, 3), (3, 0)]
    sets = random_sets(members, 4, 50, 0)
    assert sets == random_sets(members, 4, 50, 0) != random_sets(members, 4, 50, 1)
    for drawn in sets:
        assert sorted(layer for layer, _ in drawn) == [0, 0, 0, 3]
        assert len(set(drawn)) == 4
        assert (0, 0) in drawn  # the only one outside it
        assert (3, 0) not in drawn
    assert len(set(sets)) > 3
    with pytest.raises(ValueError, match="no random set of the same shape"):
        random_sets([(0, 0), (0, 1)], 2, 10, 0)
    with pytest.raises(ValueError, match="at least 10"):
        random_sets(members, 4, 9, 0)
    with pytest.raises(ValueError, match="nothing to draw"):
        random_sets([], 4, 10, 0)


def test_random_directions_have_the_norm():
    like = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    drawn = random_directions(like, torch.Generator().manual_seed(1))
    assert torch.allclose(drawn.norm(dim=-1), like.norm(dim=-1))
    assert torch.cosine_similarity(drawn, like, dim=-1).abs().max() < 0.9


def test_statistics_by_hand():
    base, value = np.ones(6), np.array([0, 0, 0, 0, 0, 1.0])
    drawn = np.array([[1, 1, 1, 1, 1, 0.0], [0, 0, 0, 0, 0, 0.0]])
    r = against("x", base, value, drawn)
    assert r.values == (5 / 6, 0.0)
    assert r.share == 0.5
    assert r.draw_p == 2 / 3
    assert r.p == paired(value, drawn.mean(0))
    assert paired([1, 2], [1, 2]) == 1
    three = corrected([dc.replace(r, p=p) for p in (0.01, 0.04, 0.03)])
    assert [t.q for t in three] == pytest.approx([0.03, 0.04, 0.04])
    assert corrected([]) == []


def test_a_folder_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    assert Verification.load(tmp_path) == found
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match="not function verification"):
        Verification.load(tmp_path)


def test_what_cannot_be_verified_is_refused(pairs):
    subject = planted.subject()
    with pytest.raises(ValueError, match="above 1"):
        verify(subject, CIRCUIT, pairs, enhance=1.0)
    with pytest.raises(ValueError, match="nothing to draw"):
        verify(subject, Circuit("llava", planted.LAYERS, 2, ()), pairs)
    with pytest.raises(ValueError, match="this is 'llava' with 4"):
        verify(subject, Circuit("llava", 7, 2, ((1, 2),)), pairs)
