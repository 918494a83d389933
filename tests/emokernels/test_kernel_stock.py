"""`composed` on GPU kernels, run here without any: stand-ins for flash-attn and torch's CUDA kernels.

The stand-ins compute the formula on the CPU and keep each library's conventions: array layout, where the log-sum-exp is
and how it is padded, which diagonal a causal call has, what is refused. They check the shapes, strides and dtypes they
are given. They show that planning, layouts and merges are right; that the real libraries follow the conventions is for
tests/gpu/test_composed_on_gpu.py to show, on a machine that has them.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_oracle import oracle_of
from problems import LLAVA, VIDEO, assert_close, qkv, random_routes, roles_of, visual_routes

import emokernels as emo
from emokernels import composed
from emokernels.attention import make_problem, run
from emokernels.composed import device, host, libraries, memo, stock
from emokernels.composed.libraries import Kernel
from emokernels.composed.visible import visible_keys

NAMES = ["flash4", "flash3", "flash2", "cudnn", "flash", "efficient"]


def formula(q, k, v, causal, scale, corner):
    """z and lse in float64 of ``[B, H, N, D]`` and ``[B, Hkv, K, D]``; the diagonal ends in a corner of the scores."""
    n, keys = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    s = scale * (q.double() @ k.mT)
    if causal:
        hidden = torch.ones(n, keys, dtype=torch.bool).triu(1 + (keys - n if corner == "bottom right" else 0))
        s = s.masked_fill(hidden, -torch.inf)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def padded(lse, multiple):
    """With garbage after the last row."""
    return torch.nn.functional.pad(lse.float(), (0, -lse.shape[2] % multiple), value=torch.nan)


def check(q, k, v, dtypes=(torch.float16, torch.bfloat16)):
    """What every kernel asks for; q, k, v ``[B, H, L, D]``."""
    for x in (q, k, v):
        assert x.dim() == 4
        assert x.dtype in dtypes
        assert x.stride(3) == 1
        assert x.shape[3] % 8 == 0
    assert k.shape == v.shape
    assert q.shape[0] == k.shape[0]
    assert q.shape[1] % k.shape[1] == 0
    assert not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v))


def flash_attn_library(calls, name, corner="bottom right", multiple=1, expanded=True):
    """The body of a `flash_attn_func`: arrays are [B, L, H, D]."""

    def attend(q, k, v, scale, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        check(q, k, v)
        assert expanded or all(0 not in x.stride() for x in (q, k, v))
        calls.append((name, q.shape[2], k.shape[2], causal))
        z, lse = formula(q, k, v, causal, scale, corner)
        return z.to(q.dtype).transpose(1, 2).contiguous(), padded(lse, multiple)

    return attend


def fake_modules(calls):
    """flash_attn 2, flash_attn_interface (3) and flash_attn.cute (4) with the signatures of their public function."""
    attend2 = flash_attn_library(calls, "flash2", multiple=128)
    attend3 = flash_attn_library(calls, "flash3", expanded=False)
    attend4 = flash_attn_library(calls, "flash4", expanded=False)

    def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
        assert dropout_p == 0.0
        out, lse = attend2(q, k, v, softmax_scale, causal)
        return (out, lse, None) if return_attn_probs else out

    def flash3(q, k, v, softmax_scale=None, causal=False, qv=None, num_splits=1, return_attn_probs=False):
        out, lse = attend3(q, k, v, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def flash4(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, return_lse=False):
        assert qv is gather_kv_indices is None
        out, lse = attend4(q, k, v, softmax_scale, causal)
        return out, lse if return_lse else None

    modules = {}
    for name, function in (("flash_attn", flash2), ("flash_attn_interface", flash3), ("flash_attn.cute", flash4)):
        modules[name] = ModuleType(name)
        modules[name].flash_attn_func = function
    return modules


def fake_aten(calls):
    """Torch's CUDA kernels with their real argument lists (`test_torch_has_the_signatures_used_here`)."""

    def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        check(q, k, v)
        assert not return_debug_mask
        calls.append(("flash", q.shape[2], k.shape[2], is_causal))
        z, lse = formula(q, k, v, is_causal, scale, "top left")
        return z.to(q.dtype), lse.float(), None, None, 0, 0, None, None, None

    def cudnn(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale):
        check(q, k, v)
        assert bias is None
        assert compute_log_sumexp
        assert k.shape[2] > 1
        assert all(0 not in x.stride() for x in (q, k, v))
        calls.append(("cudnn", q.shape[2], k.shape[2], is_causal))
        z, lse = formula(q, k, v, is_causal, scale, "top left")
        return z.to(q.dtype), lse.float().unsqueeze(-1), None, None, 0, 0, None, None, None

    def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale):
        check(q, k, v, (torch.float16, torch.bfloat16, torch.float32))
        assert bias is None
        assert compute_log_sumexp
        assert q.shape[1] == k.shape[1]
        calls.append(("efficient", q.shape[2], k.shape[2], is_causal))
        z, lse = formula(q, k, v, is_causal, scale, "top left")
        return z.to(q.dtype), padded(lse, 32), None, None

    return SimpleNamespace(
        _scaled_dot_product_flash_attention=flash,
        _scaled_dot_product_cudnn_attention=cudnn,
        _scaled_dot_product_efficient_attention=efficient,
    )


