"""Shared set-up: one thread unless TEST_THREADS says otherwise, and the beds that most tests use."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub

import pytest
import torch

from tests.support.beds import BEDS, half_a_step
from treesearch.backends.base import Guided, shift_mean

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def own_key(tmp_path_factory):
    """The command line's key of this user, for the tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def interrupts_are_given_back():
    """Whoever takes Ctrl-C gives it back: one kept would be lost on the user."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


RAY = ("test_same_tree.py", "test_faults.py", "test_workers.py")  # a single process runs them, on one Ray
FIRST = (*RAY, "test_cli.py", "test_planning.py", "test_experiments.py")  # so that no process waits for them at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files are dealt out to processes, with `--dist loadfile`; those in `RAY` as if they were one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "ray" if file.endswith(RAY) else file

    return ByFile(config, log)


@pytest.fixture(params=BEDS)
def bed(request):
    return BEDS[request.param]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """Where tiny checkpoints are built, once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def gaussian():
    return BEDS["gaussian"]


@pytest.fixture(scope="session")
def drifting():
    return Guided(BEDS["gaussian"], shift_mean(half_a_step), "drift")
