"""Where the tests of this folder run: on the GPU; or, where they are of use there, small and in the interpreter."""

import pytest
import torch

import emokernels as emo

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter computes bfloat16 wrongly, so it is left to GPUs.
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.float32, torch.float16]
HALF = DTYPES[0] if ON_GPU else torch.float16
HEADS, KEY_HEADS = (8, 2) if ON_GPU else (2, 1)

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU is visible to torch")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def here(on_gpu, interpreted):
    """A size for each of the two places."""
    return on_gpu if ON_GPU else interpreted


def needs_memory(gigabytes):
    """Skip where a GPU has less free memory than that."""
    if ON_GPU and torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def randn(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def qkv(batch=2, heads=HEADS, key_heads=KEY_HEADS, n=600, keys=None, dim=64, dtype=torch.float32, seed=0):
    """q, k, v as a Hugging Face model lays them out."""
    keys = n if keys is None else keys
    q = randn(batch, n, heads, dim, dtype=dtype, seed=seed).transpose(1, 2)
    k, v = (randn(batch, key_heads, keys, dim, dtype=dtype, seed=seed + i) for i in (1, 2))
    return q, k, v


def prompt_roles(keys, rows=1):
    """System, image, query, last; each row's image begins elsewhere."""
    row = torch.full((rows, keys), int(emo.Role.QUERY), dtype=torch.uint8)
    for number in range(rows):
        start = max(1, keys // 16) + number
        row[number, :start] = emo.Role.SYSTEM
        row[number, start : start + keys // 2] = emo.Role.VISUAL
    row[:, -1] = emo.Role.LAST
    return row.to(DEVICE)


def routes(heads=HEADS, fields=("bias", "gain"), rows=1, seed=5):
    """Tables in which every entry changes something."""
    centre = {"bias": (0.0, 1.0), "scale": (1.0, 0.3), "abs": (0.0, 0.2), "gain": (1.2, 0.4)}
    made = {}
    for i, name in enumerate(fields):
        middle, width = centre[name]
        made[name] = middle + width * randn(rows, heads, len(emo.Role), len(emo.Role), seed=seed + i)
    return emo.Routes(**made)


def wide(x):
    """Float64 copies of tensors, tables and edits."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, emo.Routes):
        return emo.Routes(**{name: table.double() for name, table in x.tables()})
    if isinstance(x, emo.HeadEdits):
        return emo.HeadEdits(**{name: wide(value) for name, value in x.fields()})
    if isinstance(x, tuple):
        return tuple(wide(one) for one in x)
    return x


def exact(q, k, v, **options):
    """The float64 answer of the definition."""
    # A mask keeps its dtype, whose lowest number masks.
    options = {name: x if name == "mask" else wide(x) for name, x in options.items()}
    return emo.attention(*wide((q, k, v)), **options, backend="reference")


def plain(q, k, v, mask=None, causal=True, scale=None, window=None, lengths=None):
    """Attention without interventions in the inputs' precision: float32 softmax, weights and output rounded."""
    share, n, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    end = torch.tensor([keys], device=q.device) if lengths is None else lengths
    i = torch.arange(n, device=q.device)[:, None] + end.view(-1, 1, 1) - n
    j = torch.arange(keys, device=q.device)
    seen = (j < end.view(-1, 1, 1)).expand(-1, n, -1)
    if causal:
        seen = seen & (j <= i)
    if window:
        seen = seen & (j > i - window)
    seen = seen.unsqueeze(1)
    s = q.float() @ k.float().repeat_interleave(share, 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        s, seen = s + mask, seen & (mask > torch.finfo(mask.dtype).min)
    s = s.masked_fill(~seen, -torch.inf)
    p = torch.softmax(s, -1).nan_to_num()
    return p.to(q.dtype) @ v.repeat_interleave(share, 1)


def check(found, q, k, v, **options):
    """z within twice the error of a plain run (times what boosts make of it), lse to float32's accuracy."""
    expected = exact(q, k, v, **options)
    without = {name: x for name, x in options.items() if name not in ("roles", "query_roles", "routes", "heads")}
    softcap = without.pop("softcap", None)
    base = exact(q, k, v, **without)
    error = (plain(q, k, v, **without).double() - base.z).abs().max()
    # One key alone has no error at all in a plain run, but a gain still rounds.
    error = torch.maximum(error, base.z.abs().max() * torch.finfo(q.dtype).eps / 2)
    size = (expected.z.abs().max() / base.z.abs().max()).clamp(min=1)
    table = options.get("routes")
    gain = 1.0 if table is None or table.gain is None else float(table.gain.abs().max())
    # Tables that multiply logits multiply their errors, and so does a cap that flattens the softmax.
    logits = 1.0 + sum(
        float(t.abs().max()) for name, t in (table.tables() if table else ()) if name in ("scale", "abs")
    )
    budget = 2 * max(float(error), 2e-7) * max(float(size), gain, 1.0) * logits * (2 if softcap else 1)
    assert found.z.shape == q.shape
    assert found.z.dtype == q.dtype
    assert torch.isfinite(found.z).all()
    assert float((found.z.double() - expected.z).abs().max()) <= budget
    assert torch.equal(found.lse == -torch.inf, expected.lse == -torch.inf)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=2e-6, atol=2e-5)
