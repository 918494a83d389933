"""An independent float64 oracle: one query at a time, straight from the formula, sharing no code with the package."""

import math

import torch


def oracle(
    q,
    k,
    v,
    *,
    roles=None,
    query_roles=None,
    bias=None,
    scale_table=None,
    abs_table=None,
    gain=None,
    mask=None,
    causal=True,
    scale=None,
    window=None,
    softcap=None,
):
    """z [B, H, N, D] and lse [B, H, N] in float64. Tables [B|1, H, 6, 6]; mask bool or additive [B|1, 1|H, N, K]."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, n, dim = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if roles is not None:
        roles = roles.long().expand(batch, keys)
        query_roles = roles[:, keys - n :] if query_roles is None else query_roles.long().expand(batch, n)
    z = torch.zeros(batch, heads, n, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, n), -math.inf, dtype=torch.float64)

    def entry(table, b, h, i):
        return table[b if table.shape[0] > 1 else 0, h, query_roles[b, i]].double()[roles[b]]

    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                s = scale * (k[b, h // share] @ q[b, h, i])
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                t = s.clone()
                if scale_table is not None:
                    t = entry(scale_table, b, h, i) * s
                if abs_table is not None:
                    t = t + entry(abs_table, b, h, i) * s.abs()
                if bias is not None:
                    t = t + entry(bias, b, h, i)
                position = i + keys - n
                for j in range(keys):
                    hidden = (causal and j > position) or (window is not None and j <= position - window)
                    if mask is not None:
                        m = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, i, j]
                        if mask.dtype == torch.bool:
                            hidden = hidden or not bool(m)
                        elif float(m) <= torch.finfo(mask.dtype).min:
                            hidden = True
                        else:
                            t[j] = t[j] + float(m)
                    if hidden:
                        t[j] = -math.inf
                top = float(t.max())
                if top == -math.inf:
                    continue
                e = torch.exp(t - top)
                lse[b, h, i] = top + math.log(float(e.sum()))
                p = e / e.sum()
                if gain is not None:
                    p = p * entry(gain, b, h, i)
                z[b, h, i] = p @ v[b, h // share]
    return z, lse


def oracle_of(q, k, v, routes=None, **kwargs):
    """`oracle` with the tables of a Routes."""
    tables = {}
    if routes is not None:
        tables = {"bias": routes.bias, "scale_table": routes.scale, "abs_table": routes.abs, "gain": routes.gain}
    return oracle(q, k, v, **tables, **kwargs)
