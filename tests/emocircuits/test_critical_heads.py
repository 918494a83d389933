"""Stage II.2 on planted circuits, and against plain hooks in float64."""

import numpy as np
import planted
import pytest
import sweep_oracle as oracle
import torch
from circuit_pairs import planted_pairs

from emocircuits.circuits.heads import FILE, TENSORS, Heads, critical_heads, halves, shares
from emocircuits.circuits.steering import extract

L_EMO = planted.TELLER[0]
SIZE = planted.SIZE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return planted_pairs(folder), planted_pairs(folder, split="analyze", first=50)


@pytest.fixture(scope="module")
def found(made):
    subject = planted.subject()
    steering = extract(subject, made[0], progress=False)
    return critical_heads(subject, made[1], steering, L_EMO, progress=False)


def test_exactly_the_planted_heads_are_found(found):
    assert {(c.layer, c.head) for c in found.critical} == {planted.READER, planted.TELLER}
    for c in found.critical:
        assert c.low <= c.effect <= c.high
        assert c.q < 0.05
        assert c.effect > 0.5 > c.random
    best = [np.unravel_index(i, found.intention.shape) for i in np.argsort(-found.intention, axis=None)[:2]]
    assert {tuple(map(int, b)) for b in best} == {planted.READER, planted.TELLER}
    assert len(found.candidates) == 10


def test_nothing_is_found_where_all_heads_carry_the_same(made):
    subject = planted.subject("diffuse")
    steering = extract(subject, made[0], progress=False)
    spread = critical_heads(subject, made[1], steering, L_EMO, progress=False)
    assert not spread.critical
    assert spread.effects[planted.READER[0]].min() > 0.1


@pytest.mark.parametrize("reads", ["projection", "log-odds"])
def test_effects_are_those_of_a_hook_loop(made, reads):
    subject = planted.subject(dtype=torch.float64)
    pairs = made[1].take([0, 1, 4, 5])
    steering = extract(subject, made[0], progress=False)
    result = critical_heads(subject, pairs, steering, L_EMO, reads=reads, progress=False, top=3)
    heads = [range(h * SIZE, (h + 1) * SIZE) for h in range(planted.HEADS)]
    layers = subject.model.model.language_model.layers
    expected, gaps = [], []
    for i in range(len(pairs)):
        emotion = pairs.emotions[i]
        sides = [pairs.take([i]).inputs(subject, side) for side in ("emotional", "neutral")]
        tables, gap = [], []
        for layer in range(planted.LAYERS):
            read = L_EMO if layer <= L_EMO else planted.LAYERS - 1
            seen = []
            hook = layers[read].register_forward_hook(lambda m, a, o, seen=seen: seen.append(o[0, -1]))
            vector = steering.of(emotion)[read].double()

            def metric(logits, seen=seen, vector=vector, emotion=emotion):
                if reads == "projection":
                    return float(seen[-1] @ (vector / vector.norm()))
                ids = subject.tokenizer.convert_tokens_to_ids(planted.WORDS[emotion])
                p = logits[0, -1].softmax(-1)[ids].sum()
                return float((p / (1 - p)).log())

            with torch.no_grad():
                clean, corrupt = (metric(subject.model(**x).logits) for x in sides)
            values = oracle.sweep(subject.model, sides[1], sides[0], "heads", metric, "all", heads, layers=[layer])
            hook.remove()
            tables.append(values[0] - corrupt)
            gap.append(clean - corrupt)
        expected.append(torch.stack(tables))
        gaps.append(gap)
    expected, gaps = torch.stack(expected).numpy(), np.array(gaps)
    assert np.abs(result.restored - expected).max() < 1e-5 * np.abs(gaps).max()
    assert np.abs(result.effects - shares(expected, gaps)).max() < 1e-5


def test_intention_is_the_cosine_of_what_a_head_writes(made, found):
    subject = planted.subject(dtype=torch.float64)
    steering = extract(subject, made[0], progress=False)
    pairs, total = made[1], np.zeros((planted.LAYERS, planted.HEADS))
    for i in range(len(pairs)):
        inputs = pairs.take([i]).inputs(subject, "emotional")
        for layer, z in oracle.record(subject.model, inputs, "heads").items():
            weight = subject.model.model.language_model.layers[layer].self_attn.o_proj.weight.detach()
            s = steering.of(pairs.emotions[i])[layer].double()
            for h in range(planted.HEADS):
                part = slice(h * SIZE, (h + 1) * SIZE)
                total[layer, h] += float(torch.cosine_similarity(weight[:, part] @ z[-1, part], s, dim=0))
    assert np.abs(found.intention - total / len(pairs)).max() < 1e-4


def test_a_folder_gives_back_everything(found, tmp_path):
    import pandas as pd

    found.save(tmp_path)
    again = Heads.load(tmp_path)
    for name in ("effects", "intention", "restored", "gaps", "half"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    assert again.candidates == found.candidates
    assert again.settings == found.settings
    table = pd.read_parquet(tmp_path / "heads.parquet")
    assert table.effect.to_numpy().reshape(found.effects.shape).tolist() == found.effects.tolist()
    assert np.allclose(table.effect_sad, found.of("sad").ravel())
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"):
        Heads.load(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="not critical heads"):
        Heads.load(tmp_path)


def test_halves_hold_as_many_of_each_emotion():
    half = halves(["a"] * 5 + ["b"] * 4, seed=3)
    assert half[:5].sum() in (2, 3)
    assert half[5:].sum() == 2
    assert (halves(["a"] * 9, 1) == halves(["a"] * 9, 1)).all()
    with pytest.raises(ValueError, match="'b' has one pair"):
        halves(["a", "a", "b"], 0)


def test_pairs_with_nothing_to_restore_are_refused():
    with pytest.raises(ValueError, match="nothing to restore"):
        shares(np.ones((3, 2, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no pair of 'joy'"):
        Heads(*[np.zeros((1, 1, 1))] * 4, np.zeros(1), ("sad",), (), {}).of("joy")


def test_readings_are_checked(made):
    subject = planted.subject()
    steering = extract(subject, made[0], progress=False)
    for wrong in ({"reads": "logit"}, {"rows": "first"}):
        with pytest.raises(ValueError, match="expected '"):
            critical_heads(subject, made[1].take([0, 1]), steering, L_EMO, progress=False, **wrong)
