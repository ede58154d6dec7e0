"""Steering on other chains: flows, whose x_T is all noise, and pipelines, by latents and by decoded samples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import treesearch as ts
from tests.support import tiny
from tests.support.flows import GaussianFlow
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.moments import Moments
from treesearch.backends.guidance import Steered
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.rewards.base import Reward
from treesearch.rewards.observation import masked, matrix, measurement, pooled
from treesearch.testing import check_kernel

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
F64 = torch.float64
FLOW = GaussianFlow(
    Schedule.flow(torch.linspace(0, 1, 9)),
    Moments(torch.tensor([1.0, 0.0, -1.0]).double(), torch.eye(3, dtype=F64), torch.tensor([1.0, 0.3, 0.1]).double()),
    eta=1.0,
)


def test_a_flow_is_steered_from_noise_alone():
    """σ_T = 1 and α_T = 0: x_T says nothing, and x̂_0(x_T) is the mean; log Z beside plain importance sampling."""
    assert float(FLOW.schedule.sigma[-1]) == 1
    reward = measurement(matrix([[1.0, 1.0, 0.0]]), torch.tensor([2.0]), tolerance=0.2)
    kernel = Steered(FLOW, reward)
    check_kernel(kernel, rows=6, proposal=True)
    plain, found = (ts.search(k, reward, ts.BestOfN(n=n), batch_size=4096) for k, n in ((FLOW, 16_000), (kernel, 2000)))
    assert abs(found.log_z - plain.log_z) < 4 * math.hypot(found.log_z_se, plain.log_z_se)
    assert found.diagnostics["ess"] / 2000 > 4 * plain.diagnostics["ess"] / 16_000


def load(name: str, root: Path) -> DiffusersKernel:
    return DiffusersKernel.from_pretrained(str(tiny.checkpoint(name, root)), num_steps=3, device="cpu")


def steer(kernel: DiffusersKernel, reward: Reward, prompts: list[str]) -> ts.SearchResult:
    steered = Steered(kernel, reward, pilot=2, prompts=prompts)
    x = torch.randn(2, *kernel.state_shape, generator=torch.Generator().manual_seed(0))
    encoded = steered.encode(prompts * 2) if prompts else {}
    cond = {k: getattr(v, "value", v) for k, v in encoded.items()} | {"task": torch.arange(2)}
    law = steered.transition(x, torch.tensor([3, 2]), cond)
    assert not torch.equal(law.mean, law.base_mean)
    assert torch.isfinite(law.rewards).all()
    return ts.search(steered, reward, ts.FeynmanKac(num_particles=2), prompts=prompts or None)


def test_latents_of_a_pipeline_are_states(tiny_root):
    kernel = load("sd", tiny_root)
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    reward = measurement(masked(mask), torch.zeros(128), tolerance=2.0)
    found = steer(kernel, reward, ["a cat"])
    assert found.diagnostics["measured"] == {"nfe": 6}
    with pytest.raises(ValueError, match=r"a pilot of DiffusersKernel without prompts.*needs prompts"):
        ts.search(Steered(kernel, reward), reward, ts.BestOfN(n=2), prompts=["a cat"])


def test_decoded_samples_of_a_pipeline_are_seen_through_its_decoder(tiny_root):
    kernel = load("sd", tiny_root)
    reward = measurement(pooled(4), torch.full((3, 4, 4), 0.5), tolerance=0.3, of="sample")
    found = steer(kernel, reward, ["a cat"])
    assert found.cost.reward_calls == 2 * 3 + 2
    assert found.cost.decodes == 2 * 3 + 2
    assert found.cost.backward_nfe == 0


def test_pixels_of_a_pipeline_are_states_and_samples(tiny_root):
    kernel = DiffusersKernel.from_pretrained(
        str(tiny.checkpoint("unconditional", tiny_root)), num_steps=3, device="cpu"
    )
    channels = kernel.state_shape[0]
    for of in ("state", "sample"):
        side = kernel.state_shape[1] // 4
        steer(kernel, measurement(pooled(4), torch.zeros(channels, side, side), tolerance=0.5, of=of), [])
