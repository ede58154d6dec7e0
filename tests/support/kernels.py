"""Kernels and rewards that misbehave, in a module that workers can import.

What happens once, or to one process only, is agreed on over files: `claim` is true for a single caller.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.beds import BEDS
from treesearch.backends.base import Gaussian, Wrapper
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import Steered
from treesearch.rewards.base import Reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.observation import measurement


def claim(path: str | os.PathLike[str]) -> bool:
    """Whether this is the first to claim the path, over all processes."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def note(path: str | os.PathLike[str], text: object) -> None:
    """Append a line to a file that several processes write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def noted(path: str | os.PathLike[str]) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def total(x):
    """The sum of a sample's entries: a reward for every bed."""
    return torch.as_tensor(x).double().flatten(1).sum(1)


def first(x):
    """A reward of a batch or a list of samples."""
    return torch.as_tensor([float(row.double().sum()) for row in x], dtype=torch.float64)


def worth(x, t, law, cond):
    """A value of every bed's states."""
    return law.endpoint.double().flatten(1).sum(1) * 0.3 - 0.1 * t


class Watched(Wrapper):
    """Notes in a file where it is evaluated without conditioning, at its highest level: by a pilot, not by a search."""

    def __init__(self, kernel: Any, file: str) -> None:
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "file", file)

    def transition(self, x, t, cond=None):
        if cond is None and (t == self.num_steps).all():
            note(self.file, os.getpid())
        return self.kernel.transition(x, t, cond)

    def _settings(self):
        return "watched"


CHAIN = GaussianTrajectories(
    torch.zeros(3, 2, dtype=torch.float64), torch.eye(6, dtype=torch.float64), channels=Channels(1, 1), num_steps=4
)


def steered(file: str) -> Steered:
    """A kernel with a pilot."""
    y = measurement(two_of_them, torch.zeros(2), tolerance=0.5)
    return Steered(Watched(CHAIN, file), y, pilot=8)


def seen(file: str) -> Reward:
    """Its reward."""
    return steered(file).reward


def two_of_them(x):
    return x[:, :2, 0]


class Wrapped:
    """A bed with something that happens before each transition."""

    def __init__(self, kernel: Any = None, folder: str | os.PathLike[str] = "") -> None:
        self.kernel, self.folder = kernel or BEDS["gaussian"], str(folder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("kernel", "folder"):
            raise AttributeError(name)
        return getattr(self.kernel, name)

    def before(self, x, t, task) -> None:
        pass

    def transition(self, x, t, cond=None):
        self.before(x, t, cond["task"])
        return self.kernel.transition(x, t, cond)


class Slow(Wrapped):
    """Sleeps `seconds` a pass and `row` seconds a row; while a file `slow` exists in `folder`, if one is named."""

    def __init__(self, kernel=None, seconds=0.002, row=0.0, folder=""):
        super().__init__(kernel, folder)
        self.seconds, self.row = seconds, row

    def before(self, x, t, task):
        if not self.folder or os.path.exists(f"{self.folder}/slow"):
            time.sleep(self.seconds + self.row * len(x))


class OneSlow(Wrapped):
    """Sleeps for each row; the process that comes first eight times as long."""

    slow = None

    def before(self, x, t, task):
        if OneSlow.slow is None or OneSlow.slow[0] != self.folder:
            OneSlow.slow = self.folder, claim(f"{self.folder}/slow")
            note(f"{self.folder}/pids", f"{os.getpid()} {OneSlow.slow[1]}")
        time.sleep(len(x) * (0.004 if OneSlow.slow[1] else 0.0005))


class RaisesOnce(Wrapped):
    """Raises the first time that anyone calls it at t = 3."""

    def before(self, x, t, task):
        if (t == 3).any() and claim(f"{self.folder}/raised"):
            raise RuntimeError("a cosmic ray")


class RaisesOn(Wrapped):
    """Raises on the rows of task 2 at t = 2."""

    def before(self, x, t, task):
        if ((t == 2) & (task == 2)).any():
            note(f"{self.folder}/raised", len(x))
            raise RuntimeError("no such weight")


class Dies(Wrapped):
    """Ends its process on the rows of task 2 at t = 2; with a folder, only the first time."""

    def before(self, x, t, task):
        if ((t == 2) & (task == 2)).any() and (not self.folder or claim(f"{self.folder}/died")):
            os._exit(7)


class HangsOnce(Wrapped):
    """Never comes back, the first time that anyone calls it at t = 3."""

    def before(self, x, t, task):
        if (t == 3).any() and claim(f"{self.folder}/hung"):
            time.sleep(1000)


class Locked(Exception):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class TwoArguments(Exception):
    """Pickles, and cannot be made again from what it hands to its parent."""

    def __init__(self, what: str, row: int) -> None:
        super().__init__(f"{what} in row {row}")


class Retold(Exception):
    """Comes back from its pickle as another error."""

    def __init__(self, text: str) -> None:
        super().__init__(f"retold: {text}")


# What code that knows nothing of workers may raise: what it is, and what it is called.
RAISED: dict[str, tuple[Callable[[], BaseException], str]] = {
    "exit": (lambda: SystemExit(3), "SystemExit: 3"),
    "interrupt": (lambda: KeyboardInterrupt(), "KeyboardInterrupt"),
    "locked": (lambda: Locked("no weights"), "Locked: no weights"),
    "two arguments": (lambda: TwoArguments("overflow", 7), "TwoArguments: overflow in row 7"),
    "retold": (lambda: Retold("no weights"), "Retold: retold: no weights"),
}


class Raises(Wrapped):
    """Raises what is named at t = 2; as a reward it does so at once, as a model when it is decoded."""

    def __init__(self, kind: str, where: str) -> None:
        super().__init__()
        self.kind, self.where = kind, where

    def before(self, x, t, task):
        if self.where == "kernel" and (t == 2).any():
            raise RAISED[self.kind][0]()

    def decode(self, x0):
        if self.where == "decode":
            raise RAISED[self.kind][0]()
        return self.kernel.decode(x0)

    def __call__(self, x):
        raise RAISED[self.kind][0]()


class Hungry(Wrapped):
    """Has memory for `room` rows."""

    room = 5

    def before(self, x, t, task):
        if len(x) > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} rows")


