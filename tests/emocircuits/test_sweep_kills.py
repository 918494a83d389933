"""Several pairs into one folder: killed with -9, two processes at once, files cut off, a disk that is really full."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_sweep_engine import A, B
from test_sweep_several import pairs

from emocircuits.sweep import Sweep, api, logit_diff
from emocircuits.sweep.store import Store

PATCHES = 3 * 9 * 4  # of a pair: layers, columns, heads
CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_sweep_kills import sweep
from emocircuits.sweep.store import Store

add, calls = Store.add, []

def slow(self, values):
    self.seconds = 0.0
    add(self, values)
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        print("ready", flush=True)
        time.sleep(60)

Store.add = slow
sweep(sys.argv[1]).heads("each")
"""


def sweep(out: object) -> Sweep:
    """Three pairs, few patches at a time."""
    model, clean, corrupt = pairs("llama")
    return Sweep(model, clean, corrupt, logit_diff(A, B), batch=2, out=out, progress=False)


@contextlib.contextmanager
def child(out: Path, chunks: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that sweeps into ``out`` and stops moving after so many chunks."""
    command = [sys.executable, "-c", CHILD, str(out), str(Path(__file__).parent), str(chunks)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield started
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.wait()


def held(out: Path) -> list[tuple[str, int]]:
    """Every value on disk: pair and number of its patch."""
    shards = sorted(out.glob("*/heads/shards"))
    # A shard that was being written when the process was killed is a hidden file, which readers leave out.
    whole = [s for s in shards if any(s.glob("*.parquet"))]
    return [(s.parts[-3], i) for s in whole for i in pd.read_parquet(s)["index"]]


@pytest.fixture(scope="module")
def whole():
    return sweep(None).heads("each")


def counting(monkeypatch) -> list:
    computed: list = []
    real = api.evaluate
    monkeypatch.setattr(api, "evaluate", lambda s, t, todo, *more: (computed.extend(todo), real(s, t, todo, *more))[1])
    return computed


def test_killed_in_the_second_pair_while_another_waits(tmp_path, whole, monkeypatch):
    chunks_of_a_pair = _chunks(monkeypatch)
    with child(tmp_path, chunks_of_a_pair + 2), pytest.raises(OSError, match=r"0002/heads: another process is sweep"):
        sweep(tmp_path).heads("each")
    before = held(tmp_path)
    assert {p for p, _ in before} == {"0001", "0002"}
    assert PATCHES < len(before) < 2 * PATCHES
    computed = counting(monkeypatch)
    found = sweep(tmp_path).heads("each")
    assert len(computed) == 3 * PATCHES - len(before), "what was there is not computed again"
    after = held(tmp_path)
    assert sorted(after) == [(f"{p:04d}", i) for p in (1, 2, 3) for i in range(PATCHES)]
    torch.testing.assert_close(found.pairs, whole.pairs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-12)
    computed.clear()
    assert torch.equal(sweep(tmp_path).heads("each").values, found.values)
    assert not computed


def _chunks(monkeypatch) -> int:
    """How many chunks a pair has."""
    calls = []
    with monkeypatch.context() as m:
        m.setattr(Store, "add", lambda self, values: calls.append(list(values)))
        m.setattr(Store, "flush", lambda self: None)
        model, clean, corrupt = pairs("llama")
        import tempfile

        with tempfile.TemporaryDirectory() as out:
            Sweep(model, clean[0], corrupt[0], logit_diff(A, B), batch=2, out=out, progress=False).heads("each")
    return len(calls)


def test_a_manifest_cut_off(tmp_path, whole):
    sweep(tmp_path).heads("each")
    path = tmp_path / "0002" / "heads" / "manifest.json"
    text = path.read_text()
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:cut])
        with pytest.raises(ValueError, match=r"pair 2 of 3: .*0002/heads/manifest.json: not the manifest of a sweep"):
            sweep(tmp_path).heads("each")
    path.write_text(text)
    assert torch.equal(sweep(tmp_path).heads("each").values, whole.values)


def test_a_shard_cut_off(tmp_path, whole, monkeypatch):
    sweep(tmp_path).heads("each")
    path = next((tmp_path / "0003" / "heads" / "shards").glob("*.parquet"))
    data = path.read_bytes()
    for cut in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"pair 3 of 3: .*: cannot be read .*remove it"):
            sweep(tmp_path).heads("each")
    # One bit is another one: a checksum tells, unless it is of what is not read.
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for at in range(40, footer, max(1, footer // 12)):
        middle = bytearray(data)
        middle[at] ^= 0x10
        path.write_bytes(bytes(middle))
        try:
            assert torch.equal(sweep(tmp_path).heads("each").values, whole.values)
        except ValueError as error:
            assert "cannot be read" in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 5
    path.unlink()  # as the message says
    computed = counting(monkeypatch)
    torch.testing.assert_close(sweep(tmp_path).heads("each").values, whole.values, rtol=0, atol=1e-12)
    assert 0 < len(computed) <= PATCHES


def test_a_disk_that_is_full(tmp_path, whole, monkeypatch):
    """A file system of a few pages: real ENOSPC."""
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=52k", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        monkeypatch.setattr(Store.__init__, "__kwdefaults__", {"seconds": 0.0})
        monkeypatch.setattr(api, "open_store", _eager(api.open_store))
        with pytest.raises(OSError, match=r"the disk is full; \d+ of 108 patches are saved there: make room"):
            sweep(out).heads("each")
        before = held(out)
        assert before
        subprocess.run(["mount", "-o", "remount,size=4m", str(out)], check=True)
        computed = counting(monkeypatch)
        found = sweep(out).heads("each")
        assert len(computed) == 3 * PATCHES - len(before)
        torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-12)
    finally:
        subprocess.run(["umount", str(out)], check=True)


def _eager(real):
    return lambda *a, **k: real(*a, **{**k, "seconds": 0.0})


ANY = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_sweep_kills import sweep
from emocircuits.sweep.store import Store

add = Store.add

def slow(self, values):
    self.seconds = 0.0
    add(self, values)
    print("shard", flush=True)
    time.sleep(0.002)

Store.add = slow
sweep(sys.argv[1]).heads("each")
"""


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(tmp_path, whole):
    """Not between shards: wherever the process happens to be, writing included."""
    rng = random.Random(0)
    counts = [0]
    for _ in range(3):
        command = [sys.executable, "-c", ANY, str(tmp_path), str(Path(__file__).parent)]
        started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None
        for _ in range(rng.randint(3, 9)):
            started.stdout.readline()
        time.sleep(rng.random() * 0.02)
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
        counts.append(len(held(tmp_path)))
        assert len(set(held(tmp_path))) == counts[-1], "nothing twice"
    assert counts == sorted(set(counts)), "every run went on from the one before"
    assert counts[-1] < 3 * PATCHES
    found = sweep(tmp_path).heads("each")
    assert sorted(held(tmp_path)) == [(f"{p:04d}", i) for p in (1, 2, 3) for i in range(PATCHES)]
    torch.testing.assert_close(found.pairs, whole.pairs, rtol=0, atol=1e-12)
