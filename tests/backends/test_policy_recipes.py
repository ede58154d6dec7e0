"""Recipes of docs/policies.md: at η = 0 samples of other libraries' policies are those of the libraries' own rules."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import treesearch as ts
from treesearch.backends.models.card import Normalisation
from treesearch.rewards import action_bounds

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
HISTORY, SEEN, CHUNK, ACTIONS = 2, 3, 6, 2
ROWS = torch.linspace(-1, 1, 4 * HISTORY * SEEN).reshape(4, -1)


def recipe(name):
    found = {}
    exec(next(block for block in BLOCKS if f"def {name}(" in block), found)
    return found[name]


class Told(nn.Module):
    """A network that all it is told matters to."""

    def __init__(self, seen):
        super().__init__()
        self.layer = nn.Linear(CHUNK * ACTIONS + 1 + seen, CHUNK * ACTIONS)

    def forward(self, x, t, seen):
        told = torch.cat([x.flatten(1), t.expand(len(x))[:, None].to(x) / 100, seen.flatten(1)], 1)
        return self.layer(told).tanh().unflatten(1, x.shape[1:])


class Linear:
    """As a normaliser of diffusion_policy: z = scale x + offset."""

    def __init__(self, scale, offset):
        self.params_dict = {"scale": torch.tensor(scale), "offset": torch.tensor(offset)}

    def normalize(self, x):
        return x * self.params_dict["scale"] + self.params_dict["offset"]

    def unnormalize(self, z):
        return (z - self.params_dict["offset"]) / self.params_dict["scale"]


class Global(Told):
    def forward(self, sample, timestep, local_cond=None, global_cond=None):
        return super().forward(sample, timestep, global_cond)


def samples(kernel, noise):
    """Where the chain ends that begins at noise (n, CHUNK, ACTIONS) and has no other."""
    x, cond = noise, kernel.seen(ROWS)
    for t in range(kernel.num_steps, 0, -1):
        x = kernel.transition(x, torch.full((len(x),), t), cond).mean
    return kernel.decode(x)


@pytest.fixture
def noise():
    return torch.randn(len(ROWS), CHUNK, ACTIONS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("early", [False, True])
def test_diffusion_policy(noise, early):
    torch.manual_seed(1)
    policy = SimpleNamespace(
        model=Global(HISTORY * SEEN).requires_grad_(False), horizon=CHUNK, obs_dim=SEEN, action_dim=ACTIONS,
        n_action_steps=3, n_obs_steps=HISTORY, oa_step_convention=early,
        normalizer={"obs": Linear([2.0, 1.0, 0.5], [0.1, 0.0, -0.2]), "action": Linear([0.5, 4.0], [0.3, -1.0])},
        noise_scheduler=DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True),
    )  # fmt: skip
    scheduler, x = policy.noise_scheduler, noise
    seen = policy.normalizer["obs"].normalize(ROWS.unflatten(1, (HISTORY, SEEN))).flatten(1)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(policy.model(x, t, global_cond=seen), t, x).prev_sample
    first = HISTORY - early
    own = policy.normalizer["action"].unnormalize(x)[:, first : first + 3]
    kernel = recipe("of_diffusion_policy")(policy, num_steps=10)
    torch.testing.assert_close(samples(kernel, noise), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bound", [None, 0.4])
@pytest.mark.parametrize("predicts_noise", [True, False])
def test_cleandiffuser(noise, predicts_noise, bound):
    torch.manual_seed(2)
    t = torch.linspace(1e-3, 0.9946, 50, dtype=torch.float64)
    alpha = torch.cos(torch.pi / 2 * (t + 0.008) / 1.008) / torch.cos(torch.tensor(torch.pi / 2 * 0.008 / 1.008))
    embed = nn.Linear(SEEN, 5).requires_grad_(False)
    agent = SimpleNamespace(
        diffusion_steps=50, alpha=nn.Parameter(alpha), sigma=nn.Parameter((1 - alpha**2).sqrt()),
        x_max=bound and torch.full((ACTIONS,), bound), x_min=bound and torch.tensor([-bound, -0.2]),
        predict_noise=predicts_noise,
        model_ema={
            "diffusion": Told(HISTORY * 5).requires_grad_(False),
            "condition": lambda seen, mask: embed(seen) if mask is None else pytest.fail("nothing is masked"),
        },
    )  # fmt: skip
    units = Normalisation((0.2, -1.0), (2.0, 0.5))
    kernel = recipe("of_cleandiffuser")(agent, CHUNK, HISTORY * SEEN, units, history=HISTORY, num_steps=7)
    grid, x, told = torch.linspace(0, 49, 8).long(), noise.double(), embed(ROWS.unflatten(1, (HISTORY, SEEN)))
    a, s = (v.detach()[grid] for v in (agent.alpha, agent.sigma))
    for i in range(7, 0, -1):
        found = agent.model_ema["diffusion"](x.float(), grid[i].float(), told).double()
        x0 = (x - s[i] * found) / a[i] if predicts_noise else found
        x0 = x0 if bound is None else x0.clamp(agent.x_min, agent.x_max)
        x = a[i - 1] * x0 + s[i - 1] * (x - a[i] * x0) / s[i]
    own = x * torch.tensor(units.std) + torch.tensor(units.mean)
    torch.testing.assert_close(samples(kernel, noise).double(), own, atol=1e-4, rtol=1e-4)


def test_flow_policies(noise):
    """Euler's steps from noise at time 1 to actions at time 0."""
    torch.manual_seed(3)
    velocity, embed = Told(4).requires_grad_(False), nn.Linear(HISTORY * SEEN, 4).requires_grad_(False)
    units = Normalisation((0.2, -1.0), (2.0, 0.5))
    kernel = recipe("of_flow")(velocity, embed, CHUNK, HISTORY * SEEN, units, num_steps=5)
    x, told = noise, embed(ROWS)
    for i in range(5, 0, -1):
        x = x - velocity(x, torch.tensor(i / 5), told) / 5
    torch.testing.assert_close(samples(kernel, noise), x * torch.tensor(units.std) + torch.tensor(units.mean))
    spec = recipe("of_flow")(velocity, embed, CHUNK, HISTORY * SEEN, units, num_steps=5, eta=1.0)
    law = spec.transition(noise, torch.full((len(noise),), 3), spec.seen(ROWS))
    assert (law.std > 0).all()


def test_they_are_searched(noise):
    agent = SimpleNamespace(
        diffusion_steps=50, alpha=torch.linspace(1, 0.1, 50), sigma=(1 - torch.linspace(1, 0.1, 50) ** 2).sqrt(),
        x_max=torch.ones(ACTIONS), x_min=-torch.ones(ACTIONS), predict_noise=True,
        model_ema={"diffusion": Told(HISTORY * SEEN), "condition": lambda seen, mask: seen},
    )  # fmt: skip
    units = Normalisation((0.0,) * ACTIONS, (1.0,) * ACTIONS)
    kernel = recipe("of_cleandiffuser")(agent, CHUNK, HISTORY * SEEN, units, HISTORY, 4, eta=1.0)
    budget = ts.Budget(nfe=4 * 8)
    planner = ts.Planner(kernel, action_bounds((0, ACTIONS)), ts.FeynmanKac(), budget=budget, steps=3, warm_start=False)
    assert planner.act(ROWS[0]).shape == (3, ACTIONS)
    assert planner.decision.nfe_each == 32
