"""Teaching a reward noise without data: experts, one a band of levels, from the kernel's own draws.

    x̃_0 ~ p,  x_t = α_t x̃_0 + σ_t ε,  t ~ U(band n)
    L = KL(softmax(f(x̃_0)/τ) || softmax(f_n(x_t)))                     a reward with a network f of logits
    L = exp(δ) - δ - 1,  δ = λ (r(x̃_0) - v_n(x_t))                     any other

Both have a soft value for their minimiser. Of the first, with τ = 1, it is p_n(y | x_t) = E[p(y | x_0) | x_t], so that
log p_n(y | x_t) = log E[exp(r) | x_t] for the reward r = log p(y | x): V_t at λ = 1, exactly what a search wants. The
paper's τ = .25 makes log E[1{y is the label} | x_t] of it, nearly. Of the second, dL/dv = λ (1 - E exp(δ)) vanishes at
exp(λ v) = E[exp(λ r) | x_t]; the squared error would learn E[r | x_t], too little wherever r is uncertain and λ large.
Beyond δ = 4 L goes on as a line, lest single draws decide, so that where λ r spreads that much v is too small.

Experts of x̂_0 are taught on the states of the rollouts that x̃_0 comes from, which are draws of (x_t, x_0) under p.

Sources: Towards Practical Plug-and-Play Diffusion Models (Go et al., 2023), eqs. 8 and 9. Extreme Q-Learning: MaxEnt RL
without Entropy (Garg et al., 2023), section 3, for the second loss. A single optimiser for all bands, τ = 1, noise by
angle in place of time, and experts of x̂_0 are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treesearch.backends.base import Kernel, bare, describe, expand
from treesearch.backends.guidance import banded
from treesearch.backends.guidance.experts import (
    Card,
    Critic,
    Experts,
    Reads,
    Sight,
    chain_of,
    kernel_name,
    network_of,
    refuse_loose_head,
    teacher_name,
)  # fmt: skip
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.headed import Headed
from treesearch.rewards.numeric import is_positive, is_whole

LIMIT = 4.0
DECAY = 0.05


class Rollouts(NamedTuple):
    """Draws of the kernel: x_0 (n, *state), and x̂_0 at x_1..x_T (T, n, *state) in half precision, if it was kept."""

    x0: Tensor
    endpoints: Tensor | None


@torch.no_grad()
def rollouts(kernel: Kernel, n: int, *, seed: int = 0, endpoints: bool = True, batch: int = 128) -> Rollouts:
    """n draws without prompts, n · T evaluations."""
    spec, rng, ends, found = describe(kernel, identify=False), torch.Generator("cpu").manual_seed(seed), [], []
    for start in range(0, n, batch):
        rows, kept = min(batch, n - start), []

        def noise(rows: int = rows) -> Tensor:
            shape = (rows, *spec.noise_shape)
            return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float32).to(spec.device)

        x = kernel.prior(noise(), None)
        for t in range(spec.num_steps, 0, -1):
            law = kernel.transition(x, torch.full((rows,), t, device=spec.device), None)
            kept.append(law.endpoint.half() if endpoints else law.endpoint[:0])
            x = law.sample(noise())
        found.append(x)
        ends.append(torch.stack(kept[::-1]))
    return Rollouts(torch.cat(found), torch.cat(ends, 1) if endpoints else None)


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """How experts learn.

    Args:
        steps: of AdamW, with a half cosine to zero.
        batch_size: pairs of a step, over all bands.
        lr: the highest.
        temperature: τ.
        seed: of noise and of the first weights.
    """

    steps: int = 2_000
    batch_size: int = 64
    lr: float = 2e-3
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_whole(self.steps, 0) and is_whole(self.batch_size) and is_positive(self.temperature)):
            raise ValueError(f"{self}: expected steps >= 0, batch_size >= 1 and a temperature above 0")


def transfer(
    reward: Reward,
    kernel: Kernel,
    *,
    bands: int = 5,
    rank: int = 4,
    reads: Reads = "state",
    samples: int | Rollouts = 2_000,
    lam: float = 1.0,
    plan: Plan | None = None,
) -> Experts:
    """Experts of a reward for the noisy states of a kernel; no data are needed.

    Args:
        reward: any; of one with a network (`rewards.headed.Headed`, as `digit` and its kin) the experts are changes of
            it, for all rewards that read it.
        kernel: on a `Chain`; prompts are not given.
        bands, rank: N, and r of the changes.
        reads: see `backends.guidance.experts`.
        samples: rollouts, T evaluations each, or those that `rollouts` made.
        lam: λ of the searches that it is for, where the reward has no network.
        plan: how they learn.

    Raises:
        TypeError: the kernel's levels of noise are not known.
        ValueError: a setting out of range, states that are not seen as samples, a head that reads more of its logits
            than their softmax, or a reward that nothing tells from others.
    """
    reward, plan = as_reward(reward), plan or Plan()
    spec, chain, sight = describe(kernel, identify=False), chain_of(kernel), Sight.of(kernel, reward, reads)
    if not isinstance(samples, Rollouts):
        if not is_whole(samples, 2):
            raise ValueError(f"samples is {samples!r}, expected two rollouts or more")
        samples = rollouts(kernel, samples, seed=plan.seed, endpoints=reads == "endpoint")
    seen = sight.of_endpoint(samples.x0[:1])
    if isinstance(reward.fn, Headed):
        refuse_loose_head(reward, network_of(reward, spec.device), tuple(seen.shape[1:]))
    goal = _goal(reward, kernel, samples.x0, lam, plan)
    card = Card(bands=bands, rank=rank, reads=reads, kernel=kernel_name(kernel), teacher=teacher_name(reward),
                shape=tuple(seen.shape[1:]), lam=lam, centre=goal.centre, spread=goal.spread)  # fmt: skip
    rng = torch.Generator("cpu").manual_seed(plan.seed)
    own = None if isinstance(reward.fn, Headed) else _fresh(card.shape, plan.seed).to(spec.device)
    network = network_of(reward, spec.device) if own is None else own
    changes = {k: c.to(spec.device) for k, c in banded.unchanged(network, bands, rank, rng).items()}
    draw = _noised(samples, sight, kernel) if reads == "state" else _met(samples, sight, banded.angles(chain.schedule))
    _learn(network, changes, [] if own is None else list(own.parameters()), draw, goal, card, plan, rng)
    return Experts(card, changes, None if own is None else {k: w.detach() for k, w in own.state_dict().items()})


class Goal(NamedTuple):
    """What the experts are to tell of each x̃_0: targets (n, ...), the loss of outputs, c and s."""

    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    centre: float = 0.0
    spread: float = 1.0


@torch.no_grad()
def _goal(reward: Reward, kernel: Kernel, x0: Tensor, lam: float, plan: Plan) -> Goal:
    if not is_positive(lam):
        raise ValueError(f"lam is {lam!r}, expected a finite number above 0")
    parts = [bare(kernel, x) if reward.input == "state" else kernel.decode(x) for x in x0.split(128)]
    if isinstance(reward.fn, Headed):
        network = network_of(reward, x0.device)
        like = next(network.parameters())
        logits = torch.cat([network(part.to(like)) for part in parts])
        return Goal((logits / plan.temperature).softmax(1), F.cross_entropy)
    rewards = torch.cat([reward(part) for part in parts])
    centre, spread = float(rewards.mean()), float(rewards.std(correction=0))
    if not 0 < spread < math.inf:
        raise ValueError(
            f"{reward.name!r} is {centre:g} with spread {spread:g} on all draws: there is nothing to learn"
        )
    size = lam * spread
    targets = ((rewards - centre) / spread).float().to(x0.device)
    return Goal(targets, lambda out, r: linex(size * (r - out[:, 0])) / max(1.0, size) ** 2, centre, spread)


def linex(gap: Tensor) -> Tensor:
    """Mean of exp(δ) - δ - 1, from δ = 4 on as its tangent there."""
    top = gap.clamp(max=LIMIT)
    return (top.exp() * (1 + gap - top) - gap - 1).mean()


def _fresh(shape: tuple[int, ...], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return Critic(shape).float()


Draw = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(rows (b,), angles (b,) in 0..1, rng) -> what is seen (b, ...), and the angles that it is seen at."""


