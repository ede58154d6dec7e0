"""The denoising kernel: what a model family must provide so that a search can walk its tree.

Notation: t counts denoising steps left, x_t is the state with t steps to go, x_0 a sample, T = num_steps.
A kernel draws x_T from its prior and, for any rows x_t (each with its own t), returns the law of x_{t-1}.
Randomness is an argument: `prior` and `Transition.sample` turn standard normals into states and draw none themselves.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from treesearch.rewards.base import content, flat

Cond = dict[str, Any] | None
"""Conditioning of n rows: row tensors (n, ...) gathered by the engine, always with `task` int64 (n,)."""


@runtime_checkable
class Transition(Protocol):
    """p(x_{t-1} | x_t) for n rows: a law, not a draw."""

    @property
    def endpoint(self) -> Tensor:
        """Predicted x_0, shape (n, *state), from the same network call."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """x_{t-1} (n, *state) from standard normals (n, *noise_shape)."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(x_{t-1} = x | x_t), shape (n,)."""
        ...

    def log_weight(self, x: Tensor) -> Tensor:
        """log p/q of the step that ended in x, shape (n,): zeros unless a proposal q replaces the base kernel p."""
        ...

    def take(self, rows: Tensor) -> Transition:
        """The same law for the given rows (repeats allowed): offspring share the network call and draw apart."""
        ...


class Kernel(Protocol):
    """A denoising chain x_T -> ... -> x_0.

    Optional attributes, read by `describe`: `noise_shape` (default `state_shape`), `stochastic` (bool (T + 1,),
    [t] for the step t -> t-1 and [0] for the prior draw; default all True), `device` (cpu), `dtype` (float32),
    `fingerprint` (str; default None), `rows_per_nfe` (2 under classifier-free guidance), `backward_per_nfe` and
    `rewards_per_nfe` (backward passes and reward calls that a transition costs: a number, or one for each t in 0..T),
    `scores` (the Reward that those calls are of). Optional methods: `prior_log_weight(x, cond) -> (n,)`, log p/q of
    the prior draw, `renoise(x, t_from, t_to, noise)` for moves up the chain, and `preview(endpoint)`, an approximate
    `decode` for endpoints that are scored above t = 0, and `diagnose(t) -> str`, said when the steps from t end in NaN.
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
        """Conditioning, once a search: tensors with one row a prompt, or `Shared` for those without a row axis."""
        ...

    def decode(self, x0: Tensor) -> Any:
        """What rewards and users see: a tensor (n, ...) or a sequence of n objects."""
        ...


@dataclass(frozen=True)
class Shared:
    """Marks conditioning without a batch axis: handed to the kernel as it is."""

    value: Any


class Spec(NamedTuple):
    """A kernel's shapes and optional attributes, resolved once by `describe`."""

    num_steps: int
    state_shape: tuple[int, ...]
    noise_shape: tuple[int, ...]
    stochastic: tuple[bool, ...]  # (T + 1,)
    device: torch.device
    dtype: torch.dtype
    fingerprint: str | None
    rows_per_nfe: int
    backward_per_nfe: tuple[int, ...] = ()  # (T + 1,), [t] for the evaluation of x_t
    rewards_per_nfe: tuple[int, ...] = ()  # (T + 1,)
    previews: bool = False  # endpoints are drawn by `preview`
    departs: str | None = None  # why its chain is another law than the model's, without weights that would say so

    @property
    def state_bytes(self) -> int:
        """Bytes of one state."""
        return math.prod(self.state_shape) * self.dtype.itemsize

    def branchable(self, t: int) -> bool:
        """Whether two children of a state x_t can differ: some step below t is stochastic."""
        return any(self.stochastic[1 : t + 1]) if t <= self.num_steps else True


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
        if optional(kernel, name, _ABSENT) is _ABSENT:
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
        rows_per_nfe=int(optional(kernel, "rows_per_nfe", 1)),
        backward_per_nfe=_by_level(kernel, "backward_per_nfe", steps),
        rewards_per_nfe=_by_level(kernel, "rewards_per_nfe", steps),
        previews=optional(kernel, "preview") is not None,
        departs=optional(kernel, "departs"),
    )


