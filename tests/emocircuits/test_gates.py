"""GateHeads and GateRoute against plain loops over rows: in every cache, under a compiler, beside other edits."""

import models
import published
import pytest
import torch
from test_compiled import generate as generate_with
from test_compiled import prompts

from emocircuits import BoostRoute, GateHeads, GateRoute, Plan, ScaleHead, patch
from emocircuits.tables.gates import Attention


def chosen(edit, roles, column):
    """Whether the role and the position of a token are those of the edit."""
    if edit.positions is not None:
        tokens = [c for c, role in enumerate(roles) if role not in ("pad", "generated")]
        if column not in tokens or column not in [tokens[position] for position in edit.positions]:
            return False
    return edit.to is None or roles[column] in edit.to


def gate(edit, layer, z, scores, visible, roles):
    """``z [B, N, H, D]`` of one layer; ``scores`` are matrices ``[B, H, N, N]``, ``roles`` names by row and column."""
    z = z.clone()
    for row in range(z.shape[0]) if layer in edit.layers else ():
        if edit.rows is not None and row not in edit.rows:
            continue
        for i in range(z.shape[1]):
            if not chosen(edit, roles[row], i):
                continue
            keys = [j for j in range(z.shape[1]) if roles[row][j] in edit.source and visible[row, 0, i, j]]
            if not keys:
                continue
            score = [float(scores[row, head, i, keys].sum()) for head in range(z.shape[2])]
            kept = sorted(range(z.shape[2]), key=lambda head: -score[head])[: edit.keep]
            for head in range(z.shape[2]):
                if head not in kept:
                    z[row, i, head] *= edit.by
    return z


def reweigh(edit, layer, p, roles):
    """Weights ``[B, H, N, N]`` of one layer after a GateRoute."""
    p = p.clone()
    for at, head in edit.heads:
        for row in range(p.shape[0]) if at == layer else ():
            for i in range(p.shape[2]):
                if (edit.rows is not None and row not in edit.rows) or not chosen(edit, roles[row], i):
                    continue
                keys = [j for j in range(p.shape[2]) if roles[row][j] in edit.source]
                if p[row, head, i, keys].sum() >= edit.threshold:
                    p[row, head, i, keys] *= edit.by
    return p


def check(model, inputs, edits, extra=(), tolerance=1e-10, **options):
    where = published.Where.of(inputs, published.STEPS - 1)
    last = where.emits & ~where.generated
    names = {"visual": where.image, "system": where.before, "query": where.after & ~where.emits, "last": last}
    names["generated"] = where.generated
    roles = [
        [next((n for n, mask in names.items() if mask[b, i]), "pad") for i in range(last.shape[1])]
        for b in range(last.shape[0])
    ]
    seen = {}

    def logits(layer, s):
        seen[layer, "logits"] = s
        return s

    def weights(layer, p):
        seen[layer, "weights"] = p
        for edit in edits:
            p = reweigh(edit, layer, p, roles) if isinstance(edit, GateRoute) else p
        return p

    def z(layer, x):
        for edit in (e for e in edits if isinstance(e, GateHeads)):
            x = gate(edit, layer, x, seen[layer, edit.measure], seen[layer, "weights"] > 0, roles)
        for edit in extra:
            for at, head in edit.heads:
                if at == layer:
                    x = x.clone()
                    x[:, :, head] *= edit.by
        return x

    plan = Plan([*edits, *extra])
    published.check(model, inputs, plan, tolerance, options, logits=logits, weights=weights, z=z)


EDITS = [
    GateHeads([0], keep=1, by=0.3, source=["visual", "query"]),
    GateHeads([1, 2], keep=2, by=-0.5, to=["query", "last"], rows=[1]),
    # Weights tie in rows that see nothing but such keys: text after the image sees all kinds.
    GateHeads([2], keep=2, by=0.5, to=["query", "last"], measure="weights"),
    GateRoute([(1, 0), (0, 2), (2, 1)], ["visual", "system"], by=2.5, threshold=0.6, to=["query", "generated"]),
    GateRoute([(1, 0), (0, 3)], ["query", "last", "generated"], by=0.0, threshold=0.3, to=["last", "generated"]),
    GateRoute([(2, 2)], "visual", by=0.4, threshold=0.0, rows=[0]),
    GateRoute([(0, 0), (1, 3)], ["visual", "system"], by=3.0, threshold=0.2, positions=[-3, -1]),
    GateHeads([0], keep=2, by=1.7, positions=[-4, 20], to="query"),
    GateHeads([1], keep=3, by=0.0, to=["last", "generated"], source=["system", "generated"], measure="weights"),
]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_equals_loops(cache, text):
    more = {"sliding_window": 12} if text == "mistral" else {}
    model = models.build("llava", text, torch.float64, **more)
    inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    check(model, inputs, EDITS, [ScaleHead([(1, 2), (0, 0)], by=1.5)], **options)


