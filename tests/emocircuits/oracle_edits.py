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
    return edit.to is None or role in edit.to


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
    for edit in named(plan, "AddVector", "ReplaceVector"):
        if edit.site != site or layer not in edit.layers:
            continue
        v = array(edit.vector, hidden)
        v = v if v.ndim == 1 else v[edit.layers.index(layer)]
        for row, i in tokens(edit, roles):
            hidden[row, i] = hidden[row, i] + edit.by * v if type(edit).__name__ == "AddVector" else v
    return hidden