def _noised(samples: Rollouts, sight: Sight, kernel: Kernel) -> Draw:
    """x_t = cos(π φ/2) x_0 + sin(π φ/2) ε: every chain's, over √(α² + σ²)."""

    def draw(rows: Tensor, angle: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x0 = bare(kernel, samples.x0[rows])
        noise = torch.randn(x0.shape, generator=rng, device="cpu", dtype=torch.float32).to(x0)
        alpha, sigma = (0.5 * math.pi * angle).cos(), (0.5 * math.pi * angle).sin()
        x = expand(alpha.to(x0), x0) * x0 + expand(sigma.to(x0), x0) * noise
        return sight.of_noisy(x, alpha.to(x0.device), sigma.to(x0.device)), angle

    return draw


def _met(samples: Rollouts, sight: Sight, angles: Tensor) -> Draw:
    """x̂_0 of the level whose angle is nearest."""
    if samples.endpoints is None:
        raise ValueError("the rollouts kept no endpoints: make them with endpoints=True")
    ends, at = samples.endpoints, angles[1:]

    def draw(rows: Tensor, angle: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        level = (angle[:, None] - at).abs().argmin(1)
        return sight.of_endpoint(ends[level, rows].to(samples.x0)), at[level]

    return draw


def _learn(
    network: nn.Module,
    changes: dict[str, Tensor],
    own: list[nn.Parameter],
    draw: Draw,
    goal: Goal,
    card: Card,
    plan: Plan,
    rng: torch.Generator,
) -> None:
    """Move the changes, and the weights that are the family's own, in place."""
    weights = [c.requires_grad_() for c in changes.values()] + own
    optimizer = torch.optim.AdamW(weights, lr=plan.lr, weight_decay=DECAY)
    like, size = next(iter(changes.values())), plan.batch_size
    for step in range(plan.steps):
        optimizer.param_groups[0]["lr"] = 0.5 * plan.lr * (1 + math.cos(math.pi * step / plan.steps))
        rows = torch.randint(len(goal.targets), (size,), generator=rng, device="cpu")
        angle = (torch.arange(size, device="cpu") + torch.rand(size, generator=rng, device="cpu")) / size
        seen, angle = draw(rows, angle.double(), rng)
        band = banded.band_of(angle, card.bands).to(seen.device)
        outputs = banded.call(network, changes, seen.to(like), band)
        optimizer.zero_grad()
        goal.loss(outputs, goal.targets[rows]).backward()
        optimizer.step()
    for weight in weights:
        weight.requires_grad_(False)
