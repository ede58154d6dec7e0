"""What is held against what before a pipeline is searched by code that is not written for it.

Rows in a batch at mixed levels against each row alone, and steps of the pipeline's own loop against the chain's at
η = 0:

    ‖one - other‖ ≤ √eps ‖scale‖ + 2 eps ‖other‖      eps of the network's dtype
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.schedules import Schedule

FEW, MORE = "", "a red cube beside two blue ones"
LONG = "; ".join(7 * [MORE])
"""Prompts of unequal length, to try rows on."""

Seen = tuple[float, Tensor, Tensor, Tensor]
"""Of one step of a pipeline's loop: its timestep and, (1, *state), the network's output, guided, the state before and
the state after."""


class Proof:
    """A family's chain at η = 0, beside the pipeline that it stands for.

    Args:
        family: its prompts are encoded once each, and its network is asked as in a search.
        chain: of the pipeline's grid, without noise.
    """

    def __init__(self, family: Any, chain: Chain) -> None:
        self._family, self._chain = family, chain
        self._encoded: dict[tuple[str, ...], dict[str, Any]] = {}

    def output(self, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """The network's output, guided, for x (n, *state), t (n,) and n prompts."""
        key, family = tuple(prompts), self._family
        if key not in self._encoded:
            self._encoded[key] = {k: getattr(v, "value", v) for k, v in family.encode(prompts).items()}
        return family.predict(x.to(family.network.dtype), self._chain.timestep[t], self._encoded[key]).float()

    def alone(self, x: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same, row by row."""
        rows = range(len(prompts))
        return torch.cat([self.output(x[i : i + 1], t[i : i + 1], [prompts[i]]) for i in rows])

    def rows(self, x: Tensor, t: Tensor, prompts: Sequence[str], alone: Tensor) -> None:
        """Hold rows in a batch against the same alone.

        Raises:
            ValueError: one differs; the message has the difference.
        """
        for one, other in zip(self.output(x, t, prompts), alone, strict=True):
            self._refuse("rows in a batch at mixed timesteps, and alone,", one, other)

    def steps(self, seen: Mapping[int, Seen], wanted: Collection[int], *, memoryless: bool) -> None:
        """Hold steps of the pipeline's own loop, on the prompt `MORE`, against the chain.

        Args:
            seen: by its number, from 0; solvers of higher order have more of them than the chain.
            wanted: those of which the network's output is held, too.
            memoryless: whether its solver's steps are the chain's.

        Raises:
            ValueError: one differs, or a state is changed between two steps; the message has the difference.
        """
        chain, T = self._chain, self._chain.schedule.num_steps
        scaled = float(getattr(self._family.pipe.scheduler, "init_noise_sigma", 1.0)) != 1
        for i in sorted(seen):
            if i - 1 in seen:
                self._refuse(f"states before step {i + 1}, and after the one before,", seen[i][2], seen[i - 1][3])
        for i in sorted(wanted):
            t = (chain.timestep.double()[1:] - seen[i][0]).abs().argmin()[None] + 1
            step = f"step {T - int(t) + 1} of {T}"
            output, x, after = (value.float() for value in seen[i][1:])
            # A solver that scales what its network is told steps on x / α.
            x = float(chain.alpha[t]) * x if scaled else x
            found = self.output(x, t, [MORE])
            self._refuse(f"{step}, and the pipeline's own,", found, output)
            if memoryless:
                after_ours = chain.law(x, t, found).mean
                self._refuse(f"states after {step}, and the pipeline's own,", after_ours, after, after - x)

    def _refuse(self, what: str, one: Tensor, other: Tensor, scale: Tensor | None = None) -> None:
        refuse_difference(self._family.name, self._family.network.dtype, what, one, other, scale)


def is_memoryless(scheduler: Any, schedule: Schedule) -> bool:
    """Whether a step of a scheduler, without noise, is the chain's at η = 0 and in the same coordinates.

    By name, and not by trying it: that the two are equal is what is held here, and a scheduler whose sign or unit the
    chain has wrong would else pass as one of another law. DDIM's step goes N // T training steps down: the next of the
    grid for leading spacing, for trailing spacing where T divides N, and never for linspace.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in ("DDIMScheduler", "CogVideoXDDIMScheduler"):
        lands = schedule.timestep - config["num_train_timesteps"] // schedule.num_steps
        return torch.equal(lands[1:], schedule.timestep[:-1]) and bool(lands[0] < 0)
    return name == "FlowMatchEulerDiscreteScheduler" and not config.get("stochastic_sampling")


def refuse_difference(
    name: str, dtype: torch.dtype, what: str, one: Tensor, other: Tensor, scale: Tensor | None = None
) -> None:
    """Refuse a pipeline of which two ways to the same thing differ.

    Args:
        name: of the pipeline's class.
        dtype: of its network.
        what: the two, for the message.
        one, other: (n, *state).
        scale: by whose norm they may differ, `other` by default.

    Raises:
        ValueError: they differ; the message has the difference.
    """
    eps = torch.finfo(dtype).eps
    bound = eps**0.5 * float((other if scale is None else scale).norm()) + 2 * eps * float(other.norm())
    found = float((one - other).norm())
    if not math.isfinite(found):
        raise ValueError(f"{name} cannot be searched: its network says NaN or infinity, are its weights whole?")
    if not found <= bound:
        raise ValueError(f"{name} cannot be searched: {what} differ by {found:.3g}, expected {bound:.3g} at most; it "
                         "keeps something that is not of the row")  # fmt: skip
