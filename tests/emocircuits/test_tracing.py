"""Tracing from heads to tokens, neurons and heads: the planted tree, and plain autograd in float64."""

import planted
import pytest
import torch
from circuit_pairs import face_pairs, planted_pairs

from emocircuits.circuits.heads import halves
from emocircuits.circuits.steering import SteeringVectors, extract
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.tracing import FILE, Tracing, measure, trace, written_along
from emocircuits.circuits.visits import Visit

HEADS = [planted.READER, planted.TELLER]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return planted_pairs(folder), planted_pairs(folder, each=6, split="analyze", first=50)


@pytest.fixture(scope="module")
def steering(made):
    return extract(planted.subject(), made[0], progress=False)


def trees(found):
    return {(n.layer, n.head): n for n in found.roots}


@pytest.mark.parametrize(
    "options",
    [{}, {"source": "attention"}, {"source": "gradient", "l_emo": 2}, {"by": "emotion"}, {"follow": "steering"}],
)
def test_the_planted_tree_is_found(made, steering, options):
    found = trace(planted.subject(), made[1], steering, HEADS, progress=False, **options)
    reader, teller = (trees(found)[h] for h in HEADS)
    # READER looks at the image; what it gets comes from TRIGGERS, a quarter of it through one of four equal tokens.
    assert reader.roles == {"visual": 1.0}
    assert {(u.layer, u.neuron) for u in reader.neurons[:4]} == set(planted.TRIGGERS)
    each = 0.25 if options.get("by") == "emotion" else 0.25 / 4
    for u in reader.neurons[:4]:
        assert u.score == pytest.approx(each, rel=0.05)
        assert u.frequency >= 0.25
    assert all(abs(u.score) < 0.001 for u in reader.neurons[4:])
    assert not found.children(reader)
    # TELLER looks at the query, where READER writes; no neuron does.
    assert teller.roles == {"query": 1.0}
    assert all(abs(u.score) < 0.001 for u in teller.neurons)
    (child,) = found.children(teller)
    assert (child.layer, child.head) == planted.READER
    assert child.frequency == 1.0
    assert child.score == pytest.approx(teller.sources[0].share, rel=0.35)  # of the first order
    assert child.roles == {"visual": 1.0}
    assert {(u.layer, u.neuron) for u in child.neurons[:4]} == set(planted.TRIGGERS)


def test_the_screen_finds_the_trigger_that_writes_along_s(made, steering):
    found = trace(planted.subject(), made[1], steering, [planted.READER], score="screen", progress=False)
    (root,) = found.nodes
    assert (root.neurons[0].layer, root.neurons[0].neuron) in planted.TRIGGERS


def test_where_nothing_differs_nothing_is_traced(made, steering):
    with pytest.raises(ValueError, match=r"nothing to trace: head 1\.2: what it writes along S is the same"):
        trace(planted.subject("blind"), made[1], steering, HEADS, progress=False)
    found = trace(planted.subject(), made[1], steering, [*HEADS, (1, 0)], progress=False)
    assert [u[:2] for u in found.untraced] == [(1, 0)]
    assert set(trees(found)) == set(HEADS)


def oracle(subject, pairs, i, layer, head, unit):
    """By side: c, and activations and gradients at t*, of one pair without padding: plain hooks and a dense W_O."""
    model = subject.model
    text = model.config.text_config
    blocks, size = model.model.language_model.layers, text.head_dim
    part = slice(head * size, (head + 1) * size)
    shared = head // (text.num_attention_heads // text.num_key_value_heads)
    weight = blocks[layer].self_attn.o_proj.weight.detach()[:, part]
    held, hooks, sides = {}, [], {}

    def hold(name):
        def hook(module, args):
            if torch.is_grad_enabled():
                args[0].retain_grad()
            held[name] = args[0]

        return hook

    for l in range(layer + 1):
        hooks.append(blocks[l].mlp.down_proj.register_forward_pre_hook(hold(("neurons", l))))
        hooks.append(blocks[l].self_attn.o_proj.register_forward_pre_hook(hold(("z", l))))
    hooks.append(blocks[layer].self_attn.v_proj.register_forward_hook(lambda m, a, o: held.update(v=o[0].detach())))
    for side in ("emotional", "neutral"):
        inputs = pairs.take([i]).inputs(subject, side)
        model.set_attn_implementation("eager")  # it has weights, but takes its softmax in float32
        with torch.no_grad():
            attentions = model(**inputs, use_cache=False, output_attentions=True).attentions[layer][0, head, -1]
        model.set_attn_implementation("sdpa")
        model(**inputs, use_cache=False)
        c = (weight @ held["z", layer][0, -1, part]) @ unit
        c.backward()
        if side == "emotional":
            v = held["v"][:, shared * size : (shared + 1) * size]
            terms = attentions * (v @ (weight.T @ unit))
            assert float(terms.sum()) == pytest.approx(float(c.detach()), rel=1e-5)
            column = int(terms.argmax())
        places = [(kind, l) for kind in ("neurons", "z") for l in range(layer)]
        sides[side] = float(c.detach()), {p: (held[p].detach()[0, column], held[p].grad[0, column]) for p in places}
    for hook in hooks:
        hook.remove()
    return column - len(terms), sides


