"""The denoising kernel: what a model family must provide so that a search can walk its tree.

Notation: t counts denoising steps left, x_t is the state with t steps to go, x_0 a sample, T = num_steps.
A kernel draws x_T from its prior and, for any rows x_t (each with its own t), returns the law of x_{t-1}.
Randomness is an argument: `prior` and `Transition.sample` turn standard normals into states and draw none themselves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from treesearch.backends.base.grids import time_of
from treesearch.backends.base.laws import Transition
from treesearch.backends.base.spec import NO_CHAIN, STEPS, Spec
from treesearch.rewards.numeric import is_number

Cond = dict[str, Any] | None
"""Conditioning of n rows: row tensors (n, ...) gathered by the engine, always with `task` int64 (n,)."""


class Kernel(Protocol):
    """A denoising chain x_T -> ... -> x_0.

    What it may have beside the methods below, one a line: meaning, shape, [what its absence stands for] and who reads
    it; `describe` where nobody is named. Ask by `optional(kernel, name)`; wrappers hand on what is in `PASSED_ON`.

    Randomness
        noise_shape: of the standard normals that a step of one row takes [state_shape]
        stochastic: bool (T + 1,), [t] for the step t -> t - 1 and [0] for the prior draw [all True]
        prior_log_weight: (x, cond) -> (n,), log p/q of prior draws [p is drawn from]; engine
    Numbers
        device, dtype: of its states [cpu, float32]
        to: (device) -> the kernel there [it cannot be moved]; workers and wrappers
        fingerprint: str of all that decides its law, the same in every process [unknown: resume computes an edge again]
        name: str, under which what is shipped with a model is found [the name of its class]; teleportation
        class_name: str, what a run calls it, for stand-ins [the name of its class]; session
    Cost
        rows_per_nfe: rows of its network that an evaluation is, 2 under classifier-free guidance; a number or one for
            each t in 0..T [1]
        backward_per_nfe: backward passes of an evaluation, a number or one for each t in 0..T [0]
        rewards_per_nfe: reward calls of an evaluation, likewise [0]
        draft_times: τ of levels 0..T, see `backends.base.grids` [those of its chain]; stand-ins
        undrafted: str, why drafts cannot leap along its steps, though there may be a chain [its chain says]; stand-ins
        draft_ratio: what an evaluation of a draft costs, in evaluations of the kernel [1]
        memory_plan: (batch_size, prompts=, backward=) -> bytes a search takes of the device [unknown]; command line
    Guidance
        scores: the Reward that those calls are of [none: it is not guided]; engine and guides
        valued: bool, the `rewards` of its transitions are declared values v(x_t, t) of `scores`, one for every row:
            they score states above t = 0 as they stand, slope 1, and no method fits anything to them [False]
        proposes_for: the kernel p that its steps' log p/q lead back to [it is p]; session
        departs: str, why its chain is another law than the model's, with no weights that would say so [None]
        base_law: str, whose law p is where a changed network has one of its own, of which log Z then is [the model's]
        choices: names of the settings of the interventions around it, innermost first [it has none]; actions
        untouched: the kernel without them; proposals. A wrapper's is itself around that of its kernel
    Samples
        measured: `Measured`, conditioning that it finds out about itself once, for workers too [none]; session
        encode: the method below [no prompts are taken]; engine and guides
        preview: (endpoint) -> n samples, an approximate `decode` of endpoints scored above t = 0 [decode]
        bare: (x) -> what rewards of states see of states and endpoints (n, *state) that hold more than x_t [all of it];
            engine, guides and planning
        writes: bool, its samples are texts [False]; progress
        sample_range: (low, high) that all entries of its samples lie in [unknown]; session, for what was observed
        encode_samples: (samples) -> states x_0 (n, *state), the inverse of `decode` [there is none]; planning
        state_of: (PIL image, or pixels (c, h, w) in [0, 1]) -> its x_0 (*state) [it draws no pictures]; command line
        diagnose: (t) -> str, a hint when the steps from levels t (k,) end in NaN [""]; engine
    Chain
        network: the nn.Module that `transition` calls, or a tuple of several, where hooks attach [none is known]
        family: how its pipeline calls that network, guidance included [it has no pipeline]; interventions
        chain: its `backends.chains.diffusion.Chain`, with α_t and σ_t by level [none of that form]; guides, inpainting
        drafter: a kernel of the same states, T and prior, whose endpoints drafts take [its own]; engine
        offset: (x, cond) -> m (n, *state) of rows x, where the chain is that of y = x - m [0]; inpainting refuses it
        renoise: (x, t_from, t_to, noise) -> x_{t_to} for moves up the chain [it has none]; planning
        clamp: (x, cond) -> states with the known entries put in [nothing is known]; guides and planning
        held: (x, cond) -> where those are, bool against x [nowhere]; guides leave them
    Trajectories
        channels: `rewards.channels.Channels`, which are observation and action [no trajectory]; planning and export
        observed: numbers in the `start` of a prompt, where rows are actions alone [those of a row]; planning
        seen: (observations (n, observed)) -> conditioning, `encode` of many at once [it is no policy]; policies
        horizon, normalisation, card: rows, units and origin of the training data [unknown]; planning and export
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def state_shape(self) -> tuple[int, ...]: ...

    def prior(self, noise: Tensor, cond: Cond = None) -> Tensor:
        """x_T (n, *state) from standard normals (n, *noise_shape)."""
        ...

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """Law of x_{t-1} for rows x (n, *state) with t (n,) in 1..T; one network evaluation a row."""
        ...

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any] | None:
        """Conditioning, once a search: tensors with one row a prompt, or `Shared` for those without a row axis.

        Under classifier-free guidance `negative_NAME` is what ∅ is told beside conditioning NAME, (1, ...) for all rows
        or (n, ...) of its own: whoever puts another there moves ∅, and no weight.
        """
        ...

    def decode(self, x0: Tensor) -> Any:
        """What rewards and users see: a tensor (n, ...) or a sequence of n objects."""
        ...


