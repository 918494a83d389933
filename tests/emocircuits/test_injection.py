"""Stage II.1 against the unmodified model with one plain hook, prompt by prompt, in float64."""

import numpy as np
import planted
import pytest
import torch
from circuit_pairs import planted_pairs

from emocircuits.circuits.injection import FILE, Layers, choose, inject, random_directions, spelled
from emocircuits.circuits.steering import extract

ALPHAS = (0.1, 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return planted_pairs(folder), planted_pairs(folder, each=2, split="analyze", first=50)


@pytest.fixture(scope="module")
def steered(made):
    subject = planted.subject(dtype=torch.float64)
    steering = extract(subject, made[0], progress=False)
    return subject, steering, inject(subject, made[1], steering, alphas=ALPHAS, progress=False)


def said(subject, pairs, i, vector=None, layer=0, rows="all", kind="raw", by=0.0):
    """What one prompt is answered with, with a hook that adds a vector."""
    inputs = pairs.take([i]).inputs(subject, "neutral")
    first = True

    def hook(module, args, output):
        nonlocal first
        prefill, first = first, False
        if vector is None or (rows != "all" and not prefill):
            return output
        h = output[0] if isinstance(output, tuple) else output
        added = by * vector.double()
        if kind == "relative":
            added = by * h.norm(dim=-1, keepdim=True) * vector.double() / vector.double().norm()
        new = h + added
        if kind == "norm-preserving":
            new = new * h.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)
        if rows == "last":
            new = torch.cat([h[:, :-1], new[:, -1:]], 1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = subject.model.model.language_model.layers[layer].register_forward_hook(hook)
    out = subject.model.generate(**inputs, max_new_tokens=subject.limit, do_sample=False)
    handle.remove()
    return subject.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("rows", "reading"), [("all", "raw"), ("last", "raw"), ("prompt", "relative"), ("all", "norm-preserving")]
)
def test_hit_rates_are_those_of_a_hook_loop(made, steered, rows, reading):
    subject, steering, _ = steered
    pairs = made[1].take([0, 3, 5])
    found = inject(
        subject, pairs, steering, alphas=ALPHAS, rows=rows, reading=reading, layers=[1, 2, 3], progress=False
    )
    for l, layer in enumerate(found.layers):
        for a, alpha in enumerate(ALPHAS):
            texts = [
                said(subject, pairs, i, steering.of(e)[layer], layer, rows, reading, alpha)
                for i, e in enumerate(pairs.emotions)
            ]
            assert found.hits[l, a] == np.mean(
                [subject.lexicon.hit(t, e) for t, e in zip(texts, pairs.emotions, strict=True)]
            )
            first = [e["steered"][l][a] for e in found.examples]
            assert first == [t.strip() for t in texts]
    assert found.settings["rows"] == rows
    assert found.settings["reading"] == reading


def test_the_planted_layers_answer(steered):
    _, _, found = steered
    assert found.plus == 1
    assert found.minus == 0
    assert found.l_emo == planted.TELLER[0]
    assert planted.READER[0] in found.tied
    assert "the deepest" in found.note
    assert found.random.shape == (10, planted.LAYERS, 2)
    assert found.random.mean(0).max() < 0.3  # one of four emotions by chance
    assert (found.hits[1:, 1] == 1).all()
    assert (found.restoration == found.effects).all()
    assert (found.low <= found.effects).all()
    assert (found.effects <= found.high).all()
    assert [found.tokens[e][-1][0] for e in planted.EMOTIONS] == [planted.WORDS[e][0] for e in planted.EMOTIONS]


def test_random_directions_have_the_length_of_the_vectors(steered):
    vectors = steered[1].of("sad")
    drawn = random_directions(vectors, 12, 3)
    assert torch.allclose(drawn.norm(dim=-1), vectors.norm(dim=-1).expand(12, -1), rtol=1e-5)
    assert torch.equal(drawn, random_directions(vectors, 12, 3))
    assert not torch.equal(drawn, random_directions(vectors, 12, 4))


def test_a_vector_is_spelled_through_the_final_norm(steered):
    subject, steering, _ = steered
    gain = subject.model.model.language_model.norm.weight.detach()
    logits = subject.model.lm_head.weight.detach() @ (gain * steering.of("fear")[3].double())
    ids = logits.argsort(descending=True)[:3].tolist()
    assert spelled(subject, steering.of("fear")[3:], 3) == [tuple(subject.tokenizer.convert_ids_to_tokens(ids))]


def test_a_folder_gives_back_everything(steered, tmp_path):
    found = steered[2]
    found.save(tmp_path)
    again = Layers.load(tmp_path)
    for name in ("hits", "low", "high", "random"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    for name in ("layers", "alphas", "plus", "minus", "tokens", "l_emo", "tied", "note", "examples", "settings"):
        assert getattr(again, name) == getattr(found, name)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match="not effects of steering"):
        Layers.load(tmp_path)


def test_a_choice_says_what_it_rests_on():
    none = np.zeros((10, 2, 2))
    assert choose([0, 1], np.array([[0.0, 0.5], [0.2, 0.2]]), none) == (0, (0,), "")
    l_emo, tied, note = choose([0, 1], np.array([[0.1, 0.3], [0.2, 0.2]]), none)
    assert (l_emo, tied) == (1, (0, 1))
    assert "same effect" in note
    assert "in no layer" in choose([0, 1], np.array([[0.0, -0.5], [0.0, 0.0]]), none)[2]
    assert choose([0, 1], np.zeros((2, 1)), none)[0] is None
    assert "a random direction does as much" in choose([0, 1], np.full((2, 2), 0.1), none + 0.3)[2]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"draws": 9}, "at least 10"),
        ({"rows": "some"}, "rows='some'"),
        ({"reading": "loud"}, "reading='loud'"),
        ({"layers": [0, 9]}, "from 0 to 3"),
    ],
)
def test_bad_settings_are_refused(made, steered, more, match):
    with pytest.raises(ValueError, match=match):
        inject(steered[0], made[1], steered[1], progress=False, **more)


def test_a_killed_run_resumes(made, steered, tmp_path, monkeypatch):
    from emocircuits.circuits import injection

    subject, steering, found = steered
    grid, calls = injection.plan_grid, []

    def twice(*args, **more):
        calls.append(more["out"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return grid(*args, **more)

    monkeypatch.setattr(injection, "plan_grid", twice)
    with pytest.raises(KeyboardInterrupt):
        inject(subject, made[1], steering, alphas=ALPHAS, out=tmp_path, progress=False)
    monkeypatch.setattr(injection, "plan_grid", grid)
    again = inject(subject, made[1], steering, alphas=ALPHAS, out=tmp_path, progress=False)
    assert np.array_equal(again.hits, found.hits)
    assert np.array_equal(again.random, found.random)
