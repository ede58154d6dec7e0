"""Experts: a value of noisy states, by a network that was taught noise, another expert in each band of levels.

    v(x_t, t) = head(f_n(x_t)),  n = band(t)           f_n the reward's own network with the changes of band n
    v(x_t, t) = c + s f_n(x_t)                         of a reward that has no network: a small one of the family's own

A family is made by `backends.guidance.transfer`, from draws of the kernel alone. What it sees is x_t as an image or a
vector would be seen without noise ("state"), or x̂_0(x_t) as the reward sees it ("endpoint"), which the step predicts
anyway. With x_t a guide needs no backward pass through the kernel's network (`through_network=False`); x̂_0 knows more.

    valued(mnist(), digit(8), 'ppap.safetensors')      as potential; the reward at t = 0 is the reward itself
    tds(mnist(), digit(8), value='ppap.safetensors')   and steps lean along ∇v

Source: Towards Practical Plug-and-Play Diffusion Models (Go et al., 2023), sections 3.2 and 3.3. Experts as potentials,
and of x̂_0, are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import Cond, Kernel, bare, describe, expand, fingerprint, optional
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.guidance import banded
from treesearch.backends.models.shipped import shipped_file
from treesearch.rewards.algebra import Joined
from treesearch.rewards.base import Reward
from treesearch.rewards.headed import Headed
from treesearch.rewards.numeric import is_whole

Reads = Literal["state", "endpoint"]
BASE = "base."  # names of the weights of a network that comes with a family


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a family is of; stored with its weights.

    Args:
        bands, rank: N and r.
        reads: what the experts see.
        kernel, teacher: what tells them from others.
        shape: of what the experts see, one row.
        lam: λ of the soft value, where there is no network to read log-probabilities from.
        centre, spread: c and s.

    Raises:
        ValueError: a setting out of range.
    """

    bands: int
    rank: int
    reads: Reads = "state"
    kernel: str = ""
    teacher: str = ""
    shape: tuple[int, ...] = ()
    lam: float = 1.0
    centre: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not (is_whole(self.bands) and is_whole(self.rank)):
            raise ValueError(
                f"bands and rank are {self.bands!r} and {self.rank!r}, expected whole numbers of 1 or more"
            )
        if self.reads not in ("state", "endpoint"):
            raise ValueError(f"experts read {self.reads!r}, expected state or endpoint")
        object.__setattr__(self, "shape", tuple(self.shape))


