"""Chains from given images: where they begin, how long they are, which image is whose."""

import math

import pytest
import torch

import treesearch as ts
from tests.support import kernels
from treesearch.backends.base import Guided, describe, shift_mean
from treesearch.backends.chains.inversion import invert
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.backends.guidance import Steered
from treesearch.backends.roots import Rooted
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards import masked, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
SHAPE, T = (1, 2, 2), 8
IMAGES = torch.tensor([[0.5, -0.3, 0.2, 0.9], [-0.8, 0.1, 0.7, -0.2], [0.0, 0.6, -0.5, 0.4]], dtype=F64).view(3, *SHAPE)
KEEP = torch.tensor([[True, True], [False, False]]).expand(SHAPE)
LAST = 1e-9  # of float64 and a fixed point of 200 evaluations a level


def states(eta=1.0):
    return GaussianStates(torch.zeros(SHAPE, dtype=F64), 0.3 * torch.eye(4, dtype=F64), num_steps=T, eta=eta)


class Asked(type(states())):
    """One that takes prompts."""

    def encode(self, prompts):
        return {"said": torch.tensor([float(p) for p in prompts], dtype=F64)}


def path():
    return invert(states(), IMAGES, iterations=200)


@pytest.mark.parametrize("level", [None, 5, 1])
def test_a_chain_without_noise_leads_back_to_the_image(level):
    kernel = Rooted(states(0.0), path()[:, :1], level=level)
    result = ts.search(kernel, kernels.total, ts.BestOfN(n=2), budget=ts.Budget(nfe=2 * kernel.num_steps))
    assert result.cost.nfe == 2 * (level or T)
    assert (result.samples - IMAGES[0]).abs().max() < LAST


def test_images_are_tasks_in_shared_batches_and_resume_where_they_were(tmp_path):
    kernel = Rooted(Asked(torch.zeros(SHAPE, dtype=F64), 0.3 * torch.eye(4, dtype=F64), num_steps=T), path(), level=4)
    half, whole = ts.Budget(nfe=48), ts.Budget(nfe=96)
    words = {"prompts": ["0", "1", "2"], "seed": 3}
    straight = ts.search(kernel, kernels.total, ts.TreeSearch(), budget=whole, **words)
    ts.search(kernel, kernels.total, ts.TreeSearch(), budget=half, store=tmp_path / "run", **words)
    resumed = ts.resume(tmp_path / "run", kernel=kernel, reward=kernels.total, budget=whole)
    for i, task in enumerate(straight.tasks):
        assert torch.equal(task.samples, resumed.tasks[i].samples)
        away = (task.samples[:, None] - IMAGES).flatten(2).norm(dim=2).mean(0)
        assert int(away.argmin()) == i
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        ts.search(kernel, kernels.total, ts.BestOfN(n=1), budget=whole, prompts=["0", "1"])
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        ts.search(Clamp(states(), KEEP, path()), kernels.total, ts.BestOfN(n=1), budget=whole, prompts=["0", "1"])
    with pytest.raises(ValueError, match="3 images are as many tasks"):
        ts.search(kernel, kernels.total, ts.BestOfN(n=1), budget=whole)


def test_noised_images_have_the_marginal_of_their_level():
    kernel = Rooted(states(), IMAGES[None, :1], level=5, noised=True)
    noise = torch.randn(4, *SHAPE, dtype=F64)
    schedule = states().chain.schedule
    want = float(schedule.alpha[5]) * IMAGES[:1] + float(schedule.sigma[5]) * noise
    assert torch.allclose(kernel.prior(noise), want, rtol=0, atol=1e-15)
    assert describe(kernel).stochastic[0]
    assert not describe(Rooted(states(), path(), level=5)).stochastic[0]