def test_long_prompts_are_gated_in_parts(monkeypatch):
    monkeypatch.setattr("emocircuits.tables.gates.LOGITS_AT_ONCE", 500)
    model = models.build("llava", "llama", torch.float64)
    check(model, models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)]), EDITS)


@pytest.mark.parametrize("causal", [True, False])
def test_logits_of_some_rows(causal):
    """Grouped heads, a softcap and a mask of one row for all, against the whole matrix."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, 8, dtype=torch.float64, generator=g) for h, n in ((6, 5), (2, 7)))
    mask = None if causal else torch.rand(1, 1, 5, 7, generator=g) > 0.3
    rows = torch.tensor([[4, 1], [0, 3]])
    logits, seen = Attention(q, k, k, mask, 0.5, causal, 2.0, torch.zeros(2, 7)).logits(rows)
    whole = 2.0 * torch.tanh(q @ k.repeat_interleave(3, 1).mT * 0.5 / 2.0)
    visible = torch.ones(5, 7, dtype=torch.bool).tril(2) if causal else mask[0, 0]
    for b in range(2):
        for n in range(2):
            torch.testing.assert_close(logits[b, :, n], whole[b, :, rows[b, n]], rtol=1e-12, atol=1e-12)
            assert torch.equal(seen.expand(2, -1, -1, -1)[b, 0, n], visible[rows[b, n]])


def test_one_graph_serves_every_step_and_refill():
    model = models.build("llava")
    plans = [
        Plan(
            [
                GateHeads([0, 2], keep=2, by=by, to=["last", "generated"]),
                GateRoute([(0, 1), (1, 3)], by=by, threshold=0.2, to=["last", "generated"]),
                BoostRoute([(2, 1), (1, 1)], "visual", 1.0 + by, to="generated"),
            ]
        )
        for by in (0.1, 0.7)
    ]
    inputs = prompts(model)
    with torch.no_grad():
        expected = []
        for plan in plans:
            with patch(model, plan):
                expected.append(generate_with(model, inputs, model))
        torch._dynamo.reset()
        with patch(model, plans[0]) as patched:
            step = torch.compile(model, fullgraph=True, backend="aot_eager")
            got = [generate_with(model, inputs, step)]
            with torch._dynamo.config.patch(error_on_recompile=True):
                patched.replace(plans[1])
                got.append(generate_with(model, inputs, step))
    torch._dynamo.reset()
    assert not torch.allclose(expected[0], expected[1])
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


def test_beams_follow_the_gates_of_their_prompt():
    model = models.build("llava", dtype=torch.float64)
    rows = [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)]
    plans = [Plan([EDITS[0], GateHeads([1], keep=1, by=0.2, to="generated")]), Plan([GateHeads([2], keep=2, by=-1.0)])]
    options = dict(max_new_tokens=4, do_sample=False, num_beams=3, suppress_tokens=published.SUPPRESS)
    with patch(model, Plan.per_row(plans)):
        together = model.generate(**models.batch(rows), **options)[:, -4:]
    for plan, row, tokens in zip(plans, rows, together, strict=True):
        with patch(model, plan):
            assert torch.equal(model.generate(**row, **options)[0, -4:], tokens)


def test_a_factor_of_one_changes_no_bit():
    model = models.build("llava")
    inputs = prompts(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        with patch(model, Plan([GateHeads([0, 1], keep=1, by=1.0)])):
            assert torch.equal(model(**inputs).logits, expected)


def test_what_is_refused():
    model = models.build("llava")
    for wrong, message in (
        (dict(keep=0), "at least 1"),
        (dict(keep=1.5), "at least 1"),
        (dict(measure="mass"), "logits, weights"),
        (dict(source=None), "source is None"),
    ):
        with pytest.raises(ValueError, match=message):
            GateHeads([0], **wrong)
    with pytest.raises(ValueError, match="has 4 heads"), patch(model, Plan([GateHeads([0], keep=5)])):
        pass
    with pytest.raises(ValueError, match="text-only"), patch(models.build("text"), Plan([GateHeads([0])])):
        pass
    with pytest.raises(ValueError, match="source is None"):
        GateRoute([(0, 0)], source=None)
    with pytest.raises(ValueError, match="at least 0"):
        GateRoute([(0, 0)], by=-1.0)
    both = Plan([BoostRoute([(0, 1), (1, 1)], by=2.0), GateRoute([(1, 1)])])
    with pytest.raises(NotImplementedError, match=r"head \(1, 1\) also has a BoostRoute"), patch(model, both):
        pass
    plan = Plan(EDITS)
    assert Plan.from_json(plan.to_json()) == plan
