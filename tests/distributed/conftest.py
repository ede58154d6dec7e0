"""One Ray and its workers for all files of this folder that want them and that a process runs one after the other."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import treesearch as ts

TESTS = Path(__file__).parents[1]
HEAD = {"num_cpus": 10, "num_gpus": 1, "include_dashboard": False}
SYSTEM = {
    "enable_worker_prestart": False,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,  # Ray's 15 leaves workers behind all other test processes
}


class Running:
    """What has been started, until a test of another folder is next."""

    def __init__(self):
        self.made, self.end = {}, ExitStack()

    def get(self, name, context):
        """What a context gives; it is entered once."""
        if name not in self.made:
            self.made[name] = self.end.enter_context(context)
        return self.made[name]

    def close(self):
        self.made = {}
        self.end.close()


RUNNING = Running()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path.parent != item.path.parent:
        RUNNING.close()


@contextmanager
def own_ray():
    """A Ray away from any other on the machine."""
    folder = tempfile.mkdtemp(prefix="ts", dir="/tmp")  # paths of sockets are short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=HEAD | {"_system_config": SYSTEM})
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.CRITICAL)
        yield made
        ray.shutdown()
        made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster():
    return RUNNING.get("cluster", own_ray())


@pytest.fixture
def three(cluster):
    """Workers that score where they sample."""
    return RUNNING.get("three", ts.RayWorkers(3))


@pytest.fixture
def scored(cluster):
    """A worker, and two that score."""
    return RUNNING.get("scored", ts.RayWorkers(1, reward_workers=2))


@pytest.fixture
def free(cluster):
    """CPUs that no pool above has taken."""
    pools = [RUNNING.made[name].pool for name in ("three", "scored") if name in RUNNING.made]
    return HEAD["num_cpus"] - sum(len(pool.actors) for pool in pools)
