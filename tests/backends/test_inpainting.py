"""Known entries that a model was not trained with: the conditional law by weights, replacement as a law of its own."""

import math

import pytest
import torch

import treesearch as ts
from tests.support.laws import populations, unbiased
from treesearch.backends.base import Gaussian
from treesearch.backends.chains.diffusion import Chain, DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.exact.moments import Moments
from treesearch.backends.exact.teleport import Teleport
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.trajectory import TrajectoryKernel
from treesearch.backends.models.unet1d import TrajectoryNetwork
from treesearch.backends.wrappers.inpainting import Clamp, Condition
from treesearch.rewards.analytic import constant
from treesearch.rewards.channels import Channels, known
from treesearch.testing import check_kernel

F64 = torch.float64
TOLERANCE = 0.5
WIDE = 8192


def matrix(value):
    return torch.tensor([[value]], dtype=F64)


BASE = GaussianTrajectories.of_system(
    matrix(0.9), matrix(0.7), matrix(-0.5), horizon=3, start=1.0, noise=0.5, behaviour=0.6, num_steps=8
)
MASK = torch.tensor([[True, False], [False, False], [True, False]])
VALUES = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [-0.4, math.nan]], dtype=F64)
CONDITION = Condition(BASE, MASK, VALUES, tolerance=TOLERANCE)
CLAMP = Clamp(BASE, MASK, VALUES)
NOTHING = constant(0.0)


def conditional():
    """Mean, covariance and log density of the chain's law given the values up to the tolerance."""
    mean, cov = BASE.law
    seen, y = MASK.flatten(), VALUES[MASK]
    noisy = cov[seen][:, seen] + TOLERANCE**2 * torch.eye(2, dtype=F64)
    gain, gap = cov[:, seen] @ torch.linalg.inv(noisy), y - mean[seen]
    log_p = -0.5 * (gap @ torch.linalg.solve(noisy, gap) + torch.logdet(noisy) + 2 * math.log(2 * math.pi))
    return mean + gain @ gap, cov - gain @ cov[seen], float(log_p)


def moments(kernel, method, rollouts, seed=0):
    """Mean and covariance of the weighted samples of a search without a reward."""
    budget = ts.Budget(nfe=rollouts * kernel.num_steps)
    result = ts.search(kernel, NOTHING, method, budget=budget, batch_size=WIDE, seed=seed)
    weight = torch.softmax(torch.as_tensor(result.log_weights), 0)
    x = result.samples.double().flatten(1)
    mean = weight @ x
    return mean, (x - mean).T @ ((x - mean) * weight[:, None])


def errors(kernel, method, rollouts=16_000, seed=0):
    """Largest error of the mean, and of the covariance as a share of its norm."""
    mean, cov = moments(kernel, method, rollouts, seed)
    want_mean, want_cov, _ = conditional()
    return float((mean - want_mean).abs().max()), float((cov - want_cov).norm() / want_cov.norm())


METHODS = {
    "importance sampling": (ts.BestOfN(), 16_000),
    "feynman-kac": (ts.FeynmanKac(num_particles=16_000, ess_threshold=0.5), 16_000),
}


@pytest.mark.parametrize("name", METHODS)
def test_condition_has_the_mean_and_covariance_of_the_conditional_law(name):
    mean, cov = errors(CONDITION, *METHODS[name])
    assert mean < 0.05
    assert cov < 0.1


def test_tree_sampling_over_condition_aims_at_the_conditional_mean():
    mean, _ = errors(CONDITION, ts.TreeSampling(), 8000)
    assert mean < 0.1


def test_condition_estimates_the_density_of_the_values_without_bias():
    single = ts.search(CONDITION, NOTHING, ts.BestOfN(n=30_000), batch_size=WIDE)
    unbiased(torch.exp(torch.as_tensor(single.log_weights) - conditional()[2]))
    method = ts.FeynmanKac(num_particles=100, ess_threshold=0.5)
    unbiased(populations(CONDITION, NOTHING, method, conditional()[2], 400))


def test_without_weights_the_same_proposal_is_off():
    class Unweighted:
        def __getattr__(self, name):
            if name.startswith("__") or name == "prior_log_weight":
                raise AttributeError(name)
            return getattr(CONDITION, name)

        def transition(self, x, t, cond=None):
            law = CONDITION.transition(x, t, cond).law
            return Gaussian(law.mean, law.std, law.endpoint)

    mean, _ = errors(Unweighted(), ts.BestOfN())
    assert mean > 0.1


def test_replacement_is_another_law_and_says_so():
    mean, _ = errors(CLAMP, ts.BestOfN())
    assert mean > 0.1
    assert "law of its own" in CLAMP.departs
    assert getattr(CONDITION, "departs", None) is None


def test_replaced_entries_are_the_values_noised_at_every_level():
    x, t = BASE.prior(torch.randn(4000, 3, 2)), torch.full((4000,), 5)
    alpha, sigma = (float(v[4]) for v in (BASE.chain.schedule.alpha, BASE.chain.schedule.sigma))
    law = CLAMP.transition(x, t)
    below = law.sample(torch.randn(4000, 3, 2, generator=torch.Generator().manual_seed(0)))[:, MASK]
    assert below.mean(0).tolist() == pytest.approx((alpha * VALUES[MASK]).tolist(), abs=4 * sigma / 4000**0.5)
    assert below.std(0).tolist() == pytest.approx([sigma, sigma], rel=0.05)
    assert (law.endpoint[:, MASK] == VALUES[MASK]).all()
    free = BASE.transition(x, t)
    torch.testing.assert_close(law.mean[:, ~MASK], free.mean[:, ~MASK], rtol=0, atol=0)
    done = CLAMP.transition(x, torch.ones_like(t)).sample(torch.randn(4000, 3, 2))
    assert (done[:, MASK] == VALUES[MASK]).all()