class Machine:
    """A pretended GPU: what was called, what was read, what is installed."""

    def __init__(self, monkeypatch):
        self.patch, self.calls, self.reads = monkeypatch, [], 0
        self.patch.setattr(host, "owns", lambda tensor: False)
        self.patch.setattr(host, "read", self._read)
        self.patch.setattr(memo, "_on_devices", memo.Seen(1024))
        self.patch.setattr("emokernels.composed.visible._masks", memo.Seen(8))
        self.patch.setattr(libraries, "aten", fake_aten(self.calls))
        self.patch.setattr(torch.backends.cuda, "SDPAParams", lambda *arguments: arguments)
        for asks in ("can_use_cudnn_attention", "can_use_flash_attention", "can_use_efficient_attention"):
            self.patch.setattr(torch.backends.cuda, asks, lambda params: True)
        self.patch.delenv(stock.CHOICE, raising=False)
        self.gpu((9, 0))
        self.cudnn(91501)
        self.install()

    def _read(self, tensor):
        self.reads += 1
        return tensor.detach().cpu()

    def gpu(self, capability):
        self.patch.setattr(libraries, "capability", lambda tensor=None: capability)

    def cudnn(self, version):
        self.patch.setattr(torch.backends.cudnn, "version", lambda: version)

    def install(self, *without):
        """All libraries but some; kernels that have not looked for them yet."""
        for name, module in fake_modules(self.calls).items():
            self.patch.setitem(sys.modules, name, None if name in without else module)
        self.patch.setattr(stock, "KERNELS", tuple(type(kernel)() for kernel in stock.KERNELS))

    def force(self, name):
        self.patch.setenv(stock.CHOICE, name)

    def exact(self):
        """A single kernel that takes every dtype, so that results can be compared closely."""

        class Exact(Kernel):
            name = "exact"
            dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

            def __call__(_, q, k, v, causal, scale):
                check(q, k, v, Exact.dtypes)
                assert not causal or q.shape[2] == k.shape[2]
                self.calls.append(("exact", q.shape[2], k.shape[2], causal))
                z, lse = formula(q, k, v, causal, scale, "top left")
                wide = torch.float64 if q.dtype == torch.float64 else torch.float32
                return z.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.to(wide)

        self.patch.setattr(stock, "KERNELS", (Exact(),))

    @property
    def used(self):
        return {name for name, *_ in self.calls}


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


# --- the adapters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [16, 20])
def test_every_kernel_returns_z_and_its_log_sum_exp(machine, name, causal, dim):
    machine.force(name)
    q, k, v = qkv(batch=2, n=13, keys=13 if causal else 9, dim=dim, dtype=torch.float16)
    z, lse = stock.stock_with_lse(q, k, v, causal, 0.3)
    expected, expected_lse = formula(q, k, v, causal, 0.3, "top left")
    assert machine.used == {name}
    assert z.shape == q.shape
    assert z.dtype == q.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["transposed", "sliced"])
