"""LeRobot's diffusion policies as kernels: a stand-in of the same parts, and LeRobot's own where it is installed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, RePaintScheduler
from torch import nn

import treesearch as ts
from treesearch.backends.lerobot import Frames, observed_by, policy_kernel, stats_of
from treesearch.policies.frozen import FrozenPolicy
from treesearch.rewards.base import Reward
from treesearch.testing import check_kernel

H, A, T = 8, 2, 4
GENERATOR = torch.Generator().manual_seed(0)
SEEN = {
    "observation.state": torch.randn(3, 2, 2, generator=GENERATOR),
    "observation.image": torch.rand(3, 2, 3, 4, 4, generator=GENERATOR),
    "observation.environment_state": torch.randn(3, 2, 3, generator=GENERATOR),
}
NOISE = torch.randn(3, H, A, generator=GENERATOR)


def feature(*shape):
    return SimpleNamespace(shape=shape)


class UNet(nn.Module):
    def __init__(self, told):
        super().__init__()
        self.layer = nn.Linear(H * A + told + 1, H * A)

    def forward(self, x, timestep, global_cond=None):
        rows = torch.cat([x.flatten(1), global_cond, timestep[:, None] / 100], 1)
        return self.layer(rows).tanh().unflatten(1, (H, A))


class Model(nn.Module):
    """What LeRobot's `DiffusionModel` is made of."""

    def __init__(self, config, scheduler):
        super().__init__()
        self.config, self.noise_scheduler, self.num_inference_steps = config, scheduler, T
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Dropout(0.5))
        self.unet = UNet(2 * (2 + 5 + 3))

    def _prepare_global_conditioning(self, batch):
        pictures = batch["observation.images"]
        parts = [batch["observation.state"], self.encoder(pictures.flatten(0, 2)).unflatten(0, pictures.shape[:2])]
        return torch.cat([*parts, batch["observation.environment_state"]], -1).flatten(1)

    @torch.no_grad()
    def generate_actions(self, batch, noise):
        told, x = self._prepare_global_conditioning(batch), noise
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            out = self.unet(x, torch.full(x.shape[:1], t, dtype=torch.long), global_cond=told)
            x = self.noise_scheduler.step(out, t, x).prev_sample
        return x[:, 1 : 1 + self.config.n_action_steps]


def stand_in(scheduler=None, action="IDENTITY", **modes):
    torch.manual_seed(0)
    config = SimpleNamespace(
        n_obs_steps=2, horizon=H, n_action_steps=5, action_feature=feature(A), robot_state_feature=feature(2),
        image_features={"observation.image": feature(3, 4, 4)}, env_state_feature=feature(3),
        normalization_mapping={"ACTION": action, "STATE": "IDENTITY", "VISUAL": "IDENTITY"} | modes,
    )  # fmt: skip
    scheduler = scheduler or DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return SimpleNamespace(config=config, diffusion=Model(config, scheduler))


def batch():
    return SEEN | {"observation.images": SEEN["observation.image"][:, :, None]}


def made_by(policy, **settings):
    kernel = policy_kernel(policy, **settings)
    return FrozenPolicy(kernel).actions(observed_by(policy, SEEN), NOISE.flatten(1))


def test_without_noise_in_its_steps_it_makes_the_policys_own_chunks():
    policy = stand_in()
    found = made_by(policy)
    assert policy.diffusion.training  # as it was
    policy.diffusion.eval()
    torch.testing.assert_close(found, policy.diffusion.generate_actions(batch(), NOISE), atol=1e-6, rtol=0)
    assert found.shape == (3, 5, A)


def test_it_is_a_kernel_that_planners_take():
    policy = stand_in()
    kernel = policy_kernel(policy, eta=1.0)
    rows = observed_by(policy, SEEN)
    check_kernel(kernel, prompts=[{"start": row} for row in rows.tolist()])
    reward = Reward(lambda samples, prompts: samples.double().sum((1, 2)))
    planner = ts.Planner(kernel, reward, ts.BestOfN(), budget=ts.Budget(nfe=2 * T), steps=5, warm_start=False)
    assert planner.act_many(rows).shape == (3, 5, A)
    with pytest.raises(ValueError, match="no encode_samples: use warm_start=False"):
        ts.Planner(kernel, reward, ts.BestOfN(), budget=ts.Budget(nfe=2 * T))


