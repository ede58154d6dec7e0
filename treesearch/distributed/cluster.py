"""The cluster: a Ray that is there, or one that is started on this machine for these workers alone."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.util

from treesearch import host
from treesearch.distributed.settings import Settings
from treesearch.errors import WorkerError

log = logging.getLogger("treesearch")

LOOPBACK = "127.0.0.1"
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
SOCKET_BYTES = 103 - 70  # of a folder below which Ray's sockets keep within a system's limit for their names
STORE_SHARE, STORE_LEAST = 0.3, 80 * 2**20  # of the memory that Ray's object store may take, and at least
STORE_ON_DISK = 10**10 - 1  # bytes from which on Ray refuses a store that shared memory does not hold


class Cluster:
    """A connection to Ray; one that was there already is left open.

    Raises:
        WorkerError: nothing listens at the address, or a Ray of our own would listen to other machines.
    """

    def __init__(self, settings: Settings) -> None:
        self.ours, self._folder = not ray.is_initialized(), None
        if self.ours and settings.address is not None:
            _knock(settings.address)
            ray.init(address=settings.address, **QUIET)
        elif self.ours:
            self._folder = _start_ray(settings)

    def leave(self) -> None:
        """Close the connection, and end a Ray that was started for it."""
        if self.ours:
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def resources() -> str:
    """CPUs and GPUs of the cluster, and those of them that are free, for messages."""
    return f"{_devices(ray.cluster_resources())}, of them free {_devices(ray.available_resources())}"


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables of the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray gives a node the machine's address, and then listens on all of them; it turns down a loopback address that it
    is told of. So the function that it asks answers with one."""
    asked, ray.util.get_node_ip_address = ray.util.get_node_ip_address, lambda *args: LOOPBACK
    try:
        with _environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"):  # the same for the processes that it starts
            yield
    finally:
        ray.util.get_node_ip_address = asked


def _start_ray(settings: Settings) -> str | None:
    """Start a Ray on this machine for these workers alone; returns a folder that is to be removed with it.

    Raises:
        WorkerError: it would listen to other machines.
    """
    if settings.cpus > host.cores():
        log.warning("%g CPUs are asked for and %d are there: workers share them", settings.cpus, host.cores())
    folder = _socket_folder()
    variables = {"RAY_USAGE_STATS_ENABLED": "0"} | {
        "RAY_worker_niceness": "0",  # Ray's 15 leaves workers behind anything else that runs
        "RAY_enable_worker_prestart": "0",  # no processes that wait for tasks: there are only actors
    }
    variables |= {name: os.environ[name] for name in variables if name in os.environ}  # the user knows better
    if folder is not None:
        variables["RAY_TMPDIR"] = folder
    with _environment(**variables), _on_loopback():
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(settings.cpus)),
            object_store_memory=_store_bytes(),
            include_dashboard=settings.dashboard,
            dashboard_host=LOOPBACK,
            **QUIET,
        )
    if (found := ray.nodes()[0]["NodeManagerAddress"]) != LOOPBACK:
        ray.shutdown()
        raise WorkerError(
            f"this version of Ray would listen on {found} for its private cluster: start one yourself with `ray start "
            "--head` and name its address, or call ray.init() first"
        )
    return folder


def _store_bytes() -> int | None:
    """Size of the object store by what this process may use, where Ray sees the machine; None leaves it to Ray."""
    if (allowed := host.memory()) is None:
        return None
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return int(max(STORE_LEAST, min(STORE_SHARE * allowed, max(STORE_ON_DISK, 0.95 * shared))))


def _socket_folder() -> str | None:
    """A folder for Ray's sockets, whose names may have about a hundred bytes; None where Ray's own choice will do.

    Raises:
        WorkerError: no folder with a short name can be written to.
    """
    if os.name == "nt":
        return None
    linux = sys.platform == "linux"
    chosen = os.environ.get("RAY_TMPDIR") or (linux and os.environ.get("TMPDIR")) or "/tmp"
    if len(os.fsencode(chosen)) <= SOCKET_BYTES and os.access(chosen, os.W_OK):
        return None
    for short in ("/tmp", "/var/tmp", "/dev/shm"):
        with suppress(OSError):
            return tempfile.mkdtemp(prefix="ts", dir=short)
    raise WorkerError(
        f"Ray needs a folder for its sockets, with a name of at most {SOCKET_BYTES} bytes: {chosen} is longer or "
        "cannot be written to, and neither can /tmp: set RAY_TMPDIR to one"
    )


def _devices(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs of a cluster, for messages."""
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


def _knock(address: str) -> None:
    """Raises:
    WorkerError: nothing listens at host:port, where Ray itself would try for minutes.
    """
    name, _, port = address.rpartition(":")
    if not name or not port.isdigit():
        return
    try:
        socket.create_connection((name.removeprefix("ray://"), int(port)), timeout=10).close()
    except OSError as error:
        raise WorkerError(
            f"no Ray at {address} ({error}): start one with `ray start --head`, or give no address to use this machine"
        ) from error
