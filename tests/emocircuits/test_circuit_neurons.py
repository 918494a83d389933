"""Stage II.3 on planted circuits: exactly the planted neurons of each type, exact patches, files."""

import numpy as np
import planted
import pytest
import sweep_oracle as oracle
import torch
from circuit_pairs import planted_pairs

from emocircuits import Circuit
from emocircuits.circuits.activations import by_role
from emocircuits.circuits.neuron_effects import matched, patched_neurons
from emocircuits.circuits.neurons import FILE, TABLE, Neurons, critical_neurons
from emocircuits.circuits.steering import extract
from emocircuits.circuits.tracing import FILE as TREES
from emocircuits.report.sections.neurons import section
from emokernels import Role

HEADS = [planted.READER, planted.TELLER]
L_EMO = planted.TELLER[0]
# The planted vocabulary has 38 words: twenty of them would be half of it.
SMALL = dict(look=2, k=2, top=10, progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return planted_pairs(folder), planted_pairs(folder, each=8, split="analyze", first=50)


@pytest.fixture(scope="module")
def steering(made):
    return extract(planted.subject(), made[0], progress=False)


@pytest.fixture(scope="module")
def found(made, steering):
    return critical_neurons(planted.subject(), made[1], steering, HEADS, L_EMO, **SMALL)


def test_exactly_the_planted_neurons_are_found(found):
    assert {(n.layer, n.neuron) for n in found.explicit} == set(planted.SPEAKERS)
    assert {(n.layer, n.neuron) for n in found.contextual} == set(planted.TRIGGERS)
    for n in (*found.explicit, *found.contextual):
        planted_for = (planted.SPEAKERS if n.type == "explicit" else planted.TRIGGERS).index((n.layer, n.neuron))
        assert n.emotion == planted.EMOTIONS[planted_for]
        assert n.effect.low <= n.effect.effect <= n.effect.high
        assert n.effect.effect > 0.5 > 0.01 > n.effect.random
        assert n.effect.q < 0.05
        assert n.effect.n == 4
        assert n.low <= n.score <= n.high
        assert n.score > 0.1 > n.random
        if n.type == "explicit":
            assert set(n.tokens) == set(planted.WORDS[n.emotion])
            assert (n.hits, n.head, n.sign) == (2, None, 1)
            assert n.activation["emotional"]["last"] > 1 > abs(n.activation["neutral"]["last"])
        else:
            assert n.head == planted.READER
            assert n.activation["emotional"]["visual"] > 0.5 > abs(n.activation["neutral"]["visual"])
    assert all(n.effect.effect < 0.01 for n in found.neurons if not n.critical)


def test_where_all_neurons_of_a_layer_do_the_same_none_is_critical(made, steering):
    subject = planted.subject()
    mlp = subject.model.model.language_model.layers[planted.SPEAKERS[0][0]].mlp
    with torch.no_grad():
        same = [planted.SPEAKERS[i % 4][1] for i in range(planted.NEURONS)]
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[:] = weight[same].clone()
        mlp.down_proj.weight[:] = mlp.down_proj.weight[:, same].clone() / 8
    # Eight neurons do the same for each emotion: four of them are candidates, the others are among the random ones.
    spread = critical_neurons(subject, made[1], steering, [], L_EMO, **{**SMALL, "top": 4, "controls": 28})
    assert len(spread.neurons) == 4
    assert max(n.effect.effect for n in spread.neurons) > 0.02
    assert not spread.explicit
    assert spread.tracing is None
    assert spread.settings["not_traced"] == "there are no critical heads"


def test_a_model_that_sees_no_difference_is_refused(made, steering):
    with pytest.raises(ValueError, match="no further along S"):
        critical_neurons(planted.subject("blind"), made[1], steering, HEADS, L_EMO, **SMALL)


@pytest.mark.parametrize(("reads", "rows"), [("log-odds", "last"), ("projection", "all")])
def test_effects_are_those_of_a_hook_loop(made, steering, reads, rows):
    subject = planted.subject(dtype=torch.float64)
    pairs = made[1].take([0, 9])
    places = [planted.TRIGGERS[0], (2, 3), *planted.SPEAKERS[:2]]
    wanted = np.ones((2, len(places)), bool)
    wanted[1, 1] = False
    restored, gaps = patched_neurons(
        subject, pairs, places, wanted, reads=reads, rows=rows, steering=steering, l_emo=L_EMO, progress=False
    )
    assert np.isnan(restored[1, 1])
    layers = subject.model.model.language_model.layers
    for i in range(2):
        emotion = pairs.emotions[i]
        sides = [pairs.take([i]).inputs(subject, side) for side in ("emotional", "neutral")]
        for j, (layer, neuron) in enumerate(places):
            if not wanted[i, j]:
                continue
            read = L_EMO if layer <= L_EMO else planted.LAYERS - 1
            seen = []
            hook = layers[read].register_forward_hook(lambda m, a, o, seen=seen: seen.append(o[0, -1]))
            vector = steering.of(emotion)[read].double()

            def metric(logits, seen=seen, vector=vector, emotion=emotion):
                if reads == "projection":
                    return float(seen[-1] @ (vector / vector.norm()))
                p = logits[0, -1].softmax(-1)[subject.tokenizer.convert_tokens_to_ids(planted.WORDS[emotion])].sum()
                return float(p.log() - (1 - p).clamp(min=1e-6).log())

            with torch.no_grad():
                clean, corrupt = (metric(subject.model(**x).logits) for x in sides)
            positions = "all" if rows == "all" else [sides[1]["input_ids"].shape[1] - 1]
            value = oracle.sweep(
                subject.model, sides[1], sides[0], "neurons", metric, positions, [[neuron]], layers=[layer]
            )
            hook.remove()
            assert restored[i, j] == pytest.approx(float(value.flatten()) - corrupt, abs=1e-6 * abs(clean - corrupt))
            assert gaps[i, j] == pytest.approx(clean - corrupt, rel=1e-6)


def test_activations_by_role_are_those_of_plain_hooks(made):
    subject = planted.subject(dtype=torch.float64)
    pairs = made[1].take([0, 1, 2])  # events of different length, so that there is padding
    places = [(3, 11), (0, 5), (3, 2)]
    found = by_role(subject, pairs, places, batch=2)
    for side in ("emotional", "neutral"):
        values = {}
        for i in range(3):
            inputs = pairs.take([i]).inputs(subject, side)
            kept = oracle.record(subject.model, inputs, "neurons")
            for column, role in enumerate(subject.roles(inputs)[0].tolist()):
                values.setdefault(role, []).append([float(kept[l][column, n]) for l, n in places])
        assert {Role[name.upper()] for name in found[0][side]} == set(values)
        for role, rows in values.items():
            mean = [f[side][Role(role).name.lower()] for f in found]
            assert np.allclose(mean, np.mean(rows, 0), rtol=1e-4, atol=1e-6)


def test_a_folder_gives_back_everything(found, tmp_path):
    import pandas as pd

    found.save(tmp_path)
    assert Neurons.load(tmp_path) == found
    table = pd.read_parquet(tmp_path / TABLE)
    assert table.effect.tolist() == [n.effect.effect for n in found.neurons]
    assert table[table.critical & (table.type == "contextual")]["head"].unique().tolist() == ["1.2"]
    assert (tmp_path / TREES).is_file()
    page = section(tmp_path)
    assert "4 explicit-state neurons and 4 contextual triggers" in page.text
    assert "<b>head 2.1</b> reads query 100%" in page.html
    assert all(f"<b>{l}.{i}</b>" in page.html for l, i in (*planted.SPEAKERS, *planted.TRIGGERS))
    kept = found.for_circuit(("explicit", "contextual"))
    circuit = Circuit("llava", planted.LAYERS, L_EMO, tuple(HEADS), **kept)
    assert set(circuit.neurons) == {*planted.SPEAKERS, *planted.TRIGGERS}
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == circuit
    assert set(found.for_circuit()["neurons"]) == set(planted.SPEAKERS)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="not neurons of a circuit"):
        Neurons.load(tmp_path)