def test_every_kernel_takes_strides(machine, name, how):
    machine.force(name)
    q, k, v = qkv(n=12, dim=8, dtype=torch.float16)
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    if how == "sliced":
        given = [torch.cat([x, x], 2)[:, :, :12] for x in (q, k, v)]
    z, _ = stock.stock_with_lse(*given, True, 0.3)
    torch.testing.assert_close(z.double(), formula(q, k, v, True, 0.3, "top left")[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("share", [1, 2])
def test_one_key_needs_no_kernel(machine, share):
    q, k, v = qkv(batch=2, heads=4, key_heads=4 // share, n=5, keys=1, dtype=torch.float16)
    z, lse = stock.stock_with_lse(q, k, v, False, 0.5)
    expected, expected_lse = formula(q, k, v, False, 0.5, "top left")
    assert not machine.calls
    assert z.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


def test_torch_has_the_signatures_used_here():
    """The real ops, on meta tensors: argument lists and the shapes they promise."""
    q, k, v = (x.half().to("meta") for x in qkv(batch=2, n=40, key_heads=4, dim=16))
    for kernel, shape in (
        (libraries.Flash(), (2, 4, 40)),
        (libraries.Cudnn(), (2, 4, 40)),
        (libraries.Efficient(), (2, 4, 64)),
    ):
        z, lse = kernel(q, k, v, True, 0.3)
        assert z.shape == q.shape
        assert z.dtype == q.dtype
        assert lse.dtype == torch.float32
        assert lse.shape == shape
    for asks in ("can_use_cudnn_attention", "can_use_flash_attention", "can_use_efficient_attention"):
        params = torch.backends.cuda.SDPAParams(
            torch.ones(1, 2, 3, 8), *[torch.ones(1, 1, 3, 8)] * 2, None, 0.0, True, True
        )
        assert getattr(torch.backends.cuda, asks)(params) in (True, False)


# --- the choice


def test_the_first_that_is_here_and_takes_the_call(machine):
    def chosen(dim=128, dtype=torch.bfloat16, expanded=False):
        q, k, v = (torch.empty(2, 4, 8, dim, dtype=dtype) for _ in range(3))
        if expanded:
            k = k[:1].expand(2, -1, -1, -1)
        return stock.choose(q, k, v, True).name

    assert chosen() == "flash4"
    assert chosen(dim=256) == "flash3"
    assert chosen(expanded=True) == "flash2"
    assert chosen(dtype=torch.float32) == "efficient"
    machine.install("flash_attn.cute")
    assert chosen() == "flash3"
    machine.install("flash_attn.cute", "flash_attn_interface")
    assert chosen() == "flash2"
    machine.install("flash_attn.cute", "flash_attn_interface", "flash_attn")
    assert chosen() == "cudnn"
    assert chosen(expanded=True) == "flash"
    machine.patch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params: False)
    assert chosen() == "flash"
    machine.patch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: False)
    assert chosen() == "efficient"
    with pytest.raises(stock.Refused):
        chosen(dtype=torch.float64)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), ["efficient"]),
        ((8, 0), ["flash2", "flash", "efficient"]),
        ((9, 0), ["flash4", "flash3", "flash2", "cudnn", "flash", "efficient"]),
        ((10, 0), ["flash4", "flash2", "cudnn", "flash", "efficient"]),
        ((12, 0), ["flash2", "flash", "efficient"]),
    ],
)
def test_what_runs_where(machine, capability, expected):
    machine.gpu(capability)
    machine.install()
    assert [kernel.name for kernel in stock.KERNELS if kernel.missing() is None] == expected


def test_an_old_cudnn_is_not_used(machine):
    machine.cudnn(91002)
    machine.install("flash_attn.cute", "flash_attn_interface", "flash_attn")
    q = torch.empty(1, 2, 8, 64, dtype=torch.half)
    assert stock.choose(q, q, q, True).name == "flash"
    assert "cudnn: cuDNN 91002 is too old" in stock.describe()
    machine.gpu((8, 6))
    assert "flash3: it needs compute capability 9.x, this GPU has 8.6" in stock.describe()
    machine.gpu((9, 0))
    machine.cudnn(None)
    machine.install()
    assert "this torch has no cuDNN" in stock.describe()


def test_libraries_that_do_not_load(machine):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise ImportError("undefined symbol: _ZN3c105ErrorE\nand more")

    machine.patch.setitem(sys.modules, "flash_attn", Broken("flash_attn"))
    old = ModuleType("flash_attn_interface")
    old.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: None
    machine.patch.setitem(sys.modules, "flash_attn_interface", old)
    machine.patch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    text = stock.describe()
    assert "flash2: flash_attn cannot be used: undefined symbol: _ZN3c105ErrorE)" in text
    assert "flash3: this flash_attn_interface is too old: it has no return_attn_probs" in text
    assert "flash4: flash_attn.cute cannot be used: module 'flash_attn.cute' has no attribute" in text
    assert "\n" not in text