@dataclass(frozen=True)
class Shared:
    """Marks conditioning without a batch axis: handed to the kernel as it is."""

    value: Any


class Measured(NamedTuple):
    """What a kernel found out about itself by evaluations that no budget pays for."""

    cond: dict[str, Shared]  # goes to every evaluation of a search
    nfe: int


def describe(kernel: Kernel, *, identify: bool = True) -> Spec:
    """Read a kernel's attributes, fill in the defaults and check them.

    Args:
        kernel: to be read; its fingerprint is asked now, since weights may have changed since it was made.
        identify: False leaves the fingerprint out, which may read every weight.

    Raises:
        ValueError: an attribute has a wrong value.
        TypeError: a required method or attribute is missing.
    """
    if isinstance(kernel, type):
        raise TypeError(f"kernel is the class {kernel.__name__}, expected an object of it: {kernel.__name__}(...)")
    for name in ("num_steps", "state_shape", "prior", "transition", "decode"):
        if optional(kernel, name, ABSENT) is ABSENT:
            raise TypeError(f"{type(kernel).__name__} is not a kernel: it has no `{name}`; see backends.base.Kernel")
    steps, shape = int(kernel.num_steps), tuple(int(s) for s in kernel.state_shape)
    if not 1 <= steps <= STEPS:
        raise ValueError(f"kernel.num_steps is {steps}, expected at least 1 and at most {STEPS}")
    stochastic = optional(kernel, "stochastic")
    stochastic = (True,) * (steps + 1) if stochastic is None else tuple(bool(s) for s in stochastic)
    if len(stochastic) != steps + 1:
        raise ValueError(f"kernel.stochastic has {len(stochastic)} entries, expected num_steps + 1 = {steps + 1}")
    return Spec(
        num_steps=steps,
        state_shape=shape,
        noise_shape=tuple(optional(kernel, "noise_shape", shape)),
        stochastic=stochastic,
        device=torch.device(optional(kernel, "device", "cpu")),
        dtype=optional(kernel, "dtype", torch.float32),
        fingerprint=optional(kernel, "fingerprint") if identify else None,
        rows_per_nfe=_by_level(kernel, "rows_per_nfe", steps, 1),
        backward_per_nfe=_by_level(kernel, "backward_per_nfe", steps),
        rewards_per_nfe=_by_level(kernel, "rewards_per_nfe", steps),
        previews=optional(kernel, "preview") is not None,
        departs=optional(kernel, "departs"),
        base_law=optional(kernel, "base_law"),
        valued=_declares(kernel),
        sample_range=_range(kernel),
        draft_times=() if (why := _undrafted(kernel, shape, steps)) else _draft_times(kernel),
        undrafted=why,
        draft_ratio=_ratio(kernel),
    )


