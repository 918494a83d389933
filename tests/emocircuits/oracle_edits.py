"""What edits of heads, neurons and vectors do, token by token in plain loops; no code of the package."""

from __future__ import annotations

import torch


def applies(edit, roles, row: int, column: int) -> bool:
    """Whether an edit changes this token. ``roles`` are names by row and column."""
    role = roles[row][column]
    if edit.rows is not None and row not in edit.rows:
        return False
    if edit.phase == "prefill" and role == "generated":
        return False
    if edit.phase == "decode" and role != "generated":
        return False
    if edit.positions is not None and not at_position(edit.positions, roles[row], column):
        return False
    return edit.to is None or role in edit.to


def at_position(positions, roles, column: int) -> bool:
    """Whether the token in this column is the prompt's token of one of these numbers."""
    tokens = [c for c, other in enumerate(roles) if other not in ("pad", "generated")]
    return column in tokens and bool({tokens.index(column), tokens.index(column) - len(tokens)} & set(positions))


def reads(edit, roles, row: int, i: int, j: int) -> bool:
    """Whether a BoostRoute changes what row i reads from key j."""
    if not applies(edit, roles, row, i) or roles[row][j] not in edit.source:
        return False
    if edit.source_positions is None:
        return True
    return roles[row][i] != "generated" and at_position(edit.source_positions, roles[row], j)


def tokens(edit, roles):
    """(row, column) of every token that an edit changes."""
    return [(b, i) for b in range(len(roles)) for i in range(len(roles[b])) if applies(edit, roles, b, i)]


def named(plan, *kinds):
    """Edits of these classes: class by class, in the order of the plan."""
    return [edit for kind in kinds for edit in plan if type(edit).__name__ == kind]


def array(value, like):
    return torch.tensor(value.tolist(), dtype=like.dtype)


def heads(z, layer, plan, roles):
    """``z [B, N, H, D]`` of one layer after the head edits."""
    z = z.clone()
    for edit in named(plan, "ScaleHead", "AddHead", "ReplaceHead"):
        for m, (at, head) in enumerate(edit.heads):
            for row, i in tokens(edit, roles) if at == layer else ():
                if type(edit).__name__ == "ScaleHead":
                    z[row, i, head] *= edit.by
                elif type(edit).__name__ == "AddHead":
                    vector = array(edit.vector, z)
                    z[row, i, head] += edit.by * (vector if vector.ndim == 1 else vector[m])
                else:
                    value = array(edit.value, z)
                    if value.ndim < 4:
                        z[row, i, head] = value if value.ndim == 1 else value[m]
                    elif roles[row][i] != "generated":
                        z[row, i, head] = value[row, i, m]
    return z


def neurons(a, layer, plan, roles):
    """``a [B, N, neurons]`` of one layer after the neuron edits."""
    a = a.clone()
    for edit in named(plan, "ScaleNeurons", "AddNeurons", "ReplaceNeurons"):
        place = 0
        for at, index in edit.neurons:
            for neuron in index:
                for row, i in tokens(edit, roles) if at == layer else ():
                    if type(edit).__name__ == "ScaleNeurons":
                        a[row, i, neuron] *= edit.by
                    elif type(edit).__name__ == "AddNeurons":
                        a[row, i, neuron] += edit.by * edit.value.tolist()[place]
                    else:
                        a[row, i, neuron] = edit.value.tolist()[place]
                place += 1
    return a


def vectors(hidden, layer, site, plan, roles):
    """``hidden [B, N, d]`` at one site of one layer after the vector edits."""
    hidden = hidden.clone()
    plan = [edit for edit in plan if getattr(edit, "site", None) == site and layer in edit.layers]
    for row in range(hidden.shape[0]):
        for i in range(hidden.shape[1]):
            here = [edit for edit in plan if applies(edit, roles, row, i)]
            if here:
                hidden[row, i] = vector(hidden[row, i], here, layer)
    return hidden


def cached(states, layer, site, head, plan, roles, row):
    """Keys or values ``[N, D]`` of one head after edits of the cache."""
    states = states.clone()
    plan = [edit for edit in plan if getattr(edit, "site", None) == site and layer in edit.layers]
    for i in range(states.shape[0]) if plan else ():
        here = [edit for edit in plan if roles[row][i] != "generated" and applies(edit, roles, row, i)]
        if here:
            states[i] = vector(states[i], here, layer, head)
    return states


def vector(h, edits, layer, head=None):
    """One vector ``[d]`` after edits that all act on it; of one head where vectors have heads."""

    def array(value, like):
        given = torch.tensor(value.tolist(), dtype=like.dtype)
        return given if head is None else given[..., head, :]

    directions = []
    for edit in named(edits, "ProjectOut"):
        v = array(edit.vector, h)
        directions.append(torch.atleast_2d(v[edit.layers.index(layer)] if v.ndim == 3 else v))
    if directions:
        span = torch.cat(directions)
        h = h - torch.linalg.pinv(span, rtol=1e-9) @ (span @ h)

    def added(edit, h):
        v = array(edit.vector, h)
        v = v if v.ndim == 1 else v[edit.layers.index(layer)]
        return edit.by * (h.norm() * v / v.norm() if edit.relative else v)

    adds = named(edits, "AddVector")
    h = h + sum(added(edit, h) for edit in adds if edit.norm == "free")
    kept = [edit for edit in adds if edit.norm == "keep"]
    if kept:
        moved = h + sum(added(edit, h) for edit in kept)
        h = moved * h.norm() / moved.norm() if h.norm() > 0 else h  # a padding row may be zero
    for edit in named(edits, "ReplaceVector"):
        v = array(edit.vector, h)
        h = v if v.ndim == 1 else v[edit.layers.index(layer)]
    return h
