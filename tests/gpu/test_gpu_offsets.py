"""Tensors whose elements lie further apart than 32 bits reach: the same bits as from compact copies."""

import pytest
import torch
from on_device import DEVICE, HALF, needs_gpu, needs_memory, prompt_roles, randn, routes

import emokernels as emo

pytestmark = [pytest.mark.gpu, needs_gpu]

FAR = 2**31
BATCH, HEADS, KEY_HEADS, KEYS, DIM = 2, 4, 2, 300, 64


@pytest.fixture(scope="module")
def memory():
    """More than 2^31 elements of bfloat16, 4.6 GiB."""
    needs_memory(8)
    return torch.empty(FAR + 2**28, dtype=HALF, device=DEVICE)


def far(memory, at, shape, strides):
    """A view of `memory` with random contents, and a compact copy of it."""
    view = memory.as_strided(shape, strides, at)
    view.copy_(randn(*shape, dtype=HALF, seed=at % 1000))
    return view, view.clone(memory_format=torch.contiguous_format)


def layouts(which):
    """Strides of [B, H, N, D] with batch rows, or keys, far apart."""
    if which == "rows":
        return FAR, KEYS * DIM, DIM, 1
    return KEY_HEADS * DIM, DIM, FAR // (KEYS - 20), 1


@pytest.mark.parametrize("n", [1, KEYS], ids=["decode", "prefill"])
@pytest.mark.parametrize("which", ["rows", "keys"])
def test_attention(memory, which, n):
    shape = (BATCH, KEY_HEADS, KEYS, DIM)
    k, near_k = far(memory, 0, shape, layouts(which))
    v, near_v = far(memory, 2**20 if which == "rows" else 1024, shape, layouts(which))
    q, near_q = far(memory, 2**21, (BATCH, HEADS, n, DIM), (FAR, KEYS * DIM, DIM, 1))
    # The views may not lie on top of each other.
    assert all(torch.equal(a, b) for a, b in ((q, near_q), (k, near_k), (v, near_v)))
    options = {"roles": prompt_roles(KEYS), "routes": routes(HEADS), "backend": "fused"}
    for given in (options, {"backend": "fused"}):
        found, same = emo.attention(q, k, v, **given), emo.attention(near_q, near_k, near_v, **given)
        assert torch.equal(found.z, same.z)
        assert torch.equal(found.lse, same.lse)


def test_gradients(memory):
    shape = (BATCH, KEY_HEADS, KEYS, DIM)
    strides = layouts("rows")
    pairs = [far(memory, 0, shape, strides), far(memory, 2**20, shape, strides)]
    pairs.insert(0, far(memory, 2**21, (BATCH, HEADS, KEYS, DIM), strides))
    grad, near_grad = far(memory, 2**22, (BATCH, HEADS, KEYS, DIM), strides)
    gradients = []
    for given, weight in (([a for a, _ in pairs], grad), ([b for _, b in pairs], near_grad)):
        leaves = [x.detach().requires_grad_() for x in given]
        z, _ = emo.attention(*leaves, roles=prompt_roles(KEYS), routes=routes(HEADS), backend="fused")
        gradients.append(torch.autograd.grad(z, leaves, weight))
    for found, same in zip(*gradients, strict=True):
        assert torch.equal(found, same)


def test_a_mask_of_its_own_for_every_head(memory):
    keys = 256
    mask, near = far(memory, 0, (BATCH, HEADS, keys, keys), (FAR, keys * keys, keys, 1))
    q, k, v = (randn(BATCH, heads, keys, DIM, dtype=HALF, seed=heads) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    found, same = (emo.attention(q, k, v, mask=one, backend="fused") for one in (mask, near))
    assert torch.equal(found.z, same.z)


def test_flow(memory):
    shape = (BATCH, KEY_HEADS, KEYS, DIM)
    k, near_k = far(memory, 0, shape, layouts("rows"))
    q, near_q = far(memory, 2**21, (BATCH, HEADS, KEYS, DIM), (FAR, KEYS * DIM, DIM, 1))
    found, same = (
        emo.attention_flow(*given, roles=prompt_roles(KEYS), backend="fused") for given in ((q, k), (near_q, near_k))
    )
    assert torch.equal(found, same)


def test_an_unembedding_with_rows_far_apart(memory):
    vocabulary, width = 70000, 64
    unembed, near = far(memory, 0, (vocabulary, width), (FAR // (vocabulary - 100), 1))
    hidden = randn(9, width, dtype=HALF, seed=1)
    sets = torch.tensor([[3, vocabulary - 1]], device=DEVICE)
    found, same = (emo.logit_lens(hidden, one, token_sets=sets, top_k=3, backend="fused") for one in (unembed, near))
    assert torch.equal(found.entropy, same.entropy)
    assert torch.equal(found.set_prob, same.set_prob)
    assert torch.equal(found.top.ids, same.top.ids)


def test_an_activation_with_rows_far_apart(memory):
    shape, strides = (2, 8, 4096), (FAR, 4096, 1)
    (gate, near_gate), (up, near_up) = far(memory, 0, shape, strides), far(memory, 2**20, shape, strides)
    neurons = emo.NeuronEdits(torch.arange(40, device=DEVICE), scale=torch.full((1, 1, 40), 1.5, device=DEVICE))
    found = emo.gated_activation(gate, up, neurons=neurons, backend="fused")
    assert torch.equal(found, emo.gated_activation(near_gate, near_up, neurons=neurons, backend="fused"))


def test_an_activation_of_more_elements_than_32_bits_count():
    needs_memory(16)
    width = 16384
    rows = FAR // width + 3
    gate = torch.empty(1, rows, width, dtype=HALF, device=DEVICE).fill_(0.5)
    gate[:, -4:] = randn(1, 4, width, dtype=HALF)
    neurons = emo.NeuronEdits(torch.arange(40, device=DEVICE), scale=torch.full((1, 1, 40), 1.5, device=DEVICE))
    found = emo.gated_activation(gate, gate, neurons=neurons, backend="fused")
    last = emo.gated_activation(gate[:, -4:], gate[:, -4:], neurons=neurons, backend="fused")
    assert torch.equal(found[:, -4:], last)
    assert torch.equal(found[:, 0], found[:, rows // 2])
