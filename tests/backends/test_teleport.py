"""The closed form of Gaussian data, and chains that begin by it."""

import math
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

import treesearch as ts
from tests.support.flows import (
    F64,
    THREE,
    Around,
    GaussianFlow,
    between,
    diagonal,
    draws,
    log_snr,
    run,
    scaled_linear,
    spectrum,
)
from treesearch.backends import mnist, teleport
from treesearch.backends.base import describe, optional
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.moments import Moments
from treesearch.rewards.images.image import brightness
from treesearch.testing import check_kernel


def by_entry():
    of = log_snr(4)
    return replace(of, alpha=of.alpha[:, None].expand(-1, 3), sigma=of.sigma[:, None].expand(-1, 3))


def level(snr):
    """α and σ of a variance preserving path at log α/σ, and their derivatives in it."""
    alpha, sigma = 1 / math.sqrt(1 + math.exp(-2 * snr)), 1 / math.sqrt(1 + math.exp(2 * snr))
    return alpha, sigma, (alpha * sigma**2, -sigma * alpha**2)


def test_the_closed_form_solves_the_flow():
    """Against 2,000 steps of Runge and Kutta's method over the levels of Stable Diffusion, even in log α/σ."""
    moments, x = spectrum(), draws(1, 20)
    bars, steps = scaled_linear(), 2000
    start, end = (0.5 * math.log(bar / (1 - bar)) for bar in (bars[-1], bars[0]))

    def velocity(x, time):
        alpha, sigma, (falls, rises) = level(time)
        endpoint = moments.endpoint(x, alpha, sigma)
        return falls * endpoint + rises / sigma * (x - alpha * endpoint)

    y, h = x, (end - start) / steps
    for i in range(steps):
        time = start + i * h
        k1 = velocity(y, time)
        k2 = velocity(y + h / 2 * k1, time + h / 2)
        k3 = velocity(y + h / 2 * k2, time + h / 2)
        k4 = velocity(y + h * k3, time + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    want = moments.move(x, level(start)[:2], level(end)[:2])
    assert (y - want).norm() / want.norm() < 4e-12


def test_the_endpoint_follows_xi():
    moments, x, flow = spectrum(), draws(3, 20), GaussianFlow(between(50), spectrum())
    (top, noise), (alpha, sigma) = flow.level(50), flow.level(20)
    lam = moments.eigenvalues
    xi = alpha * lam / ((alpha**2 * lam + sigma**2) * (top**2 * lam + noise**2)).sqrt()
    want = (x @ moments.basis.T * xi) @ moments.basis
    assert (moments.endpoint(flow.flow(x, 50, 20), alpha, sigma) - want).abs().max() < 1e-12


def test_what_the_basis_does_not_span_is_noise():
    """As if those directions had no variance."""
    whole = diagonal([0.5, -1.0, 2.0], [4.0, 1.0, 1e-30])
    part = Moments(whole.mean, whole.basis[:2], whole.eigenvalues[:2])
    x = draws(5, 3)
    one, other = ([torch.tensor(v, dtype=F64) for v in pair] for pair in ((0.3, 0.9), (0.8, 0.4)))
    assert (part.move(x, one, other) - whole.move(x, one, other)).abs().max() < 1e-12
    assert (part.endpoint(x, *one) - whole.endpoint(x, *one)).abs().max() < 1e-12


def test_features_emerge_in_the_order_of_their_variance():
    """At timesteps 814, 761, ..., 2 of 0..999, as published; level t is timestep t - 1."""
    levels = spectrum().emergence(Schedule.variance_preserving(scaled_linear(), 1000))
    assert (levels.diff() < 0).all()
    assert [int(level) - 1 for level in (levels[0], levels[1], levels[-1])] == [814, 761, 2]
    schedule, flow = log_snr(400), GaussianFlow(log_snr(400), THREE)
    t, x = int(THREE.emergence(schedule)[1]), THREE.basis[1:2] + flow.level(400)[0] * THREE.mean
    shown = [float((THREE.endpoint(flow.flow(x, 400, s), *flow.level(s)) - THREE.mean)[0, 1]) for s in (t, t + 1)]
    final = float((flow.flow(x, 400, 0) - flow.level(0)[0] * THREE.mean)[0, 1])
    assert shown[0] >= 0.5 * final > 0.98 * shown[1]
    assert int(diagonal([0.0], [1e9]).emergence(log_snr(5))) == 5
    assert int(diagonal([0.0], [1e-9]).emergence(log_snr(5))) == -1  # below what x_0 has left of noise


def test_a_kick_ends_as_the_sensitivity_says():
    flow, x = GaussianFlow(log_snr(20), THREE), draws(1, 3)
    for t in (20, 10, 3):
        for k in range(3):
            kicked = flow.flow(x + 0.1 * THREE.basis[k], t, 0) - flow.flow(x, t, 0)
            assert abs(float(kicked.norm()) / 0.1 - float(THREE.sensitivity(flow.schedule)[t, k])) < 1e-12


def test_teleporting_cuts_the_error_of_the_steps_on_gaussian_data():
    """Published: .0344 to .0111 of one x_T; on our grid the error of every x_T falls, by a fifth on average."""
    plain = GaussianFlow(between(50), spectrum())
    x = draws(64, 20)
    want, kernel = plain.flow(x, 50, 0), teleport(plain, 0.3, spectrum(), gaussian=True)
    assert kernel.num_steps == kernel.chain.schedule.num_steps == 35
    assert describe(kernel).departs is None
    assert torch.equal(kernel.prior(x), plain.flow(x, 50, 35))
    errors = [(end - want).norm(dim=1) for end in (run(plain, x), run(kernel, kernel.prior(x)))]
    assert (errors[1] < errors[0]).all()
    assert errors[1].mean() < 0.9 * errors[0].mean()


def test_moments_are_measured_kept_and_read(tmp_path):
    truth = spectrum()
    states = 1.0 + draws(20000, 20) * truth.eigenvalues.sqrt() @ truth.basis
    found = Moments.of(states.reshape(-1, 4, 5), 6)
    assert found.basis.shape == (6, 4, 5)
    torch.testing.assert_close(found.eigenvalues, truth.eigenvalues[:6], rtol=0.05, atol=0.0)
    assert (found.basis.flatten(1) @ truth.basis[:6].T).abs().diag().min() > 0.98
    assert (found.mean - 1).abs().max() < 0.1
    found.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors")
    torch.testing.assert_close(again.basis.double(), found.basis, rtol=0.0, atol=1e-3)
    bed = GaussianFlow(log_snr(4), truth)
    reshaped = DiffusionKernel(lambda x, t: x, state_shape=(4, 5), schedule=log_snr(4))
    one, other = (teleport(reshaped, 0.5, m) for m in (again, str(tmp_path / "moments.safetensors")))
    assert torch.equal(one.prior(draws(2, 4, 5)), other.prior(draws(2, 4, 5)))
    assert teleport(bed, 0.5, truth).fingerprint != teleport(bed, 0.25, truth).fingerprint
    assert teleport(bed, 0.5, truth).fingerprint != teleport(bed, 0.5, truth, gaussian=True).fingerprint
    wider = replace(truth, eigenvalues=2 * truth.eigenvalues)
    assert teleport(bed, 0.5, truth).fingerprint != teleport(bed, 0.5, wider).fingerprint


def test_a_teleported_chain_is_a_kernel_that_departs():
    bed = GaussianFlow(log_snr(6), spectrum(), eta=1.0)
    kernel = teleport(bed, 0.3, spectrum())
    check_kernel(kernel, rows=5)
    assert "first 2 steps" in describe(kernel).departs
    check_kernel(SecondOrder(kernel), rows=5)

    class Costly(GaussianFlow):
        backward_per_nfe = (0, 1, 2, 3, 4)

        def prior_log_weight(self, x, cond=None):
            return x.sum(1)

    made = teleport(Costly(log_snr(4), spectrum()), 0.5, spectrum())
    assert describe(made).backward_per_nfe == (0, 1, 2)
    assert optional(made, "prior_log_weight") is None

    class Elsewhere(GaussianFlow):
        departs = "a law of its own"

    assert teleport(Elsewhere(log_snr(4), spectrum()), 0.5, spectrum(), gaussian=True).departs == "a law of its own"


def test_the_shipped_moments_are_those_of_digits():
    kernel = teleport(mnist(num_steps=4), skip=0.5)
    assert describe(kernel).num_steps == 2
    found = ts.search(kernel, brightness(), ts.BestOfN(n=3), seed=1)
    assert found.samples.shape == (3, 1, 28, 28)
    assert found.cost.nfe == 6
    mean = Moments.load(files("treesearch.backends").joinpath("weights", "mnist_moments.safetensors")).mean[0]
    assert mean[0].max() < -0.99 < -0.5 < mean[14].max()  # black at the edge, ink in the middle


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: teleport(LinearGaussian(), 0.3, spectrum()), "LinearGaussian is no kernel on a"),
        (lambda: teleport(GaussianFlow(log_snr(4), spectrum()), 0.3, THREE), r"moments are of states \(3,\)"),
        (lambda: teleport(GaussianFlow(log_snr(4), THREE)), "no moments of 'GaussianFlow' are shipped"),
        (lambda: teleport(GaussianFlow(log_snr(4), THREE), 0.3, moments=3), "moments is 3, expected Moments"),
        (lambda: teleport(Around(GaussianFlow(log_snr(4), THREE)), 0.3, THREE), "a chain around an offset"),
        (lambda: teleport(GaussianFlow(by_entry(), THREE), 0.3, THREE), "or one for each entry"),
        *[(lambda s=s: teleport(GaussianFlow(log_snr(4), THREE), s, THREE), "skip is .*, expected a share in")
          for s in (0.0, 0.05, 0.95, 1.0, -1, "x", None, float("nan"))],
        (lambda: Moments(THREE.mean, THREE.basis[:, :2], THREE.eigenvalues), "have shapes"),
        (lambda: Moments(THREE.mean, 2 * THREE.basis, THREE.eigenvalues), "off orthonormal by 3"),
        (lambda: Moments(THREE.mean, THREE.basis, -THREE.eigenvalues), "finite and positive"),
        (lambda: Moments(THREE.mean * torch.nan, THREE.basis, THREE.eigenvalues), "must be finite"),
        (lambda: Moments.of(draws(5, 3), 4), r"rank is 4, expected 1\.\.3"),
    ],
)  # fmt: skip
def test_what_cannot_be_teleported_is_told(make, said):
    with pytest.raises((TypeError, ValueError), match=said):
        make()
