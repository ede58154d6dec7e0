"""Directions in a network's h-space: vectors in the output of one of its parts, as a file that says what it is of.

    v_{i,t}    direction i at level t, of the part's shape; given at some levels, linear in t between them and constant
               beyond; at one level alone it is the same for all
    n - Nᵀ (N Nᵀ)⁻¹ N n        n without its share in the span of the rows of N: `disentangled`

They are found by `rollouts` (principal components, differences of means) and by `jacobian`, and added by `hspace`.

Source: Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models (Haas et al., 2024),
sections 3.1 to 3.3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import fingerprint, optional
from treesearch.backends.base.capture import parts
from treesearch.backends.interventions.base import network_of
from treesearch.backends.models.shipped import shipped_file

KEY = "directions"


@final
@dataclass(frozen=True, kw_only=True)
class Card:
    """What directions are of; stored with them.

    Args:
        method: how they were found.
        names: of the directions, k.
        part: of the network, by its whole name.
        levels: t that they are given at (L,), ascending; a single one holds for all.
        num_steps: T of the kernel that they were found on.
        network: what tells the network from others, `name_of`.
        sizes: of each direction by level, k × L: standard deviations of h along it where it is of rollouts, singular
            values where it is of a Jacobian.
        unit: what α = 1 is.
        seeds: of the rollouts.
    """

    method: str
    names: tuple[str, ...]
    part: str
    levels: tuple[int, ...]
    num_steps: int
    network: str
    sizes: tuple[tuple[float, ...], ...]
    unit: str
    seeds: tuple[int, ...] = ()

    @staticmethod
    def from_json(text: str) -> Card:
        told = json.loads(text)
        known = {field.name: _frozen(told[field.name]) for field in fields(Card)}
        return Card(**known)


@final
@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of one network.

    Args:
        card: what they are of.
        vectors: (k, L, *part), float32.

    Raises:
        ValueError: vectors that are not those of the card, or not finite; names twice.
    """

    card: Card
    vectors: Tensor

    def __post_init__(self) -> None:
        card, found = self.card, tuple(self.vectors.shape[:2])
        if found != (len(card.names), len(card.levels)) or self.vectors.ndim < 3:
            raise ValueError(f"vectors have shape {tuple(self.vectors.shape)}, expected ({len(card.names)} directions, "
                             f"{len(card.levels)} levels, *shape of {card.part!r})")  # fmt: skip
        if not self.vectors.isfinite().all():
            raise ValueError("directions have entries that are not finite")
        if len(set(card.names)) < len(card.names) or not card.names:
            raise ValueError(f"names of directions are {card.names}, expected one or more, each once")
        if (
            not card.levels
            or list(card.levels) != sorted(set(card.levels))
            or not 1 <= card.levels[0] <= card.levels[-1] <= card.num_steps
        ):
            raise ValueError(f"levels of directions are {card.levels}, expected ascending in 1..T = {card.num_steps}")

    def at(self, which: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Directions (n, *part) that rows which (n,) have at levels t (n,); device and dtype of `like`.

        Raises:
            ValueError: the part puts out another shape.
        """
        if tuple(like.shape[1:]) != tuple(self.vectors.shape[2:]):
            raise ValueError(
                f"{self.card.part!r} puts out {tuple(like.shape[1:])} a row, its directions are "
                f"{tuple(self.vectors.shape[2:])}: they were found on samples of another size"
            )
        knots = torch.tensor(self.card.levels, dtype=torch.float32, device=like.device)
        where, vectors = t.to(knots), self._on(like)
        high = torch.searchsorted(knots, where).clamp(max=len(knots) - 1)
        low = (high - 1).clamp(min=0)
        share = ((where - knots[low]) / (knots[high] - knots[low]).clamp(min=1)).clamp(0, 1)
        share = torch.where(low == high, 1.0, share).to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
        return torch.lerp(vectors[which, low], vectors[which, high], share)

    def named(self, *names: str) -> Directions:
        """Some of them.

        Raises:
            ValueError: a name that there is not.
        """
        if missing := [name for name in names if name not in self.card.names]:
            raise ValueError(f"there is no direction {missing[0]!r}: choose among {', '.join(self.card.names)}")
        rows = [self.card.names.index(name) for name in names]
        card = replace(self.card, names=tuple(names), sizes=tuple(self.card.sizes[i] for i in rows))
        return Directions(card, self.vectors[rows])

    def check(self, kernel: Any) -> None:
        """Refuse a kernel that they are not of.

        Raises:
            ValueError: another network, one without the part, or another T.
        """
        network, card = network_of(kernel), self.card
        parts(network, (card.part,))
        if card.network != (found := name_of(network)):
            raise ValueError(
                f"the directions are of a network with fingerprint {card.network}, {type(kernel).__name__} has one of "
                f"{found}: find them on this one, python -m experiments.interventions.directions"
            )
        if len(card.levels) > 1 and (steps := int(kernel.num_steps)) != card.num_steps:
            raise ValueError(f"directions by level are of T = {card.num_steps}, the kernel has T = {steps}: give it "
                             f"num_steps={card.num_steps}, or find them on this one")  # fmt: skip

    def save(self, path: Path) -> None:
        """As float16 safetensors with the card as metadata, replaced at once."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        save_file({KEY: self.vectors.half().contiguous()}, part, {KEY: json.dumps(asdict(self.card))})
        part.chmod(0o644)
        part.replace(path)

    @staticmethod
    def load(name: str | Path) -> Directions:
        """Directions by the name of a shipped file, or by the path of one.

        Raises:
            FileNotFoundError: neither exists.
            TypeError: no name and no path.
            ValueError: a file of something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with shipped_file(name) as path, safe_open(path, framework="pt") as file:
                card = Card.from_json((file.metadata() or {}).get(KEY, "{}"))
                vectors = file.get_tensor(KEY).float()
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{str(name)!r} holds no directions: save them with Directions.save") from error
        return Directions(card, vectors)

    def _on(self, like: Tensor) -> Tensor:
        """The vectors where they are added, moved there once."""
        place = (like.device, like.dtype)
        if place not in self._moved:
            self._moved[place] = self.vectors.to(like)
        return self._moved[place]

    @cached_property
    def _moved(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}


def disentangled(directions: Tensor, others: Tensor) -> Tensor:
    """Directions (..., D) without what they share with others (..., m, D), in float64.

    Raises:
        ValueError: others that depend on each other.
    """
    n, rows = directions.double(), others.double()
    unit = rows / rows.norm(dim=-1, keepdim=True)
    gram = unit @ unit.mT
    if bool((torch.linalg.matrix_rank(gram, hermitian=True) < rows.shape[-2]).any()):
        raise ValueError("the other directions depend on each other, or one is 0: leave out those that say the same")
    for _ in range(2):  # what rounding left of the first time
        n = n - (unit.mT @ torch.linalg.solve(gram, unit @ n[..., None]))[..., 0]
    return n


def name_of(network: nn.Module | Sequence[nn.Module]) -> str:
    """What tells a network from others, by its weights: the same on every device and with every version of its library.

    Raises:
        ValueError: weights that cannot be read, since they are elsewhere.
    """
    each = (network,) if isinstance(network, nn.Module) else network
    found = fingerprint.of([dict(net.state_dict()) for net in each])
    if found is None:
        raise ValueError("the weights of the network cannot be read: directions need to know what they are of")
    return found


def part_of(kernel: Any, ending: str) -> str:
    """The whole name of the one part of a kernel's network whose name ends so: "mid_block" for "unet.mid_block".

    Raises:
        TypeError: a kernel without a network.
        ValueError: none, or several.
    """
    network = network_of(kernel)
    whole = network if isinstance(network, nn.Module) else nn.ModuleList(network)
    names = [name for name, _ in whole.named_modules()]
    found = [name for name in names if name == ending or name.endswith(f".{ending}")]
    if not found or ending in found:
        return next(iter(parts(network, (ending,))))
    if len(found) > 1:
        raise ValueError(f"{ending!r} ends the names of {len(found)} parts: say more of it, such as {found[0]!r}")
    return found[0]


def given_rows(h: Tensor, n: int) -> Tensor:
    """Rows (n, *part) of the prompt: all, or the second block under classifier-free guidance.

    Raises:
        ValueError: neither.
    """
    if len(h) not in (n, 2 * n):
        raise ValueError(f"the part puts out {len(h)} rows for {n} of an evaluation: take one with a row for each")
    return h[-n:]


def steps_of(kernel: Any) -> int:
    """T of a kernel.

    Raises:
        TypeError: one whose states hold more than x_t.
    """
    noise = optional(kernel, "noise_shape")
    if optional(kernel, "bare") is not None or (noise is not None and tuple(noise) != tuple(kernel.state_shape)):
        raise TypeError(f"states of {type(kernel).__name__} hold more than x_t: find directions on the kernel inside")
    return int(kernel.num_steps)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