@final
class Critic(nn.Module):
    """A small network of one output: three convolutions for images of 8 × 8 and more, else three linear layers.

    Args:
        shape: of an input, without the axis of rows.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) == 3 and min(shape[1:]) >= 8:
            deep = 32 * math.ceil(math.ceil(shape[1] / 2) / 2) * math.ceil(math.ceil(shape[2] / 2) / 2)
            body = [nn.Conv2d(shape[0], 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(),
                    nn.Conv2d(32, 32, 3, 1, 1), nn.SiLU()]  # fmt: skip
        else:
            deep, body = 64, [nn.Flatten(), nn.Linear(math.prod(shape), 64), nn.SiLU()]
        self.layers = nn.Sequential(*body, nn.Flatten(), nn.Linear(deep, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@final
@dataclass(frozen=True)
class Experts:
    """A family, not of a kernel yet: `of` makes the value.

    Args:
        card: what it is of.
        changes: of all bands, see `backends.guidance.banded`.
        base: weights of the network that comes with it; None where that is the reward's own.

    Raises:
        ValueError: changes of other bands than the card says.
    """

    card: Card
    changes: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        found = sorted({len(c) for c in self.changes.values()})
        if found != [self.card.bands]:
            raise ValueError(f"the experts are of {found} bands, their card says {self.card.bands}")

    def of(self, kernel: Kernel, reward: Reward) -> ExpertValue:
        """The value of a kernel's states for a reward.

        Raises:
            TypeError: the kernel's levels of noise are not known.
            ValueError: experts of another kernel, of another reward, of another network or of a head that their loss
                does not fix.
        """
        chain, card = chain_of(kernel), self.card
        if card.kernel != (found := kernel_name(kernel)):
            raise ValueError(f"the experts are of kernel {card.kernel!r}, not of {found!r}: transfer a family to it")
        if card.teacher != (found := teacher_name(reward)):
            alike = isinstance(reward.fn, Headed) and card.teacher.split(" ")[:2] == found.split(" ")[:2]
            why = ", which has its weights between other parts, as softplus for ReLU" if alike else ""
            raise ValueError(f"the experts are of {card.teacher!r}, not of {found!r}{why}: transfer a family from it")
        device = describe(kernel, identify=False).device
        network = network_of(reward, device) if self.base is None else self._own(device)
        expected = banded.shapes(network, card.bands, card.rank)
        if expected != {name: tuple(c.shape) for name, c in self.changes.items()}:
            raise ValueError(f"the experts change other weights than those of a {type(network).__name__}")
        if self.base is None:
            refuse_loose_head(reward, network, card.shape)
        band = banded.band_of(banded.angles(chain.schedule), card.bands)
        changes = {name: c.to(device) for name, c in self.changes.items()}
        return ExpertValue(self, Sight.of(kernel, reward, card.reads), reward, network, changes, band)

    def _own(self, device: torch.device) -> nn.Module:
        with torch.device("cpu"):  # whatever torch's default device and dtype
            network = Critic(self.card.shape).float()
        network.load_state_dict(dict(self.base or {}))
        return network.to(device).eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Weights as float16 safetensors with the card as metadata, replaced at once.

        Raises:
            ValueError: of a kernel that nothing tells from others.
        """
        from safetensors.torch import save_file

        if not self.card.kernel:
            raise ValueError("the kernel of these experts has no fingerprint: a file could not say what it is of")
        held = {**self.changes, **{BASE + name: w for name, w in (self.base or {}).items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        save_file({k: w.detach().half().cpu().contiguous() for k, w in held.items()}, part,
                  {"experts": json.dumps(asdict(self.card))})  # fmt: skip
        part.chmod(0o644)
        part.replace(path)

    @staticmethod
    def load(name: str | Path) -> Experts:
        """A family by the name of a shipped file, or by the path of one.

        Raises:
            FileNotFoundError: neither exists.
            ValueError: a file of something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with shipped_file(name) as path, safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get("experts")
                held = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  # not a mapping
            known = json.loads(told or "{}")
            card = Card(**{f.name: known[f.name] for f in fields(Card)})
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{str(name)!r} holds no experts: save them with Experts.save") from error
        base = {key.removeprefix(BASE): w for key, w in held.items() if key.startswith(BASE)}
        return Experts(card, {k: w for k, w in held.items() if not k.startswith(BASE)}, base or None)


@final
@dataclass(frozen=True)
class Sight:
    """What experts see of a kernel's states.

    Args:
        kernel: whose states.
        reads: x_t or x̂_0.
        bare: whether the reward is of states.
        shift, scale: of what `decode` makes of states near 0: shift + scale x.
    """

    kernel: Any
    reads: Reads
    bare: bool
    shift: float = 0.0
    scale: float = 1.0

    @staticmethod
    def of(kernel: Kernel, reward: Reward, reads: Reads) -> Sight:
        """What a family sees of a kernel.

        Raises:
            ValueError: noisy states that nothing shows as samples.
        """
        if reads == "endpoint" or reward.input == "state":
            return Sight(kernel, reads, reward.input == "state")
        return Sight(kernel, reads, False, *_line(kernel))

    def of_noisy(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x_t (n, *state) of α_t and σ_t (n,), as a sample of that much noise."""
        size = expand((alpha**2 + sigma**2).rsqrt().to(x.dtype), x)
        return self.shift + self.scale * size * x

    def of_endpoint(self, endpoint: Tensor) -> Tensor:
        """x̂_0 (n, *state) as the reward sees it."""
        if self.bare:
            return bare(self.kernel, endpoint)
        preview = optional(self.kernel, "preview")
        return self.kernel.decode(endpoint) if preview is None else preview(endpoint)


@final
@dataclass(frozen=True, eq=False)
class ExpertValue:
    """v of a kernel's states; an evaluation is told as a call of the reward.

    Args:
        experts: the family.
        sight: what it sees.
        reward: what it is of.
        network, changes: of the family, where the kernel is.
        band: of each level, (T + 1,).
    """

    experts: Experts
    sight: Sight
    reward: Reward
    network: nn.Module
    changes: Mapping[str, Tensor]
    band: Tensor

    rewards_per_nfe = 1

    def __call__(self, x: Tensor, t: Tensor, law: Any, cond: Cond) -> Tensor:
        card = self.experts.card
        seen = self.sight.of_endpoint(law.endpoint) if card.reads == "endpoint" else self.seen(x, t)
        seen = seen.to(next(iter(self.changes.values())))
        outputs = banded.call(self.network, self.changes, seen, self.band.to(t.device)[t])
        if self.experts.base is None:
            return network_head(self.reward)(outputs)
        return card.centre + card.spread * outputs[:, 0].double()

    def seen(self, x: Tensor, t: Tensor) -> Tensor:
        """What the experts of x_t see of states (n, *state)."""
        of = chain_of(self.sight.kernel).schedule
        return self.sight.of_noisy(bare(self.sight.kernel, x), of.alpha.to(x.device)[t], of.sigma.to(x.device)[t])

    def of(self, kernel: Kernel, reward: Reward) -> ExpertValue:
        """The same family for another kernel or reward."""
        return self.experts.of(kernel, reward)

    @cached_property
    def fingerprint(self) -> str:
        """Of the family, and of the reward whose head it has."""
        return f"experts:{digest(self.experts.changes, self.experts.base or {})} {self.experts.card}"


def as_value(value: Any, kernel: Kernel, reward: Reward) -> Any:
    """What is declared, as a value: a family by the name of its file, or one that still asks for its kernel."""
    if isinstance(value, (str, Path)):
        value = Experts.load(value)
    return value.of(kernel, reward) if isinstance(value, (Experts, ExpertValue)) else value


def chain_of(kernel: Kernel) -> Chain:
    """The chain of a kernel, whose levels are the same for all entries of a state.

    Raises:
        TypeError: it has none.
    """
    chain = optional(kernel, "chain")
    if not isinstance(chain, Chain) or chain.schedule.alpha.ndim > 1:
        raise TypeError(f"{type(kernel).__name__} is no kernel on a backends.chains.diffusion.Chain with one noise "
                        "level a state: its bands are not known")  # fmt: skip
    return chain


def network_of(reward: Reward, device: str | torch.device) -> nn.Module:
    """The network of a reward that says so."""
    assert isinstance(reward.fn, Headed)
    return reward.fn.network(str(device))


def network_head(reward: Reward) -> Any:
    """What a reward makes of its network's outputs."""
    assert isinstance(reward.fn, Headed)
    return reward.fn.head


def kernel_name(kernel: Kernel) -> str:
    """What tells the kernel's data from others: its network, or else its fingerprint; empty where that is not known."""
    networks = optional(kernel, "network")
    if networks is None:
        return describe(kernel).fingerprint or ""
    networks = networks if isinstance(networks, tuple) else (networks,)
    return digest(*(n.state_dict() for n in networks))


def refuse_loose_head(reward: Reward, network: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse a head that sees what the softmax of its logits does not tell: a constant on all of them.

    Raises:
        ValueError: it does.
    """
    with torch.no_grad():
        logits = network(next(network.parameters()).new_zeros(1, *shape))
        low, high = (network_head(reward)(logits.double() + c).double() for c in (0.0, 1.0))
    if not torch.allclose(low, high, rtol=1e-6, atol=1e-6):
        raise ValueError(f"{reward.name!r} changes where all logits rise by one number, which experts of log p leave "
                         "open: take a head of log p, such as digit(8)")  # fmt: skip


def teacher_name(reward: Reward) -> str:
    """What tells a teacher from others: its network by weights and parts, or the reward by name, settings and content.

    Raises:
        ValueError: nothing tells it from others of its name.
    """
    if isinstance(reward.fn, Headed):
        network = network_of(reward, "cpu")
        return f"{type(network).__name__} {digest(network.state_dict())} {_parts(network)}"
    if (content := _content(reward)) is None:
        raise ValueError(f"nothing tells {reward.name!r} from other rewards of its name: make it of functions and of "
                         "objects whose content can be read, or by a registered factory")  # fmt: skip
    return " ".join((reward.name, *reward.settings, content[:24]))


def _parts(network: nn.Module) -> str:
    """Digest of what a network is made of beside its weights: its parts in their order, with their settings."""
    return hashlib.blake2b(repr(network).encode(), digest_size=4).hexdigest()


def _content(reward: Any) -> str | None:
    """Digest of the expression that a reward was built from, or else of its function."""
    if reward.source is not None:
        return reward.source
    cached = getattr(getattr(reward.fn, "__self__", None), "reward", None)
    if isinstance(cached, Reward):  # what is remembered of it changes with use
        return _content(cached)
    if not isinstance(reward.fn, Joined):
        return fingerprint.of(reward.fn)
    parts = [_content(part) for part in reward.fn.parts]
    return None if None in parts else fingerprint.of([reward.fn.apply, parts])


def digest(*weights: Mapping[str, Tensor]) -> str:
    """Of weights by their names, as float32: the same on every device and in every memory format."""
    found = hashlib.blake2b(digest_size=12)
    for name, weight in sorted(item for each in weights for item in each.items()):
        found.update(name.encode())
        found.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _line(kernel: Kernel) -> tuple[float, float]:
    """Shift and scale of `decode` near 0.

    Raises:
        ValueError: it is no such line there.
    """
    spec = describe(kernel, identify=False)
    rows = torch.linspace(-0.5, 0.5, 5, device=spec.device, dtype=spec.dtype)
    states = expand(rows, torch.empty(5, *spec.state_shape, device="meta")).expand(5, *spec.state_shape)
    shown = kernel.decode(bare(kernel, states.contiguous()))
    if not isinstance(shown, Tensor):
        raise ValueError(f"{type(kernel).__name__}.decode gives no tensor: use reads='endpoint'")
    shift, scale = float(shown[2].double().mean()), float((shown[4] - shown[0]).double().mean())
    line = expand(shift + scale * rows.double(), shown)
    if tuple(shown.shape[1:]) != tuple(bare(kernel, states).shape[1:]) or (shown.double() - line).abs().max() > 1e-5:
        raise ValueError(f"{type(kernel).__name__}.decode is no line near 0, so that a noisy state is no noisy sample: "
                         "use reads='endpoint'")  # fmt: skip
    return shift, scale