def test_random_neurons_are_alike_and_never_chosen():
    activity = np.stack([np.arange(100.0), np.arange(100.0)])
    chosen = [(0, 10), (0, 90), (1, 50)]
    drawn = matched(activity, chosen, 20, np.random.default_rng(0))
    assert not set(drawn) & set(chosen)
    assert len(set(drawn)) == len(drawn) == 40
    low = [i for l, i in drawn if l == 0 and i < 50]
    assert len(low) == 10
    assert max(abs(i - 10) for i in low) < 20
    assert matched(activity, chosen, 20, np.random.default_rng(0)) == drawn
    with pytest.raises(ValueError, match="all 3 neurons of layer 0 are candidates"):
        matched(np.ones((1, 3)), [(0, 0), (0, 1), (0, 2)], 10, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": "first"}, "row='first'"),
        ({"controls": 9}, "10 random neurons"),
        ({"patch_rows": {"both": "all"}}, "patch_rows names both"),
        ({"activation": "raw"}, "activation='raw'"),
    ],
)
def test_readings_are_checked(made, steering, options, message):
    with pytest.raises(ValueError, match=message):
        critical_neurons(planted.subject(), made[1], steering, HEADS, L_EMO, **{**SMALL, **options})
    with pytest.raises(ValueError, match="'happy' has 2 pairs"):
        critical_neurons(planted.subject(), made[1].take([0, 1]), steering, HEADS, L_EMO, **SMALL)
