"""DiffEditor: a picture is edited by the gradient of energies of the network's own features, region by region.

    g = 1[m'] ∇_{x_t} E_edit + 1[not m'] ∇_{x_t} (E_content + E_contrast + E_inpaint)          see `guidance.regions`
    ε̂' = ε̂ + κ g in the endpoint, ε̂ in the direction:      mean' = mean - κ (α_s σ_t / α_t) g

F are what parts of the network put out while it evaluates x_t, so that an edit costs backward passes through the parts
before them and no other evaluation; F° and F* are what they put out at the states of the inverted picture, a table by
level that is made once.

As a proposal, where a step has noise the shift comes with its exact weight, and where it has none nothing moves: under
`roots.Regional` weights are sums over the mask alone, p stays the chain from the picture and the edit is the reward's.
With weights=False the shift is everywhere, as published, which is another law, without weights.

Not here: keys and values of the source in attention, image prompts, and the climb by DDIM inversion of the paper's time
travel; a `Cycle` around it climbs by noise.

Source: DiffEditor: Boosting Accuracy and Flexibility on Diffusion-based Image Editing (Mou et al., 2024); in 50 steps
the first 10 are guided and every second of the next 20, κ = 40 where an object moves and 20 where points are dragged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from treesearch.backends.base import (
    Cond,
    Gaussian,
    Measured,
    Shared,
    Spec,
    Wrapper,
    describe,
    expand,
    fingerprint,
    optional,
)
from treesearch.backends.base.capture import captured
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance.base import loose
from treesearch.backends.guidance.regions import PUBLISHED, Places, Region, Strengths
from treesearch.backends.interventions.base import network_of, window, within
from treesearch.backends.interventions.directions import given_rows, part_of
from treesearch.backends.roots.rooted import image_of
from treesearch.rewards.numeric import is_number
from treesearch.rewards.values import flat

FEATURES = "diffeditor_features"


class Table(NamedTuple):
    """F° and F* at guided levels, by part of the network, (levels, n, C, h, w)."""

    own: dict[str, Tensor]
    theirs: dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class DiffEditor(Wrapper):
    """A kernel whose steps move regions of a picture.

    Args:
        kernel: with a `network` whose parts put out (n, C, h, w), on a `Chain` of states (C, H, W).
        path: x_0..x_T of n pictures, (T + 1, n, *state), as `chains.inversion.invert` finds them; levels above those
            of the kernel are not read.
        regions: what goes where, the same in every picture.
        parts: names of parts of the network, or their ends.
        reference: a path like `path`, of the pictures that the regions are in, where they are pasted.
        source: prompts of the pictures, for a kernel that takes some; one, or one each.
        scale: κ >= 0; 0 is the base kernel.
        strengths: w of the energies.
        window: (low, high), the levels that are guided; None is as published: all in the first fifth of the chain, and
            every second one to three fifths.
        max_shift: limit of |shift / std| over a state, as in `GradientGuided`; None for none.
        weights: False is the rule as published.

    Raises:
        TypeError: a kernel without a network or a chain, or whose states hold more than x_t.
        ValueError: shapes that do not fit, a setting out of range, parts that are not there, or guided levels without
            a step that has noise.
    """

    path: Tensor
    regions: tuple[Region, ...]
    _: KW_ONLY
    parts: tuple[str, ...] = ("up_blocks.1", "up_blocks.2")
    reference: Tensor | None = None
    source: Sequence[Any] | None = None
    scale: float = 40.0
    strengths: Strengths = PUBLISHED
    window: tuple[int, int] | None = None
    max_shift: float | None = None
    weights: bool = True

    def __post_init__(self) -> None:
        spec, name = self._spec, type(self.kernel).__name__
        if not isinstance(optional(self.kernel, "chain"), Chain) or spec.noise_shape != spec.state_shape:
            raise TypeError(f"{name} is no kernel on a backends.chains.diffusion.Chain of states that are x_t alone")
        object.__setattr__(self, "parts", tuple(part_of(self.kernel, part) for part in self.parts))
        object.__setattr__(self, "regions", tuple(self.regions))
        for path in (self.path,) if self.reference is None else (self.path, self.reference):
            self._check_path(path)
        if not self.regions or any(tuple(r.mask.shape) != spec.state_shape[-2:] for r in self.regions):
            raise ValueError(f"expected regions with masks {spec.state_shape[-2:]}, as high and wide as a state")
        if not (is_number(self.scale, 0) and self.scale < math.inf):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number >= 0")
        if not all(is_number(w, 0) and w < math.inf for w in self.strengths):
            raise ValueError(f"strengths are {self.strengths!r}, expected finite numbers >= 0")
        if self.max_shift is not None and not (self.weights and is_number(self.max_shift) and self.max_shift > 0):
            raise ValueError(f"max_shift is {self.max_shift!r}, expected a positive number of a shift with weights")
        object.__setattr__(self, "window", window(self.window, spec.num_steps))
        self._check_levels()

    def _check_path(self, path: Tensor) -> None:
        spec, count = self._spec, self.path.shape[1] if self.path.ndim > 1 else 0
        if not count or len(path) <= spec.num_steps or tuple(path.shape[1:]) != (count, *spec.state_shape):
            want = f"({spec.num_steps + 1}, {count or 'n'}, {', '.join(map(str, spec.state_shape))})"
            raise ValueError(f"a path has shape {tuple(path.shape)}, expected {want}: from `invert`")
        if not path.isfinite().all():
            raise ValueError("a path has entries that are not finite")

    def _check_levels(self) -> None:
        if not self._levels.any() and self.scale > 0:
            raise ValueError("no step in the window has noise, and only such steps have weights: Regional(...) inside, "
                             "another window, or weights=False, as published")  # fmt: skip
        if not (flat(self.kernel.chain.alpha)[self._levels.to(self.kernel.chain.alpha.device)] > 0).all():
            raise ValueError("the rule divides by α_t, which is 0 at x_T: begin below, window=(low, high)")

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Gaussian:
        """The base step, moved in the rows that are guided.

        Raises:
            TypeError: no Gaussian step.
            ValueError: the gradient is not finite, or a part puts out no (n, C, h, w).
        """
        rows, inner = self._levels.to(t.device)[t].nonzero().flatten(), _inner(cond)
        if not len(rows):
            return self.kernel.transition(x, t, inner)
        table = self._features_of(cond)
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            with captured(network_of(self.kernel), self.parts) as seen:
                law = self.kernel.transition(leaf, t, inner)
            if not isinstance(law, Gaussian):
                raise TypeError(f"energies guide Gaussian steps, got {type(law).__name__} from the kernel")
            energies = self._energies(seen, t, inner, rows, table)
            gradient = self._gradient(energies, leaf, t[rows], keep=x.requires_grad)
        if not x.requires_grad:
            held = {f.name: v.detach() for f in fields(law) if isinstance(v := getattr(law, f.name), Tensor)}
            law = replace(law, **held)
        return self._moved(law, self._shift(gradient, x, t), inner)

    def energies(self, x: Tensor, t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """E_edit and the sum of the others, (n,) each, of states x (n, *state) at guided levels t (n,)."""
        inner, table = _inner(cond), self._features_of(cond)
        with torch.no_grad(), captured(network_of(self.kernel), self.parts) as seen:
            self.kernel.transition(x, t, inner)
            return self._energies(seen, t, inner, torch.arange(len(t), device=t.device), table)

    def _energies(
        self, seen: dict[str, Tensor], t: Tensor, cond: Cond, rows: Tensor, table: Table
    ) -> tuple[Tensor, Tensor]:
        image = image_of(cond, self.path.shape[1])
        image = torch.zeros_like(t) if image is None else image.to(t.device)
        now = [_cells(seen[part], len(t), part)[rows] for part in self.parts]
        at = self._index.to(t.device)[t[rows]]
        own, theirs = ([of[part].to(now[0])[at, image[rows]] for part in self.parts] for of in table)
        return self._places.energies(now, own, theirs, Strengths(*self.strengths))

    def _gradient(self, energies: tuple[Tensor, Tensor], leaf: Tensor, t: Tensor, keep: bool) -> Tensor:
        """g (n, *state), 0 in rows that are not guided."""
        edit, others = (_slope(energy, leaf, keep or i == 0) for i, energy in enumerate(energies))
        found = torch.where(self._places.target.to(leaf.device), edit, others)
        if not found.isfinite().all():
            raise ValueError(f"the gradient of the energies is NaN or infinite at t in {sorted(set(t.tolist()))}")
        return found

    def _shift(self, gradient: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, alpha_s = (self.kernel.chain.at(name, t, x) for name in ("alpha", "sigma", "alpha_s"))
        guided = expand(self._levels.to(t.device)[t], x)
        return torch.where(guided, -self.scale * alpha_s * sigma / alpha * gradient, 0.0).to(x.dtype)

    def _moved(self, law: Gaussian, move: Tensor, cond: Cond) -> Gaussian:
        """The law whose mean moved, with weights or as published."""
        move = loose(self.kernel, move, cond)
        if not self.weights:
            base = None if law.base_mean is None else law.base_mean + move
            return replace(law, mean=law.mean + move, base_mean=base)
        move = torch.where(law.std > 0, move, 0.0)
        if self.max_shift is not None:
            size = flat(torch.where(law.std > 0, move / law.std, 0.0).double()).norm(dim=1)
            move = move * expand((self.max_shift / size).clamp(max=1.0), move).to(move)
        return replace(law, mean=law.mean + move, base_mean=law.mean if law.base_mean is None else law.base_mean)

    @property
    def proposes_for(self) -> Any:
        """The kernel p that the weights of the steps lead back to."""
        return self.kernel

    @property
    def undrafted(self) -> str | None:
        """Why no drafts are made of it as published."""
        if self.weights or self.scale == 0:
            return optional(self.kernel, "undrafted")
        return "moves without weights, of which a leap would know one"

    @property
    def departs(self) -> str | None:
        """Why its chain is another law than the kernel's."""
        published = "DiffEditor as published: the shifts of its energies have no weights"
        return published if not self.weights and self.scale > 0 else optional(self.kernel, "departs")

    @property
    def backward_per_nfe(self) -> tuple[int, ...]:
        """Backward passes of an evaluation at each t: two gradients, each for entries of its own."""
        return tuple(n + 2 * int(g) for n, g in zip(self._spec.backward_per_nfe, self._levels, strict=True))

    @property
    def measured(self) -> Measured:
        """The features of the pictures at guided levels, by an evaluation each, and what the kernel finds out."""
        inner = optional(self.kernel, "measured") or Measured({}, 0)
        paths = 1 if self.reference is None else 2
        nfe = paths * self.path.shape[1] * int(self._levels.sum())
        return Measured(inner.cond | {FEATURES: Shared(self._table)}, inner.nfe + nfe)

    def _features_of(self, cond: Cond) -> Table:
        """Those that a search hands out, or its own."""
        return self._table if cond is None or FEATURES not in cond else cond[FEATURES]

    @cached_property
    def _table(self) -> Table:
        own = self._features(self.path)
        return Table(own, own if self.reference is None else self._features(self.reference))

    def _features(self, path: Tensor) -> dict[str, Tensor]:
        """What the parts put out at guided levels of a path, (levels, n, C, h, w) by part."""
        n, cond = path.shape[1], self._told(path.shape[1])
        found: dict[str, list[Tensor]] = {part: [] for part in self.parts}
        for level in self._levels.nonzero().flatten().tolist():
            x = path[level].to(self._spec.device, self._spec.dtype)
            with torch.no_grad(), captured(network_of(self.kernel), self.parts) as seen:
                self.kernel.transition(x, torch.full((n,), level, device=x.device), cond)
            for part in self.parts:
                found[part].append(_cells(seen[part], n, part))
        return {part: torch.stack(each) for part, each in found.items()}

    def _told(self, n: int) -> Cond:
        """Conditioning of the pictures' own rows."""
        cond: dict[str, Any] = {"task": torch.arange(n, device=self._spec.device)}
        if self.source is None:
            return cond
        said = list(self.source) * (n if len(self.source) == 1 else 1)
        encoded = self.kernel.encode(said) or {}
        return {k: v.value if isinstance(v, Shared) else v for k, v in encoded.items()} | cond

    @cached_property
    def _places(self) -> Places:
        return Places(self.regions, pasted=self.reference is not None)

    @cached_property
    def _levels(self) -> Tensor:
        """Whether x_t is guided, (T + 1,)."""
        steps = self._spec.num_steps
        passed = [steps - t for t in range(steps + 1)]  # i of the paper
        if self.window is None:
            told = [5 * i < steps or (5 * i < 3 * steps and i % 2 == 0) for i in passed]
        else:
            told = [within(self.window, t) for t in range(steps + 1)]
        noisy = [s or not self.weights for s in self._spec.stochastic]
        every = zip(range(steps + 1), told, noisy, strict=True)
        return torch.tensor([t > 0 and a and b and self.scale > 0 for t, a, b in every], device="cpu")

    @cached_property
    def _index(self) -> Tensor:
        """Which row of the table a level has (T + 1,)."""
        return (self._levels.long().cumsum(0) - 1).clamp_min(0)

    @cached_property
    def _spec(self) -> Spec:
        return describe(self.kernel, identify=False)

    def _settings(self) -> str | None:
        where = [[region.mask, *region.by, region.size] for region in self.regions]
        how = [self.parts, self.scale, tuple(self.strengths), self.window, self.max_shift, self.weights]
        said = None if self.source is None else list(self.source)
        return fingerprint.of([self.path, self.reference, where, how, said])


def _inner(cond: Cond) -> Cond:
    """Conditioning of the kernel."""
    return cond if cond is None or FEATURES not in cond else {k: v for k, v in cond.items() if k != FEATURES}


def _cells(features: Tensor, n: int, part: str) -> Tensor:
    """Features (n, C, h, w) of the rows of the prompt.

    Raises:
        ValueError: others.
    """
    if features.ndim != 4:
        raise ValueError(f"{part} puts out {tuple(features.shape)}, expected (n, C, h, w): take a part with places")
    return given_rows(features, n)


def _slope(energy: Tensor, leaf: Tensor, keep: bool) -> Tensor:
    """∂ Σ E / ∂ leaf."""
    found = torch.autograd.grad(energy.sum(), leaf, retain_graph=keep, allow_unused=True)[0]
    if found is None:
        raise TypeError("no gradient reaches x_t from the features: a guide inside cuts it, put that one around")
    return found
