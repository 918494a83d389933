"""Stage patching on the planted circuit, and against plain hooks in float64."""

import planted
import pytest
import torch
from circuit_pairs import planted_pairs

from emocircuits import patch
from emocircuits.circuits.decoupling import stages as spans
from emocircuits.circuits.stages import FILE, Rows, Stages, stage_patching
from emokernels import Role


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return planted_pairs(tmp_path_factory.mktemp("pairs"), split="analyze", first=50)


@pytest.fixture(scope="module")
def found(pairs):
    return stage_patching(planted.subject(), pairs, progress=False)


def test_the_emotion_is_where_the_planted_heads_move_it(found):
    # Layers: shallow 0, middle 1 and 2, deep 3. READER moves it from the image to the query in layer 1, TELLER to the
    # last row in layer 2.
    carried = {("visual", "shallow"), ("query", "middle"), ("last", "middle"), ("last", "deep")}
    assert found.gap.base == 0
    assert found.gap.value == 1
    assert len(found.cells) == 9
    for cell in found.cells:
        assert cell.restored == float((cell.role, cell.stage) in carried)
        assert cell.effect.value == cell.restored
        assert (cell.effect.q < 0.01) == bool(cell.restored)
        assert cell.effect.relative is None  # X- is never hit
        if cell.restored:
            assert cell.random.mean < 0.4
            assert cell.random.q < 0.01
            assert cell.random.share == 0
        else:
            assert cell.random.q == 1
        assert len(cell.random.values) == 10


def leaves(subject, inputs):
    """What leaves every layer, ``[N, d_model]``, by plain hooks."""
    found, hooks = [], []
    for layer in subject.model.model.language_model.layers:
        hooks.append(
            layer.register_forward_hook(lambda m, a, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
        )
    subject.model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(subject, inputs, plus, roles, role, layers):
    """Greedy tokens of one prompt, run anew for each, with the role's rows of some layers set by plain hooks."""
    columns = (roles[0] == int(Role[role.upper()])).nonzero().flatten()
    modules = subject.model.model.language_model.layers
    hooks = []
    for layer in layers:

        def put(module, args, output, layer=layer):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, columns] = plus[layer][columns]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hooks.append(modules[layer].register_forward_hook(put))
    try:
        ids, said = inputs["input_ids"], []
        while len(said) < subject.limit and (not said or said[-1] != subject.tokenizer.eos_token_id):
            logits = subject.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            said.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[said[-1]]])], 1)
    finally:
        for hook in hooks:
            hook.remove()
    return said


@pytest.mark.parametrize("role", ["visual", "query", "last"])
def test_tokens_are_those_of_a_hook_loop(pairs, role):
    subject = planted.subject(dtype=torch.float64)
    (_, part), *_ = pairs.take([0, 5, 10, 15, 9]).batches(5)
    assert len({len(e) for e in part.events}) > 1  # padded
    rows = Rows(subject, part)
    assert any(rows.padding)
    for span in spans(planted.LAYERS).values():
        inputs = part.inputs(subject, "neutral")
        with patch(subject.model, rows.plan(role, span)), torch.no_grad():
            out = subject.model.generate(**inputs, max_new_tokens=subject.limit, do_sample=False)
        out = out[:, inputs["input_ids"].shape[1] :].tolist()
        for i in range(len(part)):
            one = part.take([i])
            alone = one.inputs(subject, "neutral")
            clean = one.inputs(subject, "emotional")
            with torch.no_grad():
                plus = leaves(subject, clean)
                expected = by_hand(subject, alone, plus, subject.roles(alone), role, span)
            assert out[i][: len(expected)] == expected


def test_random_rows_are_moved_as_far(pairs):
    rows = Rows(planted.subject(), next(iter(pairs.batches(4)))[1])
    generator = torch.Generator().manual_seed(1)
    moved, drawn = rows.plan("query", range(1, 3)), rows.plan("query", range(1, 3), generator)
    assert len(moved) == len(drawn) > 0
    for a, b in zip(moved, drawn, strict=True):
        assert (a.rows, a.positions) == (b.rows, b.positions)
        for i, layer in enumerate((1, 2)):
            base = rows.minus[layer][a.rows[0], a.positions[0] + rows.padding[a.rows[0]]].numpy()
            far = [float(((e.vector.__array__()[i] - base) ** 2).sum() ** 0.5) for e in (a, b)]
            assert far[0] == pytest.approx(far[1], rel=1e-4)
            assert abs(a.vector.__array__()[i] - b.vector.__array__()[i]).max() > 1e-3


def test_a_folder_gives_back_everything(found, tmp_path):
    found.save(tmp_path)
    assert Stages.load(tmp_path) == found
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="not stage patching"):
        Stages.load(tmp_path)


def test_it_is_the_same_again_and_refuses_what_it_cannot_do(pairs, found):
    few = pairs.take([0, 5])
    once, again = (stage_patching(planted.subject(), few, roles=["visual"], progress=False, seed=3) for _ in range(2))
    assert once == again
    with pytest.raises(ValueError, match="at least 10"):
        stage_patching(planted.subject(), few, draws=3)
    with pytest.raises(ValueError, match="expected some of visual"):
        stage_patching(planted.subject(), few, roles=["system"])
