"""Rewards: batched black-box functions of samples, with an algebra.

r = 2.0 * digit(3) + compressibility().clip(-3, 0)
r(samples) -> (n,) float64, higher is better
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, final

import torch
from torch import Tensor

from treesearch.rewards.algebra import Joined, Remarks, joint_remarks
from treesearch.rewards.lending import lend
from treesearch.rewards.numeric import is_number
from treesearch.rewards.plain import Plain, code_of, takes_prompts
from treesearch.rewards.values import RewardError, as_prompts, check_rewards

Input = Literal["sample", "state"]


@final
@dataclass(frozen=True, eq=False)
class Reward:
    """r(samples, prompts) -> (n,) float64, higher is better; -inf forbids a sample.

    Two rewards are equal when they were built from the same expression of registered factories and plain settings, so
    that a guide's values serve a search for its reward; others are equal when they are the same function.

    Args:
        fn: called as fn(samples, prompts) on n samples and None or n prompts; it may not write into them.
        name: shown in errors, run cards and tables.
        input: "sample" for what `kernel.decode` returns, "state" for x_0 itself.
        calls: reports how many samples were really scored so far, where that is not every one (a cache).
        settings: what tells it from rewards of the same name; a resumed search must find the same.
        prompted: whether it may look at prompts.
        code: hash of what its function is written as, None where that is not known.
        source: digest of the expression it was built from; None where a part of it is known by its object alone.
        remarks: asked once a search for what to know of its values under each prompt, such as that it is cut.
    """

    fn: Callable[[Any, Sequence[Any] | None], Any]
    name: str = "reward"
    input: Input = "sample"
    calls: Callable[[], int] | None = None
    settings: tuple[str, ...] = ()
    source: str | None = field(default=None, repr=False)
    prompted: bool = True
    code: str | None = field(default=None, repr=False)
    remarks: Remarks | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Reward) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        if self.source is not None:
            return self.source, self.input
        return self.fn, self.name, self.input, self.calls, self.settings

    def __call__(self, samples: Any, prompts: Sequence[Any] | None = None) -> Tensor:
        """Score n samples.

        Raises:
            RewardError: the function raised, wrote into its samples or prompts, or returned a wrong shape, complex
                values, NaN or +inf.
        """
        return self.attached(samples, prompts).detach()

    def attached(self, samples: Any, prompts: Sequence[Any] | None = None) -> Tensor:
        """The same with its graph: a differentiable reward has a gradient to samples that require one."""
        prompts = as_prompts(prompts)
        if prompts is not None and len(prompts) != len(samples):
            got = f"{len(prompts)} prompts for {len(samples)} samples"
            raise RewardError(f"reward {self.name!r} got {got}: give one a sample")
        if isinstance(self.fn, Joined):  # its parts are lent what they read
            return self._values(samples, prompts)
        lent, marks = lend(samples)
        given, more = lend(prompts)
        values = self._values(lent, given)
        for changed, what in ((marks, "samples"), (more, "prompts")):
            if any(mark() for mark in changed):
                raise RewardError(
                    f"reward {self.name!r} wrote into its {what}, which others read after it: compute out of place "
                    "(x = x - 0.5 for x.sub_(0.5) or x -= 0.5), or on a copy of them"
                )
        return values

    def remarks_on(self, prompts: Sequence[Any]) -> list[list[str]]:
        """What to know of its values under each prompt.

        Raises:
            RewardError: it cannot say, for what it reads prompts with is not there.
        """
        try:
            return [[] for _ in prompts] if self.remarks is None else self.remarks(prompts)
        except Exception as error:
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error

    def _values(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        n = len(samples)  # before a list that was lent is emptied
        try:
            values = self.fn(samples, prompts)
        except RewardError:
            raise
        except (Exception, GeneratorExit) as error:
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error
        return check_rewards(values, n, self.name)

    def __add__(self, other: Reward | float) -> Reward:
        return _combine(self, other, torch.add, "+")

    def __mul__(self, other: Reward | float) -> Reward:
        return _combine(self, other, torch.mul, "*")

    def __sub__(self, other: Reward | float) -> Reward:
        return _combine(self, other, torch.sub, "-")

    def __neg__(self) -> Reward:
        return self * -1.0

    __radd__ = __add__
    __rmul__ = __mul__
    __array_ufunc__ = None  # 0.5 of numpy on the left leaves the sum to __radd__

    def __rsub__(self, other: float) -> Reward:
        return -self + other

    def min(self, other: Reward | float) -> Reward:
        """The smaller of the two: both must be high."""
        return _combine(self, other, torch.minimum, "min")

    def clip(self, low: float = -math.inf, high: float = math.inf) -> Reward:
        """r limited to [low, high]: a floor keeps one term from drowning others, a ceiling stops over-optimising."""
        if not (is_number(low) and is_number(high) and low < high):
            raise ValueError(f"clip needs low < high, got {low!r} and {high!r}")
        source = built_from("clip", self, low, high)
        return wrap(self, lambda v: v.clamp(low, high), f"clip({self.name}, {low:g}, {high:g})", source)

    def gate(self, condition: Reward, above: float, otherwise: float = -math.inf) -> Reward:
        """r where `condition` is at least `above`, else `otherwise`."""

        if not (is_number(above) and is_number(otherwise)) or otherwise == math.inf:
            raise ValueError(
                f"gate needs numbers, and otherwise below inf, got above={above!r}, otherwise={otherwise!r}"
            )

        def apply(value: Tensor, allowed: Tensor) -> Tensor:
            return torch.where(allowed >= above, value, torch.full_like(value, otherwise))

        settings = (above, otherwise)
        return _combine(self, condition, apply, f"gate[>={above:g}]", settings=settings, may_forbid=True)


def built_from(head: str, *parts: Any) -> str | None:
    """A digest of the expression head(parts...), None where a part is neither plain data nor a reward that has one.

    Numbers stand for themselves exactly, an integer for the same float too. A digest, for a part may be secret.
    """
    told = [as_text(part) for part in parts]
    if None in told:
        return None
    return hashlib.sha256(f"{head}({', '.join(map(str, told))})".encode("utf-8", "surrogatepass")).hexdigest()


def as_text(value: Any) -> str | None:
    if isinstance(value, Reward):
        return value.source and f"{value.input}:{value.source}"
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, (int, float)):
        return repr(float(value)) if float(value) == value else repr(value)
    if isinstance(value, (list, tuple)):
        return built_from("", *value)
    return None


def as_reward(function: Reward | Callable[..., Any], name: str | None = None, input: Input = "sample") -> Reward:
    """Wrap a plain callable `f(samples)` or `f(samples, prompts=None)`; a Reward passes through.

    Raises:
        TypeError: it is not callable.
    """
    if isinstance(function, Reward):
        return function
    if not callable(function):
        raise TypeError(f"expected a reward or a function of samples, got {type(function).__name__}")
    if isinstance(function, type):
        raise TypeError(f"reward is the class {function.__name__}, expected an object of it: {function.__name__}(...)")
    label: str = name or getattr(function, "__name__", type(function).__name__)
    plain = Plain(function, takes_prompts(function))
    return Reward(plain, label, input, prompted=plain.takes_prompts, code=code_of(function))


def summands(reward: Reward) -> list[Reward]:
    """The rewards whose plain sum it is, each with weight 1; itself where it is none."""
    fn = reward.fn
    if isinstance(fn, Joined) and fn.apply is torch.add and len(fn.parts) == 2:
        return [term for part in fn.parts if isinstance(part, Reward) for term in summands(part)]
    return [reward]


def refuse_unseen(reward: Reward, sample_range: tuple[float, float] | None) -> None:
    """Refuse a reward whose terms know, by their function's `refuse_range`, that no sample of this range is theirs.

    Raises:
        ValueError: there is such a term.
    """
    for term in summands(reward):
        refuse = getattr(term.fn, "refuse_range", None)
        if sample_range is not None and refuse is not None and term.input == "sample":
            refuse("samples", *sample_range)


def wrap(reward: Reward, apply: Callable[[Tensor], Tensor], name: str, source: str | None = None) -> Reward:
    """The reward apply(r), of values (n,) to values (n,); `source` as in `Reward`."""
    return replace(reward, fn=Joined(name, (reward,), apply), name=name, source=source)


def _combine(
    left: Reward,
    right: Reward | float,
    op: Callable[[Tensor, Tensor], Tensor],
    symbol: str,
    *,
    settings: tuple[float, ...] = (),
    may_forbid: bool = False,
) -> Reward:
    source = built_from(symbol, left, float(right) if isinstance(right, Real) else right, *settings)
    if isinstance(right, Real):
        number = float(right)
        if not math.isfinite(number):
            raise ValueError(f"cannot combine {left.name} {symbol} {number}: expected a finite number or a reward")
        constant = torch.tensor(number, dtype=torch.float64, device="cpu")
        return wrap(left, lambda v: op(v, constant.expand_as(v)), f"({left.name} {symbol} {number:g})", source)
    if not isinstance(right, Reward):
        raise TypeError(f"cannot combine a reward with {type(right).__name__}: wrap it with as_reward")
    if left.input != right.input:
        raise ValueError(
            f"{left.name} reads the {left.input}, {right.name} the {right.input}: give both one input; a measurement "
            "reads samples with of='sample', other rewards states with input='state'"
        )
    name = f"({left.name} {symbol} {right.name})"
    joined = Joined(name, (left, right), op, may_forbid=may_forbid)
    counts = None if left.calls is None or right.calls is None else joined.calls  # else one scores every sample
    known: dict[str, Any] = {"settings": left.settings + right.settings, "prompted": left.prompted or right.prompted}
    known["code"] = None if left.code is None or right.code is None else left.code + right.code
    known["remarks"] = joint_remarks([left, right])
    return Reward(joined, name, left.input, counts, source=source, **known)