def test_conformance():
    check_kernel(CONDITION, proposal=True)
    check_kernel(CLAMP)


def test_replacement_is_noisy_where_the_base_kernel_is_not():
    still = DiffusionKernel(lambda x, t: x, state_shape=(2,), schedule=Schedule.flow(torch.linspace(0, 1, 5)), eta=0.0)
    kernel = Clamp(still, torch.tensor([True, False]), torch.zeros(2))
    assert kernel.stochastic.tolist() == [True, False, True, True, True]
    check_kernel(kernel)


@pytest.fixture(scope="module")
def planner():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TrajectoryNetwork(3, (8, 16))
    bars = torch.linspace(0.99, 0.01, 100)
    return TrajectoryKernel(
        network,
        channels=Channels(2, 1),
        normalisation=Normalisation((1.0, 0.0, 0.0), (2.0, 1.0, 1.0)),
        horizon=8,
        schedule=Schedule.variance_preserving(bars, 6, prediction="sample"),
    )


def test_a_way_point_beside_the_start_that_the_model_knows(planner):
    mask = torch.zeros(8, 3, dtype=torch.bool)
    mask[4, :2] = mask[0, 0] = True  # the start is the model's own: it must not be weighted twice
    kernel = Condition(planner, mask, torch.full((8, 3), 0.5), tolerance=0.2)
    prompts = [known([3.0, 1.0]), known([-3.0, 0.0], [2.0, 2.0])]
    check_kernel(kernel, prompts=prompts, proposal=True, atol=1e-4)
    result = ts.search(kernel, NOTHING, ts.BestOfN(n=8), prompts=prompts)
    for task, prompt in zip(result.tasks, prompts, strict=True):
        torch.testing.assert_close(task.samples[:, 0, :2], torch.tensor(prompt["start"]).expand(8, 2))
        gap = (task.samples[:, 4, :2] - torch.tensor([2.0, 0.5])) / torch.tensor([2.0, 1.0])
        assert torch.isfinite(task.log_weights).all()
        assert gap.abs().min() < 1.0


def test_entries_that_the_model_knows_carry_no_weight(planner):
    mask = torch.zeros(8, 3, dtype=torch.bool)
    mask[0, :2] = True
    cond = planner.encode([known([3.0, 1.0])] * 4)
    kernel = Condition(planner, mask, torch.full((8, 3), 9.0))
    x = kernel.prior(torch.randn(4, 8, 3), cond)
    assert not kernel.prior_log_weight(x, cond).any()
    for t in (6, 1):
        law = kernel.transition(x, torch.full((4,), t), cond)
        assert not law.log_weight(law.sample(torch.randn(4, 8, 3))).any()


def test_fingerprints_tell_masks_values_and_tolerances_apart():
    kernels = [
        CONDITION,
        CLAMP,
        Condition(BASE, MASK, VALUES, tolerance=0.2),
        Condition(BASE, MASK, VALUES + 1, tolerance=TOLERANCE),
        Condition(BASE, ~MASK, torch.zeros(3, 2), tolerance=TOLERANCE),
    ]
    assert len({kernel.fingerprint for kernel in kernels}) == len(kernels)
    again = Condition(BASE, MASK, VALUES, tolerance=TOLERANCE)
    assert again.fingerprint == CONDITION.fingerprint


def test_other_entries_may_be_known_to_a_kernel_inside():
    other = torch.zeros_like(MASK)
    other[tuple((~MASK).nonzero()[0])] = True
    both = Condition(Condition(BASE, MASK, VALUES), other, torch.zeros(3, 2))
    z = torch.randn(4, 3, 2, dtype=torch.float64)
    inner = both.kernel.prior_log_weight(z)
    assert not torch.equal(both.prior_log_weight(z), inner)


def teleported():
    return Teleport(BASE, 0.5, Moments.of(1 + torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0)), 3))


def still():
    chain = GaussianTrajectories(BASE.mean, BASE.cov, channels=BASE.channels, num_steps=4, eta=0.0)
    assert isinstance(chain.chain, Chain)
    return chain


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda: Clamp(LinearGaussian(), torch.ones(1, dtype=torch.bool), torch.zeros(1)), TypeError, "noise levels"),
        (lambda: Clamp(BASE, MASK[:2], VALUES), ValueError, r"mask has shape \(2, 2\), expected .*\(3, 2\)"),
        (lambda: Clamp(BASE, MASK, VALUES[0]), ValueError, "values has shape"),
        (lambda: Clamp(BASE, MASK.float(), VALUES), ValueError, "mask must be bool"),
        (lambda: Clamp(BASE, torch.zeros_like(MASK), VALUES), ValueError, "a known entry"),
        (lambda: Clamp(BASE, ~MASK, VALUES), ValueError, "finite"),
        (lambda: Condition(BASE, MASK, VALUES, tolerance=0.0), ValueError, "tolerance is 0.0"),
        (lambda: Condition(teleported(), MASK, VALUES), ValueError, "x_T of Teleport is more than noise"),
        (lambda: Condition(still(), MASK, VALUES), ValueError, "eta > 0"),
    ],
)
def test_bad_input(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
