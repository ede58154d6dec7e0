"""Inversion: the deterministic path to a sample, and back."""

from dataclasses import replace

import pytest
import torch

from tests.support import tiny
from tests.support.conditional import cond_of
from tests.support.flows import GaussianFlow, diagonal, draws, log_snr, run
from treesearch.backends.chains import inversion
from treesearch.backends.chains.diffusion import Chain, DiffusionKernel
from treesearch.backends.chains.inversion import invert, walk
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.roots.negative_prompt import unguided

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
F64 = torch.float64
COV = torch.eye(4, dtype=F64) + 0.5


def kernel(steps, eta=0.0):
    return GaussianStates(torch.full((4,), 0.3, dtype=F64), COV, num_steps=steps, eta=eta)


X0 = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def back(path, steps):
    """How far the deterministic chain from the end of a path comes out from its beginning."""
    x = path[-1]
    for t in range(steps, 0, -1):
        x = kernel(steps).transition(x, torch.full((3,), t)).mean
    return float((x - path[0]).abs().max())


def test_the_round_trip_is_exact_at_the_fixed_point():
    path = invert(kernel(10), X0, iterations=30)
    assert path.shape == (11, 3, 4)
    assert torch.equal(path[0], X0)
    assert back(path, 10) < 1e-12
    for t in range(1, 11):
        step = kernel(10).transition(path[t], torch.full((3,), t))
        assert (step.mean - path[t - 1]).abs().max() < 1e-12


def test_one_evaluation_a_level_misses_in_proportion_to_the_step():
    few, many = (back(invert(kernel(n), X0), n) for n in (20, 80))
    assert 0.1 < many / few < 0.5
    assert back(invert(kernel(20), X0, iterations=2), 20) < 0.5 * few


def test_one_evaluation_is_the_published_rule():
    """x_t = α_t/α_s (x_s - σ_s ε) + σ_t ε with ε = ε(x_s, t)."""

    def eps(x, told):
        return 0.3 * x + told[:, None].float() / 1000

    schedule = Schedule.variance_preserving(torch.linspace(0.999, 0.01, 1000), 5)
    path = invert(DiffusionKernel(eps, state_shape=(4,), schedule=schedule), X0.float())
    for t in range(1, 6):
        alpha_s, alpha, sigma_s, sigma = (float(v[s]) for v in (schedule.alpha, schedule.sigma) for s in (t - 1, t))
        noise = eps(path[t - 1], schedule.timestep[t - 1].repeat(3))
        want = alpha / alpha_s * (path[t - 1] - sigma_s * noise) + sigma * noise
        assert (path[t] - want).abs().max() < 1e-5


def test_the_path_is_that_without_noise_whatever_eta():
    assert torch.equal(invert(kernel(6, eta=1.0), X0), invert(kernel(6), X0))


DATA = diagonal([1.0, 0.0, -1.0, 0.2], [1.0, 0.3, 0.1, 0.5])


def flow(steps=8, eta=0.0):
    """From pure noise, where α_T = 0."""
    return GaussianFlow(replace(Schedule.flow(torch.linspace(0, 1, steps + 1)), prediction="sample"), DATA, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_round_trip_is_exact_from_pure_noise(eta):
    """There x̂_0 is the same for every x_T: one evaluation finds it."""
    path = invert(flow(eta=eta), X0, iterations=60)
    assert (run(flow(), path[8]) - X0).abs().max() < 1e-12
    last = invert(flow(), X0)
    assert (flow().transition(last[8], torch.full((3,), 8)).mean - last[7]).abs().max() < 1e-12


def test_one_evaluation_of_a_flow_is_euler_s_step_back():
    """x_t = x_s + (σ_t - σ_s) v(x_s, t), but from pure noise."""

    def v(x, told):
        return 0.3 * x.sin() + told[:, None].float() / 1000

    schedule = Schedule.flow(torch.linspace(0, 1, 6))
    path = invert(DiffusionKernel(v, state_shape=(4,), schedule=schedule), X0.float())
    for t in range(1, 5):
        step = float(schedule.sigma[t] - schedule.sigma[t - 1])
        want = path[t - 1] + step * v(path[t - 1], schedule.timestep[t - 1].repeat(3))
        assert (path[t] - want).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [8, 28])
def test_on_a_flow_it_misses_half_of_what_the_rule_for_noise_would(steps, monkeypatch):
    """α_t/α_s keeps ε̂, where the paths of a flow are nearly straight in v."""
    ours = float((run(flow(steps), invert(flow(steps), X0)[-1]) - X0).norm())
    gains = inversion._gains

    def kept(chain, t, iterations):
        below, here = chain.schedule.alpha[t - 1 : t + 1]
        return [here / below] if here > 0 else gains(chain, t, iterations)

    monkeypatch.setattr(inversion, "_gains", kept)
    assert ours < 0.6 * float((run(flow(steps), invert(flow(steps), X0)[-1]) - X0).norm())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_picture_of_a_flow_pipeline_comes_back(name, tiny_root):
    """From α_T = 0, where nothing of it is left; each evaluation more is a digit or so."""
    text = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    kernel = DiffusersKernel.from_pretrained(
        str(tiny.checkpoint(name, tiny_root)), num_steps=10, device="cpu", height=16, width=16, components=text, eta=0.0
    )
    cond = cond_of(kernel, ["a cat"])
    cond = unguided(kernel, cond) if kernel.family.guided else cond
    assert kernel.chain.schedule.alpha[-1] == 0
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    x0 = kernel.state_of(picture)[None]
    miss = []
    for iterations in (1, 4):
        back = walk(kernel, invert(kernel, x0, cond=cond, iterations=iterations)[-1], 10, cond=cond)
        miss.append(float((back - x0).square().mean().sqrt()))
    assert miss[1] < 0.05 * miss[0]
    assert (kernel.decode(back) - kernel.decode(x0)).abs().max() < 0.02


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_round_trip_is_exact_where_endpoints_are_clipped(eta):
    """Of a sample of the chain itself; x̂_0 and the network's own ε̂ do not add up to x_t where it is clipped."""
    still, noisy = (GaussianFlow(log_snr(10, high=1.0), DATA, eta=e) for e in (0.0, eta))
    for k in (still, noisy):
        k.chain = Chain(k.schedule, eta=k.chain.eta, clip_sample=1.0)
    x0 = run(still, draws(3, 4))
    path = invert(noisy, x0, iterations=150)
    ends = [still.transition(path[t], torch.full((3,), t)).endpoint for t in (1, 2, 3)]
    assert all((end.abs() == 1).any() for end in ends)
    assert (run(still, path[10]) - x0).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda: invert(LinearGaussian(), X0), TypeError, "no path to invert"),
        (lambda: invert(SecondOrder(kernel(4)), X0), TypeError, "hold more than x_t"),
        (lambda: invert(kernel(4), X0[:, :3]), ValueError, r"x0 has shape \(3, 3\)"),
        (lambda: invert(kernel(4), X0, iterations=0), ValueError, "iterations is 0"),
        (lambda: invert(flow(1), X0), ValueError, "from pure noise to clean"),
    ],
)
def test_bad_input(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
