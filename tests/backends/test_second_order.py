"""Solvers with memory as chains: orders on Gaussian data, diffusers' own steps, and branches that are whole paths."""

import itertools

import diffusers
import pytest
import torch
from torch import nn

import treesearch as ts
from tests.support import tiny
from tests.support.flows import F64, THREE, Around, GaussianFlow, draws, law_of, log_snr, run
from treesearch.backends import mnist
from treesearch.backends.base import Guided, Wrapper, describe, optional, shift_mean
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.heun import Heun
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS
from treesearch.rewards.base import Reward
from treesearch.rewards.images.image import brightness
from treesearch.testing import check_kernel

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SHAPE = (2, 4, 4)


class Toy(nn.Module):
    """A fixed smooth function of (x, t), ε-like."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1)
        chance = torch.Generator().manual_seed(0)
        for weight in self.mix.parameters():
            weight.data = 0.3 * torch.randn(weight.shape, generator=chance)

    def forward(self, x, timestep):
        return torch.tanh(self.mix(x) + (timestep / 1000).reshape(-1, 1, 1, 1))


def toy(steps=6, eta=1.0, **options):
    bars = diffusers.DDIMScheduler().alphas_cumprod
    schedule = Schedule.variance_preserving(bars, steps)
    return DiffusionKernel(Toy().requires_grad_(False), state_shape=SHAPE, schedule=schedule, eta=eta, **options)


def errors_of(make, grids):
    """Distance of x_0 to the closed form of the flow, by number of steps."""
    found = []
    for steps in grids:
        bed = GaussianFlow(log_snr(steps), THREE)
        kernel, z = make(bed), draws(50, 3)
        end = run(kernel, kernel.prior(z[:, None]))[:, 0]
        found.append(float((end - bed.flow(z, steps, 0)).norm()))
    return found


@pytest.mark.parametrize(
    ("make", "least", "most"),
    [(SecondOrder, 3.5, 4.5), (lambda k: SecondOrder(k, order=3), 8.0, 40.0), (Heun, 3.5, 4.5)],
    ids=["2m", "3m", "heun"],
)
def test_the_flow_is_solved_at_the_solver_s_order(make, least, most):
    for one, other in itertools.pairwise(errors_of(make, (20, 40, 80))):
        assert least < one / other < most


def sde_errors(make, steps):
    """Of mean and variance of x_0 given one x_T, beside the exact reverse law."""
    bed = GaussianFlow(log_snr(steps), THREE, eta=1.0)
    kernel, (top, noise), (end, left) = make(bed), bed.level(-1), bed.level(0)
    start = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
    size = (len(kernel.state_shape) > 1 and kernel.state_shape[0]) or 1
    mean, cov = torch.zeros(3 * size, dtype=F64), torch.zeros(3 * size, 3 * size, dtype=F64)
    mean[:3] = start
    known = torch.ones(1, *kernel.state_shape, dtype=F64)  # a memory that is not that of a first step

    def at(t):
        return torch.cat([known[:, :1], (known[:, 1:] if t < steps else 0 * known[:, 1:])], 1) if size > 1 else known

    mean, cov = law_of(kernel, mean, cov, at)
    lam = THREE.eigenvalues
    cross, spread, before = end * top * lam + top / end * left**2, end**2 * lam + left**2, top**2 * lam + noise**2
    want_mean, want_var = end * THREE.mean + cross / before * (start - top * THREE.mean), spread - cross**2 / before
    return float((mean[:3] - want_mean).norm()), float((cov.diag()[:3] - want_var).norm())


def test_the_reverse_sde_is_solved_in_law_at_order_two():
    """The mean is exact at any order: x̂_0 is a martingale on the way back, so that D_t - D_1 is 0 on average."""
    makers = (lambda k: k, SecondOrder, lambda k: SecondOrder(k, order=3))
    first, second, third = ([sde_errors(make, n) for n in (20, 40, 80)] for make in makers)
    assert max(mean for errors in (first, second, third) for mean, _ in errors) < 1e-12
    plain, twice, thrice = ([var for _, var in errors] for errors in (first, second, third))
    assert all(1.6 < a / b < 2.4 for a, b in itertools.pairwise(plain))
    assert all(3.4 < a / b < 4.8 for a, b in itertools.pairwise(twice))
    assert thrice[-1] < twice[-1] / 4 < plain[-1] / 20


def solver(eta, **config):
    kind = "dpmsolver++" if eta == 0 else "sde-dpmsolver++"
    return diffusers.DPMSolverMultistepScheduler(
        algorithm_type=kind, solver_order=2, solver_type="heun", final_sigmas_type="zero", **config
    )


def by_diffusers(scheduler, model, x, z):
    """States x_T, ..., x_0 of one trajectory, or of several side by side; z[t] is the noise of the step from t."""
    steps, path = len(z) - 1, [x]
    scheduler.set_timesteps(steps)
    for t, timestep in zip(range(steps, 0, -1), scheduler.timesteps, strict=True):
        output = model(path[-1], timestep.expand(len(x)))
        path.append(scheduler.step(output, timestep, path[-1], variance_noise=z[t]).prev_sample)
    return path


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("config", [{}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}], ids=str)
def test_order_two_is_diffusers_step_for_step(eta, config):
    scheduler, model = solver(eta, **config), Toy().requires_grad_(False)
    kernel = SecondOrder(DiffusionKernel(model, state_shape=SHAPE, schedule=Schedule.of(scheduler, 8), eta=eta))
    z = draws(9, 3, *SHAPE).float()
    theirs, x = by_diffusers(scheduler, model, z[0], z), kernel.prior(z[0][:, None])
    for t, want in zip(range(8, 0, -1), theirs[1:], strict=True):
        x = kernel.transition(x, torch.full((3,), t)).sample(z[t][:, None])
        assert (x[:, 0] - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("split", [7, 5, 2])
def test_a_branch_is_the_path_that_its_noises_give_alone(split):
    """diffusers' solver holds one history: it must run each path from the prior, where the tree shares its trunk."""
    scheduler, model = solver(1.0), Toy().requires_grad_(False)
    kernel = SecondOrder(DiffusionKernel(model, state_shape=SHAPE, schedule=Schedule.of(scheduler, 8), eta=1.0))
    trunk, twigs = draws(9, 1, *SHAPE).float(), draws(9, 4, *SHAPE, seed=2).float()
    x = kernel.prior(trunk[0][:, None])
    for t in range(8, split, -1):
        x = kernel.transition(x, torch.tensor([t])).sample(trunk[t][:, None])
    law = kernel.transition(x, torch.tensor([split])).take(torch.zeros(4, dtype=torch.long))
    x = law.sample(twigs[split][:, None])
    for t in range(split - 1, 0, -1):
        x = kernel.transition(x, torch.full((4,), t)).sample(twigs[t][:, None])
    for i in range(4):
        z = torch.stack([trunk[t] if t > split or t == 0 else twigs[t, i : i + 1] for t in range(9)])
        alone = by_diffusers(solver(1.0), model, trunk[0], z)[-1]
        assert (x[i, 0] - alone[0]).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))
    assert (x[0] - x[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: SecondOrder(toy()),
        lambda: SecondOrder(toy(eta=0.0)),
        lambda: SecondOrder(toy(clip_sample=1.0, step="ddpm"), order=3),
        lambda: Heun(toy(4, eta=0.0)),
        lambda: Heun(GaussianFlow(log_snr(4), THREE)),
        lambda: SecondOrder(GaussianFlow(log_snr(5), THREE, eta=1.0)),
    ],
    ids=["sde", "ode", "order-3", "heun", "heun-exact", "exact"],
)
def test_solvers_are_kernels(make):
    check_kernel(make(), rows=6)


