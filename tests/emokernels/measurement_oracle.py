"""Independent float64 oracles of the measurements: dense matrices, gradients by autograd, one route at a time."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def softmax_weights(
    q, k, roles, query_roles, *, bias=None, factor=None, magnitude=None, mask=None, causal=True, scale=None,
    window=None, softcap=None,
):  # fmt: skip
    """Softmax weights [B, H, N, K] in float64, 0 in rows without keys."""
    q, k = q.double(), k.double()
    batch, heads, n, dim = q.shape
    keys = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], 1)
    s = torch.einsum("bhnd,bhkd->bhnk", q, k) * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    x = s
    if factor is not None:
        x = x * dense(factor, roles, query_roles, batch)
    if magnitude is not None:
        x = x + s.abs() * dense(magnitude, roles, query_roles, batch)
    if bias is not None:
        x = x + dense(bias, roles, query_roles, batch)
    i, j = torch.arange(n)[:, None] + keys - n, torch.arange(keys)[None, :]
    hidden = torch.zeros(n, keys, dtype=torch.bool)
    if causal:
        hidden |= j > i
    if window is not None:
        hidden |= j <= i - window
    x = x.masked_fill(hidden, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        x = x.masked_fill(~mask, -math.inf)
    elif mask is not None:
        x = x + mask.double().masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)
    return torch.softmax(x, -1).nan_to_num(0.0)


def dense(table, roles, query_roles, batch):
    """A routes table at every pair, [B, H, N, K]."""
    out = []
    for b in range(batch):
        dst = query_roles[b if query_roles.shape[0] > 1 else 0].long()
        src = roles[b if roles.shape[0] > 1 else 0].long()
        out.append(table[b if table.shape[0] > 1 else 0].double()[:, dst][:, :, src])
    return torch.stack(out)


def flow_oracle(q, k, v=None, *, roles, query_roles=None, grad_z=None, routes=None, **options):
    """attention_flow in float64: dL/dA by autograd through z = A v, then every route summed by itself."""
    batch, heads, n, _ = q.shape
    keys = k.shape[2]
    query_roles = roles[:, keys - n :] if query_roles is None else query_roles
    tables = {} if routes is None else {"bias": routes.bias, "factor": routes.scale, "magnitude": routes.abs}
    weights = softmax_weights(q, k, roles, query_roles, **tables, **options)
    if routes is not None and routes.gain is not None:
        weights = weights * dense(routes.gain, roles, query_roles, batch)
    if grad_z is not None:
        leaf = weights.detach().requires_grad_()
        z = leaf @ v.double().repeat_interleave(heads // v.shape[1], 1)
        (slope,) = torch.autograd.grad((z * grad_z.double()).sum(), leaf)
        weights = (weights * slope).abs()
    flow = torch.zeros(batch, heads, 6, 6, dtype=torch.float64)
    for b in range(batch):
        dst = query_roles[b if query_roles.shape[0] > 1 else 0]
        src = roles[b if roles.shape[0] > 1 else 0]
        for d in range(6):
            for r in range(6):
                flow[b, :, d, r] = weights[b][:, dst == d][:, :, src == r].sum((1, 2))
    return flow


def lens_oracle(hidden, unembed, *, sets=(), top_k=0, bias=None, softcap=None):
    """Entropy [...], set probabilities [..., S], and (ids, log probabilities) [..., k] by a full float64 softmax."""
    logits = hidden.double() @ unembed.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_prob = torch.log_softmax(logits, -1)
    prob = log_prob.exp()
    entropy = -torch.where(prob > 0, prob * log_prob, 0.0).sum(-1)
    set_prob = torch.stack([prob[..., sorted(set(one))].sum(-1) for one in sets], -1) if sets else None
    order = log_prob.argsort(-1, descending=True)[..., :top_k]
    return entropy, set_prob, (order, log_prob.gather(-1, order))


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest memory that a torch function returned and that is not a given tensor's."""

    def __init__(self, *given):
        super().__init__()
        self.given = {one.untyped_storage().data_ptr() for one in given}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, one.untyped_storage().size() // one.element_size())
        return out
