"""Leases: what is under way at a process, whose it is, and the process as the driver sees it.

A lease has an owner. Whoever owns leases is a `Tenant`: a search is one, the service of its rewards another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

FETCH_SECONDS = 60.0  # for an answer that Ray reported ready
PULSE_SECONDS = 60.0  # within which a process says how it is, however busy its machine


@dataclass(eq=False, kw_only=True)
class Lease:
    """Work under way at a process."""

    owner: Tenant[Any]
    refs: tuple[Any, ...]  # to the answer, then to what may stay where it is until it is wanted
    alone: bool = False  # its process takes nothing beside it


L = TypeVar("L", bound=Lease, contravariant=True)


class Tenant(Protocol[L]):
    """Who has a pool's processes work. The pool tells it of its own leases only, and of none once it has left."""

    def dispatch(self) -> None:
        """Send what processes have room for."""
        ...

    def due(self) -> float:
        """Seconds until there is something to do even if no answer comes."""
        ...

    def spare(self) -> bool:
        """Do something that has waited for a moment in which no answer is there; whether there was something."""
        ...

    def patience(self, actor: Actor, /) -> float:
        """Seconds that a process may take for its oldest lease."""
        ...

    def received(self, lease: L, actor: Actor, answer: Any, /) -> None:
        """A lease has ended with an answer."""
        ...

    def missed(self, lease: L, actor: Actor, error: Exception, /) -> None:
        """No answer will come, though the process lives: either `actor.done(lease)` or `pool.lost(actor, error)`."""
        ...

    def lost(self, lease: L, error: Exception, /) -> None:
        """A lease has ended with its process."""
        ...


@dataclass(frozen=True)
class Role:
    """What processes of a kind are."""

    name: str  # for messages
    kind: Any  # their class, as Ray starts it
    cpus: float
    gpus: float
    ahead: int  # leases that one has at most


@dataclass(eq=False)
class Actor:
    """A process of the pool, as the driver sees it."""

    role: Role
    number: int
    handle: Any
    ready: Any  # reference to its hello, None once it has come
    started: float
    info: dict[str, Any] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    began: float = 0.0  # when it began the oldest of them
    pulse: Any = None  # reference to an answer of its `pulse`
    asked: float = 0.0  # when it was asked for one

    @property
    def free(self) -> bool:
        """Whether it takes another lease."""
        return self.open and len(self.leases) < self.role.ahead

    @property
    def open(self) -> bool:
        """Whether it is up and takes leases beside those that it has."""
        return self.ready is None and not any(lease.alone for lease in self.leases)

    def seconds(self) -> float:
        """Seconds since it began the oldest of its leases."""
        return time.monotonic() - self.began

    def take(self, lease: Lease) -> None:
        """A lease has begun, or follows the one before."""
        self.began = self.began if self.leases else time.monotonic()
        self.leases.append(lease)

    def done(self, lease: Lease) -> None:
        """A lease has ended."""
        self.leases.remove(lease)
        self.began = time.monotonic()

    def hangs(self, limit: float) -> bool:
        """Whether it has been at one step for longer than `limit` seconds, by its own clock: asked now, heard later."""
        now = time.monotonic()
        if self.pulse is None:
            if now - self.asked > min(1.0, limit / 4):
                self.pulse, self.asked = self.handle.pulse.remote(), now
            return False
        if not ray.wait([self.pulse], timeout=0)[0]:
            return now - self.asked > max(limit, PULSE_SECONDS)
        pulse, self.pulse = self.pulse, None
        try:
            seconds: Any = ray.get(pulse, timeout=FETCH_SECONDS)
            return seconds > limit
        except (RayError, GetTimeoutError):  # it died: its work will tell
            return False
