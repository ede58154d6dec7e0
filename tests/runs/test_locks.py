"""Locks of run folders: that cannot be had, that outlive their stream, that another machine left behind."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import threading
from collections import deque

import numpy as np
import pytest

import treesearch as ts
from tests.support.kernels import total
from treesearch.api import open_session
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.main import main
from treesearch.rewards.base import RewardError
from treesearch.runs.config import read_config
from treesearch.runs.files import write_json
from treesearch.runs.lock import held

KERNEL, TREE = LinearGaussian(num_steps=5), ts.DiffusionTreeSampling(wave=4)
BUDGET, MORE = ts.Budget(nfe=100), ts.Budget(nfe=140)


@pytest.fixture
def run(tmp_path):
    ts.search(KERNEL, total, TREE, budget=BUDGET, store=tmp_path / "run")
    return tmp_path / "run"


def without_locks(patch, number):
    """A file system whose locks fail with an error of the system."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", refuse)


def read_only(patch, number):
    """A file system on which no file is opened for writing."""
    opened = os.open

    def refuse(path, flags, *more, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, *more, **options)

    patch.setattr(os, "open", refuse)


KINDS = {
    "ENOLCK": without_locks,
    "EOPNOTSUPP": without_locks,
    "EIO": without_locks,
    "EROFS": read_only,
    "EACCES": read_only,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_cannot_be_had_is_told_and_looking_needs_none(run, kind, monkeypatch, capsys):
    config = read_config(run) | {"status": "running"}  # as kill -9 leaves it
    write_json(run / "run.json", config)
    before = {file: file.read_bytes() for file in run.iterdir()}
    number = getattr(errno, kind)
    with monkeypatch.context() as patch:
        KINDS[kind](patch, number)
        for attempt in (
            lambda: ts.search(KERNEL, total, TREE, budget=BUDGET, store=run),
            lambda: next(ts.stream(KERNEL, total, TREE, budget=BUDGET, store=run)),
            lambda: ts.resume(run, KERNEL, total, budget=MORE),
        ):
            with pytest.raises(ts.StoreError, match=f"cannot lock .*: {os.strerror(number)}; .* a local disk, or copy"):
                attempt()
        assert main(["show", str(run)]) == main(["ls", str(run.parent)]) == 0
        looked = open_session(run, KERNEL, total, look=True)
        assert looked.result().cost.nfe <= BUDGET.nfe
        looked.close()
    out = capsys.readouterr().out
    assert "killed" in out
    assert ("running or killed" in out) == (KINDS[kind] is without_locks)
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    assert ts.resume(run, KERNEL, total, budget=MORE).cost.nfe > BUDGET.nfe - 5


def test_a_stream_may_end_on_another_thread_than_it_began_on(tmp_path):
    made, begun, over = [], threading.Event(), threading.Event()

    def begin():
        made.append(ts.stream(KERNEL, total, TREE, budget=BUDGET, store=tmp_path / "run"))
        begun.set()
        over.wait(60)

    thread = threading.Thread(target=begin)
    thread.start()
    assert begun.wait(60)
    deque(made[0], 0)
    assert held(tmp_path / "run") is False
    over.set()
    thread.join()
    assert ts.resume(tmp_path / "run", KERNEL, total, budget=MORE).diagnostics["status"] == "budget"


@pytest.mark.parametrize("leave", ["break", "unread", "error"])
def test_a_stream_that_is_left_says_that_it_is_open_and_how_it_is_closed(tmp_path, leave):
    def spoilt(x):
        return total(x) * np.nan

    reward = spoilt if leave == "error" else total
    snapshots = ts.stream(KERNEL, reward, TREE, budget=BUDGET, store=tmp_path / "run")
    assert held(tmp_path / "run") is True
    if leave == "error":
        with pytest.raises(RewardError):
            next(snapshots)
        assert held(tmp_path / "run") is False
        return
    if leave == "break":
        next(snapshots)
    with pytest.raises(ts.StoreError, match=r"in use by this process: a search or stream .* call its close\(\)"):
        ts.resume(tmp_path / "run", KERNEL, total)
    snapshots.close()
    assert held(tmp_path / "run") is False
    assert read_config(tmp_path / "run")["status"] == "interrupted"
    again = ts.resume(tmp_path / "run", KERNEL, total)
    assert np.array_equal(again.tree.key, ts.search(KERNEL, total, TREE, budget=BUDGET).tree.key)


@pytest.mark.parametrize("waves", [0, 1])
def test_a_stream_that_is_forgotten_lets_go(tmp_path, waves):
    snapshots = ts.stream(KERNEL, total, TREE, budget=BUDGET, store=tmp_path / "run")
    for _ in range(waves):
        next(snapshots)
    del snapshots
    gc.collect()
    assert held(tmp_path / "run") is False


def test_a_lock_file_of_another_machine_is_named_with_the_way_out(run, monkeypatch):
    """Where the system has no locks at all, a marker file takes their place; a machine that is gone leaves its own."""
    without_locks(monkeypatch, errno.ENOSYS)
    (run / "lock").write_text("4711\nnode-17\n")
    way_out = rf"is in use by process 4711 of node-17: wait for it, or stop it; if it is gone, remove {run / 'lock'}"
    for attempt in (
        lambda: ts.resume(run, KERNEL, total, budget=MORE),
        lambda: ts.search(KERNEL, total, TREE, budget=BUDGET, store=run),
    ):
        with pytest.raises(ts.StoreError, match=way_out):
            attempt()
    (run / "lock").unlink()
    assert ts.resume(run, KERNEL, total, budget=MORE).cost.nfe > BUDGET.nfe - 5
    assert not (run / "lock").exists()