def test_normalisation_is_by_statistics():
    stats = {
        "action": {"min": torch.tensor([-2.0, 0.0]), "max": torch.tensor([2.0, 6.0])},
        "observation.state": {"mean": torch.tensor([1.0, 1.0]), "std": torch.tensor([2.0, 2.0])},
        "observation.image": {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.5)},
    }
    policy = stand_in(action="MIN_MAX", STATE="MEAN_STD", VISUAL="MEAN_STD")
    found = made_by(policy, stats=stats_of([SimpleNamespace(steps=[object(), SimpleNamespace(stats=stats)])]))
    policy.diffusion.eval()
    told = batch() | {
        "observation.state": (SEEN["observation.state"] - 1) / 2,
        "observation.images": (SEEN["observation.image"][:, :, None] - 0.5) / 0.5,
    }
    own = policy.diffusion.generate_actions(told, NOISE)
    torch.testing.assert_close(found, own * torch.tensor([2.0, 3.0]) + torch.tensor([0.0, 3.0]), atol=1e-5, rtol=0)
    still = stats | {"action": {"min": torch.tensor([-2.0, 3.0]), "max": torch.tensor([2.0, 3.0])}}
    torch.testing.assert_close(made_by(policy, stats=still)[..., 1], torch.full((3, 5), 3.0))
    with pytest.raises(ValueError, match=r"no mean and std of 'observation\.image'"):
        policy_kernel(policy, stats={k: v for k, v in stats.items() if "image" not in k})
    with pytest.raises(ValueError, match="hold no statistics"):
        stats_of([SimpleNamespace(steps=[])])


def test_what_it_cannot_be_told_is_named():
    policy = stand_in()
    with pytest.raises(ValueError, match=r"but no 'observation\.image'"):
        observed_by(policy, {"observation.state": SEEN["observation.state"]})
    with pytest.raises(ValueError, match=r"observation.state has shape \(3, 1, 2\), expected \(n, 2, 2\)"):
        observed_by(policy, SEEN | {"observation.state": torch.zeros(3, 1, 2)})
    with pytest.raises(ValueError, match="cannot read a schedule from RePaintScheduler"):
        policy_kernel(stand_in(scheduler=RePaintScheduler(100)))
    with pytest.raises(ValueError, match="normalised by 'QUANTILES'"):
        policy_kernel(stand_in(action="QUANTILES"), stats={})


def test_lerobots_own_policy_makes_the_same_chunks():
    diffusion = pytest.importorskip("lerobot.policies.diffusion.modeling_diffusion", exc_type=ImportError)
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (A,))},
        down_dims=(16, 32), noise_scheduler_type="DDIM", num_inference_steps=10, device="cpu", crop_shape=None,
    )  # fmt: skip
    policy = diffusion.DiffusionPolicy(config).eval()
    seen = {"observation.state": torch.randn(2, 2, 2), "observation.image": torch.rand(2, 2, 3, 32, 32)}
    noise = torch.randn(2, config.horizon, A)
    told = {"observation.state": seen["observation.state"], "observation.images": seen["observation.image"][:, :, None]}
    own = policy.diffusion.generate_actions(told, noise=noise)
    found = FrozenPolicy(policy_kernel(policy)).actions(observed_by(policy, seen), noise.flatten(1))
    torch.testing.assert_close(found, own, atol=1e-6, rtol=0)


def test_what_an_environment_shows_becomes_a_row_of_features():
    frames = Frames({"observation.state": (2,), "observation.images.top": (3, 2, 5)})
    picture = np.random.default_rng(0).integers(0, 256, (2, 5, 3), np.uint8)
    found = frames({"agent_pos": [1.0, 2.0], "pixels": {"top": picture}, "more": 0})
    assert found[:2].tolist() == [1.0, 2.0]
    np.testing.assert_allclose(found[2:].reshape(3, 2, 5).numpy(), picture.transpose(2, 0, 1) / 255, atol=1e-7)
    assert Frames({"observation.state": (2,)})(np.ones(2)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"shape \(3, 2, 5\), the policy is told \(3, 5, 2\)"):
        Frames({"observation.image": (3, 5, 2)})({"pixels": picture})
    with pytest.raises(ValueError, match=r"shows \['observation.image'\], but no 'observation.state'"):
        frames(picture)