def test_what_backends_can_say(machine):
    assert stock.describe().endswith("flash4, flash3, flash2, cudnn, flash, efficient on this GPU")
    machine.install("flash_attn_interface")
    assert "flash3: " in stock.describe()
    machine.patch.setattr(libraries, "capability", lambda tensor=None: None)
    assert stock.describe() == "stock attention merged by log-sum-exp: torch's flash kernel on a CPU"
    assert all(kernel.missing() == "no CUDA GPU is visible to torch" for kernel in stock.KERNELS)


def test_describing_does_not_break_a_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + len(stock.describe()), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), float(len(stock.describe()))))


def test_a_named_kernel_is_used_or_an_error(machine):
    q, k, v = qkv(n=40, dtype=torch.float16)
    roles, routes = roles_of(LLAVA * 2), visual_routes()
    for name in NAMES:
        machine.calls.clear()
        machine.force(name)
        emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
        assert machine.used == {name}
    machine.force("flash5")
    with pytest.raises(ValueError, match=r"EMOKERNELS_STOCK: expected one of flash4, .* got 'flash5'"):
        emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    machine.force("flash2")
    with pytest.raises(NotImplementedError, match=r"'flash2', but it takes float16 and bfloat16, not torch.float32"):
        emo.attention(q.float(), k.float(), v.float(), roles=roles, routes=routes, backend="composed")
    machine.install("flash_attn_interface")
    machine.force("flash3")
    with pytest.raises(NotImplementedError, match=r"'flash3', but .*flash_attn_interface.*Unset EMOKERNELS_STOCK"):
        emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")


def test_on_a_cpu_the_choice_has_no_say(monkeypatch):
    monkeypatch.setenv(stock.CHOICE, "flash2")
    q, k, v = qkv(n=80)
    out = emo.attention(q, k, v, roles=roles_of(LLAVA * 4), routes=visual_routes(), backend="composed")
    assert torch.isfinite(out.z).all()


# --- attention planned from a device


FIELDS = [("bias",), ("scale",), ("gain",), ("bias", "scale", "gain"), ("bias", "scale", "abs", "gain")]


@pytest.mark.parametrize("fields", FIELDS, ids="+".join)
@pytest.mark.parametrize("layout", [LLAVA, VIDEO], ids=["llava", "video"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_routes(machine, fields, layout, key_heads):
    machine.exact()
    q, k, v = qkv(batch=2, key_heads=key_heads)
    roles, routes = roles_of(layout), random_routes(rows=2, fields=fields)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))
    assert bool(machine.calls) == ("abs" not in fields)


@pytest.mark.parametrize("dim", [8, 12])
def test_knocked_out_routes_leave_rows_without_keys(machine, dim):
    machine.exact()
    q, k, v = qkv(dim=dim)
    routes = emo.Routes.identity(4, fields=("bias", "gain"), dtype=torch.float64)
    routes.bias[:, 1, emo.Role.SYSTEM] = -torch.inf
    routes.bias[:, 2, emo.Role.QUERY, emo.Role.VISUAL] = -torch.inf
    routes.bias[:, 1, emo.Role.LAST] = -torch.inf  # in one head all of the several sets that another head makes
    routes.gain[:, 2, emo.Role.LAST, emo.Role.VISUAL] = 1.5
    routes.gain[:, 3, emo.Role.LAST] = 0.0
    roles = roles_of(LLAVA)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))
    assert machine.calls


PADDINGS = {
    "none": [[1] * 20, [1] * 20, [1] * 20],
    "left": [[0] * 5 + [1] * 15, [1] * 20, [0] * 5 + [1] * 15],
    "right": [[1] * 20, [1] * 14 + [0] * 6, [1] * 20],
    "one row nothing": [[0] * 20, [0] * 4 + [1] * 12 + [0] * 4, [1] * 20],
    "holes": [[1, 0] * 10, [1] * 9 + [0] * 2 + [1] * 9, [1] * 20],
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("form", ["bool", "lowest"])
@pytest.mark.parametrize("routed", [True, False])
def test_padding(machine, padding, form, routed):
    """Rows with equal layouts, adjacent or not, share their calls; masks are analysed on the device."""
    machine.exact()
    q, k, v = qkv(batch=3)
    keep = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    mask = keep[:, None, None, :] & torch.ones(20, 20, dtype=torch.bool).tril()
    if form == "lowest":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    roles = roles_of([0] * 5 + LLAVA[:15], LLAVA, [0] * 5 + LLAVA[:15]) if routed else None
    routes = random_routes(rows=3, fields=("bias", "scale", "gain")) if routed else None
    out = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, causal=False, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, mask=mask, causal=False))
    assert bool(machine.calls) == (padding != "holes")


