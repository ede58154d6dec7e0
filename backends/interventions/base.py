"""What every intervention shares: its settings, the rows that it acts on, and the kernel that it makes.

    Intervened(kernel, intervention)    p is the law of the changed network, and log Z is of it: see `base_law`
    Proposal(Intervened(...))           p is the kernel's own, the changed network proposes: exact weights
    Actions(Intervened(...), levels)    which setting: drawn where a tree branches, and searched

An intervention has a number of settings, each a row of its own choice: number 0 is off, and then nothing of the network
is touched, bit for bit. Rows of one batch have each their level and their setting. Hooks stand while a step is
evaluated and are gone after it, whatever happens inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treesearch.backends.base import STEPS, Cond, Transition, Wrapper, fingerprint, optional
from treesearch.backends.base.taps import rows_called
from treesearch.rewards.numeric import is_whole

CHOSEN = "choices"  # of conditioning: settings (n, interventions), by column


class Rows(NamedTuple):
    """Rows of a batch.

    Args:
        t: levels (n,).
        setting: of the intervention (n,), 0 where it is off.
        given: whether a row is of the prompt (n,), not of the ∅ beside it under classifier-free guidance.
        cond: conditioning of the rows of an evaluation, where an intervention reads its own.
    """

    t: Tensor
    setting: Tensor
    given: Tensor
    cond: Cond = None

    def of_network(self, like: Tensor) -> Rows:
        """The rows of a network's batch: those of an evaluation, or blocks of them, ∅ first; on the device of `like`.

        Raises:
            RuntimeError: neither.
        """
        part = rows_called()
        whole = self.t, self.setting, self.given
        mine = whole if part is None else [each[part.to(each.device)] for each in whole]
        copies, rest = divmod(len(like), len(mine[0]))
        if rest or copies not in (1, 2):
            raise RuntimeError(
                f"the network is called on {len(like)} rows for {len(mine[0])} of an evaluation: which is which?"
            )
        t, setting, given = (each.to(like.device) for each in mine)
        if copies == 1:
            return Rows(t, setting, given)
        return Rows(t.repeat(2), setting.repeat(2), torch.cat([torch.zeros_like(given), given]))


class Intervention(ABC):
    """A change of a network's evaluations: a frozen dataclass of settings."""

    @property
    @abstractmethod
    def settings(self) -> tuple[str, ...]:
        """What its settings are called; the i-th is number i + 1, since 0 is off."""

    @abstractmethod
    def on(self, network: nn.Module | tuple[nn.Module, ...], rows: Rows) -> AbstractContextManager[Any]:
        """A context in which the network is changed for rows; of a row under setting 0 not a bit changes."""

    def check(self, kernel: Any) -> None:
        """Refuse a kernel whose network this does not fit.

        Raises:
            TypeError: a kernel that names no network.
            ValueError: a compiled network, one that checkpoints gradients, or, of subclasses, parts that are not there.
        """
        network_of(kernel)

    def conditioned(self, cond: Cond, rows: Rows) -> Cond:
        """Conditioning of the rows, changed where the intervention is of prompts."""
        return cond

    @property
    def identity(self) -> list[Any]:
        """All that decides what it does: numbers, strings, tensors, and lists of them."""
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Intervened(Wrapper):
    """A kernel whose network is changed while it evaluates a step.

    Args:
        kernel: with a `network`.
        intervention: of one setting, or of several under `Actions`, which draws them.
        levels: (low, high), t at which it acts, both included; None are all.

    Raises:
        TypeError: a kernel that names no network.
        ValueError: a compiled network, whose parts run without hooks; levels out of range; settings of one name.
    """

    intervention: Intervention
    _: KW_ONLY
    levels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", window(self.levels, int(self.kernel.num_steps)))
        names = self.intervention.settings
        if not names or len(set(names)) < len(names):
            raise ValueError(f"settings are {names}, expected one or more, each once: actions are drawn evenly of them")
        self.intervention.check(self.kernel)

    @property
    def base_law(self) -> str:
        """Whose law p is."""
        return f"{law_of(self.kernel)} under {type(self.intervention).__name__}"

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """Names of settings, by intervention."""
        return (*optional(self.kernel, "choices", ()), self.intervention.settings)

    @property
    def untouched(self) -> Any:
        """The kernel without interventions."""
        return optional(self.kernel, "untouched", self.kernel)

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        """The step of the changed network.

        Raises:
            ValueError: several settings, and no action that says which.
        """
        setting = self.setting(t, cond)
        if not setting.any():
            return self.kernel.transition(x, t, cond)
        rows = Rows(t, setting, torch.ones_like(t, dtype=torch.bool), cond)
        cond = self.intervention.conditioned(cond, rows)
        with self.intervention.on(network_of(self.kernel), rows):
            return self.kernel.transition(x, t, cond)

    def setting(self, t: Tensor, cond: Cond) -> Tensor:
        """The setting of each row (n,), 0 where it is off.

        Raises:
            ValueError: several settings, and no action that says which.
        """
        if cond is not None and CHOSEN in cond:
            setting = cond[CHOSEN][:, len(self.choices) - 1].to(t.device)
        elif len(self.intervention.settings) == 1:
            setting = torch.ones_like(t)
        else:
            raise ValueError(
                f"{type(self.intervention).__name__} has {len(self.intervention.settings)} settings: draw them, "
                "actions(KERNEL, levels), or give one"
            )
        return torch.where(within(self.levels, t), setting, 0)

    def _settings(self) -> str | None:
        return fingerprint.of([type(self.intervention), self.intervention.identity, self.levels])


def law_of(kernel: Any) -> str:
    """Whose law the chain of a kernel has, in words; wrappers that say nothing have that of what they are around."""
    if said := optional(kernel, "base_law"):
        return said
    inner = isinstance(kernel, Wrapper)
    return law_of(kernel.kernel) if inner else str(optional(kernel, "name", type(kernel).__name__))


def network_of(kernel: Any) -> Any:
    """The network of a kernel, which hooks can be attached to.

    Raises:
        TypeError: it names none.
        ValueError: it is compiled, or computes parts again in a backward pass, where hooks are gone.
    """
    network = optional(kernel, "network")
    if network is None:
        raise TypeError(f"{type(kernel).__name__} names no network to intervene in: its `network` is None")
    for each in (network,) if isinstance(network, nn.Module) else network:
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in each.modules()):
            raise ValueError("the network is compiled, and its parts run without hooks: leave compile=True out")
        if any(getattr(m, "gradient_checkpointing", False) for m in each.modules()):
            raise ValueError("the network checkpoints gradients: a backward pass would run its parts again, without "
                             "hooks; call its disable_gradient_checkpointing()")  # fmt: skip
    return network


Window = tuple[int, int] | None


def window(levels: Any, steps: int) -> Window:
    """A window in t, (low, high) with both included; None are all levels.

    Raises:
        ValueError: it is none.
    """
    if levels is None:
        return None
    each = tuple(levels) if isinstance(levels, (tuple, list)) else (levels,)
    if len(each) != 2 or not all(is_whole(t, 1, steps) for t in each) or each[0] > each[1]:
        raise ValueError(f"levels are {levels!r}, expected (low, high) with 1 <= low <= high <= T = {steps}")
    return each


def within(levels: Window, t: Any) -> Any:
    """Whether t, a level or levels (n,), lies in a window."""
    low, high = levels or (0, STEPS)
    return (t >= low) & (t <= high)
