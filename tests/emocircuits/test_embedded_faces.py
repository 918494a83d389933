"""Drawn faces: twins, determinism, errors."""

import numpy as np
import pytest

from emocircuits.embedded import faces

SEEDS = range(100_300, 100_330)


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("emotion", faces.EMOTIONS)
def test_twins_share_what_the_expression_does_not_touch(emotion):
    for seed in SEEDS:
        who = faces.identity_of(seed)
        neutral, emotional = pixels(faces.face(seed, "neutral", 0.0)), pixels(faces.face(seed, emotion, 1.0))
        differs = np.argwhere((neutral != emotional).any(-1))
        assert len(differs) > 0
        place = (np.arange(faces.SIZE) + 0.5) / faces.SIZE
        u, v = (place - who.centre[0]) / who.radius[0], (place - who.centre[1]) / who.radius[1]
        # nothing outside the head and its nearest marks (vomit, tears of laughter), never the frame of the picture
        assert np.abs(u[differs[:, 1]]).max() < 1.5
        assert v[differs[:, 0]].min() > -1.5
        assert v[differs[:, 0]].max() < 1.7
        assert len(differs) < neutral.shape[0] * neutral.shape[1]


@pytest.mark.parametrize(
    ("channel", "above", "below"),
    [("curve", -0.1, 1.2), ("blift", -1.5, 0.0), ("tears", -0.4, 1.0), ("blue", -1.2, 0.2)],
)
def test_one_channel_changes_only_its_place(channel, above, below):
    for seed in SEEDS:
        who = faces.identity_of(seed)
        if who.grid or who.wobble:  # coarse pixels and wobbly lines blur the borders that are checked here
            continue
        changed = (pixels(faces.render(who, {channel: 0.6})) != pixels(faces.render(who, {}))).any(-1)
        rows = (np.flatnonzero(changed.any(1)) + 0.5) / faces.SIZE
        v = (rows - who.centre[1]) / who.radius[1]
        assert (v > above - 0.1).all()
        assert (v < below + 0.1).all()


def test_deterministic_and_seeded():
    a, b = faces.face(100_000, "fear", 0.7), faces.face(100_000, "fear", 0.7)
    assert (pixels(a) == pixels(b)).all()
    assert (pixels(a) != pixels(faces.face(100_000, "fear", 0.7, expression_seed=1))).any()
    assert (pixels(a) != pixels(faces.face(100_001, "fear", 0.7))).any()
    assert a.size == (faces.SIZE, faces.SIZE)
    assert a.mode == "RGB"
    assert faces.sample_identity(np.random.default_rng(3)) == faces.sample_identity(np.random.default_rng(3))


def test_every_style_occurs():
    assert {faces.identity_of(s).style for s in range(200)} == set(faces.STYLES)


def test_neutral_is_the_resting_face():
    rng = np.random.default_rng(0)
    assert faces.sample_expression("neutral", 0.5, rng) == {}
    assert faces.sample_expression("happy", 0.0, rng) == {}


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"unknown emotion 'joy'.*happy"):
        faces.face(100_000, "joy", 1.0)
    with pytest.raises(ValueError, match=r"intensity is 1.5.*\[0, 1\]"):
        faces.face(100_000, "happy", 1.5)
    with pytest.raises(ValueError, match="identity_seed is -1"):
        faces.face(-1, "happy", 1.0)
