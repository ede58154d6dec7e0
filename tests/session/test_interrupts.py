"""Ctrl-C in Python: a first one ends a search and returns what there is, a second one raises."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import numpy as np
import pytest

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.interrupts import first_interrupt
from treesearch.runs.config import read_config

KERNEL, METHOD, BUDGET = LinearGaussian(), ts.DiffusionTreeSampling(wave=16), ts.Budget(nfe=800)
OPTIONS = {"budget": BUDGET, "batch_size": 16}


def total(x):
    return x.double().sum(1)


def interrupting(*calls, times=1):
    """The same reward, with a Ctrl-C, or several, in the given ones of its calls."""
    count = iter(range(10**9))

    def reward(x):
        if next(count) in calls:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return total(x)

    return reward


def test_the_first_ends_the_search_after_its_wave(tmp_path):
    found = ts.search(KERNEL, interrupting(3), METHOD, store=tmp_path / "r", **OPTIONS)
    assert found.status == ts.methods.base.Status.STOPPED
    assert len(found.history) == 4
    assert len(found.samples) == len(found.rewards) > 48
    assert read_config(tmp_path / "r")["status"] == "stopped"
    straight = ts.search(KERNEL, total, METHOD, **OPTIONS)
    resumed = ts.resume(tmp_path / "r", KERNEL, interrupting(), batch_size=16)
    assert np.array_equal(resumed.tree.key, straight.tree.key)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_raises_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ts.search(KERNEL, interrupting(3, times=2), METHOD, store=tmp_path / "r", **OPTIONS)
    assert read_config(tmp_path / "r")["status"] == "interrupted"
    again = ts.resume(tmp_path / "r", KERNEL, interrupting(2), batch_size=16)  # verified, then one wave
    assert again.status == ts.methods.base.Status.STOPPED


def test_a_handler_of_the_program_stays_in_charge():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        found = ts.search(KERNEL, interrupting(3), METHOD, **OPTIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [signal.SIGINT]
    assert found.cost.nfe == 800


def test_of_two_the_first_may_end_first():
    """As two streams that are read in turn: Ctrl-C is then what it was."""
    stopped = []
    one, two = (first_interrupt(lambda name=name: stopped.append(name), raises=False) for name in "ab")
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    signal.raise_signal(signal.SIGINT)
    assert stopped == ["b"]
    two.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stream_is_interrupted_as_any_loop():
    with pytest.raises(KeyboardInterrupt):
        deque(ts.stream(KERNEL, interrupting(3), METHOD, **OPTIONS), 0)


def test_a_search_in_another_thread_has_no_handler():
    found = []
    thread = threading.Thread(target=lambda: found.append(ts.search(KERNEL, total, METHOD, **OPTIONS)))
    thread.start()
    thread.join()
    assert found[0].cost.nfe == 800


PROGRAM = """
import time, sys
import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
def slow(x):
    print("a wave", flush=True)
    time.sleep(float(sys.argv[1]))
    return x.double().sum(1)
found = ts.search(LinearGaussian(), slow, ts.BestOfN(), budget=ts.Budget(nfe=10**7))
print(found.status.name, len(found.samples), flush=True)
"""


def test_signals_from_outside():
    """One process that is asked once, while a wave takes half a second; one that is asked twice, in a long one."""
    words = [sys.executable, "-c", PROGRAM]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    for seconds, signals in (("0.5", 1), ("600", 2)):
        job = subprocess.Popen([*words, seconds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert job.stdout is not None
        assert job.stdout.readline() == "a wave\n"
        for _ in range(signals):
            job.send_signal(signal.SIGINT)
            time.sleep(0.2)
        printed, told = job.communicate(timeout=600)
        if signals == 1:
            assert (job.returncode, printed.splitlines()[-1]) == (0, "STOPPED 64")
        else:
            assert job.returncode == -signal.SIGINT
            assert told.rstrip().endswith("KeyboardInterrupt")
