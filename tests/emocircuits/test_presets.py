"""Presets against their published formulas: full attention matrices in float64 on real generations."""

import models
import pytest
import torch
from published import DIM, HEADS, LAYERS, NEURONS, STEPS, Where, block, check

from emocircuits import Plan, presets


@pytest.fixture(scope="module")
def model():
    return models.build("llava", "llama", torch.float64)


@pytest.fixture(scope="module")
def inputs(model):
    """Two prompts of different lengths, left-padded."""
    return models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])


@pytest.fixture
def where(inputs):
    return Where.of(inputs, STEPS - 1)


def test_pai(model, inputs, where):
    alpha, layers = 0.7, (0, 2)

    def logits(layer, s):
        return torch.where(block(where.emits, where.image) & (layer in layers), alpha * s.abs() + s, s)

    check(model, inputs, presets.pai(model, alpha, layers=layers), logits=logits)


def test_vaf(model, inputs, where):
    enhance, suppress = 1.6, 0.4

    def logits(layer, s):
        if layer not in (1, 2):
            return s
        s = torch.where(block(where.after, where.image), enhance * s, s)
        return torch.where(block(where.after, where.before), suppress * s, s)

    check(model, inputs, presets.vaf(model, enhance, suppress, layers=(1, 2)), logits=logits)


def test_adhh(model, inputs, where):
    heads, text, image = [(0, 1), (2, 3), (2, 0)], 0.2, 1.7

    def weights(layer, p):
        chosen = torch.tensor([(layer, h) in heads for h in range(HEADS)])[:, None, None]
        p = torch.where(block(where.emits, where.after) & chosen, text * p, p)
        return torch.where(block(where.emits, where.image) & chosen, image * p, p)

    check(model, inputs, presets.adhh(model, heads, text, image), weights=weights)


def test_adhh_adaptive(model, inputs, where):
    """As its modified attention does: sum the weights after the image, compare, set to zero."""
    heads, threshold = [(0, 1), (1, 2), (2, 3), (2, 0)], 0.25
    acted = []

    def weights(layer, p):
        p = p.clone()
        for at, head in heads:
            for b in range(2) if at == layer else ():
                for i in where.emits[b].nonzero()[:, 0].tolist():
                    text = where.after[b, : i + 1].nonzero()[:, 0]
                    acted.append(bool(p[b, head, i, text].sum() >= threshold))
                    if acted[-1]:
                        p[b, head, i, text] = 0
        return p

    check(model, inputs, presets.adhh(model, heads, threshold=threshold), weights=weights)
    assert 0 < sum(acted) < len(acted), "the threshold should separate steps"
    with pytest.raises(ValueError, match="leave image at 1"):
        presets.adhh(model, heads, image=2.0, threshold=0.5)


def test_knockout(model, inputs, where):
    def logits(layer, s):
        return s.masked_fill(block(where.emits, where.image), -torch.inf) if layer in (1, 2) else s

    check(model, inputs, presets.knockout(model, ("last", "generated"), "visual", layers=range(1, 3)), logits=logits)


def test_temperature(model, inputs):
    def logits(layer, s):
        return torch.cat([s[:, :1] / 0.5, s[:, 1:]], 1) if layer == 1 else s

    check(model, inputs, presets.temperature(model, 0.5, heads=[(1, 0)]), logits=logits)
    check(model, inputs, presets.temperature(model, 3.0), logits=lambda layer, s: s / 3.0)


