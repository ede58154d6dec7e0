"""Observations as rewards: y = A x_0 + noise, and r(x_0) = log N(y; A x_0, tolerance² I).

With λ = 1 the target p(x_0) exp(r(x_0)) is the posterior given y, and log Z is the evidence log p(y). A is an
`Operator` of states or of samples: known entries, means over squares, a blur, a grey picture, some frequencies, a
matrix, or functions of your own, of which a guide needs the adjoint too.

    mask        y = the entries under the mask                                       A Aᵀ = I
    pooled      y = means over k × k squares                                         A Aᵀ = I / k²
    blurred     y = x * g, g a Gaussian of a given std, zeros beyond the border      A = Aᵀ
    grey        y = Σ_c w_c x_c over the channels                                    A Aᵀ = |w|² I
    frequencies y = the entries of an orthonormal cosine transform under the mask    A Aᵀ = I

Source: Denoising Diffusion Restoration Models (Kawar et al., 2022), section 5, for the operators in use.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from treesearch.rewards import files
from treesearch.rewards.base import Input, Reward, built_from
from treesearch.rewards.cosines import cosine_transform
from treesearch.rewards.numeric import is_positive, is_whole
from treesearch.rewards.values import flat

Map = Callable[[Tensor], Tensor]
UNIT = (0.0, 1.0)


@final
@dataclass(frozen=True)
class Operator:
    """A linear map A of x (n, *shape) to observations (n, ...); of the same functions it is the same.

    Args:
        forward: x -> A x.
        adjoint: v -> Aᵀ v, of the shape of x.
        name: what tells it from others; fingerprints and the settings of rewards hold it.
        gram: g where A Aᵀ = g I; None where it is another matrix.
        reach: least and most that an entry of A x can be where 0 <= x <= 1; None where that is not known.
        picks: whether an A x is entries of x as they are.
    """

    forward: Map
    adjoint: Map
    name: str
    gram: float | None = None
    reach: tuple[float, float] | None = None
    picks: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def masked(mask: Tensor | files.File) -> Operator:
    """The entries of x (n, *shape) under a mask.

    Args:
        mask: (*shape) bool, or its last axes, as (H, W) for all channels; or a file of it, a picture in black and white
            (white is seen) or an array.

    Raises:
        ValueError: no mask, or one without an entry; later, states of another shape.
    """
    mask = files.mask(mask) if isinstance(mask, (str, os.PathLike)) else torch.as_tensor(mask, device="cpu")
    if mask.dtype != torch.bool or not mask.any():
        raise ValueError(f"mask must be bool with an entry set, got {mask.dtype} with {int(mask.sum())} set")
    return Operator(partial(_picked, mask), partial(_put, mask), f"mask {_digest(mask)}", 1.0, UNIT, True)


def _picked(mask: Tensor, x: Tensor) -> Tensor:
    if x.ndim <= mask.ndim or x.shape[-mask.ndim :] != mask.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, and states {tuple(x.shape[1:])}")
    return x[..., mask.to(x.device)]


def _put(mask: Tensor, v: Tensor) -> Tensor:
    x = v.new_zeros(*v.shape[:-1], *mask.shape)
    x[..., mask.to(v.device)] = v
    return x


def pooled(size: int) -> Operator:
    """Means over size × size squares of images (n, C, H, W), H and W multiples of size.

    Args:
        size: pixels of a side, 2 or more.

    Raises:
        ValueError: size below 2; later, images of other sides.
    """
    if not is_whole(size, 2):
        raise ValueError(f"size is {size!r}, expected a whole number of pixels, 2 or more")
    return Operator(partial(_pooled, size), partial(_unpooled, size), f"pooled({size})", size**-2, UNIT)


def _pooled(size: int, x: Tensor) -> Tensor:
    if x.ndim != 4 or x.shape[2] % size or x.shape[3] % size:
        raise ValueError(f"pooled({size}) got {tuple(x.shape)}, expected images whose sides are multiples of {size}")
    return F.avg_pool2d(x, size)


def _unpooled(size: int, v: Tensor) -> Tensor:
    return v.repeat_interleave(size, 2).repeat_interleave(size, 3) / size**2


def blurred(std: float) -> Operator:
    """A Gaussian blur of images (n, C, H, W), with zeros beyond the border.

    Args:
        std: of the filter, in pixels.

    Raises:
        ValueError: std is no positive number.
    """
    if not is_positive(std):
        raise ValueError(f"std is {std!r}, expected a positive number of pixels")
    radius = math.ceil(3 * std)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64, device="cpu") / std) ** 2)
    blur = partial(_blurred, line / line.sum())
    return Operator(blur, blur, f"blurred({std})", reach=UNIT)  # symmetric with zeros around: its own adjoint


def _blurred(line: Tensor, x: Tensor) -> Tensor:
    kernel, radius = line.to(x).expand(x.shape[1], 1, 1, -1), len(line) // 2
    across = F.conv2d(x, kernel, padding=(0, radius), groups=x.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), padding=(radius, 0), groups=x.shape[1])


def grey(luma: Sequence[float] = (0.299, 0.587, 0.114)) -> Operator:
    """One channel of images (n, C, H, W).

    Args:
        luma: the weight of each channel, (C,).

    Raises:
        ValueError: no weights, or none above 0.
    """
    w = torch.as_tensor(luma, dtype=torch.float64, device="cpu")
    if w.ndim != 1 or not w.isfinite().all() or not w.abs().sum() > 0:
        raise ValueError(f"luma is {luma!r}, expected a finite number a channel, not all zero")
    rows = w[:, None, None]
    name, gram = f"grey({w.tolist()})", float((w**2).sum())
    return Operator(partial(_greyed, rows), partial(_coloured, rows), name, gram, _reach(w[None]))


def _greyed(rows: Tensor, x: Tensor) -> Tensor:
    if x.ndim != 4 or x.shape[1] != len(rows):
        raise ValueError(f"grey got {tuple(x.shape)}, expected images of {len(rows)} channels, one a weight of luma")
    return (rows.to(x) * x).sum(1, keepdim=True)


def _coloured(rows: Tensor, v: Tensor) -> Tensor:
    return rows.to(v) * v


def frequencies(mask: Tensor | files.File) -> Operator:
    """Entries of the orthonormal cosine transform of images (n, C, H, W) under a mask.

    Args:
        mask: (H, W) bool, lowest frequency first; or a file of it, as for `masked`.

    Raises:
        ValueError: no mask, or one without an entry.
    """
    mask = files.mask(mask) if isinstance(mask, (str, os.PathLike)) else torch.as_tensor(mask, device="cpu")
    if mask.ndim != 2 or mask.dtype != torch.bool or not mask.any():
        raise ValueError(f"mask must be (H, W) bool with an entry set, got {tuple(mask.shape)} of {mask.dtype}")
    down, across = (cosine_transform(n) for n in mask.shape)
    forward, adjoint = partial(_frequencies, mask, down, across), partial(_waves, mask, down, across)
    return Operator(forward, adjoint, f"frequencies {_digest(mask)}", 1.0, _reach_of_product(mask, down, across))


def _frequencies(mask: Tensor, down: Tensor, across: Tensor, x: Tensor) -> Tensor:
    return (down.to(x) @ x @ across.to(x).T)[..., mask.to(x.device)]


def _waves(mask: Tensor, down: Tensor, across: Tensor, v: Tensor) -> Tensor:
    x = v.new_zeros(*v.shape[:2], *mask.shape)
    x[..., mask.to(v.device)] = v
    return down.to(v).T @ x @ across.to(v)


def matrix(rows: Tensor | Sequence[Sequence[float]] | files.File) -> Operator:
    """A x of vectors (n, D).

    Args:
        rows: A (M, D), or a file of it.

    Raises:
        ValueError: A is no finite matrix.
    """
    rows = files.numbers(rows) if isinstance(rows, (str, os.PathLike)) else rows
    a = torch.as_tensor(rows, dtype=torch.float64, device="cpu")
    if a.ndim != 2 or not a.isfinite().all():
        raise ValueError(f"rows have shape {tuple(a.shape)}, expected a finite matrix (M, D)")
    return Operator(partial(_times, a.T), partial(_times, a), f"matrix {_digest(a)}", reach=_reach(a))


def _times(a: Tensor, x: Tensor) -> Tensor:
    return x @ a.to(x)


def _reach(rows: Tensor) -> tuple[float, float]:
    """Least and most of an entry of A x, A (M, D), where 0 <= x <= 1."""
    return float(rows.clamp_max(0).sum(1).min()), float(rows.clamp_min(0).sum(1).max())


def _reach_of_product(mask: Tensor, down: Tensor, across: Tensor) -> tuple[float, float]:
    """The same of the entries under a mask of down x acrossᵀ."""
    (up, low), (right, left) = ((w.clamp_min(0).sum(1), -w.clamp_max(0).sum(1)) for w in (down, across))
    most, least = torch.outer(up, right) + torch.outer(low, left), torch.outer(up, left) + torch.outer(low, right)
    return -float(least[mask].max()), float(most[mask].max())


def _digest(table: Tensor) -> str:
    """Ten hexadecimal digits of what it holds."""
    return hashlib.sha256(str(tuple(table.shape)).encode() + table.numpy().tobytes()).hexdigest()[:10]


def check_adjoint(operator: Operator, shape: Sequence[int], seed: int = 0) -> None:
    """The dot test: <A x, v> = <x, Aᵀ v> for random x (*shape) and v; and A Aᵀ v = g v where g is said.

    Raises:
        ValueError: two sides differ beyond rounding, or shapes do not fit.
    """
    draw = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(1, *shape, dtype=torch.float64, generator=draw, device="cpu")
    seen = operator(x)
    v = torch.randn(seen.shape, dtype=torch.float64, generator=draw, device="cpu")
    back = operator.adjoint(v)
    if back.shape != x.shape:
        raise ValueError(f"the adjoint of {operator.name} returns {tuple(back.shape)}, expected {tuple(x.shape)}")
    there, here = float((seen * v).sum()), float((x * back).sum())
    room = 2.0**-52 * float(x.norm() * v.norm()) * max(1.0, float(seen.norm() / x.norm())) * x.numel()
    if not abs(there - here) <= room:
        raise ValueError(
            f"{operator.name} and its adjoint do not belong together: <A x, v> = {there:.6g} and <x, A* v> = {here:.6g}"
        )
    if operator.gram is None:
        return
    gap, norm = float((operator(back) - operator.gram * v).norm()), float(operator.gram * v.norm())
    if not gap <= 2.0**-52 * norm * x.numel():
        raise ValueError(f"A A* of {operator.name} is no multiple {operator.gram:g} of the identity: say gram=None")


@final
@dataclass(frozen=True, eq=False)
class Measurement:
    """log N(y; A x, tolerance² I) as a function of x (n, *shape).

    Args:
        operator: A.
        observed: y, the shape of an A x.
        tolerance: standard deviation of the noise, in units of y.
        picture: whether y is a picture (C, H, W), which takes the channels that an A x has and is seen through a mask
            where A is one.
    """

    operator: Operator | Map
    observed: Tensor
    tolerance: float
    picture: bool = False

    def __call__(self, x: Tensor, prompts: Any = None) -> Tensor:
        gap = flat(self.gap(x))
        constant = gap.shape[1] * (math.log(self.tolerance) + 0.5 * math.log(2 * math.pi))
        return -0.5 * (gap**2).sum(1) - constant

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Measurement) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self.operator, _digest(self.observed), self.tolerance, self.picture

    def gap(self, x: Tensor) -> Tensor:
        """(y - A x) / tolerance, (n, ...) float64."""
        seen = self.seen(x)
        return (self.fitted(seen.shape[1:]).observed.to(seen.device) - seen) / self.tolerance

    def seen(self, x: Tensor) -> Tensor:
        """A x of (n, *shape) in float64; in that of x where A is a function, which may hold a network.

        Raises:
            ValueError: A x is complex, or of whole numbers.
        """
        found = self.operator(x.double() if isinstance(self.operator, Operator) else x)
        if not found.is_floating_point():
            raise ValueError(f"A x is of {found.dtype}, expected real numbers: stack real and imaginary parts of a "
                             "complex one")  # fmt: skip
        return found.double()

    def refuse_range(self, what: str, low: float, high: float) -> None:
        """Refuse a y that nothing within low..high gives: further off than its noise in one of 10^7 observations.

        Raises:
            ValueError: one entry is off by more than six tolerances, or all together by more than their chi-squared.
        """
        if not isinstance(self.operator, Operator) or self.operator.reach is None:
            return
        least, most, up, down = *self.operator.reach, max(high, 0.0), max(-low, 0.0)
        least, most = up * least - down * most, up * most - down * least
        off = (least - self.observed).clamp_min(0) + (self.observed - most).clamp_min(0)
        entries = off.numel()
        if float(off.max()) > 6 * self.tolerance or float((off / self.tolerance).square().sum()) > _unlikely(entries):
            found = f"{float(self.observed.min()):.4g} to {float(self.observed.max()):.4g}"
            raise ValueError(f"observed has entries from {found}, and {what} within {low:g}..{high:g} give {least:.4g} "
                             f"to {most:.4g} and noise of {self.tolerance:g}: scale it as {what} are, images to "
                             f"[{low:g}, {high:g}]")  # fmt: skip

    def fitted(self, shape: Sequence[int]) -> Measurement:
        """The same for an A x of this shape.

        Raises:
            ValueError: y has another.
        """
        if self.observed.shape == shape:
            return self
        found = self._pictured(shape) if self.picture else self.observed
        if found.shape != shape:
            got, want = tuple(found.shape), tuple(shape)
            raise ValueError(f"observed has shape {got}, expected {want}, that of what is seen of a sample")
        return replace(self, observed=found, picture=False)

    def _pictured(self, shape: Sequence[int]) -> Tensor:
        """The picture as an A x of this shape would be, as far as that goes."""
        if not isinstance(self.operator, Operator) or not self.operator.picks:
            return in_channels(self.observed, shape)
        whole = self.operator.adjoint(torch.zeros(1, *shape, dtype=torch.float64, device="cpu"))
        seen = in_channels(self.observed, whole.shape[1:])
        return self.operator(seen[None])[0] if seen.shape == whole.shape[1:] else seen


def _unlikely(n: int, nats: float = 16.0) -> float:
    """What a chi-squared of n degrees exceeds with a probability of exp(-16) at most (Laurent and Massart, 2000)."""
    return n + 2 * math.sqrt(nats * n) + 2 * nats


def in_channels(picture: Tensor, shape: Sequence[int]) -> Tensor:
    """A picture (1 or 3, H, W) with one channel or three, where that makes it of a shape."""
    if len(shape) != 3 or picture.shape[1:] != tuple(shape[1:]) or len(picture) == shape[0]:
        return picture
    if len(picture) == 1:
        return picture.expand(3, -1, -1)
    return grey()(picture[None])[0]


def measurement(
    operator: Operator | Map, observed: Tensor | files.File, *, tolerance: float, of: Input = "state"
) -> Reward:
    """r(x_0) = log N(y; A x_0, tolerance² I): the log-likelihood of an observation.

    Args:
        operator: A, such as pooled(4), or any differentiable function, which guides by gradient alone.
        observed: y, of the shape that A gives one x_0; or a file of it, an array or a picture. A picture is in [-1, 1]
            for states and in [0, 1] for samples, has the channels that an A x_0 has, and under a mask is the whole one.
        tolerance: standard deviation of the noise, in units of y.
        of: "state" for an A of states x_0, "sample" for one of decoded samples.

    Raises:
        ValueError: y is not finite, holds whole numbers or complex ones, or is no file of one, or tolerance is no
            positive number.
        TypeError: operator cannot be called.
    """
    if not callable(operator):
        raise TypeError(f"operator is {type(operator).__name__}, expected an Operator or a function of x_0")
    if of not in ("state", "sample"):
        raise ValueError(f"of is {of!r}, expected 'state' or 'sample'")
    y, picture = _observed(observed, of)
    if not y.isfinite().all():
        raise ValueError("observed has entries that are not finite")
    if not is_positive(tolerance):
        raise ValueError(f"tolerance is {tolerance!r}, expected a positive number in units of what is observed")
    name = getattr(operator, "name", getattr(operator, "__name__", "operator"))
    settings = (f"{name}, y {_digest(y)}, tolerance={tolerance}",)
    source = built_from("measurement", name, _digest(y), picture, tolerance) if _is_ours(operator) else None
    return Reward(
        Measurement(operator, y, tolerance, picture),
        f"measurement({name})",
        of,
        settings=settings,
        source=source,
        prompted=False,
    )


def _is_ours(operator: Operator | Map) -> bool:
    """Whether its name tells all of it: one of this file."""
    forward = operator.forward if isinstance(operator, Operator) else None
    return isinstance(forward, partial) and forward.func.__module__ == __name__


def _observed(given: Tensor | files.File, of: Input) -> tuple[Tensor, bool]:
    """y as float64, and whether it is a picture."""
    if not isinstance(given, (str, os.PathLike)):
        if hasattr(given, "dtype") and not torch.as_tensor(given, device="cpu").is_floating_point():
            raise ValueError(f"observed holds {given.dtype}, expected real numbers in units of what is seen: images of "
                             "states are (2/255) x - 1, and a complex y is its real and imaginary parts")  # fmt: skip
        return torch.as_tensor(given, dtype=torch.float64, device="cpu").clone(), False
    if not files.is_picture(given):
        return files.numbers(given), False
    return (2 * files.picture(given) - 1 if of == "state" else files.picture(given)), True
