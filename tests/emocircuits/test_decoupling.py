"""Overlap of head sets, counted by hand."""

import numpy as np
import pytest
from scipy import stats

from emocircuits.circuits.decoupling import Decoupling, as_matrix, decoupling, stages
from emocircuits.circuits.heads import Heads


def heads(strong, emotions, shape=(6, 4)):
    """One pair an emotion, in which these heads restore something."""
    restored = np.full((len(emotions), *shape), -0.1)
    for i, emotion in enumerate(emotions):
        for rank, (layer, head) in enumerate(strong[emotion]):
            restored[i, layer, head] = 1.0 - 0.1 * rank
    gaps = np.ones((len(emotions), shape[0]))
    return Heads(restored.mean(0), restored.mean(0), restored, gaps, np.zeros(len(emotions)), tuple(emotions), (), {})


STRONG = {
    "happy": [(0, 1), (2, 2), (5, 3)], "sad": [(0, 1), (2, 2), (4, 0)], "angry": [(0, 1), (3, 3)], "fear": [(1, 1)],
}  # fmt: skip


def test_by_hand(tmp_path):
    found = decoupling(heads(STRONG, list(STRONG)), k=3)
    assert found.sets["happy"] == ((0, 1), (2, 2), (5, 3))
    assert found.sets["fear"] == ((1, 1),)
    assert found.general == ((0, 1),)
    assert found.specific[2, 2] == ("happy", "sad")
    assert found.specific[1, 1] == ("fear",)
    by = {(o.first, o.second, o.stage): o for o in found.overlaps}
    assert by["happy", "sad", "all"].jaccard == 2 / 4
    assert by["happy", "sad", "all"].expected == 9 / 24
    assert by["happy", "sad", "all"].p == pytest.approx(stats.hypergeom.sf(1, 24, 3, 3))
    assert by["happy", "sad", "shallow"].jaccard == 1.0
    assert by["happy", "sad", "deep"].jaccard == 0.0
    assert by["angry", "fear", "deep"].jaccard is None
    assert by["angry", "fear", "deep"].p is None
    matrix = as_matrix(found)
    assert matrix[0, 1] == matrix[1, 0] == 0.5
    assert np.isnan(as_matrix(found, "deep")[2, 3])
    found.save(tmp_path)
    assert Decoupling.load(tmp_path) == found


def test_stages_are_thirds():
    assert {k: list(v) for k, v in stages(6).items()} == {"shallow": [0, 1], "middle": [2, 3], "deep": [4, 5]}
    assert sum(len(v) for v in stages(28).values()) == 28


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="overlap needs two"):
        decoupling(heads({"sad": [(0, 0)]}, ["sad"]))
    with pytest.raises(ValueError, match="expected 1 to 24"):
        decoupling(heads(STRONG, list(STRONG)), k=99)
    (tmp_path / "decoupling.json").write_text("[]")
    with pytest.raises(ValueError, match="not overlaps"):
        Decoupling.load(tmp_path)
