"""logit_lens of the reference and composed backends: the oracle, properties, ops, errors, memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measurement_oracle import Largest, lens_oracle

import emokernels as emo
from emokernels.composed.lens import measure_lens
from emokernels.lens import _OPS, _without_repeats, token_matrix

backends = pytest.mark.parametrize("backend", ["reference", "composed"])
examples = settings(max_examples=20, deadline=None)
f64 = torch.float64
SETS = {"joy": [3, 17, 3, 250], "fear": torch.tensor([0, 299]), "one": [42], "every": range(300)}
IDS = [[3, 17, 250], [0, 299], [42], list(range(300))]


def states(n=(2, 7), vocabulary=300, dim=20, spread=1.0, dtype=f64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*n, dim, generator=generator, dtype=f64) * spread
    return hidden.to(dtype), torch.randn(vocabulary, dim, generator=generator, dtype=f64).to(dtype)


def small_blocks(monkeypatch):
    monkeypatch.setattr("emokernels.composed.lens.ROWS", 4)
    monkeypatch.setattr("emokernels.composed.lens.LOGITS", 70)
    monkeypatch.setattr("emokernels.composed.lens.WEIGHTS", 500)


def offset(vocabulary=300):
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5), dtype=f64)
    bias[::9] = -torch.inf
    bias[:40] = -torch.inf
    return bias


@backends
@pytest.mark.parametrize("blocks", ["large", "small"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.5}, {"bias": True}, {"bias": True, "softcap": 4.0}], ids=lambda o: "+".join(o)
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_oracle(monkeypatch, backend, blocks, options, spread):
    if blocks == "small":
        small_blocks(monkeypatch)
    hidden, unembed = states(spread=spread)
    if "bias" in options:
        options = {**options, "bias": offset()}
    out = emo.logit_lens(hidden, unembed, token_sets=SETS, top_k=6, backend=backend, **options)
    entropy, set_prob, (_, log_prob) = lens_oracle(hidden, unembed, sets=IDS, top_k=6, **options)
    assert out.entropy.dtype == f64
    assert (out.entropy >= 0).all()
    torch.testing.assert_close(out.entropy, entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.set_prob, set_prob, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.top.log_prob, log_prob, rtol=0, atol=1e-11)
    # Saturated logits are equal: the ids are right when their probabilities are.
    everything = lens_oracle(hidden, unembed, top_k=300, **options)[2]
    by_id = torch.empty_like(everything[1]).scatter(-1, *everything)
    torch.testing.assert_close(by_id.gather(-1, out.top.ids), log_prob, rtol=0, atol=1e-11)
    assert all(ids.unique().shape == (6,) for ids in out.top.ids.flatten(0, 1))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
def test_error_is_at_most_twice_that_of_a_full_softmax(monkeypatch, backend, dtype, spread):
    small_blocks(monkeypatch)
    hidden, unembed = states(n=(64,), dim=64, spread=spread, dtype=dtype)
    entropy, set_prob, (_, log_prob) = lens_oracle(hidden, unembed, sets=IDS, top_k=5)
    out = emo.logit_lens(hidden, unembed, token_sets=IDS, top_k=5, backend=backend)
    plain = torch.log_softmax((hidden @ unembed.T).float(), -1)
    errors = {
        "entropy": (out.entropy - entropy, -(plain.exp() * plain).sum(-1) - entropy),
        "sets": (out.set_prob - set_prob, torch.stack([plain.exp()[:, one].sum(-1) for one in IDS], -1) - set_prob),
        "top": (out.top.log_prob - log_prob, plain.topk(5).values - log_prob),
    }
    for name, (ours, theirs) in errors.items():
        assert ours.abs().max() <= 2 * theirs.abs().max() + 1e-7, name


@backends
@pytest.mark.parametrize("peak", [5.0, 14.0, 16.0, 30.0, 200.0])
def test_entropy_of_a_peaked_distribution(monkeypatch, backend, peak):
    """One token holds nearly everything: lse - E[x] would lose the entropy in the rounding of the logits."""
    small_blocks(monkeypatch)
    unembed = torch.zeros(300, 4)
    unembed[123] = peak
    hidden = torch.full((1, 4), 0.25)
    entropy, _, _ = lens_oracle(hidden, unembed)
    got = emo.logit_lens(hidden, unembed, backend=backend).entropy
    plain = torch.log_softmax(hidden @ unembed.T, -1)
    error = (-(plain.exp() * plain).sum(-1) - entropy).abs()
    assert got >= 0
    assert (got - entropy).abs() <= max(2 * error, entropy * 1e-6)


@backends
@examples
@given(seed=st.integers(0, 1 << 16), vocabulary=st.integers(1, 200), n=st.integers(1, 9), level=st.floats(-50, 50))
def test_properties(backend, seed, vocabulary, n, level):
    hidden, unembed = states((n,), vocabulary, 8, seed=seed)
    split = vocabulary // 2
    sets = [range(vocabulary), [0], *([range(split), range(split, vocabulary)] if split else [])]
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        out = emo.logit_lens(hidden, unembed, token_sets=sets, top_k=1, backend=backend)
        moved = emo.logit_lens(hidden, unembed, bias=torch.full((vocabulary,), level), top_k=1, backend=backend)
    torch.testing.assert_close(out.set_prob[:, 0], torch.ones(n, dtype=f64))
    if split:
        torch.testing.assert_close(out.set_prob[:, 2:].sum(-1), torch.ones(n, dtype=f64))
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(vocabulary) + 1e-12).all()
    assert (out.entropy >= -out.top.log_prob[:, 0] - 1e-12).all()
    torch.testing.assert_close(moved.entropy, out.entropy, rtol=0, atol=1e-10)
    assert torch.equal(moved.top.ids, out.top.ids)


@backends
def test_equal_logits_have_the_entropy_of_the_vocabulary(monkeypatch, backend):
    small_blocks(monkeypatch)
    out = emo.logit_lens(torch.randn(3, 8), torch.zeros(300, 8), token_sets=IDS, top_k=300, backend=backend)
    torch.testing.assert_close(out.entropy, torch.full((3,), math.log(300)))
    torch.testing.assert_close(out.set_prob, torch.tensor([3, 2, 1, 300]).expand(3, -1) / 300)
    assert torch.equal(out.top.ids.sort(-1).values, torch.arange(300).expand(3, -1))


@backends
def test_norm_and_shapes(backend):
    hidden, unembed = states((2, 3, 4))
    norm = torch.nn.RMSNorm(20, dtype=f64)
    with torch.no_grad():
        norm.weight.uniform_()
        out = emo.logit_lens(hidden, unembed, norm=norm, backend=backend)
        single = emo.logit_lens(norm(hidden)[1, 2, 3], unembed, token_sets=SETS, top_k=2, backend=backend)
    assert out.set_prob is None
    assert out.top is None
    assert out.entropy.shape == (2, 3, 4)
    assert single.entropy.shape == ()
    assert single.set_prob.shape == (4,)
    assert single.top.ids.shape == (2,)
    torch.testing.assert_close(single.entropy, out.entropy[1, 2, 3])
    torch.testing.assert_close(out.entropy, lens_oracle(norm(hidden).detach(), unembed)[0])


@backends
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strides(backend, how):
    hidden, unembed = states()
    if how == "transposed":
        hidden, unembed = hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0), unembed.T.contiguous().T
    elif how == "sliced":
        hidden, unembed = torch.cat([hidden, hidden], 1)[:, 2:9], torch.cat([unembed, unembed], 1)[::1, 3:23]
    else:
        hidden, unembed = hidden[:1].expand(2, -1, -1), unembed[:1].expand(300, -1)
    out = emo.logit_lens(hidden, unembed, token_sets=SETS, bias=offset(600)[::2], backend=backend)
    expected = lens_oracle(hidden, unembed, sets=IDS, bias=offset(600)[::2])
    torch.testing.assert_close(out.entropy, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out.set_prob, expected[1], rtol=0, atol=1e-12)


def test_token_sets_in_every_form():
    hidden, unembed = states()
    lists = [[3, 17, 250], [0, 299]]
    expected = lens_oracle(hidden, unembed, sets=lists)[1]
    matrix = token_matrix(lists, 300, "cpu")
    assert matrix.tolist() == [[3, 17, 250], [0, 299, -1]]
    forms = (
        lists,
        {"a": [250, 3, 17], "b": (299, 0)},
        [torch.tensor(ids) for ids in lists],
        [torch.tensor(ids, dtype=torch.int32) for ids in lists],
        matrix,
        torch.tensor([[17, -1, 3, 250, 17], [-1, -1, 0, 299, -1]]),
    )
    for form in forms:
        got = emo.logit_lens(hidden, unembed, token_sets=form).set_prob
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_an_id_counts_once_and_an_invalid_one_not_at_all():
    sets = torch.tensor([[5, 2, 5, 5], [-1, 7, 7, 900], [900, 900, -1, -1]])
    assert _without_repeats(sets, 300).tolist() == [[2, 5, -1, -1], [-1, 7, -1, -1], [-1, -1, -1, -1]]


def test_memory_stays_bounded(monkeypatch):
    monkeypatch.setattr("emokernels.composed.lens.ROWS", 16)
    monkeypatch.setattr("emokernels.composed.lens.LOGITS", 2048)
    monkeypatch.setattr("emokernels.composed.lens.WEIGHTS", 2048)
    hidden, unembed = states((128,), 4096, 8, dtype=torch.float16)
    sets = torch.arange(4096).view(2, 2048)
    with Largest(hidden, unembed, sets) as largest:
        measure_lens(hidden, unembed, None, sets, 4, 0.0)
    # 128 x 4096 logits would be half a million elements; the list of set tokens itself has 4096.
    assert largest.elements <= 4096


@backends
@pytest.mark.parametrize("how", ["everything", "entropy alone", "half"])
def test_opcheck(backend, how):
    hidden, unembed = states((5,), dtype=torch.float16 if how == "half" else torch.float32)
    sets, bias = token_matrix(SETS, 300, "cpu"), offset().float()
    arguments = (
        (hidden, unembed, None, None, 0, 0.0) if how == "entropy alone" else (hidden, unembed, bias, sets, 3, 2.0)
    )
    torch.library.opcheck(_OPS[backend], arguments)


@backends
def test_compiles_whole(backend):
    hidden, unembed = states(dtype=torch.float32)
    matrix = token_matrix(SETS, 300, "cpu")
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def measure(hidden, sets):
        out = emo.logit_lens(hidden, unembed, token_sets=sets, norm=torch.tanh, top_k=3, backend=backend)
        return out.entropy, out.set_prob, *out.top

    torch._dynamo.reset()
    compiled = torch.compile(measure, fullgraph=True, backend=count)
    with torch.no_grad():
        for step in range(3):
            matrix[0, 0] = step
            for a, b in zip(compiled(hidden + step, matrix), measure(hidden + step, matrix), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert len(compilations) == 1
        matrix[1, 0] = 10**6
        assert compiled(hidden, matrix)[1].isnan()[..., 1].all()
        lists = torch.compile(measure, fullgraph=True, backend=count)(hidden, IDS)
    torch.testing.assert_close(lists[1], lens_oracle(hidden.tanh(), unembed, sets=IDS)[1].float())


@backends
@pytest.mark.parametrize("which", ["hidden", "norm(hidden)", "unembed", "bias"])
def test_forward_only(backend, which):
    hidden, unembed = states()
    inputs = {"hidden": hidden, "unembed": unembed, "bias": torch.zeros(300, dtype=f64)}
    norm = None
    if which == "norm(hidden)":
        norm = torch.nn.RMSNorm(20, dtype=f64)
    else:
        inputs[which].requires_grad_()
    words = f"^{which}: expected .* forward only".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(NotImplementedError, match=words):
        emo.logit_lens(**inputs, norm=norm, backend=backend)
    with torch.no_grad():
        assert not emo.logit_lens(**inputs, norm=norm, backend=backend).entropy.requires_grad
    if norm is None:
        with pytest.raises(NotImplementedError, match="forward only"):
            _OPS[backend](hidden[0], unembed, inputs["bias"], None, 0, 0.0)


def tensor(*shape, dtype=torch.float32, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


ERRORS = {
    "hidden type": (TypeError, "hidden:", {"hidden": [1.0]}),
    "hidden integer": (TypeError, "hidden:", {"hidden": tensor(3, 8, dtype=torch.int64)}),
    "hidden empty": (ValueError, "hidden:", {"hidden": tensor(0, 8)}),
    "hidden scalar": (ValueError, "hidden:", {"hidden": torch.tensor(1.0)}),
    "hidden width": (ValueError, "hidden:", {"hidden": tensor(3, 7)}),
    "hidden dtype": (TypeError, "hidden:", {"hidden": tensor(3, 8, dtype=torch.float16)}),
    "hidden device": (ValueError, "hidden:", {"hidden": tensor(3, 8, device="meta")}),
    "unembed type": (TypeError, "unembed:", {"unembed": torch.nn.Linear(8, 20)}),
    "unembed rank": (ValueError, "unembed:", {"unembed": tensor(8)}),
    "unembed dtype": (TypeError, "unembed:", {"unembed": tensor(20, 8, dtype=torch.int8)}),
    "norm type": (TypeError, "norm:", {"norm": 1}),
    "norm result": (TypeError, "norm:", {"norm": lambda x: (x,)}),
    "norm shape": (ValueError, "norm:", {"norm": lambda x: x[0]}),
    "norm width": (ValueError, r"norm\(hidden\):", {"norm": lambda x: x[:, :4]}),
    "norm dtype": (TypeError, r"norm\(hidden\):", {"norm": lambda x: x.double()}),
    "bias type": (TypeError, "bias:", {"bias": 0.5}),
    "bias dtype": (TypeError, "bias:", {"bias": tensor(20, dtype=torch.int64)}),
    "bias shape": (ValueError, "bias:", {"bias": tensor(19)}),
    "softcap": (ValueError, "softcap:", {"softcap": 0.0}),
    "top_k type": (TypeError, "top_k:", {"top_k": 2.0}),
    "top_k negative": (ValueError, "top_k:", {"top_k": -1}),
    "top_k large": (ValueError, "top_k:", {"top_k": 21}),
    "sets type": (TypeError, "token_sets:", {"token_sets": "joy"}),
    "sets none": (ValueError, "token_sets:", {"token_sets": {}}),
    "sets matrix dtype": (TypeError, "token_sets:", {"token_sets": tensor(2, 3)}),
    "sets matrix rank": (ValueError, "token_sets:", {"token_sets": tensor(3, dtype=torch.int64)}),
    "sets matrix range": (ValueError, "token_sets:", {"token_sets": torch.tensor([[1, 20]])}),
    "set empty": (ValueError, r"token_sets\['joy'\]:", {"token_sets": {"joy": []}}),
    "set of words": (TypeError, r"token_sets\['joy'\]:", {"token_sets": {"joy": ["happy"]}}),
    "set word": (TypeError, r"token_sets\['joy'\]:", {"token_sets": {"joy": "happy"}}),
    "set of floats": (TypeError, r"token_sets\[0\]:", {"token_sets": [tensor(3)]}),
    "set not nested": (TypeError, r"token_sets\[0\]:", {"token_sets": [1, 2]}),
    "id too large": (ValueError, r"token_sets\['joy'\]: .* V=20 .* got 20\.", {"token_sets": {"joy": [1, 20]}}),
    "id negative": (ValueError, r"token_sets\[1\]: .* got -1\.", {"token_sets": [[1], torch.tensor([-1])]}),
    "backend unknown": (ValueError, "backend:", {"backend": "magic"}),
    "backend without lens": (NotImplementedError, "backend:", {"backend": "native"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    kind, words, changes = ERRORS[name]
    arguments = {"hidden": tensor(3, 8), "unembed": tensor(20, 8), **changes}
    with pytest.raises(kind, match=f"^{words}") as error:
        emo.logit_lens(arguments.pop("hidden"), arguments.pop("unembed"), **arguments)
    assert ": expected " in str(error.value)
    assert ", got " in str(error.value)