ABSENT: Any = object()


def optional(kernel: Any, name: str, default: Any = None) -> Any:
    """An optional attribute of a kernel, the default where it has none.

    Raises:
        RuntimeError: it has one, a property say, that ends in an AttributeError: taken for absent it would be a fault
            that nobody sees.
    """
    try:
        return getattr(kernel, name)
    except AttributeError as error:
        if inspect.getattr_static(kernel, name, ABSENT) is ABSENT:
            return default
        raise RuntimeError(f"{type(kernel).__name__}.{name} failed with AttributeError: {error}") from error


def bare(kernel: Any, x: Tensor) -> Tensor:
    """What rewards of states see of states x (n, *state)."""
    stripped = optional(kernel, "bare")
    return x if stripped is None else stripped(x)


def _declares(kernel: Kernel) -> bool:
    """Whether it declares values; they are of a reward."""
    valued = bool(optional(kernel, "valued", False))
    if valued and optional(kernel, "scores") is None:
        raise ValueError(f"{type(kernel).__name__} is valued and has no `scores`: say which reward its values are of")
    return valued


def _undrafted(kernel: Kernel, shape: tuple[int, ...], steps: int) -> str:
    """Why steps of the chain cannot be taken several at a time; "" where they can."""
    chain, said = optional(kernel, "chain"), optional(kernel, "undrafted")
    if said or optional(kernel, "draft_times"):
        return said or ""
    if chain is None:
        return NO_CHAIN
    if tuple(optional(kernel, "noise_shape", shape)) != shape:
        return "its states hold more than x_t, which a leap would not make"
    if len(chain.schedule.alpha) != steps + 1:
        return "its levels are not those of its chain"
    return "the noise of a leap would differ from entry to entry" if chain.std.numel() > steps + 1 else ""


def _draft_times(kernel: Kernel) -> tuple[float, ...]:
    """τ by level, of `grids`."""
    if (found := optional(kernel, "draft_times")) is not None:
        return tuple(found)
    schedule = kernel.chain.schedule  # type: ignore[attr-defined]
    pairs = zip(schedule.alpha.flatten().tolist(), schedule.sigma.flatten().tolist(), strict=True)
    return tuple(time_of(a, s) for a, s in pairs)


def _ratio(kernel: Kernel) -> float:
    """What an evaluation of a draft costs."""
    found = optional(kernel, "draft_ratio", 1.0)
    if not is_number(found, 0.0) or not 0 < found < math.inf:
        raise ValueError(f"kernel.draft_ratio is {found!r}, expected a positive number")
    return float(found)


def _range(kernel: Kernel) -> tuple[float, float] | None:
    """What entries of samples lie in."""
    found = optional(kernel, "sample_range")
    if found is not None and not (len(found) == 2 and found[0] < found[1]):
        raise ValueError(f"kernel.sample_range is {found!r}, expected (low, high), low below high")
    return found


def _by_level(kernel: Kernel, name: str, steps: int, otherwise: int = 0) -> tuple[int, ...]:
    """A number for each t in 0..T."""
    given = optional(kernel, name, otherwise)
    each = (given,) * (steps + 1) if isinstance(given, int) else tuple(map(int, given))
    if len(each) != steps + 1:
        raise ValueError(f"kernel.{name} has {len(each)} entries, expected num_steps + 1 = {steps + 1}")
    return each