@pytest.mark.parametrize(("solver", "levels", "branches"), [("2m", 3, True), ("heun", 5, False)])
def test_the_shipped_model_takes_solvers(tmp_path, solver, levels, branches):
    kernel = mnist(num_steps=3, solver=solver)
    spec = describe(kernel)
    assert spec.num_steps == levels
    assert spec.branchable(2) == branches
    assert spec.fingerprint != describe(mnist(num_steps=3, eta=float(branches))).fingerprint
    method = ts.DiffusionTreeSampling() if branches else ts.BestOfN()
    cut = ts.search(kernel, brightness(), method, budget=ts.Budget(nfe=4 * levels), store=tmp_path / "run", seed=3)
    grown = ts.resume(tmp_path / "run", kernel, brightness(), budget=ts.Budget(nfe=8 * levels))
    whole = ts.search(kernel, brightness(), method, budget=ts.Budget(nfe=8 * levels), seed=3)
    assert len(cut.tree.t) < len(whole.tree.t)
    assert (grown.tree.key == whole.tree.key).all()
    assert torch.equal(grown.samples, whole.samples)
    assert whole.samples.shape[1:] == (1, 28, 28)


class Everything(GaussianFlow):
    """With every optional method that sees states."""

    def prior_log_weight(self, x, cond=None):
        return x.sum(1)

    def preview(self, endpoint):
        return endpoint + 1

    def encode_samples(self, samples):
        return samples - 1

    def renoise(self, x, t_from, t_to, noise):
        return x + noise

    def clamp(self, x, cond):
        return 0 * x

    def held(self, x, cond):
        return x > 0


