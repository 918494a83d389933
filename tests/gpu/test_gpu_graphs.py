"""Captured graphs follow what changes on the device, the host never waits for it, compiled steps stay compiled."""

import contextlib

import pytest
import torch
from on_device import DEVICE, HALF, HEADS, ON_GPU, check, here, needs_gpu, prompt_roles, qkv, randn, routes

import emokernels as emo

KEYS, DIM = here(512, 40), here(128, 16)
GENERATED = int(emo.Role.GENERATED)


def captured(call):
    """A CUDA graph of a call, and the outputs it writes at every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


class Step:
    """A decode step on a static cache: every input is memory that is refilled between steps."""

    def __init__(self, batch=2, prefix=0):
        self.q, self.k, self.v = qkv(batch, n=1, keys=KEYS, dim=DIM, dtype=HALF)
        self.roles = prompt_roles(prefix + KEYS, batch)
        self.query_roles = torch.full((1, 1), GENERATED, dtype=torch.uint8, device=DEVICE)
        self.lengths = torch.full((batch,), prefix + KEYS // 2, dtype=torch.int32, device=DEVICE)
        self.routes = routes(rows=batch)
        self.heads = emo.HeadEdits(scale=torch.ones(batch, 1, HEADS, device=DEVICE))
        self.prefix = None
        if prefix:
            self.prefix = tuple(randn(1, self.k.shape[1], prefix, DIM, dtype=HALF, seed=s) for s in (21, 22))

    def options(self):
        given = {name: getattr(self, name) for name in ("roles", "query_roles", "lengths", "routes")}
        return given

    def __call__(self):
        return emo.attention(
            self.q, self.k, self.v, **self.options(), heads=self.heads, prefix=self.prefix, backend="fused"
        )

    def advance(self, seed):
        """The next token, another intervention, one key more."""
        self.q.copy_(randn(*self.q.shape, dtype=HALF, seed=seed))
        for name, table in self.routes.tables():
            table.copy_(getattr(routes(rows=self.q.shape[0], seed=seed), name))
        self.heads.scale.copy_(1 + randn(*self.heads.scale.shape, seed=seed).abs())
        behind = self.lengths.long().view(-1, 1, 1, 1).expand(-1, self.k.shape[1], 1, DIM)
        own = behind - (self.prefix[0].shape[2] if self.prefix else 0)
        self.k.scatter_(2, own, randn(*own.shape, dtype=HALF, seed=seed + 1))
        self.roles.scatter_(1, behind[:, 0, :, 0], torch.full_like(behind[:, 0, :, 0], GENERATED, dtype=torch.uint8))
        self.lengths += 1

    def check(self, out):
        k, v = self.k, self.v
        if self.prefix:
            k, v = (
                torch.cat([p.expand(k.shape[0], -1, -1, -1), x], 2) for p, x in zip(self.prefix, (k, v), strict=True)
            )
        # The head's factor is taken off again: it multiplies an answer and its error alike.
        factor = self.heads.scale.transpose(1, 2)[..., None]
        check(emo.AttentionOutput((out.z.float() / factor).to(HALF), out.lse), self.q, k, v, **self.options())


@pytest.mark.parametrize("prefix", [0, here(300, 20)])
def test_a_step_follows_its_memory(prefix):
    """Without a graph: what the graph below has to do as well."""
    step = Step(prefix=prefix)
    for seed in (31, 33):
        step.advance(seed)
        step.check(step())


@needs_gpu
@pytest.mark.parametrize("prefix", [0, 300])
def test_a_captured_step_follows_tables_lengths_and_roles(prefix):
    step = Step(prefix=prefix)
    graph, out = captured(step)
    for seed in range(31, 39, 2):
        step.advance(seed)
        graph.replay()
        step.check(out)
        fresh = step()
        assert torch.equal(out.z, fresh.z)
        assert torch.equal(out.lse, fresh.lse)


@needs_gpu
def test_a_captured_prefill_follows_roles_and_masks():
    """Which key block is of which role is worked out inside the graph."""
    n = 300
    q, k, v = qkv(n=n, dim=DIM, dtype=HALF)
    roles, table = prompt_roles(n, 2), routes()
    mask = torch.ones(2, 1, n, n, dtype=torch.bool, device=DEVICE)
    options = {"roles": roles, "query_roles": roles.clone(), "routes": table, "mask": mask}
    graph, out = captured(lambda: emo.attention(q, k, v, **options, backend="fused"))
    for shift in (40, 90):
        roles.copy_(roles.roll(shift, 1))
        options["query_roles"].copy_(roles)
        mask.copy_(torch.arange(n, device=DEVICE).expand_as(mask) >= shift // 2)
        graph.replay()
        check(out, q, k, v, **options)


@needs_gpu
def test_a_captured_activation_follows_its_edits():
    gate, up = (randn(2, 1, 12288, dtype=HALF, seed=seed) for seed in (0, 1))
    neurons = emo.NeuronEdits(torch.arange(50, device=DEVICE), scale=torch.ones(2, 1, 50, device=DEVICE))
    graph, out = captured(lambda: emo.gated_activation(gate, up, neurons=neurons, backend="fused"))
    neurons.index.add_(7)
    neurons.scale.mul_(1.7)
    graph.replay()
    expected = emo.gated_activation(gate, up, neurons=neurons, backend="reference")
    torch.testing.assert_close(out, expected)


def calls():
    """The operations of a patched model's hot path, ready to be called."""
    q, k, v = qkv(n=KEYS // 2, dim=DIM, dtype=HALF)
    roles, table = prompt_roles(KEYS // 2, 2), routes()
    padding = (torch.arange(KEYS // 2, device=DEVICE) >= 3).expand(2, 1, KEYS // 2, -1)
    gate, up = (randn(2, 9, here(11008, 96), dtype=HALF, seed=seed) for seed in (0, 1))
    neurons = emo.NeuronEdits(torch.arange(10, device=DEVICE), scale=torch.ones(2, 1, 10, device=DEVICE))
    step, shared = Step(), Step(prefix=here(300, 20))
    learnt = [x.detach().requires_grad_() for x in (q, k, v)]
    hidden, unembed = randn(7, 64, dtype=HALF), randn(here(32000, 70), 64, dtype=HALF)
    sets = torch.tensor([[3, 5]], device=DEVICE)

    def backward():
        z, _ = emo.attention(*learnt, roles=roles, routes=table, backend="fused")
        return torch.autograd.grad(z.float().sum(), learnt)

    return {
        "prefill": lambda: emo.attention(q, k, v, backend="fused"),
        "prefill with routes": lambda: emo.attention(q, k, v, roles=roles, routes=table, backend="fused"),
        "prefill with a mask": lambda: emo.attention(q, k, v, roles=roles, routes=table, mask=padding, backend="fused"),
        "decode": step,
        "decode with a prefix": shared,
        "activation": lambda: emo.gated_activation(gate, up, neurons=neurons, backend="fused"),
        "flow": lambda: emo.attention_flow(q, k, v, roles=roles, grad_z=torch.ones_like(q), backend="fused"),
        "lens": lambda: emo.logit_lens(hidden, unembed, token_sets=sets, top_k=3, backend="fused"),
        "backward": backward,
    }


@contextlib.contextmanager
def no_waiting():
    """Any wait for the device is an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


NAMES = ["prefill", "prefill with routes", "prefill with a mask", "decode", "decode with a prefix"]
NAMES += ["activation", "flow", "lens", "backward"]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_never_waits(name):
    call = calls()[name]
    call()
    with no_waiting():
        call()


@pytest.mark.parametrize("dynamic", here([False, True], [False]))
def test_a_compiled_step_does_not_recompile_when_tables_are_refilled(dynamic):
    q, k, v = qkv(n=here(64, 20), dim=DIM, dtype=HALF)
    roles, table = prompt_roles(q.shape[2], 2), routes()
    gate = randn(2, q.shape[2], 96, dtype=HALF)
    neurons = emo.NeuronEdits(torch.arange(10, device=DEVICE), scale=torch.ones(2, 1, 10, device=DEVICE))

    def layer(q, k, v, gate):
        z, lse = emo.attention(q, k, v, roles=roles, routes=table, backend="fused")
        return z * 2, lse, emo.gated_activation(gate, gate + 1, neurons=neurons, backend="fused") + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="inductor" if ON_GPU else "aot_eager")
    with torch.no_grad():
        for number in range(3):
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                found = compiled(q, k, v, gate)
            torch.testing.assert_close(found, layer(q, k, v, gate))
            table.gain.mul_(1.3)
            table.bias.sub_(0.2)
            neurons.scale.add_(0.5)
