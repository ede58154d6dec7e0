"""What this process may use of its machine: memory and cores, by what limits it and never by what is free just now.

Free memory and load differ from one minute to the next, and numbers of a search must not. Limits are the machine's, a
container's (cgroups of both versions, each of the groups above it too) and the process's own (`ulimit`, affinity). What
a system does not know limits nothing: macOS and Windows have neither cgroups nor /proc.
"""

from __future__ import annotations

import importlib
import math
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def memory() -> int | None:
    """Bytes that this process may take, as the tightest limit has it; None where nothing is known."""
    limits = [*_cgroup_memory(), *_left_by_ulimit(), _installed()]
    return min((limit for limit in limits if limit), default=None)


def cores() -> int:
    """Cores that this process may keep busy, at least one."""
    limits = [_affinity(), *(math.ceil(quota) for quota in _cgroup_quotas())]
    return max(1, min(limits))


def locked(file: BinaryIO) -> bool | None:
    """Whether somebody holds the lock of an open file, asked without writing; None where that cannot be known."""
    try:
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows has none, some network file systems neither
        return None
    return False


def resident() -> int | None:
    """Bytes of memory of this process (its most so far where the system tells no more), None where nothing is known."""
    if (pages := _statm()) is not None:
        return pages[1] * mmap.PAGESIZE
    if (resource := _resource()) is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def waited(thread: int) -> float:
    """Seconds for which a thread of this process was ready and had no core; 0 where the system does not count them."""
    words = (_read(PROC / f"task/{thread}/schedstat") or "").split()  # ns on a core, ns waiting for one, slices
    return int(words[1]) / 1e9 if len(words) == 3 else 0.0


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _installed() -> int | None:
    """Bytes of memory of the machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not this name
        return _installed_on_windows()


def _installed_on_windows() -> int | None:
    import ctypes

    kilobytes, windows = ctypes.c_ulonglong(), getattr(ctypes, "windll", None)
    if windows is None or not windows.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes)):
        return None
    return kilobytes.value * 1024


def _left_by_ulimit() -> Iterator[int]:
    """Bytes that `ulimit -v` (address space) and `ulimit -d` (data) leave to this process."""
    if (resource := _resource()) is None:
        return
    pages = _statm() or [0] * 7  # in pages: total, resident, shared, text, 0, data, 0
    for name, used in (("RLIMIT_AS", pages[0]), ("RLIMIT_DATA", pages[5])):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY:
            yield max(1, limit - used * mmap.PAGESIZE)


def _resource() -> Any:
    """The module `resource`, None on Windows."""
    try:
        return importlib.import_module("resource")
    except ImportError:
        return None


def _statm() -> list[int] | None:
    text = _read(PROC / "statm")
    return None if text is None else [int(word) for word in text.split()]


def _cgroup_memory() -> Iterator[int]:
    """Bytes allowed by each control group above this process."""
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text and text.isdigit():
                yield int(text)


def _cgroup_quotas() -> Iterator[float]:
    """Cores allowed by each control group above this process."""
    for folder in _groups("cpu"):
        words = (_read(folder / "cpu.max") or "").split()
        words = words or [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # not "max", not -1
            yield int(words[0]) / int(words[1])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, its own first, then all above it.

    A line of `cgroup` is `number:controllers:path`, of version 2 `0::path`. Inside a container the path may be the
    host's, of which only the upper end, the mount itself, is there.
    """
    mounts = list(_mounts(controller))
    for line in (_read(PROC / "cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount, root in mounts:
            inside = path.removeprefix(root.rstrip("/")).strip("/")
            parts = [part for part in inside.split("/") if part not in ("", "..")]
            for depth in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:depth])


def _mounts(controller: str) -> Iterator[tuple[Path, str]]:
    """(folder, the group that it shows) of mounted hierarchies that may have a controller; the usual ones at least.

    A line of `mountinfo` is `id parent device root mount options [fields] - type source options`.
    """
    yield from ((CGROUPS, "/"), (CGROUPS / controller, "/"))
    for line in (_read(PROC / "mountinfo") or "").splitlines():
        found = re.match(r"\S+ \S+ \S+ (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)", line)
        if found and (found[3] == "cgroup2" or controller in found[4].split(",")):
            yield Path(found[2]), found[1]


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None
