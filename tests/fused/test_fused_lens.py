"""logit_lens in Triton: the oracle, numerics, strides, the limits, and what the audit compiles."""

import math

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from measurement_oracle import lens_oracle

import emokernels as emo
from emokernels.fused import lens as fused
from emokernels.fused.launch import ARCHITECTURES, Config
from emokernels.lens import _OPS, token_matrix

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
IDS = [[3, 17, 150], [0, 199], [42], list(range(200))]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several row tiles, parts of the vocabulary, blocks in a part and steps of d in a small problem."""
    for key in fused.CONFIGS:
        monkeypatch.setitem(fused.CONFIGS, key, dict.fromkeys(ARCHITECTURES, Config(16, 32, 4, 2)))
    monkeypatch.setattr(fused, "BLOCK_K", {2: 16, 4: 16})
    monkeypatch.setattr(fused, "PROGRAMS", dict.fromkeys(ARCHITECTURES, 6))


def states(n=(2, 11), vocabulary=200, dim=40, spread=0.5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*n, dim, generator=generator) * spread
    unembed = torch.randn(vocabulary, dim, generator=generator)
    return hidden.to(dtype).to(DEVICE), unembed.to(dtype).to(DEVICE)


def offset(vocabulary=200):
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(5))
    bias[::9] = -torch.inf
    bias[:70] = -torch.inf
    return bias.to(DEVICE)


def check(hidden, unembed, sets=IDS, top_k=6, **options):
    """Against float64, errors at most twice those of a full softmax in the same precision."""
    out = emo.logit_lens(hidden, unembed, token_sets=sets, top_k=top_k, backend="fused", **options)
    hidden, unembed = hidden.cpu(), unembed.cpu()
    options = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    entropy, set_prob, (_, log_prob) = lens_oracle(hidden, unembed, sets=sets, top_k=top_k, **options)
    logits = (hidden @ unembed.T).float()
    if "bias" in options:
        logits = logits + options["bias"].float()
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    plain = torch.log_softmax(logits, -1)
    everything = -torch.where(plain.exp() > 0, plain.exp() * plain, 0.0).sum(-1)
    by_set = torch.stack([plain.exp()[..., one].sum(-1) for one in sets], -1)
    pairs = {
        "entropy": (out.entropy, everything, entropy),
        "sets": (out.set_prob, by_set, set_prob),
        "top": (out.top.log_prob, plain.topk(top_k).values, log_prob),
    }
    for name, (ours, theirs, exact) in pairs.items():
        ours = ours.cpu()
        assert ours.dtype == torch.float32
        assert torch.isfinite(ours).all()
        allowed = 2 * (theirs - exact).abs().max() + 1e-6
        assert (ours - exact).abs().max() <= allowed, (name, float((ours - exact).abs().max()), float(allowed))
    assert (out.entropy >= 0).all()
    # Ids are right when their probabilities are, and none comes twice.
    every = lens_oracle(hidden, unembed, top_k=unembed.shape[0], **options)[2]
    by_id = torch.empty_like(every[1]).scatter(-1, *every).gather(-1, out.top.ids.cpu())
    assert (by_id - log_prob).abs().max() <= 2 * (pairs["top"][1] - log_prob).abs().max() + 1e-6
    assert all(ids.unique().shape == (top_k,) for ids in out.top.ids.flatten(0, -2))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.5}, {"bias": True}, {"bias": True, "softcap": 4.0}], ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_oracle(dtype, options, spread):
    hidden, unembed = states(spread=spread, dtype=dtype)
    if "bias" in options:
        options = {**options, "bias": offset()}
    check(hidden, unembed, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_table(monkeypatch, dtype):
    monkeypatch.undo()
    for n in (20, 150):
        hidden, unembed = states((n,), vocabulary=600, dim=72, dtype=dtype)
        check(hidden, unembed, top_k=3)


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 32])
def test_top_k(top_k):
    hidden, unembed = states()
    if top_k:
        check(hidden, unembed, top_k=top_k)
    else:
        out = emo.logit_lens(hidden, unembed, backend="fused")
        assert out.top is None
        assert out.set_prob is None


@pytest.mark.parametrize("peak", [5.0, 16.0, 30.0, 200.0])
def test_entropy_of_a_peaked_distribution(peak):
    unembed = torch.zeros(200, 16, device=DEVICE)
    unembed[123] = peak
    hidden = torch.full((1, 16), 1 / 16, device=DEVICE)
    got = emo.logit_lens(hidden, unembed, backend="fused").entropy.cpu()
    entropy = lens_oracle(hidden.cpu(), unembed.cpu())[0]
    plain = torch.log_softmax((hidden @ unembed.T).cpu(), -1)
    error = (-(plain.exp() * plain).sum(-1) - entropy).abs()
    assert got >= 0
    assert (got - entropy).abs() <= max(2 * error, entropy * 2e-6)


def test_equal_logits():
    out = emo.logit_lens(
        torch.randn(3, 16, device=DEVICE),
        torch.zeros(200, 16, device=DEVICE),
        token_sets=IDS,
        top_k=32,
        backend="fused",
    )
    torch.testing.assert_close(out.entropy.cpu(), torch.full((3,), math.log(200)))
    torch.testing.assert_close(out.set_prob.cpu(), torch.tensor([3, 2, 1, 200]).expand(3, -1) / 200)
    assert all(ids.unique().shape == (32,) for ids in out.top.ids)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1 << 16), vocabulary=st.integers(8, 150), n=st.integers(1, 40), dim=st.integers(1, 40),
    top_k=st.integers(1, 8),
)  # fmt: skip
def test_any_problem(seed, vocabulary, n, dim, top_k):
    hidden, unembed = states((n,), vocabulary, dim, seed=seed)
    sets = [list(range(vocabulary)), [0], list(range(0, vocabulary, 3))]
    with pytest.MonkeyPatch.context() as patch:
        for key in fused.CONFIGS:
            patch.setitem(fused.CONFIGS, key, dict.fromkeys(ARCHITECTURES, Config(16, 32, 4, 2)))
        patch.setattr(fused, "PROGRAMS", dict.fromkeys(ARCHITECTURES, 1 + seed % 7))
        out = check(hidden, unembed, sets, top_k)
    torch.testing.assert_close(out.set_prob[:, 0].cpu(), torch.ones(n), rtol=0, atol=2e-6)
    assert (out.entropy.cpu() <= math.log(vocabulary) + 1e-5).all()


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strides(how):
    hidden, unembed = states()
    if how == "transposed":
        hidden, unembed = hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0), unembed.T.contiguous().T
    elif how == "sliced":
        hidden, unembed = hidden[:, 2:9, 3:35], torch.cat([unembed, unembed], 1)[:, 3:35]
    else:
        hidden, unembed = hidden[:1].expand(2, -1, -1), unembed[:, :1].expand(-1, 40)
    before = hidden.clone(), unembed.clone()
    check(hidden, unembed, bias=offset(400)[::2])
    assert torch.equal(hidden, before[0])
    assert torch.equal(unembed, before[1])


def test_sets_longer_and_shorter_than_a_block():
    """One long set makes the matrix wide; blocks of a short set in it that hold no token are skipped."""
    hidden, unembed = states()
    check(hidden, unembed, sets=[[199], list(range(0, 200, 2)), [5, 6]])
    matrix = torch.tensor([[-1, 7, 7, 1000, -1]], device=DEVICE)
    matrix = matrix if DEVICE == "cuda" else matrix.where(matrix < 200, -1)
    got = emo.logit_lens(hidden, unembed, token_sets=matrix, backend="fused").set_prob
    if DEVICE == "cuda":
        assert got.isnan().all()
    else:
        expected = lens_oracle(hidden, unembed, sets=[[7]])[1]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-9)


def test_opcheck():
    hidden, unembed = states((5,), 60, 16)
    sets = token_matrix([[1, 2], [3]], 60, DEVICE)
    torch.library.opcheck(_OPS["fused"], (hidden, unembed, offset(60), sets, 3, 2.0))
    torch.library.opcheck(_OPS["fused"], (hidden, unembed, None, None, 0, 0.0))


def test_compiles_whole():
    hidden, unembed = states((5,), 60, 16)
    sets = token_matrix([[1, 2], [3]], 60, DEVICE)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def measure(hidden, sets):
        out = emo.logit_lens(hidden, unembed, token_sets=sets, norm=torch.tanh, top_k=3, backend="fused")
        return out.entropy, out.set_prob, *out.top

    torch._dynamo.reset()
    compiled = torch.compile(measure, fullgraph=True, backend=count)
    for step in range(2):
        sets[0, 0] = 4 + step
        for a, b in zip(compiled(hidden, sets), measure(hidden, sets), strict=True):
            torch.testing.assert_close(a, b)
    assert len(compilations) == 1


def test_errors():
    hidden, unembed = states((3,), 60, 16)
    with pytest.raises(NotImplementedError, match=r"^top_k: expected at most 32 for 'fused', got 33"):
        emo.logit_lens(hidden, unembed, top_k=33, backend="fused")
    with pytest.raises(NotImplementedError, match=r"^backend: expected float32, bfloat16 or float16 for 'fused'"):
        emo.logit_lens(hidden.double(), unembed.double(), backend="fused")
    with pytest.raises(NotImplementedError, match=r"^unembed: expected .* forward only"):
        emo.logit_lens(hidden, unembed.requires_grad_(), backend="fused")
    with pytest.raises(NotImplementedError, match="forward only"):
        _OPS["fused"](hidden, unembed, None, None, 0, 0.0)
    assert emo.logit_lens(hidden, unembed.detach(), top_k=33).top.ids.shape == (3, 33)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_are_built_without_a_gpu(monkeypatch, arch):
    monkeypatch.undo()
    launches = {name: launch for name, launch, _ in fused.audit_launches(arch)}
    assert len(launches) == 5 * 5
    for name, launch in launches.items():
        assert launch.args["top"].device.type == "meta"
        tiles = -(-launch.args["n"] // launch.meta["BLOCK_M"])
        if "sets" not in name:
            # Every part holds whole blocks, and together they are the vocabulary.
            parts = launch.grid[0] // tiles
            assert launch.args["part"] % launch.meta["BLOCK_N"] == 0
            assert (parts - 1) * launch.args["part"] < launch.args["stop_at"] <= parts * launch.args["part"]
        assert set(launch.args) | set(launch.meta) == set(launch.kernel.arg_names)