@pytest.mark.parametrize("keys", [20, 33])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("routed", [True, False])
def test_a_chunk_after_cached_keys(machine, keys, causal, routed):
    machine.exact()
    q, k, v = qkv(n=20, keys=keys)
    roles = roles_of(LLAVA + [3] * 6 + [4] + [2] * 6)[:, :keys] if routed else None
    routes = random_routes(fields=("bias", "scale", "gain")) if routed else None
    out = emo.attention(q, k, v, roles=roles, routes=routes, causal=causal, scale=0.3, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, causal=causal, scale=0.3))
    assert machine.calls


@pytest.mark.parametrize("name", NAMES)
def test_routes_on_every_kernel(machine, name):
    machine.force(name)
    dtype = torch.float32 if name == "efficient" else torch.float16
    q, k, v = qkv(batch=2, dtype=dtype)
    roles = roles_of(LLAVA, VIDEO)
    routes = random_routes(rows=2, fields=("bias", "scale", "gain"), dtype=torch.float32)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert machine.used == {name}
    assert_close(out, oracle_of(q, k, v, routes, roles=roles), 1e-5 if name == "efficient" else 2e-2)


@pytest.mark.parametrize("how", ["transposed", "expanded", "last dim strided"])
def test_strides(machine, how):
    machine.exact()
    q, k, v = qkv(batch=2)
    if how == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif how == "expanded":
        k, v = k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1)
    else:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    roles, routes = roles_of(LLAVA), random_routes(fields=("bias", "gain"))
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


def test_a_llava_prompt_takes_four_calls(machine):
    """The rows that nothing boosts are one causal call; the question reads text, image and itself."""
    machine.exact()
    q, k, v = qkv(n=1200, dim=8, heads=2, key_heads=1)
    roles = roles_of([1] * 20 + [2] * 600 + [3] * 579 + [4])
    out = emo.attention(q, k, v, roles=roles, routes=visual_routes(2), backend="composed")
    assert torch.isfinite(out.z).all()
    expected = [("exact", 620, 620, True), ("exact", 580, 20, False), ("exact", 580, 600, False)]
    assert sorted(machine.calls) == sorted([*expected, ("exact", 580, 580, True)])


def test_unrouted_attention_with_a_log_sum_exp_is_one_call(machine):
    machine.exact()
    q, k, v = qkv(batch=2, n=30)
    for routes in (None, emo.Routes.identity(4)):
        machine.calls.clear()
        roles = None if routes is None else roles_of(LLAVA + LLAVA[:10])
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
        assert machine.calls == [("exact", 30, 30, True)]
        assert_close(out, oracle_of(q, k, v))
        z, lse = run(q, k, v, roles=roles, routes=routes)
        assert lse is None
        torch.testing.assert_close(z, out.z)


def test_what_stock_kernels_cannot_do_runs_as_tiles(machine):
    machine.exact()
    q, k, v = qkv(batch=2)
    roles, routes = roles_of(LLAVA), random_routes(fields=("bias", "gain"))
    for extra in ({"softcap": 2.0}, {"window": 4}, {"mask": torch.randn(2, 4, 20, 20)}):
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed", **extra)
        assert_close(out, oracle_of(q, k, v, routes, roles=roles, **extra))
    assert not machine.calls


def test_a_call_that_no_kernel_takes_runs_as_tiles(machine):
    machine.exact()
    refuse = lambda q, k, v, causal: "too few" if k.shape[2] == 10 else None  # noqa: E731
    machine.patch.setattr(stock.KERNELS[0], "refuses", refuse)
    q, k, v = qkv()
    roles, routes = roles_of(LLAVA), random_routes(fields=("bias", "gain"))
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert machine.calls
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))


