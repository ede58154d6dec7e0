"""Kernels around kernels: what a wrapper passes on, and proposals made of a guide."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from treesearch.backends.base import fingerprint
from treesearch.backends.base.kernel import ABSENT, Cond, optional
from treesearch.backends.base.laws import Gaussian, Transition
from treesearch.rewards.values import content

PASSED_ON = frozenset(
    {
        *("num_steps", "state_shape", "noise_shape", "stochastic", "device", "dtype", "rows_per_nfe"),
        *(
            "backward_per_nfe",
            "rewards_per_nfe",
            "scores",
            "valued",
            "departs",
            "base_law",
            "choices",
            "network",
            "measured",
            "encode",
            "decode",
            "preview",
            "sample_range",
            "writes",
        ),
        *("prior", "prior_log_weight", "transition", "renoise", "diagnose"),
        # Of kernels on a `treesearch.backends.chains.diffusion.Chain`, and of trajectories.
        *(
            "chain",
            "drafter",
            "draft_times",
            "undrafted",
            "draft_ratio",
            "offset",
            "channels",
            "observed",
            "seen",
            "card",
            "horizon",
            "normalisation",
            "clamp",
            "held",
            "encode_samples",
            "bare",
        ),
        "state_of",  # of pictures
    }
)
"""What a wrapper hands on as it is, unless it has its own: the kernel contract and nothing else."""
MAKES_KERNELS = frozenset({"from_image", "from_noise", "with_horizon"})
"""Methods that return a kernel, whatever their annotation says."""


@dataclass(frozen=True, eq=False)
class Wrapper:
    """A kernel around another: it passes on the kernel contract, changed where it says so, and nothing else.

    A wrapper defines what it changes. The rest of `PASSED_ON` is the wrapped kernel's, less what the class withholds.
    A method of the wrapped kernel that returns a kernel (one of `MAKES_KERNELS`, or annotated to return its own class,
    `Self` or `Kernel`) returns this wrapper around that kernel, and `untouched` and `drafter` are this
    wrapper around the kernel's own. Other attributes are not there: ask `wrapper.kernel`.

    Args:
        kernel: the wrapped kernel.

    Raises:
        RuntimeError: a property, of the wrapper or of the kernel, that ends in an AttributeError.
    """

    kernel: Any

    withheld: ClassVar[frozenset[str]] = frozenset()

    def to(self, device: str | torch.device) -> Self:
        """The same around the kernel on a device; itself where the kernel cannot be moved."""
        move = optional(self.kernel, "to")
        return self if move is None else self._around(move(device), "to")

    @property
    def fingerprint(self) -> str | None:
        """Its class, the fingerprint of the kernel and its own settings; None where one of them is unknown."""
        inner = optional(self.kernel, "fingerprint")
        settings = None if inner is None else self._settings()
        code = fingerprint.code(type(self))  # "" of this library's own
        return None if settings is None else f"{type(self).__name__}{code}({inner}, {settings})"

    def _settings(self) -> str | None:
        """What tells it from other wrappers of its class, the same in every process; None if that cannot be told."""
        digest = hashlib.blake2b(digest_size=12)
        try:
            for field in fields(self)[1:]:
                digest.update(b"".join(content([field.name, getattr(self, field.name)])))
        except TypeError:
            return None
        return digest.hexdigest()

    def _passed(self, name: str, value: Any) -> Any:
        """An attribute of the kernel as the wrapper hands it on."""
        return value

    def _around(self, kernel: Any, method: str) -> Self:
        if not hasattr(kernel, "transition"):
            name = f"{type(self.kernel).__name__}.{method}"
            raise TypeError(
                f"{name} returned {type(kernel).__name__}, expected a kernel: return it, also if it is self"
            )
        return replace(self, kernel=kernel)

    def _again(self, method: Callable[..., Any], name: str) -> MethodType:
        """A method of the kernel that makes kernels, as one of the wrapper."""

        @functools.wraps(method)
        def again(self: Wrapper, *args: Any, **kwargs: Any) -> Wrapper:
            return self._around(method(*args, **kwargs), name)

        return MethodType(again, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "kernel":  # copy and pickle ask before there is a kernel
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if inspect.getattr_static(type(self), name, None) is not None:
            self._explain(name)
        found = ABSENT if name in self.withheld else optional(self.kernel, name, ABSENT)
        if found is not ABSENT and (name in MAKES_KERNELS or _makes_kernels(found, self.kernel)):
            return self._again(found, name)
        if name in ("untouched", "drafter") and found is not ABSENT and found is not None:
            return self._around(found, name)
        if found is not ABSENT and name in PASSED_ON:
            return self._passed(name, found)
        hint = "" if found is ABSENT else f": {type(self.kernel).__name__} has it, ask the wrapper's `kernel`"
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hint}")

    def _explain(self, name: str) -> None:
        """Raise what a property of the wrapper ended in: Python forgets it where there is a `__getattr__`."""
        try:
            object.__getattribute__(self, name)
        except AttributeError as error:
            raise RuntimeError(f"{type(self).__name__}.{name} failed with AttributeError: {error}") from error


def _makes_kernels(method: Any, kernel: Any) -> bool:
    """Whether a method of the kernel, no constructor of its class, says that it returns a kernel."""
    if getattr(method, "__self__", None) is not kernel:
        return False
    said = getattr(method, "__annotations__", {}).get("return")
    name = said if isinstance(said, str) else getattr(said, "__name__", "")
    own = {kind.__name__ for kind in type(kernel).__mro__ if kind is not object}
    return name.rpartition(".")[2].strip("\"'") in own | {"Self", "Kernel"}


Guide = Callable[[Tensor, Tensor, Transition, Cond], Transition]
"""(x_t, t, base transition, cond) -> proposal that carries its own log_weight."""


@dataclass(frozen=True)
class Guided(Wrapper):
    """A kernel that proposes from q instead of p and whose steps carry log p/q, so that no method changes its target.

    Args:
        kernel: the base kernel p.
        guide: turns a base transition into a proposal; `shift_mean` makes one for Gaussian kernels.
        name: tells guides apart in the fingerprint; without one there is no fingerprint, and resume recomputes an edge.
    """

    guide: Guide
    name: str | None = None

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        return self.guide(x, t, self.kernel.transition(x, t, cond), cond)

    def _settings(self) -> str | None:
        return self.name


def shift_mean(shift: Callable[[Tensor, Tensor, Gaussian, Cond], Tensor]) -> Guide:
    """A guide q = N(mean + shift, std²) for Gaussian kernels; rows without noise are left where they are."""

    def guide(x: Tensor, t: Tensor, base: Transition, cond: Cond) -> Gaussian:
        if not isinstance(base, Gaussian):
            raise TypeError(f"shift_mean guides Gaussian transitions, got {type(base).__name__}")
        move = torch.where(base.std > 0, shift(x, t, base, cond), 0.0)
        p_mean = base.mean if base.base_mean is None else base.base_mean
        return replace(base, mean=base.mean + move, base_mean=p_mean)

    return guide