def test_what_sees_states_sees_those_of_the_kernel():
    bed = Everything(log_snr(4), THREE, eta=1.0)
    kernel, x, z = SecondOrder(bed), draws(5, 2, 3), draws(5, 1, 3, seed=2)
    levels = torch.full((5,), 2)
    assert torch.equal(kernel.decode(x), x[:, 0])
    assert torch.equal(kernel.preview(x), x[:, 0] + 1)
    assert torch.equal(kernel.prior_log_weight(x), x[:, 0].sum(1))
    fresh = torch.zeros(5, 3, dtype=F64)
    assert torch.equal(kernel.renoise(x, levels, levels, z), torch.stack([x[:, 0] + z[:, 0], fresh], 1))
    assert torch.equal(kernel.encode_samples(x[:, 0]), torch.stack([x[:, 0] - 1, fresh], 1))
    assert torch.equal(kernel.clamp(x, None), torch.stack([fresh, x[:, 1]], 1))
    assert torch.equal(kernel.held(x, None), x[:, :1] > 0)
    heun = Heun(Everything(log_snr(4), THREE))
    assert optional(heun, "renoise") is None
    assert optional(heun, "chain") is None


def test_a_state_without_memory_takes_a_first_order_step():
    bed = GaussianFlow(log_snr(4), THREE, eta=1.0)
    x, levels = draws(4, 3), torch.tensor([1, 2, 3, 4])
    fresh = torch.stack([x, torch.zeros_like(x)], 1)
    for kernel in (SecondOrder(bed), SecondOrder(bed, order=3)):
        states = torch.cat([fresh, *[fresh[:, 1:]] * (kernel.memory - 1)], 1)
        assert torch.equal(kernel.transition(states, levels).mean[:, 0], bed.transition(x, levels).mean)
    moved = SecondOrder(bed).transition(torch.stack([x, x], 1), levels).mean[:, 0]
    still = (moved == bed.transition(x, levels).mean).all(1)
    assert still.tolist() == [False, False, False, True]
    partly = torch.stack([x, x, torch.zeros_like(x)], 1)
    assert torch.equal(SecondOrder(bed, order=3).transition(partly, levels).mean[:, 0], moved)


def test_the_last_step_to_a_clean_sample_is_of_first_order():
    kernel, x = toy(eta=0.0), draws(2, 2, *SHAPE).float()
    alone = kernel.transition(x[:, 0], torch.ones(2, dtype=torch.long)).mean
    assert torch.equal(SecondOrder(kernel).transition(x, torch.ones(2, dtype=torch.long)).mean[:, 0], alone)


def test_noise_is_the_kernel_s_own():
    kernel, z = toy(), draws(3, *SHAPE).float()
    packed = SecondOrder(kernel)
    assert describe(packed).noise_shape == (1, *SHAPE)
    assert torch.equal(packed.prior(z[:, None])[:, 0], kernel.prior(z))
    law = packed.transition(packed.prior(z[:, None]), torch.full((3,), 6))
    assert torch.equal(law.sample(z[:, None])[:, 0], kernel.transition(z, torch.full((3,), 6)).sample(z))


TOTAL = Reward(lambda samples, prompts=None: samples.sum(1), "sum")


def test_a_guide_weighs_its_steps_within_and_around():
    """log p/q of a step is that of x alone: memory is determined."""
    bed = GaussianFlow(log_snr(4), THREE, eta=1.0)
    x, levels, z = draws(6, 2, 3), torch.full((6,), 2), draws(6, 1, 3, seed=3)
    drift = shift_mean(lambda x, t, law, cond: 0.3 * law.std)
    plain = SecondOrder(bed).transition(x, levels)
    for kernel in (SecondOrder(Guided(bed, drift)), Guided(SecondOrder(bed), drift), TDS(SecondOrder(bed), TOTAL)):
        law = kernel.transition(x, levels)
        y = law.sample(z)
        assert torch.equal(y[:, 1], plain.mean[:, 1])
        gap = plain.log_prob(y) - law.log_prob(y)
        assert (law.log_weight(y) - gap).abs().max() < 1e-9
        assert gap.abs().min() > 0
    check_kernel(SecondOrder(Guided(toy(4), drift, "drift")), rows=4, proposal=True)


