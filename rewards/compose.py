"""Wrappers around a reward: a cache by content, and a frozen z-score.

    cached(r)                    equal samples are scored once
    normalise(r, mean, std)      (r - mean) / std, with mean and std fixed before the search

Statistics that changed during a search would change its target; `Normalisation` keeps them with where they came from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward, RewardError, built_from, wrap
from treesearch.rewards.numeric import is_number, is_positive, is_whole
from treesearch.rewards.values import content, is_anew


def cached(reward: Reward, size: int = 65_536, key: Callable[[Any], bytes] | None = None) -> Reward:
    """The same reward, which scores equal samples (under equal prompts) once and remembers the last `size` of them.

    Only for deterministic rewards. `calls` counts what was really scored, so that cache hits cost no reward calls.

    Args:
        reward: to wrap.
        size: entries kept, the least recently used go first.
        key: bytes that identify one sample; needed for objects that are not tensors, arrays, images or plain data.

    Raises:
        ValueError: size below 1.
    """
    if not isinstance(reward, Reward):
        raise TypeError(f"reward is {type(reward).__name__}, expected a Reward: cached(as_reward(f))")
    if not is_whole(size):
        raise ValueError(f"size is {size!r}, expected at least 1")
    cache = _Cache(reward, size, key or (lambda sample: b"".join(content(sample))))
    calls, source = reward.calls or (lambda: cache.misses), built_from("cached", reward)
    return replace(reward, fn=cache.score, calls=calls, source=source)


class _Cache:
    """Values by digest, least recently used first."""

    def __init__(self, reward: Reward, size: int, key: Callable[[Any], bytes]) -> None:
        self.reward, self.size, self.key = reward, size, key
        self.values: OrderedDict[bytes, float] = OrderedDict()
        self.misses = 0

    def score(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        """Rewards (n,): known ones from memory, the first of each new kind in one batch."""
        if isinstance(samples, Tensor) and samples.requires_grad:  # remembered values have no gradient
            self.misses += len(samples)
            return self.reward.attached(samples, prompts)
        if is_anew():
            values = self._evaluate(samples, prompts, list(range(len(samples))))
            return torch.tensor(values, dtype=torch.float64, device="cpu")
        names = [self._name(samples[i], None if prompts is None else prompts[i]) for i in range(len(samples))]
        fresh = {name: i for i, name in enumerate(names) if name not in self.values}
        rows = sorted(fresh.values())
        found = {name: self.values[name] for name in names if name not in fresh}
        if rows:
            values = self._evaluate(samples, prompts, rows)
            found |= {names[row]: value for row, value in zip(rows, values, strict=True)}
        for name in names:
            self.values[name] = found[name]
            self.values.move_to_end(name)
        while len(self.values) > self.size:
            self.values.popitem(last=False)
        return torch.tensor([found[name] for name in names], dtype=torch.float64, device="cpu")

    def _evaluate(self, samples: Any, prompts: Sequence[Any] | None, rows: list[int]) -> list[float]:
        part = samples[rows] if hasattr(samples, "shape") else [samples[i] for i in rows]
        try:
            values = self.reward(part, None if prompts is None else [prompts[i] for i in rows])
        except RewardError as error:
            raise RewardError(str(error), [rows[i] for i in error.rows]) from error
        self.misses += len(rows)
        return values.tolist()

    def _name(self, sample: Any, prompt: Any) -> bytes:
        digest = hashlib.blake2b(self.key(sample), digest_size=16)
        digest.update(b"|prompt|" + b"".join(content(prompt)))
        return digest.digest()


def normalise(reward: Reward, mean: float, std: float) -> Reward:
    """(r - mean) / std with fixed numbers; -inf stays -inf. λ is then in units of one standard deviation.

    Raises:
        ValueError: mean is not finite, or std not positive and finite.
    """
    if not isinstance(reward, Reward):
        raise TypeError(f"reward is {type(reward).__name__}, expected a Reward: normalise(as_reward(f), ...)")
    if not (is_number(mean) and math.isfinite(mean)):
        raise ValueError(f"mean is {mean!r}, expected a finite number")
    if not is_positive(std):
        raise ValueError(f"std is {std!r}, expected a positive finite number")
    name, source = f"normalise({reward.name}, {mean:.6g}, {std:.6g})", built_from("normalise", reward, mean, std)
    return wrap(reward, lambda v: (v - mean) / std, name, source)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and standard deviation of a reward on a calibration draw, to be frozen before a search.

    Args:
        mean, std: of the n rewards, std with n - 1.
        n: samples of the draw.
        seed: of the draw, None where it is not known.
        reward: name of the reward.
        reward_calls: what fitting cost.
    """

    mean: float
    std: float
    n: int
    seed: int | None
    reward: str
    reward_calls: int

    @staticmethod
    def fit(
        reward: Reward, samples: Any, prompts: Sequence[Any] | None = None, *, seed: int | None = None
    ) -> Normalisation:
        """Score a calibration draw, in one batch.

        Raises:
            ValueError: fewer than two samples, a reward of -inf, or rewards that do not vary.
        """
        n = len(samples)
        if n < 2:
            raise ValueError(f"{n} calibration sample{'' if n == 1 else 's'}, expected at least 2")
        before = reward.calls() if reward.calls else 0
        values = reward(samples, prompts)
        calls = reward.calls() - before if reward.calls else n
        if forbidden := int((values == -math.inf).sum()):
            raise ValueError(
                f"reward {reward.name!r} is -inf on {forbidden} of {n} calibration samples, which leaves no mean: "
                "normalise it before gating or clip it"
            )
        std = float(values.std())
        if std == 0:
            raise ValueError(
                f"reward {reward.name!r} is {values[0]:g} on all {n} calibration samples: nothing to scale by"
            )
        return Normalisation(mean=float(values.mean()), std=std, n=n, seed=seed, reward=reward.name, reward_calls=calls)

    def apply(self, reward: Reward) -> Reward:
        """The reward it was fitted on, normalised.

        Raises:
            ValueError: another reward.
        """
        if reward.name != self.reward:
            raise ValueError(f"fitted on reward {self.reward!r}, got {reward.name!r}: fit it again")
        return normalise(reward, self.mean, self.std)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Normalisation:
        """Read JSON.

        Raises:
            ValueError: it is no normalisation.
        """
        try:
            return Normalisation(**json.loads(Path(path).read_text("utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no normalisation: {error}") from error
