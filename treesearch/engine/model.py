"""The model as engines ask it: a kernel and the reward of its samples, in batches of rows that know their task.

Everything that comes back is checked, and what it costs is told. Of trees, waves and segments nothing is known here: an
engine holds a `Model` where it computes, and hands it on where it sends the work to others.

A node at level T is a draw of the prior from noise z. Below the root z is the node's own, ε(key); below another node
of level T it is a neighbour's, z = cos θ z(parent) + sin θ ε(key), again N(0, I). Such edges cost no evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treesearch.backends.base import Kernel, Shared, Spec, Transition, bare, optional
from treesearch.budget import Cost
from treesearch.core.noise import normals
from treesearch.engine.asking import Asking, as_states, as_weights, decode
from treesearch.engine.segments import Ids, Ledger
from treesearch.errors import KernelError, UsageError
from treesearch.rewards.base import Reward, refuse_unseen
from treesearch.rewards.values import flat


class Model:
    """A kernel, the conditioning of its tasks and the reward of its samples; the only caller of kernels and rewards.

    Args:
        kernel, spec: the denoising chain and `describe(kernel)`.
        reward: scores samples.
        prompts: one a task, or None.
        encoded: what `encode` made of them.
        batch_size: rows of a forward pass.
        batch_invariant: pad every pass to `batch_size` rows, so that a row's result does not depend on the batch.
        angle: θ of sideways edges.
        guide_scores: the rewards that a guide computes are the reward's, even where the two do not compare equal.

    Raises:
        UsageError: values of another reward.
        ValueError: a reward that no sample is of, see `refuse_unseen`.
    """

    def __init__(
        self,
        kernel: Kernel,
        spec: Spec,
        reward: Reward,
        *,
        prompts: Sequence[Any] | None = None,
        encoded: dict[str, Any] | None = None,
        batch_size: int = 64,
        batch_invariant: bool = False,
        angle: float = 0.0,
        guide_scores: bool = False,
    ) -> None:
        self.kernel, self.spec, self.reward = kernel, spec, reward
        self.prompts, self.encoded, self.angle = prompts, encoded or {}, angle
        self.batch_size, self.batch_invariant = batch_size, batch_invariant
        self.work = Work(kernel, spec)
        self.guide_scores = guide_scores or knows(kernel, spec, reward)
        refuse_unseen(reward, spec.sample_range)
        self._gathered: tuple[Ids, dict[str, Any]] | None = None
        self.passes = self.evaluated = 0  # forward passes, and rows in them without padding

    def evaluate(self, x: Tensor, t: Ids, task: Ids, kernel: Kernel | None = None) -> tuple[Transition, int]:
        """One network call on n rows, checked; the transition and how many rows of padding went along.

        Args:
            x, t, task: of the rows.
            kernel: whose; the search's own by default.
        """
        kernel = self.kernel if kernel is None else kernel
        n, pad = len(t), max(0, self.batch_size - len(t)) if self.batch_invariant else 0
        if pad:
            x, t, task = torch.cat([x, x[:1].expand(pad, *x.shape[1:])]), _pad(t, pad), _pad(task, pad)
        levels = torch.from_numpy(t).to(self.spec.device)
        with Asking(lambda: f"kernel.transition of {len(t)} rows at t = {np.unique(t).tolist()}"):
            law = kernel.transition(x, levels, self.conditioning(task))
        if not hasattr(law, "endpoint"):
            got = type(law).__name__
            raise KernelError(f"kernel.transition returned {got}, expected a law such as backends.base.Gaussian")
        if tuple(law.endpoint.shape) != tuple(x.shape):
            got, want = tuple(law.endpoint.shape), tuple(x.shape)
            raise KernelError(
                f"kernel.transition returned an endpoint of shape {got}, expected {want}, like its states"
            )
        self.passes, self.evaluated = self.passes + 1, self.evaluated + n
        return (law.take(torch.arange(n, device="cpu")) if pad else law), pad

    def charge(self, cost: Cost, t: Ids, again: NDArray[np.bool_], padding: int = 0) -> None:
        """Enter the rows of an evaluation into a cost; those done `again` were paid for before."""
        repeated = int(again.sum())
        cost.nfe += len(t) - repeated
        cost.repeated_nfe += repeated
        self.work.charge(cost, t, t[~again], padding)

    def draw(self, law: Transition, key: NDArray[np.uint64], t: Ids) -> tuple[Tensor, NDArray[np.float64]]:
        """x_{t-1} and the log p/q of the step, from each row's own noise."""
        try:
            x = law.sample(self.noise(key, t))
        except RuntimeError as error:
            raise KernelError(
                f"transition.sample failed on {len(t)} rows of states {self.spec.state_shape}: {error}; mean must have "
                "the shape of the states, and std one that broadcasts against it, such as (n, 1, ...)"
            ) from error
        x = self.finite(as_states(x, len(t), self.spec, "transition.sample"), t)
        return x, as_weights(law.log_weight(x), len(t), "transition.log_weight")

    def finite(self, x: Tensor, t: Ids) -> Tensor:
        """States after steps from levels t; asked last: a GPU computes while noise is made here, and is waited for
        once.

        Raises:
            KernelError: NaN or infinite ones.
        """
        if not (finite := torch.isfinite(flat(x)).all(1)).all():
            raise self._not_finite(torch.from_numpy(t)[~finite.cpu()], len(t))
        return x

    def _not_finite(self, bad: Tensor, n: int) -> KernelError:
        """States are NaN after the steps from t = bad."""
        at, diagnose = sorted(set(bad.tolist())), optional(self.kernel, "diagnose")
        hint = diagnose(bad) if diagnose else ""
        return KernelError(
            f"{len(bad)} of {n} states are NaN or infinite after the step from t = {at}{hint and ': '}{hint}"
        )

    def prior(self, task: Ids, z: Tensor) -> tuple[Tensor, NDArray[np.float64] | float]:
        """x_T from noise z (n, *noise) and the log p/q of the prior draw."""
        cond = self.conditioning(task)
        with Asking(lambda: "kernel.prior"):
            x = self.kernel.prior(z, cond)
        x = as_states(x, len(z), self.spec, "kernel.prior")
        weight = optional(self.kernel, "prior_log_weight")
        return x, as_weights(weight(x, cond), len(z), "kernel.prior_log_weight") if weight else 0.0

    def prior_noise(self, key: NDArray[np.uint64]) -> Tensor:
        """z (n, *noise) of children of the root."""
        return self.noise(key, np.full(len(key), self.spec.num_steps + 1))

    def lineage_noise(self, keys: NDArray[np.uint64]) -> Tensor:
        """z (*noise) of the last of a line of neighbours, of which the first is the root's child."""
        z, *fresh = self.prior_noise(keys)
        for own in fresh:
            z = self._turn(z, own)
        return z

    def neighbours(self, tree: Ledger, source: Ids, key: NDArray[np.uint64]) -> Tensor:
        """z (n, *noise) of new neighbours of nodes at level T."""
        lines = [tree.lineage(node) for node in map(int, source)]
        pivots = {name: self.lineage_noise(line) for name, line in {line.tobytes(): line for line in lines}.items()}
        return self._turn(torch.stack([pivots[line.tobytes()] for line in lines]), self.prior_noise(key))

    def _turn(self, z: Tensor, fresh: Tensor) -> Tensor:
        return math.cos(self.angle) * z + math.sin(self.angle) * fresh

    def noise(self, key: NDArray[np.uint64], t: Ids) -> Tensor:
        """Standard normals (n, *noise) of the steps from t, T + 1 for the prior draw."""
        shape = self.spec.noise_shape
        size = int(np.prod(shape))
        return torch.from_numpy(normals(key, t, size)).reshape(len(key), *shape).to(self.spec.device)

    def conditioning(self, task: Ids) -> dict[str, Any]:
        """Conditioning of rows: encoded rows gathered by task, shared values as they are.

        Rows of large models weigh megabytes: the last batch's are handed in again as long as its tasks stay the same.
        """
        if self._gathered is None or not np.array_equal(self._gathered[0], task):
            rows = torch.from_numpy(task).to(self.spec.device)
            cond = {k: v.value if isinstance(v, Shared) else v[rows] for k, v in self.encoded.items()}
            self._gathered = task.copy(), cond | {"task": rows}
        return dict(self._gathered[1])

    def samples(self, x: Tensor, *, endpoints: bool = False) -> Any:
        """What the reward sees of states x_0 (n, *state), or of endpoints that stand for them."""
        if self.reward.input == "state":
            return bare(self.kernel, x)
        samples = decode(self.kernel, x, "preview" if endpoints and self.spec.previews else "decode")
        if not hasattr(samples, "__len__") or len(samples) != len(x):
            got = f"{len(samples)} samples" if hasattr(samples, "__len__") else type(samples).__name__
            raise KernelError(f"kernel.decode returned {got} for {len(x)} states, expected one sample each")
        return samples

    def score(self, samples: Any, task: Ids) -> tuple[NDArray[np.float64], int | None]:
        """Rewards (n,) of samples; how many were really scored where that is not every one (a cache), else None.

        Raises:
            RewardError: the reward raised or broke its contract.
        """
        before = self.reward.calls() if self.reward.calls else 0
        values = self.reward(samples, None if self.prompts is None else [self.prompts[i] for i in task])
        return values.numpy(), self.reward.calls() - before if self.reward.calls else None