def test_vseam(model, inputs):
    scores = torch.randn(LAYERS, HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def z(layer, x):
        score = torch.where(scores[layer].abs() < 0.3, 0.0, scores[layer])
        return x * (1 + 0.9 * score).clamp(0.0, 2.0)[:, None]

    check(model, inputs, presets.vseam(model, scores, 0.9, epsilon=0.3), z=z)
    some = {(1, 2): float(scores[1, 2])}
    plan = presets.vseam(model, some, clip=None)
    check(
        model,
        inputs,
        plan,
        z=lambda n, x: x * (1 + (scores[1, 2] if n == 1 else 0) * torch.eye(4, dtype=x.dtype)[2][:, None]),
    )


def test_hones(model, inputs):
    scales = {(0, 3): 2.5, (0, 7): 0.0, (2, 40): 2.5, (1, 1): -0.5}

    def neurons(layer, a):
        factor = torch.ones(NEURONS, dtype=a.dtype)
        for (at, i), by in scales.items():
            if at == layer:
                factor[i] = by
        return a * factor

    plan = presets.hones(model, scales)
    check(model, inputs, plan, neurons=neurons)
    exported = [{"layer": layer, "neuron": i, "scale": by} for (layer, i), by in scales.items()]
    assert presets.hones(model, exported) == plan


def test_caa(model, inputs, where):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def post(layer, h):
        return h - 1.5 * vector.double() * where.emits[..., None] if layer == 1 else h

    check(model, inputs, presets.caa(model, 1, vector, -1.5), post=post)


def test_iti(model, inputs, where):
    heads = [(0, 1), (2, 0), (2, 3)]
    g = torch.Generator().manual_seed(2)
    directions, sigma = torch.randn(3, DIM, generator=g), torch.tensor([0.5, 1.0, 2.0])

    def z(layer, x):
        x = x.clone()
        for (at, head), theta, spread in zip(heads, directions.double(), sigma.double(), strict=True):
            if at == layer:
                x[:, :, head] += where.emits[..., None] * 1.5 * spread * theta / theta.norm()
        return x

    # a plan keeps vectors in float32
    check(model, inputs, presets.iti(model, heads, directions, sigma, 1.5), tolerance=1e-6, z=z)


@pytest.mark.parametrize("measure", ["logits", "weights"])
def test_spin(model, inputs, where, measure):
    """As in attentionSPIN.py: scores of a layer, their order, a mask on head outputs."""
    seen = {}

    def logits(layer, s):
        seen[layer, "logits"] = s
        return s

    def weights(layer, p):
        seen[layer, "weights"] = p
        return p

    def z(layer, x):
        if layer == 0:
            return x
        total = (seen[layer, measure] * block(where.emits, where.image)).sum(-1).mT  # [B, N, H]
        gate = (total / total.std(-1, keepdim=True)).softmax(-1)
        kept = torch.nn.functional.one_hot(gate.argsort(-1, descending=True)[..., :2], HEADS).sum(-2).bool()
        return torch.where((where.emits[..., None] & ~kept)[..., None], 0.1 * x, x)

    plan = presets.spin(model, 0.6, 0.1, layers=(1, 2), measure=measure)  # int(0.6 * 4) heads are kept
    check(model, inputs, plan, logits=logits, weights=weights, z=z)


def test_actadd(model, inputs):
    """As in hook_utils.py, for prompts that are padded on the left."""
    difference = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    difference[0] = 0.0  # both prompts begin with the same token

    def pre(layer, h):
        h = h.clone()
        for b, first in enumerate((inputs["attention_mask"] == 0).sum(1).tolist() if layer == 1 else ()):
            h[b, first : first + 4] += 2.0 * difference.double()
        return h

    check(model, inputs, presets.actadd(model, 1, difference, 2.0), pre=pre)
    shifted = presets.actadd(model, 1, difference[1:], 2.0, start=1)
    assert shifted == presets.actadd(model, 1, difference, 2.0)
    with pytest.raises(ValueError, match="one row per token"):
        presets.actadd(model, 1, difference[1])


@pytest.mark.parametrize("relative", [True, False])
def test_vista(model, inputs, relative):
    """As in VSVLayer: normalise(normalise(x) + lambda * normalise(v)) * |x|, on what the MLP returns."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    normalize = torch.nn.functional.normalize

    def mlp(layer, x):
        if layer not in (0, 2):
            return x
        v, length = vectors[layer // 2].double(), x.norm(dim=-1, keepdim=True)
        u = normalize(x, dim=-1) + 0.4 * normalize(v, dim=0) if relative else x + 0.4 * v
        return normalize(u, dim=-1) * length

    plan = presets.vista(model, vectors, 0.4, layers=(0, 2), relative=relative)
    check(model, inputs, plan, mlp=mlp)


def test_rows_and_sums(model, inputs, where):
    """Presets are plans: they add up, and name batch rows."""
    plan = presets.pai(model, 0.7, layers=[0], rows=[1]) + presets.hones(model, {(1, 4): 3.0})

    def logits(layer, s):
        second = torch.tensor([False, True])[:, None, None, None]
        return torch.where(block(where.emits, where.image) & second & (layer == 0), s + 0.7 * s.abs(), s)

    def neurons(layer, a):
        return torch.cat([a[..., :4], a[..., 4:5] * (3.0 if layer == 1 else 1.0), a[..., 5:]], -1)

    check(model, inputs, plan, logits=logits, neurons=neurons)
    assert Plan.from_json(plan.to_json()) == plan


def test_the_table_names_every_preset(model):
    for name, entry in presets.PRESETS.items():
        assert getattr(presets, name) is entry.function
        assert name in presets.__all__
        assert all((entry.formula, entry.paper, entry.needs, entry.function.__doc__))


def test_what_is_refused(model):
    text = models.build("text", "llama")
    for build in (lambda: presets.pai(text), lambda: presets.vaf(text), lambda: presets.adhh(text, [(0, 0)])):
        with pytest.raises(ValueError, match="text-only"):
            build()
    with pytest.raises(ValueError, match="layers 9 to 14 of 32"):
        presets.vaf(model)
    with pytest.raises(ValueError, match="0 to 2"):
        presets.pai(model, layers=[3])
    with pytest.raises(ValueError, match="not both"):
        presets.knockout(model, "last", "visual", layers=1, heads=[(1, 1)])
    with pytest.raises(ValueError, match="above 0"):
        presets.temperature(model, 0.0)
    with pytest.raises(ValueError, match="scores has shape"):
        presets.vseam(model, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="layer"):
        presets.hones(model, [3, 4])
    assert presets.temperature(text, 2.0)