STEPS = 2**15 - 2  # T + 1 is the level of the root, and levels have two bytes
_ABSENT: Any = object()


def optional(kernel: Any, name: str, default: Any = None) -> Any:
    """An optional attribute of a kernel, the default where it has none.

    Raises:
        RuntimeError: it has one, a property say, that ends in an AttributeError: taken for absent it would be a fault
            that nobody sees.
    """
    try:
        return getattr(kernel, name)
    except AttributeError as error:
        if inspect.getattr_static(kernel, name, _ABSENT) is _ABSENT:
            return default
        raise RuntimeError(f"{type(kernel).__name__}.{name} failed with AttributeError: {error}") from error


def _by_level(kernel: Kernel, name: str, steps: int) -> tuple[int, ...]:
    """A number for each t in 0..T."""
    given = optional(kernel, name, 0)
    each = (given,) * (steps + 1) if isinstance(given, int) else tuple(map(int, given))
    if len(each) != steps + 1:
        raise ValueError(f"kernel.{name} has {len(each)} entries, expected num_steps + 1 = {steps + 1}")
    return each


def uniform(noise: Tensor) -> Tensor:
    """Φ(z) in float64: the uniforms that standard normals stand for."""
    return torch.special.ndtr(noise.double())


def expand(rows: Tensor, like: Tensor) -> Tensor:
    """Give a tensor (n,) trailing axes so that it broadcasts against (n, *state)."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """Index drawn from each row of probs (..., S) by its uniform u (...), in float64."""
    cdf = probs.double().cumsum(-1)
    drawn = (u.double()[..., None] * cdf[..., -1:] >= cdf).sum(-1)
    last = (probs > 0).long() * torch.arange(probs.shape[-1], device=probs.device)
    return torch.minimum(drawn, last.amax(-1))


@dataclass(frozen=True)
class Gaussian:
    """q = N(mean, std²), beside the base kernel p = N(base_mean, std²) when a guide moved the mean.

    Args:
        mean: (n, *state).
        std: broadcastable to mean with its row axis kept, zero where the step is deterministic.
        endpoint: predicted x_0 (n, *state).
        base_mean: mean of p (n, *state); None where q = p.
        rewards: r of the endpoints (n,) float64 where a guide computed it, NaN in the rows where it did not.
    """

    mean: Tensor
    std: Tensor
    endpoint: Tensor
    base_mean: Tensor | None = None
    rewards: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        std = self.std.double().expand(self.mean.shape)
        gap = x.double() - self.mean.double()
        density = -0.5 * (gap / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        atom = torch.where(gap == 0, 0.0, -math.inf)
        return flat(torch.where(std > 0, density, atom)).sum(1)

    def log_weight(self, x: Tensor) -> Tensor:
        if self.base_mean is None:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        # -Σ(zδ + δ²/2): a difference of two log densities loses digits over many dimensions.
        std = self.std.double()
        z = (x.double() - self.mean.double()) / std
        delta = (self.mean.double() - self.base_mean.double()) / std
        moved = torch.where(self.mean == self.base_mean, 0.0, -math.inf)
        return flat(torch.where(std > 0, -(z * delta + 0.5 * delta**2), moved)).sum(1)

    def take(self, rows: Tensor) -> Gaussian:
        base = None if self.base_mean is None else self.base_mean[rows]
        known = None if self.rewards is None else self.rewards[rows]
        return Gaussian(self.mean[rows], self.std[rows], self.endpoint[rows], base, known)

    @staticmethod
    def cat(parts: Sequence[Gaussian]) -> Gaussian:
        """The rows of several Gaussians in one; either all or none carry a base mean, and likewise rewards."""
        bases = [p.base_mean for p in parts if p.base_mean is not None]
        known = [p.rewards for p in parts if p.rewards is not None]
        std = torch.cat([p.std.expand(p.mean.shape) for p in parts])
        return Gaussian(
            torch.cat([p.mean for p in parts]),
            std,
            torch.cat([p.endpoint for p in parts]),
            torch.cat(bases) if bases else None,
            torch.cat(known) if known else None,
        )


@dataclass(frozen=True)
class Mixture:
    """Σ_j exp(log_mix_j) N(mean_j, std_j² I) over vector states (n, D); noise (n, D + 1), its first entry picks j.

    Args:
        log_mix: (n, J), normalised.
        mean: (n, J, D).
        std: (n, J).
        endpoint: (n, D).
    """

    log_mix: Tensor
    mean: Tensor
    std: Tensor
    endpoint: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        pick = inverse_cdf(self.log_mix.exp(), uniform(noise[:, 0]))
        rows = torch.arange(len(pick), device=pick.device)
        return self.mean[rows, pick] + self.std[rows, pick][:, None] * noise[:, 1:].to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.log_mix + log_normal(x[:, None], self.mean, self.std), 1)

    def log_weight(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def take(self, rows: Tensor) -> Mixture:
        return Mixture(self.log_mix[rows], self.mean[rows], self.std[rows], self.endpoint[rows])

    @staticmethod
    def cat(parts: Sequence[Mixture]) -> Mixture:
        """The rows of several mixtures in one."""
        return Mixture(
            *(torch.cat(field) for field in zip(*((p.log_mix, p.mean, p.std, p.endpoint) for p in parts), strict=True))
        )


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std² I) over the last axis; std without that axis."""
    gap = ((x - mean) ** 2).sum(-1) / std**2
    return -0.5 * gap - x.shape[-1] * (std.log() + 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class Categorical:
    """Independent tokens: x_{t-1}[i] ~ probs[:, i]; one normal a token, read as a uniform, inverse CDF in float64.

    Args:
        probs: (n, L, S), rows of float64 probabilities.
        endpoint: predicted x_0 (n, L).
        base_probs: probabilities of the base kernel where this is a proposal.
    """

    probs: Tensor
    endpoint: Tensor
    base_probs: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        return inverse_cdf(self.probs, uniform(noise))

    def log_prob(self, x: Tensor) -> Tensor:
        return _log_categorical(self.probs, x)

    def log_weight(self, x: Tensor) -> Tensor:
        if self.base_probs is None:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return _log_categorical(self.base_probs, x) - _log_categorical(self.probs, x)

    def take(self, rows: Tensor) -> Categorical:
        base = None if self.base_probs is None else self.base_probs[rows]
        return Categorical(self.probs[rows], self.endpoint[rows], base)

    @staticmethod
    def cat(parts: Sequence[Categorical]) -> Categorical:
        """The rows of several categoricals in one; either all or none carry base probabilities."""
        bases = [p.base_probs for p in parts if p.base_probs is not None]
        return Categorical(
            torch.cat([p.probs for p in parts]),
            torch.cat([p.endpoint for p in parts]),
            torch.cat(bases) if bases else None,
        )


def _log_categorical(probs: Tensor, x: Tensor) -> Tensor:
    return probs.double().gather(-1, x.long()[..., None]).squeeze(-1).log().sum(-1)


PASSED_ON = frozenset(
    {
        *("num_steps", "state_shape", "noise_shape", "stochastic", "device", "dtype", "rows_per_nfe"),
        *("backward_per_nfe", "rewards_per_nfe", "scores", "departs", "prior", "prior_log_weight", "transition"),
        *("encode", "decode", "preview", "renoise", "diagnose"),
        # Of kernels on a `treesearch.backends.chains.diffusion.Chain`, and of trajectories.
        *("chain", "channels", "card", "horizon", "normalisation", "clamp", "encode_samples"),
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
    `Self` or `Kernel`) returns this wrapper around that kernel. Other attributes are not there: ask `wrapper.kernel`.

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
        """Its name, the fingerprint of the kernel and its own settings; None where one of them is unknown."""
        inner = optional(self.kernel, "fingerprint")
        settings = None if inner is None else self._settings()
        return None if settings is None else f"{type(self).__name__}({inner}, {settings})"

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
        found = _ABSENT if name in self.withheld else optional(self.kernel, name, _ABSENT)
        if found is not _ABSENT and (name in MAKES_KERNELS or _makes_kernels(found, self.kernel)):
            return self._again(found, name)
        if found is not _ABSENT and name in PASSED_ON:
            return self._passed(name, found)
        hint = "" if found is _ABSENT else f": {type(self.kernel).__name__} has it, ask the wrapper's `kernel`"
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
