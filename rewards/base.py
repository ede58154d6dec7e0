"""Rewards: batched black-box functions of samples, with an algebra.

r = 2.0 * log_prob(3) + compressibility().clip(-3, 0)
r(samples) -> (n,) float64, higher is better
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import math
import os
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, TypeVar, final

import torch
from torch import Tensor

from treesearch.rewards.lending import lend
from treesearch.rewards.numeric import is_number
from treesearch.rewards.redact import marked_url, redacted

Input = Literal["sample", "state"]
Remarks = Callable[[Sequence[Any]], list[list[str]]]
"""Called on prompts, returns for each the sentences that its task's warnings take up."""


class RewardError(ValueError):
    """A reward broke its contract; `rows` lists the offending rows where they are known."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


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
        if isinstance(self.fn, _Joined):  # its parts are lent what they read
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


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What to know before choosing a reward; `treesearch list rewards` prints it.

    Args:
        range: values to expect.
        differentiable: whether gradients reach the samples.
        prompts: whether it needs them; None where it takes them and does without.
        checkpoint: default weights, a hub id or a file.
        licence: of those weights.
        memory: of the model, in float32.
        limits: what it takes, and what of it goes unread.
        source: the paper.
    """

    range: str
    differentiable: bool
    prompts: bool | None = False
    checkpoint: str = ""
    licence: str = ""
    memory: str = ""
    limits: str = ""
    source: str = ""


HOW = {"device", "batch_size", "allow_pickle", "concurrency", "timeout", "retries", "backoff", "max_pause"}
HOW |= {"token_env", "token_header", "max_bytes"}
"""Settings of factories that say how to score, not what."""

Factory = TypeVar("Factory", bound=Callable[..., Reward])


def facts(**known: Any) -> Callable[[Factory], Factory]:
    """Attach `Facts` to a factory of rewards, as its attribute `facts`; its rewards keep what they were made with."""

    def attach(factory: Factory) -> Factory:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def made(*args: Any, **kwargs: Any) -> Reward:
            reward = factory(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments.items()
            chosen = [_told(k, v) for k, v in given if k not in HOW and not _usual(v, signature.parameters[k].default)]
            chosen.sort(key=lambda told: not told.startswith("url="))  # it may have come by the name of a variable
            source = built_from(f"{factory.__module__}.{factory.__qualname__}", *_what(signature, args, kwargs))
            settings = (redacted(f"{factory.__name__}({', '.join(chosen)})"),)
            prompted = known.get("prompts", False) is not False
            return replace(reward, settings=settings, source=source, prompted=prompted)

        made.facts = Facts(**known)  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]

    return attach


def _what(signature: inspect.Signature, args: Any, kwargs: Any) -> list[Any]:
    """Settings of a factory that say what to score, in order and with its defaults."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return [value for name, value in bound.arguments.items() if name not in HOW]


def built_from(head: str, *parts: Any) -> str | None:
    """A digest of the expression head(parts...), None where a part is neither plain data nor a reward that has one.

    Numbers stand for themselves exactly, an integer for the same float too. A digest, for a part may be secret.
    """
    told = [_plain(part) for part in parts]
    if None in told:
        return None
    return hashlib.sha256(f"{head}({', '.join(map(str, told))})".encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> str | None:
    if isinstance(value, Reward):
        return value.source and f"{value.input}:{value.source}"
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, (int, float)):
        return repr(float(value)) if float(value) == value else repr(value)
    if isinstance(value, (list, tuple)):
        return built_from("", *value)
    return None


def _usual(value: Any, default: Any) -> bool:
    """Whether a setting is its default: tensors and other objects never are, unless they are the same object."""
    return value is default or (_plain(value) is not None and _plain(value) == _plain(default))


def _told(name: str, value: Any) -> str:
    """A setting in words that are the same in another process; a URL without what may be secret in it."""
    if name == "url_env":
        name, value = "url", os.environ.get(value, "")
    if name == "url":
        value = marked_url(str(value))
    return f"{name}={getattr(value, '__qualname__', None) or repr(value)}"


_ANEW: ContextVar[bool] = ContextVar("anew", default=False)


@contextmanager
def anew() -> Iterator[None]:
    """Within it caches score what they know once more and remember nothing: what varies is seen to vary."""
    token = _ANEW.set(True)
    try:
        yield
    finally:
        _ANEW.reset(token)


def is_anew() -> bool:
    """Whether remembered values are not wanted."""
    return _ANEW.get()


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
    plain = _Plain(function, _takes_prompts(function))
    return Reward(plain, label, input, prompted=plain.takes_prompts, code=_code(function))


@dataclass(frozen=True)
class _Plain:
    """A plain callable as a reward's function; of one callable they are equal, and so are the rewards."""

    function: Callable[..., Any]
    takes_prompts: bool

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Any:
        return self.function(samples, prompts=prompts) if self.takes_prompts else self.function(samples)


