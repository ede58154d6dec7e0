"""What workers and scorers share: a clock, threads, a device, kernels and rewards that are loaded once."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from treesearch import host
from treesearch.backends.base import Shared, fingerprint
from treesearch.registry.recipe import Recipe, place
from treesearch.rewards.base import Reward, as_reward


@dataclass(frozen=True)
class Setup:
    """What a process needs to know of a search. References keep large things out of it until they are needed."""

    search: int
    kernel: tuple[int, list[Any]] | None  # (number, [reference])
    reward: tuple[int, list[Any]] | None
    sample: bool  # whether rewards see samples
    prompts: Sequence[Any] | None = None
    encoded: dict[str, Any] | None = None
    batch_size: int = 64
    batch_invariant: bool = False
    guide_scores: bool = False  # a guide's rewards are the search's
    angle: float = 0.0  # of sideways edges
    keep_inner: bool = True  # states above t = 0 are wanted


class Clock:
    """How long a thread has been at what it does, in seconds in which it could have worked.

    Waiting for a core does not count: a slow machine is no reason to call a process hung.
    """

    def __init__(self) -> None:
        self._thread, self._since, self._waited = 0, time.monotonic(), 0.0

    def beat(self) -> None:
        """This thread begins with something new."""
        thread = threading.get_native_id()
        self._thread, self._since, self._waited = thread, time.monotonic(), host.waited(thread)

    def seconds(self) -> float:
        """Since the last beat; any thread may ask."""
        return time.monotonic() - self._since - (host.waited(self._thread) - self._waited)


@dataclass(frozen=True)
class TorchSettings:
    """Torch's settings of the driver's process, which a kernel may depend on."""

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)

    def apply(self) -> None:
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic)


class Process:
    """What workers and scorers share: threads, a device, kernels and rewards that are loaded once."""

    def __init__(self, threads: int, settings: TorchSettings) -> None:
        torch.set_num_threads(threads)
        settings.apply()
        self._clock = Clock()
        on_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        self.device = "cuda" if on_gpu else None
        self._loaded: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def hello(self) -> dict[str, Any]:
        """Who this is."""
        name = torch.cuda.get_device_name() if self.device else "cpu"
        node = ray.get_runtime_context().get_node_id()
        return {"pid": os.getpid(), "node": node, "device": name, "gpu_ids": [str(g) for g in ray.get_gpu_ids()]}

    def pulse(self) -> float:
        """Seconds that the thread which computes has been at its present step."""
        return self._clock.seconds()

    def _load(self, what: str, found: tuple[int, list[Any]]) -> Any:
        """A kernel or reward, built from its recipe or fetched from the object store; the last two stay loaded."""
        number, reference = found
        if (what, number) not in self._loaded:
            made = ray.get(reference[0])
            if isinstance(made, Recipe):
                made = made.kernel(self.device) if what == "kernel" else as_reward(made.reward(self.device))
            elif what == "kernel":
                made = place(made, self.device)
            self._loaded[what, number] = made
            while sum(kind == what for kind, _ in self._loaded) > 2:
                self._loaded.pop(next(key for key in self._loaded if key[0] == what))
        self._loaded.move_to_end((what, number))
        return self._loaded[what, number]


def on_cpu(encoded: dict[str, Any]) -> dict[str, Any]:
    """Conditioning as it travels."""

    def move(value: Any) -> Any:
        if isinstance(value, Shared):
            return Shared(move(value.value))
        return value.cpu() if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in encoded.items()}


def of_reward(reward: Reward) -> dict[str, Any]:
    """What is known of it without its function: stand-ins for equal rewards are equal.

    Those that no expression of registered factories stands for are known by what their functions are made of.
    """
    known = {name: getattr(reward, name) for name in ("name", "input", "settings", "prompted", "code")}
    return known | {"source": reward.source or fingerprint.of([reward.fn, reward.name, reward.settings])}