class Work:
    """What evaluations take beside NFE, by level.

    Args:
        kernel, spec: that evaluates, and its `describe`.
    """

    def __init__(self, kernel: Kernel, spec: Spec) -> None:
        guide: Reward | None = optional(kernel, "scores")
        self._guide_decodes = guide is not None and guide.input == "sample"
        self._rows, self._backward = np.array(spec.rows_per_nfe), np.array(spec.backward_per_nfe)
        self._guiding = np.array(spec.rewards_per_nfe)

    def charge(self, cost: Cost, t: Ids, new: Ids, padding: int = 0) -> None:
        """Enter evaluations at levels t; a guide's reward calls where they are new."""
        guided = int(self._guiding[new].sum())
        cost.rows += int(self._rows[t].sum()) + padding * int(self._rows[t[0]])  # the first row pads a pass
        cost.backward_nfe += int(self._backward[t].sum())
        cost.reward_calls += guided
        cost.decodes += guided * self._guide_decodes


def knows(kernel: Kernel, spec: Spec, reward: Reward) -> bool:
    """Whether what a kernel's transitions know of states is of this reward.

    Raises:
        UsageError: the kernel declares values, and they are of another reward.
    """
    of: Reward | None = optional(kernel, "scores")
    if of is None or of == reward:  # of one name is not enough: functions must agree
        return of is not None
    if spec.valued:
        raise UsageError(
            f"the kernel declares values of reward {of.name!r}, the search is for {reward.name!r}, and values of one "
            "say nothing of another: search for the kernel's own (--reward kernel, in Python kernel.scores), or leave "
            "the values out"
        )
    return False


def _pad(values: Ids, pad: int) -> Ids:
    return np.concatenate([values, np.repeat(values[:1], pad)])