def as_prompts(prompts: Iterable[Any] | None) -> list[Any] | None:
    """Prompts as a list, in order of iteration: what follows may count on positions.

    Raises:
        TypeError: a string, or something without an order or a length.
    """
    if prompts is None or type(prompts) is list:
        return prompts
    kind = type(prompts).__name__
    if isinstance(prompts, (str, bytes)):
        raise TypeError(f"prompts is the string {prompts!r}, expected a list of prompts: [{prompts!r}]")
    if isinstance(prompts, (Set, Mapping)) and not isinstance(prompts, (KeysView, ItemsView)):
        raise TypeError(f"prompts is a {kind}, which has no positions: give a list of prompts")
    if hasattr(prompts, "columns"):
        raise TypeError(f"prompts is a {kind}, a table: give the column that holds them")
    try:
        found, count = list(prompts), len(prompts)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"prompts is a {kind}, expected a list of prompts") from error
    if len(found) != count:
        raise TypeError(
            f"prompts is a {kind} of length {count} that gives {len(found)} entries: give a list of prompts"
        )
    return [p.item() if hasattr(p, "item") and getattr(p, "ndim", 1) == 0 else p for p in found]


def flat(x: Tensor) -> Tensor:
    """Rows (n, ...) as (n, size); those without an axis of their own as (n, 1)."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def check_rewards(values: Any, n: int, name: str) -> Tensor:
    """Rewards as float64 (n,) on the CPU, in memory of their own.

    Raises:
        RewardError: shape, dtype or a NaN or +inf value; the message says which rows and what to do.
    """
    try:
        values = _tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        got = f"reward {name!r} returned {type(values).__name__}"
        raise RewardError(f"{got}, expected a tensor or a list of {n} numbers: {error}") from error
    if values.is_complex():
        raise RewardError(f"reward {name!r} returned complex values ({values.dtype}), expected real ones")
    if values.shape != (n,):
        hint = ": squeeze the last axis" if values.shape == (n, 1) else ": return one number per sample"
        raise RewardError(f"reward {name!r} returned shape {tuple(values.shape)}, expected ({n},){hint}")
    values = values.to("cpu", torch.float64, copy=True)
    for bad, what in ((values.isnan(), "nan"), (values == math.inf, "+inf")):
        if bad.any():
            rows = bad.nonzero().flatten().tolist()
            more = f"{len(rows)} of {n} rows, first row {rows[0]}"
            raise RewardError(
                f"reward {name!r} returned {what} ({more}): return a finite number, or -inf to forbid", rows
            )
    return values


def _tensor(values: Any) -> Tensor:
    """Numbers of any kind, with their graph where they have one.

    Raises:
        TypeError, ValueError, RuntimeError, OverflowError: no numbers.
    """
    if isinstance(values, Tensor):
        return values.to_dense() if values.layout is not torch.strided else values
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, Tensor) for v in values):
        return torch.stack([v.reshape(()) if v.numel() == 1 else v for v in values])
    if not hasattr(values, "__array__"):
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")  # whatever torch's defaults are
    import numpy as np

    if isinstance(values, np.ma.MaskedArray):
        raise ValueError("a masked array has entries that are no numbers, fill them")
    array = np.asarray(values)  # columns of a table too: by position, whatever their labels
    if array.dtype.kind not in "biufc":
        raise TypeError(f"an array of {array.dtype}")
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))


def _takes_prompts(function: Callable[..., Any]) -> bool:
    function = getattr(function, "forward", function) if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "prompts" or p.kind is p.VAR_KEYWORD for p in parameters)


def _code(function: Any) -> str | None:
    """Hash of the source of a function and of what a partial one fixes; None where there is none."""
    if isinstance(function, functools.partial):
        inner, fixed = _code(function.func), repr((function.args, sorted(function.keywords.items())))
        return None if inner is None else hashlib.blake2b(f"{inner}{fixed}".encode(), digest_size=8).hexdigest()
    if not hasattr(function, "__code__"):
        function = type(function).forward if isinstance(function, torch.nn.Module) else type(function).__call__
    try:
        return hashlib.blake2b(inspect.getsource(function).encode(), digest_size=8).hexdigest()
    except (OSError, TypeError):
        return None


def wrap(reward: Reward, apply: Callable[[Tensor], Tensor], name: str, source: str | None = None) -> Reward:
    """The reward apply(r), of values (n,) to values (n,); `source` as in `Reward`."""
    return replace(reward, fn=_Joined(name, (reward,), apply), name=name, source=source)


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
        raise ValueError(f"{left.name} reads the {left.input}, {right.name} the {right.input}: give both one input")
    name = f"({left.name} {symbol} {right.name})"
    joined = _Joined(name, (left, right), op, may_forbid=may_forbid)
    counts = None if left.calls is None or right.calls is None else joined.calls  # else one scores every sample
    known: dict[str, Any] = {"settings": left.settings + right.settings, "prompted": left.prompted or right.prompted}
    known["code"] = None if left.code is None or right.code is None else left.code + right.code
    known["remarks"] = _remarks([left, right])
    return Reward(joined, name, left.input, counts, source=source, **known)


def _remarks(parts: Sequence[Reward]) -> Remarks | None:
    """What all of them say of prompts, the same sentence once."""
    asked = [part.remarks for part in parts if part.remarks is not None]

    def each(prompts: Sequence[Any]) -> list[list[str]]:
        said = zip(*(ask(prompts) for ask in asked), strict=True)
        return [list(dict.fromkeys(itertools.chain.from_iterable(one))) for one in said]

    return each if asked else None


class _Joined:
    """A function of the values of one reward or of two, which read the same samples."""

    def __init__(
        self, name: str, parts: tuple[Reward, ...], apply: Callable[..., Tensor], *, may_forbid: bool = False
    ) -> None:
        self.name, self.parts, self.apply, self.may_forbid = name, parts, apply, may_forbid
        self.scored = 0

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        before = [part.calls() if part.calls else 0 for part in self.parts]
        terms = [part.attached(samples, prompts) for part in self.parts]
        self.scored += max(part.calls() - b if part.calls else 0 for part, b in zip(self.parts, before, strict=True))
        values = self.apply(*terms)
        self._check(values, terms)
        return values

    def calls(self) -> int:
        """Samples really scored so far, by the part that scored more."""
        return self.scored

    def _check(self, values: Tensor, terms: list[Tensor]) -> None:
        """Refuse what finite terms cannot mean.

        Raises:
            RewardError: NaN or +inf, or -inf although no term forbids the sample; the message names the terms.
        """
        forbidden = torch.stack([term.isinf() for term in terms]).any(0)
        bad = values.isnan() | (values == math.inf) | (values.isinf() & ~forbidden & (not self.may_forbid))
        if not bad.any():
            return
        rows = bad.nonzero().flatten().tolist()
        of = " and ".join(f"{p.name} = {float(v[rows[0]]):g}" for p, v in zip(self.parts, terms, strict=True))
        raise RewardError(
            f"{self.name} is {float(values[rows[0]])} where {of} ({len(rows)} of {len(values)} rows, first row "
            f"{rows[0]}): scale or clip this term before it is combined",
            rows,
        )


def content(value: Any) -> list[bytes]:
    """Bytes that tell values apart, with their types and lengths.

    Raises:
        TypeError: an object whose content is not known.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [f"tensor{value.dtype}{tuple(value.shape)}".encode(), data]
    if value is None or isinstance(value, (bool, int, float, str)):
        data = repr(value).encode()
        return [f"{type(value).__name__}{len(data)}:".encode(), data]
    if isinstance(value, bytes):
        return [f"bytes{len(value)}:".encode(), value]
    if isinstance(value, (list, tuple)):
        return [f"{type(value).__name__}{len(value)}:".encode(), *(part for item in value for part in content(item))]
    if isinstance(value, dict):
        return [f"dict{len(value)}:".encode(), *(part for item in value.items() for part in content(item))]
    if hasattr(value, "tobytes"):  # arrays and PIL images
        shape = getattr(value, "shape", getattr(value, "size", ()))
        kind = getattr(value, "dtype", getattr(value, "mode", ""))
        return [f"{type(value).__name__}{kind}{shape}".encode(), value.tobytes()]
    raise TypeError(f"cannot tell {type(value).__name__} samples or prompts apart: give cached(..., key=...)")