@pytest.mark.parametrize("at", ["both", "neutral"])
def test_scores_are_those_of_plain_autograd_with_shared_values_and_padding(tmp_path, at):
    subject = Subject.embedded()
    subject.model.double()
    pairs = face_pairs(tmp_path, [101_000], emotions=("sad", "happy", "fear"))
    vectors = torch.randn(3, 6, 128, generator=torch.Generator().manual_seed(3))
    steering = SteeringVectors(("sad", "happy", "fear"), vectors, (2,) * 3, (2,) * 3, vectors.mean(0))
    layer, head, size = 3, 5, 16
    visit = Visit(layer, head, 3, u=written_along(subject, pairs, steering, layer, head, False))
    measure(subject, pairs, steering, [visit], {}, "signed", "gradient", at, False, False, 2, False)
    columns = {len(i["input_ids"][0]) for i in (pairs.take([i]).inputs(subject, "neutral") for i in range(3))}
    assert len(columns) > 1  # so that there was padding
    weights = {"both": (0.5, 0.5), "neutral": (0, 1)}[at]
    batches = {}
    for which, part in pairs.batches(2):
        batches.update(dict.fromkeys(which, part.inputs(subject, "neutral")["input_ids"].shape[1]))
    largest = 0.0
    for i in range(3):
        s = steering.of(pairs.emotions[i])[layer].double()
        column, sides = oracle(subject, pairs, i, layer, head, s / s.norm())
        assert visit.columns[i] == column + batches[i]
        # Padding moves positions, and transformers turns them into angles in float32.
        padded = batches[i] > pairs.take([i]).inputs(subject, "neutral")["input_ids"].shape[1]
        near = 1e-4 if padded else 1e-9
        (plus, there), (minus, other) = sides["emotional"], sides["neutral"]
        assert (visit.plus[i], visit.minus[i]) == pytest.approx((plus, minus), rel=near)
        for l in range(layer):
            found = {"neurons": visit.scores[i, l], "z": visit.head_scores[i, l]}
            for kind, value in found.items():
                (a, g), (b, h) = there[kind, l], other[kind, l]
                expected = (a - b) * (weights[0] * g + weights[1] * h)
                expected = expected.unflatten(-1, (-1, size)).sum(-1) if kind == "z" else expected
                assert (value - expected).abs().max() <= near * float(expected.abs().max())
                largest = max(largest, float(expected.abs().max()))
    assert largest > 1e-4


def test_weights_need_no_gradient_and_keep_what_they_had(made, steering):
    subject = planted.subject()
    expected = trace(subject, made[1], steering, HEADS, progress=False)
    for i, parameter in enumerate(subject.model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    with torch.no_grad():
        found = trace(subject, made[1], steering, HEADS, progress=False, batch=5)
    assert [p.requires_grad for p in subject.model.parameters()] == [
        i % 2 == 0 for i in range(len(list(subject.model.parameters())))
    ]
    assert all(p.grad is None for p in subject.model.parameters())
    assert [(n.layer, n.head, n.parent) for n in found.nodes] == [(n.layer, n.head, n.parent) for n in expected.nodes]
    assert found.nodes[0].score == pytest.approx(expected.nodes[0].score, rel=1e-4)


def test_a_folder_gives_back_the_trees(made, steering, tmp_path):
    found = trace(planted.subject(), made[1], steering, HEADS, progress=False)
    found.save(tmp_path)
    assert Tracing.load(tmp_path) == found
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match="not traced heads"):
        Tracing.load(tmp_path)


def test_halves_are_what_one_says(made, steering):
    half = halves(made[1].emotions, 5)
    found = trace(planted.subject(), made[1], steering, HEADS, half=half, depth=0, progress=False)
    assert found.settings["ranked_on"] == int((half == 0).sum())
    visit = found.visits[0]
    assert found.nodes[0].change == pytest.approx((visit.plus - visit.minus)[half == 1].mean())


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([], {}, "no heads to trace from"),
        ([(9, 0)], {}, "4 layers of 4 heads"),
        ([(1, 2)], {"source": "loss"}, "source='loss'"),
        ([(1, 2)], {"at": "none"}, "at='none'"),
        ([(1, 2)], {"breadth": 0}, "breadth=0"),
    ],
)
def test_readings_are_checked(made, steering, heads, options, message):
    with pytest.raises(ValueError, match=message):
        trace(planted.subject(), made[1], steering, heads, progress=False, **options)