def test_a_pipeline_takes_a_solver(tiny_root):
    from treesearch.backends.pipelines import DiffusersKernel

    kernel = DiffusersKernel.from_pretrained(tiny.checkpoint("ddim", tiny_root), num_steps=4, device="cpu", eta=0.0)
    packed, root = SecondOrder(kernel), draws(*kernel.state_shape).float()
    x, t = packed.prior(draws(3, *packed.noise_shape).float()), torch.tensor([4, 4, 4])
    first = packed.transition(x, t)
    assert torch.equal(first.mean[:, 0], kernel.transition(x[:, 0], t).mean)
    second = packed.transition(first.mean, t - 1)
    assert (second.mean[:, 0] - kernel.transition(first.mean[:, 0], t - 1).mean).abs().max() > 0.001
    again = packed.from_noise(root)
    assert type(again) is SecondOrder
    assert torch.equal(again.prior(torch.zeros(2, *again.noise_shape))[0, 0], root)


def test_half_steps_carry_what_their_levels_cost():
    class Costly(GaussianFlow):
        backward_per_nfe = (0, 1, 2, 3)
        rows_per_nfe = 2

    spec = describe(Heun(Costly(log_snr(3), THREE)))
    assert spec.backward_per_nfe == (0, 1, 1, 2, 2, 3)
    assert spec.num_steps == 5


class Mixed(Wrapper):
    def transition(self, x, t, cond=None):
        return None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SecondOrder(LinearGaussian()), "LinearGaussian is no kernel on a"),
        (lambda: Heun(LinearGaussian()), "LinearGaussian is no kernel on a"),
        (lambda: SecondOrder(SecondOrder(toy())), "SecondOrder is no kernel on a"),
        (lambda: SecondOrder(toy(eta=0.5)), "eta=0.5.*needs eta = 0 .* or eta = 1"),
        (lambda: SecondOrder(toy(step="renoise")), "step='renoise'"),
        (lambda: SecondOrder(toy(), order=4), "order is 4, expected 2 or 3"),
        (lambda: SecondOrder(toy(), order="2"), "order is '2', expected 2 or 3"),
        (lambda: Heun(toy()), "eta=1.0, expected 0"),
        (lambda: Heun(GaussianFlow(Schedule.flow(torch.linspace(0, 1, 5)), THREE)), "ends with alpha = 0"),
        (lambda: SecondOrder(Mixed(toy())).transition(draws(1, 2, *SHAPE), torch.ones(1)), "Gaussian steps, got None"),
        (lambda: mnist(num_steps=2, solver="3m"), "unknown solver '3m': choose ddim, 2m, heun"),
        (lambda: mnist(num_steps=2, eta=0.5, solver="2m"), "needs eta = 0"),
        (lambda: mnist(num_steps=2, eta=1.0, solver="heun"), "expected 0: Heun's method"),
    ],
)
def test_what_no_solver_can_take_is_told(make, said):
    with pytest.raises((TypeError, ValueError), match=said):
        make()


@pytest.mark.parametrize("make", [SecondOrder, lambda k: SecondOrder(k, order=3), Heun], ids=["2m", "3m", "heun"])
def test_around_an_offset_a_solver_is_that_of_what_lies_beyond_it(make):
    bed, z = GaussianFlow(log_snr(6), THREE), draws(5, 3)
    plain, shifted = make(bed), make(Around(bed))
    there = run(plain, plain.prior(z[:, None]))[:, 0]
    here = run(shifted, shifted.prior((z + Around(bed).offset(z))[:, None]))[:, 0]
    assert (here - Around(bed).offset(z) - there).abs().max() < 1e-13


def test_hints_of_half_steps_are_of_the_kernel_s_levels():
    class Telling(GaussianFlow):
        def diagnose(self, t):
            return str(t.tolist())

    heun = Heun(Telling(log_snr(4), THREE))
    assert heun.diagnose(torch.arange(1, 8)) == "[1, 1, 2, 2, 3, 3, 4]"
    assert Heun(GaussianFlow(log_snr(4), THREE)).diagnose(torch.tensor([7])) == ""


@pytest.mark.parametrize("make", [SecondOrder, lambda k: SecondOrder(k, order=3)], ids=["2m", "3m"])
def test_rewards_of_states_see_no_memory(make):
    seen, bed = set(), GaussianFlow(log_snr(4), THREE, eta=1.0)

    def total(x, prompts=None):
        seen.add(tuple(x.shape[1:]))
        return x.double().flatten(1).sum(1)

    reward = Reward(total, "total", "state")
    for kernel in (make(bed), TDS(make(bed), reward)):
        found = ts.search(
            kernel, reward, ts.FeynmanKac(num_particles=4, schedule=(2, 0)), budget=ts.Budget(nfe=16)
        ).tasks[0]
        samples, rewards = found.best(4)
        assert (samples.sum(1) - rewards).abs().max() < 1e-12
    assert seen == {(3,)}
