"""The pieces behind the merge: role runs, mask intervals, and plans that cover every visible pair exactly once."""

import random

import pytest
import torch
from problems import LLAVA, VIDEO, qkv

import emokernels as emo
from emokernels.attention import make_problem
from emokernels.composed.layout import runs
from emokernels.composed.plan import make_plan
from emokernels.composed.tables import inspect
from emokernels.composed.visible import Visible, visible_keys


def test_runs():
    assert runs(bytes([1, 1, 2, 3, 3, 3])) == [(1, 0, 2), (2, 2, 3), (3, 3, 6)]
    assert runs(bytes([5])) == [(5, 0, 1)]
    assert runs(bytes([0] * 1000 + [1])) == [(0, 0, 1000), (1, 1000, 1001)]


def problem_with(mask, causal=True):
    n, keys = mask.shape[2:]
    q, k, v = qkv(batch=mask.shape[0], n=n, keys=keys)
    return make_problem(q, k, v, None, None, None, mask, causal, None, None, None)


def brute(one, n, keys):
    i, j = torch.arange(n)[:, None], torch.arange(keys)[None, :]
    return (j >= one.start) & (j < one.stop) & (j <= i + one.offset)


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_masks_that_are_intervals_are_recognised(n):
    keys = 12
    for start in range(0, keys, 3):
        for stop in range(start + 1, keys + 1, 2):
            for offset in (*range(keys - n + 1), keys):
                one = Visible(start, stop, offset)
                mask = brute(one, n, keys)
                found = visible_keys(problem_with(mask[None, None], causal=False))
                if not mask[-1].any() and mask.any():
                    continue
                assert found is not None
                assert torch.equal(brute(found[0], n, keys), mask)


def test_other_masks_are_left_alone():
    for seed in range(30):
        mask = torch.rand(1, 1, 6, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
        found = visible_keys(problem_with(mask, causal=False))
        assert found is None or torch.equal(brute(found[0], 6, 9), mask[0, 0])
    assert visible_keys(problem_with(torch.randn(1, 1, 6, 9))) is None
    assert visible_keys(problem_with(torch.ones(1, 4, 6, 9, dtype=torch.bool))) is None


def covered(plan, n, keys):
    """How often each (query, key) pair is computed."""
    count = torch.zeros(n, keys, dtype=torch.int64)

    def add(i0, i1, piece):
        if piece.buffer is None:
            columns = list(range(piece.start, piece.start + piece.length))
        else:
            columns = [j for start, stop in plan.buffers[piece.buffer] for j in range(start, stop)]
            columns = columns[piece.start : piece.start + piece.length]
        for i in range(i0, i1):
            for place, j in enumerate(columns):
                if not piece.causal or place <= i - i0:
                    count[i, j] += 1

    for band in plan.bands:
        for piece in band.pieces:
            add(band.i0, band.i1, piece)
        for block in band.blocks:
            for piece in block.pieces:
                add(block.i0, block.i1, piece)
    return count


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("gather", [True, False])
def test_plans_cover_every_visible_pair_once(monkeypatch, gather, cut):
    monkeypatch.setattr("emokernels.composed.plan.BLOCK_ROWS", 3)
    monkeypatch.setattr("emokernels.composed.plan.BAND_ROWS", 8)
    choose = random.Random(0)
    for _ in range(150):
        keys = choose.randint(1, 30)
        n = choose.randint(1, keys)
        roles = bytes(
            sorted(choose.choices(range(6), k=keys)) if choose.random() < 0.5 else choose.choices(range(6), k=keys)
        )
        label = tuple(tuple(min(src, choose.randint(0, 5)) for src in range(6)) for _ in range(6))
        start = choose.randint(0, keys - 1)
        visible = Visible(start, choose.randint(start + 1, keys), choose.choice([keys - n, keys, 0]))
        plan = make_plan(roles, roles[keys - n :], visible, label, gather, cut)
        assert torch.equal(covered(plan, n, keys), brute(visible, n, keys).long())
        for band in plan.bands:
            for piece in (*band.pieces, *(piece for block in band.blocks for piece in block.pieces)):
                check_alike(plan, piece, roles, [label[role] for role in roles[keys - n :][band.i0 : band.i1]])


def check_alike(plan, piece, roles, partitions):
    """All rows of a piece share one partition, and all its keys one class of it, the one its `role` stands for."""
    assert len(set(partitions)) == 1
    ranges = [(piece.start, piece.start + piece.length)] if piece.buffer is None else plan.buffers[piece.buffer]
    assert {partitions[0][roles[j]] for start, stop in ranges for j in range(start, stop)} == {piece.role}


def test_a_llava_prompt_takes_few_calls():
    """System text before the image and the question after it are one class; what a band reads of it is no copy here."""
    routes = emo.Routes.identity(4, fields=("gain",))
    routes.gain[:, :, 3:, 2] = 1.5
    q, k, v = qkv()
    roles = torch.tensor([LLAVA], dtype=torch.uint8)
    alike = inspect(make_problem(q, k, v, roles, None, routes, None, True, None, None, None))
    plan = make_plan(bytes(LLAVA), bytes(LLAVA), Visible(0, 20, 0), alike.label, True)
    assert [(band.i0, band.i1, len(band.pieces), len(band.blocks)) for band in plan.bands] == [
        (0, 13, 0, 1),
        (13, 20, 2, 1),
    ]
    assert plan.buffers == (((0, 3),), ((3, 13),))


def test_without_cuts_a_segment_is_one_band():
    """And a plan of one call says so."""
    label = ((0,) * 6,) * 6
    n = 3000
    plan = make_plan(bytes(n), bytes(n), Visible(0, n, 0), label, True, cut=False)
    assert [(band.i0, band.i1, len(band.blocks)) for band in plan.bands] == [(0, n, 1)]
    assert plan.only_piece(n) == (0, None, 0, n, True)
    assert make_plan(bytes(n), bytes(n), Visible(0, n, 0), label, True).only_piece(n) is None
    assert make_plan(bytes(n), bytes(n), Visible(0, n, n), label, True, cut=False).only_piece(n) == (0, 0, 0, n, False)
    after_cached = make_plan(bytes(n), bytes(n - 7), Visible(0, n, 7), label, True, cut=False)
    assert len(after_cached.bands) == 1
    assert after_cached.only_piece(n - 7) is None
    padded = make_plan(bytes(n), bytes(n), Visible(5, n, 0), label, True, cut=False)
    assert (padded.bands[0].i0, padded.only_piece(n)) == (5, None)


def test_roles_act_alike_only_when_every_head_and_row_says_so():
    routes = emo.Routes.identity(4, rows=2, fields=("bias", "gain"))
    routes.gain[1, 3, 5, 2] = 1.5
    q, k, v = qkv(batch=2)
    roles = torch.tensor([VIDEO], dtype=torch.uint8)
    alike = inspect(make_problem(q, k, v, roles, None, routes, None, True, None, None, None))
    assert alike.label[5] == (0, 0, 2, 0, 0, 0)
    assert alike.label[4] == (0,) * 6
    assert alike.gain[5][2]
    assert not any(map(any, alike.bias))
    assert alike.changes({5})
    assert not alike.changes({0, 1, 2, 3, 4})
