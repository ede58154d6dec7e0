"""Whether kernel and reward are those that a run was made with: a little of what it has recorded, computed again.

    kernel   without a fingerprint, and of other content than when the run began: its cheapest stored edge
    reward   the lowest, the middle and the highest recorded sample

This is work done again, `Cost.repeated_nfe`, and no budget pays for it: however often a run is resumed, its tree is
that of a straight one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treesearch.backends.base import Kernel, Spec, fingerprint
from treesearch.core.tree import NONE, ROOT, Tree
from treesearch.engine.states import LostStates, StateStore, forget
from treesearch.errors import StoreError
from treesearch.rewards.base import Reward
from treesearch.runs.folder import Run
from treesearch.session.interfaces import Runner

NOISY = "the reward gives one sample another value each time: whether it is the one of this run cannot be told"
REWRITTEN = "the code of the reward is another than when this run began; the samples scored again came out the same"
SAME = 1e-3  # relative difference at which numbers that a network gave count as one


@dataclass(frozen=True)
class Verification:
    """A run beside what is to go on with it."""

    run: Run
    kernel: Kernel
    spec: Spec
    reward: Reward
    engine: Runner
    states: StateStore
    trees: Sequence[Tree]

    def __call__(self) -> list[str]:
        """What it could not make sure of.

        Raises:
            StoreError: the kernel or the reward does not reproduce the run.
        """
        self._verify_drafts()
        if self.spec.fingerprint is None and not self._of_same_content():
            self._verify_kernel()
        while True:
            try:
                return self._verify_reward()
            except LostStates as lost:
                forget(lost, self._slots())

    def _verify_drafts(self) -> None:
        """Drafts are charged what they were when the run began, or its budget would mean something else."""
        was = self.run.config
        now = {"draft_ratio": self.spec.draft_ratio, "draft_times": list(self.spec.draft_times)}
        if other := [name for name, value in now.items() if name in was and was[name] != value]:
            raise StoreError(
                f"{', '.join(other)}: drafts of this kernel are not charged as those of the run were (another network "
                "drafts, or ratio= is another): resume with the original kernel"
            )

    def _of_same_content(self) -> bool:
        """Whether a kernel without a fingerprint is, code and all that it holds, the one that the run began with."""
        was = self.run.config.get("kernel_code")
        return was is not None and was == fingerprint.of(self.kernel)

    def _verify_kernel(self) -> None:
        """Walk the cheapest stored edge again."""
        if not (found := self._cheapest()):
            return
        _, node, above, task = found
        again = self.engine.path(task, node, above)
        stored = self.states.get(self.trees[task].slot[[node]])[0]
        if not torch.allclose(again.cpu().double(), stored.cpu().double(), rtol=1e-3, atol=1e-3):
            raise StoreError(
                f"fingerprint: the kernel does not reproduce node {node} of task {task}, so it is not the one this run "
                "was made with (weights, num_steps, eta, guidance?): resume with the original kernel"
            )

    def _verify_reward(self) -> list[str]:
        """Score the lowest, the middle and the highest recorded sample again: a name and settings are not all of it."""
        task, node, recorded = self._scored()
        if not len(task):
            return []
        finite = recorded[np.isfinite(recorded)]
        room = SAME * float(np.ptp(finite)) if len(finite) else 0.0
        pick = np.unique(np.argsort(recorded, kind="stable")[[0, len(task) // 2, -1]])
        task, node, recorded = task[pick], node[pick], recorded[pick]
        x = self.states.get(np.array([self.trees[i].slot[n] for i, n in zip(task, node, strict=True)]))
        again = self.engine.score(task, x)
        same = _alike(again, recorded, room)
        if same.all():
            was = self.run.config.get("reward_code")
            return [REWRITTEN] if was is not None and self.reward.code not in (None, was) else []
        alone = np.concatenate([self.engine.score(task[i : i + 1], x[i : i + 1]) for i in range(len(task))])
        if not _alike(alone, again, room).all():
            return [NOISY]
        i = int(np.argmin(same))
        raise StoreError(
            f"reward: {self.reward.name!r} is {again[i]:g} at node {node[i]} of task {task[i]}, where the run has "
            f"{recorded[i]:g}: it is not the one that this run was made with; resume with that one, or begin a new run"
        )

    def _scored(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """(task, node, reward) of all samples whose states are stored."""
        found = [
            (i, tree, leaves[tree.slot[leaves] != NONE])
            for i, tree in enumerate(self.trees)
            for leaves in [tree.leaves]
        ]
        task = np.concatenate([np.full(len(leaves), i) for i, _, leaves in found])
        node = np.concatenate([leaves for _, _, leaves in found])
        return task, node, np.concatenate([tree.reward[leaves] for _, tree, leaves in found])

    def _cheapest(self) -> tuple[int, int, int, int] | None:
        """(NFE, node, stored ancestor or the root, task) of the cheapest walk between stored states that are whole.

        Raises:
            StoreError: all are lost.
        """
        stored = any((tree.slot != NONE).any() for tree in self.trees)
        while found := [(*path, i) for i, tree in enumerate(self.trees) if (path := self._cheapest_path(tree))]:
            _, node, above, task = cheapest = min(found)
            slot = self.trees[task].slot[[node, above]]
            try:
                self.states.get(slot[slot != NONE])
            except LostStates as lost:
                forget(lost, self._slots())
            else:
                return cheapest
        if stored and not any((tree.slot != NONE).any() for tree in self.trees):
            raise StoreError(
                f"{self.run.path}: every state is lost, and the kernel has no fingerprint: "
                "nothing shows that it is the run's own; put back the states"
            )
        return None

    def _cheapest_path(self, tree: Tree) -> tuple[int, int, int] | None:
        """(NFE, node, stored ancestor or the root) of the cheapest walk between stored states."""
        top, stored = self.spec.num_steps, np.flatnonzero(tree.slot != NONE)
        above = np.maximum(tree.parent[stored], ROOT)
        while (missing := (above != ROOT) & (tree.slot[above] == NONE)).any():
            above[missing] = tree.parent[above[missing]]
        price = np.minimum(tree.t[above], top) - tree.t[stored]
        if not (price > 0).any():
            return None
        i = int(np.argmin(np.where(price > 0, price, top + 1)))
        return int(price[i]), int(stored[i]), int(above[i])

    def _slots(self) -> list[NDArray[Any]]:
        """Places of the states of every tree."""
        return [tree.slot for tree in self.trees]


def _alike(a: NDArray[np.float64], b: NDArray[np.float64], room: float) -> NDArray[np.bool_]:
    return np.isclose(a, b, rtol=SAME, atol=room)