def built(folder: str) -> LinearGaussian:
    """A factory that notes each time that it is called."""
    note(f"{folder}/built", os.getpid())
    note(f"{folder}/torch", f"{torch.get_float32_matmul_precision()} {torch.get_default_dtype()}")
    return LinearGaussian(num_steps=5)


def judge(folder: str) -> Any:
    """A factory of a reward that notes each time that it is called."""
    note(f"{folder}/judge", os.getpid())
    return total


def failing() -> Any:
    """A factory of nothing."""
    raise ZeroDivisionError("a factory that fails")


class Nameless(Wrapped):
    """Without a fingerprint."""

    fingerprint = None


class Misshapen(Wrapped):
    """Its endpoints have an axis too many."""

    def transition(self, x, t, cond=None):
        note(f"{self.folder}/calls", len(x))
        law = self.kernel.transition(x, t, cond)
        return replace(law, endpoint=law.endpoint[..., None])


class SlowReward:
    """`total`, in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, x):
        time.sleep(self.seconds)
        return total(x)


class PathReward:
    """`total`; what else it does, it agrees on over a path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, x, prompts=None):
        return total(x)


class GatedReward(PathReward):
    """Waits while a folder holds `closed` and not `open`."""

    def __call__(self, x):
        while os.path.exists(f"{self.path}/closed") and not os.path.exists(f"{self.path}/open"):
            time.sleep(0.01)
        return total(x)


class NotingReward(PathReward):
    """Notes the prompts of each call."""

    def __call__(self, x, prompts=None):
        note(self.path, json.dumps(list(prompts)))
        return total(x)


class FailingReward(PathReward):
    """Raises so many times; notes when it was called."""

    def __init__(self, path: str, times: int) -> None:
        super().__init__(path)
        self.times = times

    def __call__(self, x):
        note(self.path, time.time())
        if len(noted(self.path)) <= self.times:
            raise ConnectionError("service unavailable")
        return total(x)


class NanReward(PathReward):
    """NaN for prompt b."""

    def __call__(self, x, prompts=None):
        note(self.path, len(x))
        return torch.where(torch.tensor([p == "b" for p in prompts]), torch.nan, total(x))


class HangingReward(PathReward):
    """Never comes back the first time."""

    def __call__(self, x):
        if claim(self.path):
            time.sleep(1000)
        return total(x)


def cutting(letters=5):
    """A reward that reads the beginnings of prompts, and says so."""

    def remarks(prompts):
        told = "cutting reads {} letters of a prompt, this one has {}"
        return [[told.format(letters, len(p))] if len(p) > letters else [] for p in prompts]

    return Reward(lambda x, prompts: total(x), "cutting", remarks=remarks)


class Plain(nn.Module):
    """A kernel as one writes it first: an ordinary network whose weights require gradients, in every part of it."""

    num_steps, state_shape = 4, (3,)

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3)
        self.graphs: list[bool] = []

    def prior(self, noise, cond=None):
        return noise + 0 * self.f.bias

    def encode(self, prompts):
        return {"shift": self._noted(0 + self.f.weight[: len(prompts)])}

    def transition(self, x, t, cond=None):
        mean = self._noted(0.9 * x + 0.1 * self.f(x))
        return Gaussian(mean, torch.full((len(x), 1), 0.3), mean)

    def decode(self, x0):
        return self._noted(x0 @ self.f.weight)

    def _noted(self, made):
        self.graphs.append(made.requires_grad)
        assert not torch.is_inference(made)
        return made
