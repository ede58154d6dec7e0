"""Guides of trajectories: policy guidance as published and consistent, on closed forms; Diffuser; guidance scales."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import treesearch as ts
from experiments.planning import generate_data
from tests.support import laws
from tests.support.beds import BEDS
from tests.support.laws import populations, unbiased
from treesearch.backends.base import Guided, describe, shift_mean
from treesearch.backends.exact.gaussian import Tilt
from treesearch.backends.exact.gaussian_trajectories import GaussianTrajectories
from treesearch.backends.guidance import TDS, Diffuser, GuidanceScales, PolicyGuided
from treesearch.cli.show import read_result_of
from treesearch.rewards.analytic import linear, quadratic
from treesearch.rewards.trajectories.policy import PolicyLikelihood
from treesearch.testing import check_kernel

F64 = torch.float64
BED, LINEAR = BEDS["gaussian"], linear(0.8)
FK = ts.FeynmanKac(num_particles=8, ess_threshold=0.8)


def matrix(value):
    return torch.tensor([[value]], dtype=F64)


PLANS = GaussianTrajectories.of_system(
    matrix(0.9), matrix(0.7), matrix(-0.5), horizon=3, start=1.0, noise=0.5, behaviour=0.6, num_steps=8
)
GAIN, OFFSET = matrix(0.4), torch.tensor([0.3], dtype=F64)
POLICY = PolicyLikelihood(lambda s: s @ GAIN.T + OFFSET, PLANS.channels)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def levels(t, n):
    return torch.full((n,), t)


# Policy guidance as published.


@pytest.mark.parametrize("at", ["noised", "denoised"])
def test_without_a_coefficient_the_published_sampler_is_the_base_bit_for_bit(at):
    guided = PolicyGuided(PLANS, POLICY, coefficient=0.0, at=at)
    one, other = (ts.search(k, POLICY, ts.BestOfN(n=6), seed=3) for k in (PLANS, guided))
    assert torch.equal(one.samples, other.samples)
    assert other.cost.nfe == one.cost.nfe


def test_the_published_schedule():
    """λ_k = c ((1 - k/T) + .3 sin(π (k + 1)/T)), k steps taken, none before the last."""
    table = PolicyGuided(PLANS, POLICY, coefficient=2.0).schedule
    for k in range(7):
        assert table[8 - k].item() == pytest.approx(2 * ((1 - k / 8) + 0.3 * math.sin(math.pi * (k + 1) / 8)))
    assert table[:2].tolist() == [0, 0]


@pytest.mark.parametrize("at", ["noised", "denoised"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_published_move_is_along_the_actions_alone(at, normalise):
    guided = PolicyGuided(PLANS, POLICY, coefficient=0.5, at=at, normalise=normalise)
    x, t = normal(4, 3, 2), 5
    alpha = float(PLANS.chain.alpha[t])
    y = x / alpha if at == "noised" else PLANS.transition(x, levels(t, 4)).endpoint
    g = torch.zeros_like(x)
    g[..., 1] = -(y[..., 1] - (0.4 * y[..., 0] + 0.3))  # ∇_a of the unit Gaussian about the policy's action
    if normalise:
        g /= g.flatten(1).norm(dim=1)[:, None, None]
    want = PLANS.transition(x + alpha * float(guided.schedule[t]) * g, levels(t, 4))
    found = guided.transition(x, levels(t, 4))
    torch.testing.assert_close(found.mean, want.mean, rtol=1e-12, atol=1e-12)
    assert found.log_weight(found.sample(x)).abs().max() == 0
    assert describe(guided).rewards_per_nfe[t] == 1
    assert guided.rows_per_nfe[t] == (2 if at == "denoised" else 1)
    assert guided.rows_per_nfe[1] == 1  # not guided


def test_the_published_sampler_says_that_its_law_is_its_own(tmp_path):
    kernel = PolicyGuided(PLANS, POLICY)
    result = ts.search(kernel, POLICY, ts.BestOfN(n=4), store=tmp_path / "run")
    assert kernel.departs in result.diagnostics["warnings"]
    assert "departs" in [str(flag.name) for flag in result.certificate().flags]
    assert kernel.departs in read_result_of(tmp_path / "run")[1].diagnostics["warnings"]
    plain = ts.search(TDS(PLANS, POLICY), POLICY, ts.BestOfN(n=4))
    assert "departs" not in [str(flag.name) for flag in plain.certificate().flags]


# The consistent form samples p(τ) Π π(a|s)^λ.


def covariance_error(samples, target):
    return float((torch.cov(samples.flatten(1).T) - target).norm() / target.norm())


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
def test_smc_over_the_consistent_proposal_has_the_target_covariance_and_the_published_sampler_has_not(lam):
    _, cov = PLANS.reweighted(GAIN, OFFSET, 1.0, lam)
    n = 6_000
    smc = ts.FeynmanKac(num_particles=n, lam=lam, schedule=(8, 6, 4, 2, 0))
    exact = ts.search(TDS(PLANS, POLICY, lam=lam), POLICY, smc, batch_size=n).draw(n)
    ours = covariance_error(exact, cov)
    published = min(
        covariance_error(ts.search(PolicyGuided(PLANS, POLICY, coefficient=c), POLICY, ts.BestOfN(n=n)).samples, cov)
        for c in (0.05, 0.2, 0.5)
    )
    assert ours < 0.3 * published


def test_the_target_s_normaliser_is_unbiased_over_the_consistent_proposal():
    """Z = E_p Π π(a|s)^λ in closed form: a Gaussian integral over the actions' residuals."""
    lam = 0.7
    mean, cov = PLANS.law
    each = torch.cat([-GAIN, torch.eye(1, dtype=F64)], 1)
    residual = torch.block_diag(*[each] * 3)
    m, c = residual @ mean - OFFSET.repeat(3), residual @ cov @ residual.T
    wide = torch.eye(3, dtype=F64) + lam * c
    log_z = float(-0.5 * lam * m @ torch.linalg.solve(wide, m) - 0.5 * torch.logdet(wide))
    log_z -= 0.5 * lam * 3 * math.log(2 * math.pi)
    method = replace(FK, lam=lam)
    unbiased(populations(TDS(PLANS, POLICY, lam=lam), POLICY, method, log_z, 600))


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda: PolicyGuided(PLANS, POLICY, coefficient=-1.0), ValueError, "coefficient is -1.0"),
        (lambda: PolicyGuided(PLANS, POLICY, at="there"), ValueError, "unknown at"),
        (lambda: PolicyGuided(BED, LINEAR), TypeError, "no `channels`"),
        (lambda: PolicyGuided(TDS(PLANS, POLICY), POLICY), TypeError, "guided by"),
        (lambda: Diffuser(BED, LINEAR, scale=math.inf), ValueError, "scale is inf"),
        (lambda: Diffuser(BED, LINEAR, n_guide_steps=0), ValueError, "n_guide_steps"),
        (lambda: Diffuser(BED, LINEAR, t_stopgrad=99), ValueError, "t_stopgrad"),
        (lambda: GuidanceScales(BED, (0.0, 1.0), (3,)), TypeError, "no guide to scale"),
        (lambda: GuidanceScales(TDS(BED, LINEAR), (1.0, 1.0), (3,)), ValueError, "each once"),
        (lambda: GuidanceScales(TDS(BED, LINEAR), (1.0,), (99,)), ValueError, "outside 1..T"),
    ],
)
def test_bad_settings_are_refused(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()


# Diffuser.


def test_diffuser_moves_the_mean_along_the_gradient_by_the_variance():
    reward = quadratic(1.5, 1.5)
    guided = Diffuser(BED, reward, scale=0.3, n_guide_steps=2, t_stopgrad=1)
    x = normal(3, *BED.state_shape)
    base, law = (k.transition(x, levels(2, 3)) for k in (BED, guided))
    mean = base.mean
    for _ in range(2):
        leaf = mean.detach().clone().requires_grad_()
        slope = torch.autograd.grad(reward.attached(leaf, None).sum(), leaf)[0]
        mean = mean + 0.3 * base.std**2 * slope
    torch.testing.assert_close(law.mean, mean)
    assert torch.equal(law.base_mean, base.mean)
    assert torch.equal(guided.transition(x, levels(1, 3)).mean, BED.transition(x, levels(1, 3)).mean)
    assert describe(guided).rewards_per_nfe[:3] == (0, 0, 2)


def test_diffuser_at_the_state_takes_the_step_from_the_moved_state():
    guided = Diffuser(PLANS, POLICY, scale=0.4, at="state")
    x, t = normal(3, 3, 2), levels(4, 3)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(POLICY.attached(leaf, None).sum(), leaf)[0]
    want = PLANS.transition(x + 0.4 * PLANS.chain.std[4].double() ** 2 * slope, t)
    torch.testing.assert_close(guided.transition(x, t).mean, want.mean)
    assert "without weights" in guided.departs


def test_z_is_unbiased_over_diffuser():
    log_z = BED.tilted(Tilt(c=0.8)).log_z
    unbiased(populations(Diffuser(BED, LINEAR, scale=0.5), LINEAR, FK, log_z, 800))


def test_a_diffuser_without_weights_is_seen():
    class Unweighted:
        def __getattr__(self, name):
            return getattr(Diffuser(BED, LINEAR, scale=1.0), name)

        def transition(self, x, t, cond=None):
            return replace(Diffuser(BED, LINEAR, scale=1.0).transition(x, t, cond), base_mean=None)

    gap, se = laws.error(populations(Unweighted(), LINEAR, FK, BED.tilted(Tilt(c=0.8)).log_z, 400))
    assert abs(gap) > 10 * se


# Guidance scales.

STEPS = BED.num_steps
SCALED = GuidanceScales(TDS(BED, LINEAR), (0.0, 0.5, 1.0), (STEPS // 2,))


def test_scales_are_a_kernel():
    check_kernel(SCALED, proposal=True)
    assert SCALED.state_shape[0] == BED.state_shape[0] + 1


def test_the_mean_is_scaled_and_0_is_the_base():
    x = torch.cat([normal(3, *BED.state_shape), torch.tensor([[0.0], [0.5], [1.0]], dtype=F64)], 1)
    t = levels(STEPS, 3)
    guided, base = TDS(BED, LINEAR).transition(x[:, :-1], t), BED.transition(x[:, :-1], t)
    noise = torch.zeros_like(x)
    found = SCALED.transition(x, t).sample(noise)[:, :-1]
    want = base.mean + torch.tensor([[0.0], [0.5], [1.0]], dtype=F64) * (guided.mean - base.mean)
    torch.testing.assert_close(found, want)


def test_scales_are_drawn_evenly_at_their_levels_and_kept_at_others():
    n = 6_000
    start = SCALED.prior(normal(n, *SCALED.noise_shape))
    kept = SCALED.transition(start, levels(STEPS, n)).sample(normal(n, *SCALED.noise_shape, seed=1))
    fresh = SCALED.transition(kept, levels(STEPS // 2, n)).sample(normal(n, *SCALED.noise_shape, seed=2))
    assert torch.equal(start[:, -1], kept[:, -1])
    for drawn in (start, fresh):
        shares = [(drawn[:, -1] == w).double().mean().item() for w in SCALED.scales]
        np.testing.assert_allclose(shares, 1 / 3, atol=4 * math.sqrt(2 / 9 / n))
    assert (start[:, -1] != fresh[:, -1]).double().mean().item() == pytest.approx(2 / 3, abs=0.03)


def test_z_is_unbiased_over_scales():
    unbiased(populations(SCALED, LINEAR, FK, BED.tilted(Tilt(c=0.8)).log_z, 700))


def test_uct_over_scales_prefers_the_ones_that_pay():
    method = ts.DiffusionTreeSearch(widening_c=1.0, widening_alpha=0.5, wave=1)
    kernel = GuidanceScales(TDS(BED, linear(2.0), lam=2.0), (0.0, 1.0), (4, 2))
    result = ts.search(kernel, linear(2.0), method, budget=ts.Budget(nfe=200 * STEPS))
    roots = result.tree.parent == 0
    scales = result.tasks[0].fetch(np.flatnonzero(roots))
    assert scales.shape[0] == roots.sum()
    best = result.best(1)[1]
    plain = ts.search(BED, linear(2.0), method, budget=ts.Budget(nfe=200 * STEPS)).best(1)[1]
    assert best > plain


def test_a_guide_without_weights_cannot_be_scaled():
    kernel = GuidanceScales(Guided(BED, shift_mean(lambda x, t, base, cond: 0.1 * base.std)), (0.0, 2.0), (3,))
    check_kernel(kernel, proposal=True)
    published = GuidanceScales(PolicyGuided(PLANS, POLICY), (0.0, 1.0), (3,))
    with pytest.raises(TypeError, match="no shift to scale"):
        ts.search(published, POLICY, ts.BestOfN(n=1))


# Data under a target policy.


def test_generated_data_are_nearer_to_the_target_than_the_published_guidance(tmp_path, monkeypatch, capsys):
    import minari

    args = generate_data.Args(
        n=600, seeds=(0,), coefficients=(0.3,), datasets=tmp_path / "sets", out=tmp_path / "rows.json"
    )
    generate_data.main(args)
    found = generate_data.json.loads(args.out.read_text())[0]["figures"]
    published = [found[f"guided, coefficient {c:g}"][0] for c in args.coefficients]
    for name in ("fk", "dts"):
        assert found[name][0]["mean error"] < 0.5 * min(row["mean error"] for row in published)
        assert found[name][0]["covariance error"] < min(row["covariance error"] for row in published)
    assert found["exact"][0]["covariance error"] < found["fk"][0]["covariance error"]
    assert "| fk |" in capsys.readouterr().out
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(args.datasets))
    for name in ("gaussian-unguided-v0", "gaussian-fk-v0", "gaussian-guided-coefficient-0_3-v0"):
        data = minari.load_dataset(name)
        assert data.total_episodes == 600
        assert data.storage.metadata["treesearch"]["lam"] == 1.0


def test_figures_of_data_by_hand():
    bed = generate_data.Bed(
        kernel=PLANS, policy=lambda s: s, model=lambda s, a: s + a, returns=linear(1.0), cell=1.0, position=(0,)
    )
    samples = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [2.5, 2.5]]], dtype=F64)
    found = generate_data.figures(samples, replace(bed, returns=None), samples)
    assert found["log π"] == pytest.approx((-0.5 - 1.5 * math.log(2 * math.pi)) / 3)
    assert found["dynamics error"] == pytest.approx(math.sqrt(0.25 / 2))
    assert math.isnan(found["return"])
    assert generate_data.coverage(samples[:, :2, :1], samples[..., :1], 1.0) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="unknown kind"):
        generate_data.generate(PLANS, lambda s: s, "other", 2)
    with pytest.raises(TypeError, match="no `channels`"):
        generate_data.generate(BED, lambda s: s, "fk", 2)