def test_gradients(machine):
    machine.exact()
    q, k, v = (x.requires_grad_() for x in qkv(batch=2))
    roles, routes = roles_of(LLAVA), random_routes(rows=2, fields=("bias", "scale", "gain"))
    tables = [table.requires_grad_() for _, table in routes.tables()]

    def gradients(backend):
        out = emo.attention(q, k, v, roles=roles, routes=routes, backend=backend)
        return torch.autograd.grad(out.z.square().sum() + out.lse.square().sum(), [q, k, v, *tables])

    for got, want in zip(gradients("composed"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert machine.calls


# --- what the host reads


def test_a_prompt_is_read_once(machine):
    machine.exact()
    roles, routes = roles_of(LLAVA, VIDEO), random_routes(fields=("bias", "gain"))
    query_roles = roles[:, 5:]
    mask = (torch.arange(20) >= torch.tensor([[3], [0]]))[:, None, None, :].expand(2, 1, 15, 20).clone()
    q, k, v = qkv(batch=2, n=15, keys=20)
    machine.patch.setattr(device, "FEW_ROWS", 1)

    def layer():
        before = machine.reads
        given = {"roles": roles, "query_roles": query_roles, "routes": routes, "mask": mask}
        out = emo.attention(q, k, v, backend="composed", **given)
        assert_close(out, oracle_of(q, k, v, **given))
        return machine.reads - before

    # Two role tensors, two tables, a mask in two steps.
    assert layer() == 6
    assert layer() == 0
    routes.gain[:, 2, 3, 2] = 3.0
    assert layer() == 1
    roles[1, 3] = 3  # its view query_roles has changed with it
    assert layer() == 2
    mask[1, :, :, :2] = False
    assert layer() == 2
    assert layer() == 0


def test_decode_and_graphs_read_nothing(machine):
    machine.exact()
    machine.patch.setattr(host, "read", None)
    roles, routes = roles_of([*LLAVA, 5, 5]), random_routes(rows=2)
    for n in (1, 2, device.FEW_ROWS):
        q, k, v = qkv(batch=2, n=n, keys=22)
        mask = (torch.arange(22) >= torch.tensor([[3], [0]]))[:, None, None, :].expand(2, 1, n, 22)
        out = emo.attention(q, k, v, roles=roles, routes=routes, mask=mask, backend="composed")
        assert_close(out, oracle_of(q, k, v, routes, roles=roles, mask=mask))
    machine.patch.setattr(host, "capturing", lambda: True)
    q, k, v = qkv(batch=2, n=22)
    out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles))
    assert not machine.calls


def test_tiles_on_a_device_are_bounded_too(machine):
    machine.patch.setattr("emokernels.composed.tiles.DEVICE_TILE", 64)
    q, k, v = qkv(batch=2)
    roles, routes = roles_of(LLAVA, VIDEO), random_routes(rows=2)
    out = emo.attention(q, k, v, roles=roles, routes=routes, softcap=2.0, backend="composed")
    assert_close(out, oracle_of(q, k, v, routes, roles=roles, softcap=2.0))


def test_inference_tensors_are_read_every_time(machine):
    """They count no writes."""
    machine.exact()
    q, k, v = qkv()
    with torch.inference_mode():
        routes = random_routes(fields=("gain",))
        roles = roles_of(LLAVA)
        for by in (2.0, 0.5):
            routes.gain[:, :, 3, 2] = by
            out = emo.attention(q, k, v, roles=roles, routes=routes, backend="composed")
            assert_close(out, oracle_of(q, k, v, routes, roles=roles))


def test_what_is_seen_dies_with_its_tensor_or_its_state():
    seen = memo.Seen(2)
    a, b, c = torch.ones(2), torch.ones(2), torch.ones(2)
    assert [seen.get(a, lambda: 1), seen.get(a, lambda: 2)] == [1, 1]
    a.add_(1)
    assert seen.get(a, lambda: 3) == 3
    view = a[:1]
    assert seen.get(view, lambda: 4) == 4
    a.add_(1)
    assert seen.get(view, lambda: 5) == 5
    del view
    assert len(seen._known) == 1
    seen.get(b, lambda: 6)
    seen.get(c, lambda: 7)
    assert seen.get(a, lambda: 8) == 8
    assert len(seen._known) == 2


def test_two_masks_are_remembered_at_a_time(machine):
    masks = [torch.ones(2, 1, 6, 9, dtype=torch.bool).tril(3 - shift) for shift in (0, 1)]
    q, k, v = qkv(batch=2, n=6, keys=9)
    problems = [make_problem(q, k, v, None, None, None, mask, False, None, None, None) for mask in masks]
    found = [visible_keys(problem) for problem in problems]
    assert machine.reads == 4
    assert [visible_keys(problem) for problem in problems] == found
    assert machine.reads == 4


def test_composed_still_answers_for_a_cpu():
    assert composed.is_plain(make_problem(*qkv(), None, None, None, None, True, None, None, None))
    assert host.owns(torch.ones(1))
    assert not host.capturing()
