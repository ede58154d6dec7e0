"""A scorer: a process that holds rewards alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from treesearch.distributed.bundles import as_tensor
from treesearch.distributed.process import Process, Setup, TorchSettings, of_reward
from treesearch.distributed.raised import answering
from treesearch.engine.asking import without_graph
from treesearch.rewards.base import Reward, RewardError
from treesearch.rewards.values import anew


class Scorer(Process):
    """Scores samples; a failing reward is asked again, with growing pauses."""

    def __init__(self, threads: int, settings: TorchSettings) -> None:
        super().__init__(threads, settings)
        self._setups: dict[int, Setup] = {}

    @answering
    def describe_reward(self, found: tuple[int, list[Any]]) -> Any:
        """What a stand-in for a reward must know."""
        return of_reward(self._load("reward", found))

    @answering
    def remarks(self, found: tuple[int, list[Any]], prompts: Sequence[Any]) -> list[list[str]]:
        """What a reward says of prompts."""
        return self._load("reward", found).remarks_on(prompts)

    @answering
    @without_graph()
    def score(
        self,
        setup: list[Any],
        search: int,
        parts: list[tuple[list[Any], Any, list[int]]],
        tasks: list[int],
        tries: int,
        again: bool = False,
    ) -> tuple[NDArray[np.float64], int, int, float]:
        """(rewards, samples really scored, attempts, seconds) of named rows of several bundles; `again` by no cache."""
        self._clock.beat()
        if search not in self._setups:
            self._setups = {search: ray.get(setup[0])}
        of = self._setups[search]
        assert of.reward is not None
        reward: Reward = self._load("reward", of.reward)
        samples = _gather([(ray.get(reference[0]), dtype, rows) for reference, dtype, rows in parts], self.device)
        prompts = None if of.prompts is None else [of.prompts[i] for i in tasks]
        before = reward.calls() if reward.calls else 0
        for attempt in range(1, tries + 1):
            self._clock.beat()
            began = time.perf_counter()
            try:
                with anew() if again else nullcontext():
                    values = reward(samples, prompts)
            except RewardError as error:
                if error.rows or error.__cause__ is None or attempt == tries:
                    raise
                time.sleep(0.1 * 2**attempt)
                continue
            calls = reward.calls() - before if reward.calls else len(tasks)
            return values.numpy(), calls, attempt, time.perf_counter() - began
        raise AssertionError("unreachable")


def _gather(parts: list[tuple[Any, Any, list[int]]], device: str | None) -> Any:
    """Samples of several bundles as one batch."""
    if isinstance(parts[0][0], np.ndarray) and parts[0][1] is None:
        return np.concatenate([samples[rows] for samples, _, rows in parts])
    if parts[0][1] is None:
        return [samples[i] for samples, _, rows in parts for i in rows]
    batch = torch.cat([as_tensor(samples, dtype)[torch.tensor(rows, device="cpu")] for samples, dtype, rows in parts])
    return batch if device is None else batch.to(device)