def test_log_z_is_that_of_the_chain_from_the_image():
    """A Gaussian chain from a point is Gaussian: E exp(Σ x_0) in closed form."""
    kernel = Rooted(states(), path()[:, :1], level=3)
    mean, var = path()[3, :1], 0.0
    for t in (3, 2, 1):
        law = states().transition(mean, torch.tensor([t]))
        slope = (states().transition(mean + 1, torch.tensor([t])).mean - law.mean).mean()
        mean, var = law.mean, float(slope) ** 2 * var + float(law.std.max()) ** 2
    exact = float(mean.sum()) + 4 * var / 2
    draws = ts.search(kernel, kernels.total, ts.BestOfN(n=4_000), budget=ts.Budget(nfe=12_000)).tasks[0]
    assert draws.log_z == pytest.approx(exact, abs=5 * math.sqrt((math.exp(4 * var) - 1) / 4_000))


def test_what_is_kept_is_the_source_bitwise_and_what_is_not_differs():
    kernel = Rooted(Clamp(states(), KEEP, path()), path(), level=5)
    asked = torch.tensor([0, 1, 2, 1])
    x = kernel.prior(torch.zeros(4, *SHAPE, dtype=F64), {"task": asked, "pictures": torch.tensor(3)})
    for t in range(5, 0, -1):
        law = kernel.transition(x, torch.full((4,), t), {"task": asked})
        x = law.sample(torch.randn(4, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(t)))
        assert torch.equal(x[:, KEEP], path()[t - 1, asked][:, KEEP])
    assert torch.equal(x[:, KEEP], IMAGES[asked][:, KEEP])
    assert (x - IMAGES[asked])[:, ~KEEP].abs().min() > 1e-3


def test_images_may_have_masks_of_their_own():
    masks = torch.stack([KEEP, ~KEEP, KEEP])
    kernel = Rooted(Clamp(states(), masks, path()), path(), level=2)
    task = torch.tensor([1, 0])
    x = kernel.prior(torch.zeros(2, *SHAPE, dtype=F64), {"task": task, "pictures": torch.tensor(3)})
    law = kernel.transition(x, torch.full((2,), 2), {"task": task})
    assert torch.equal(law.std.expand_as(x) == 0, masks[task])
    assert torch.equal(kernel.held(x, {"task": task}), masks[task])


def test_it_is_a_kernel_and_so_is_what_is_around_it():
    rooted = Rooted(Clamp(states(), KEEP, path()[:, 0]), path()[:, :1], level=5)
    check_kernel(rooted)
    seen = measurement(masked(~KEEP), IMAGES[1][~KEEP], tolerance=0.3)
    around = Steered(rooted, seen)
    assert around.num_steps == len(around.chain.schedule.timestep) == 5
    check_kernel(around, proposal=True)


def test_guides_inside_stay_and_tables_by_level_are_cut():
    half = shift_mean(lambda x, t, law, cond: 0.1 * law.std)
    rooted = Rooted(Guided(states(), half, "half"), path(), level=3)
    law = rooted.transition(path()[3], torch.full((3,), 3))
    assert law.base_mean is not None
    assert len(describe(rooted).rows_per_nfe) == 4
    assert rooted.base_law == "GaussianStates from 3 images inverted to t = 3"
    one, other = (Rooted(states(), path()[:, [i]], level=3).fingerprint for i in (0, 1))
    assert one != other
    assert "half" in str(rooted.fingerprint)


@pytest.mark.parametrize(
    ("kernel", "given", "settings", "words"),
    [
        (states(), lambda: path(), {"level": 0}, "level is 0"),
        (states(), lambda: path(), {"level": T + 1}, "level is 9"),
        (states(), lambda: IMAGES[None], {}, "noised=True"),
        (states(), lambda: path()[:, :0], {}, "path has shape"),
        (states(), lambda: path()[..., :1], {}, "path has shape"),
        (states(), lambda: path() * torch.nan, {}, "not finite"),
        (LinearGaussian(dim=2), lambda: torch.zeros(1, 1, 2), {"noised": True, "level": 99}, "level is 99"),
    ],
)
def test_mistakes_are_named(kernel, given, settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Rooted(kernel, given(), **settings)
