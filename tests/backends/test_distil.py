"""Distillation: losses are their formulas and vanish at their optima, runs resume, and bad input is told."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.support import tiny
from tests.support.tolerance import EPS
from treesearch.backends.base import Shared
from treesearch.backends.chains.diffusion import DiffusionKernel, from_endpoint
from treesearch.backends.chains.inversion import invert, still, walk
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.backends.training.consistency import Consistency, self_consistency
from treesearch.backends.training.distil import Pairs, Student, distil, levels
from treesearch.backends.training.flow_map import FlowMap, composition_error, mapped
from treesearch.backends.training.loop import Plan
from treesearch.backends.training.lora import lora_weights, with_lora
from treesearch.backends.training.rectified import Phased, Rectified, between, boundaries, jump
from treesearch.backends.training.score_difference import ScoreDifference
from treesearch.backends.training.sub_path import SubPath, sub_path_sigma

T, F64 = 6, torch.float64
PLAN = Plan(epochs=2, steps=3, lr=0.01, warmup=1, cooldown=0.5, ema=0.5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(prediction="epsilon", steps=T):
    return Schedule.variance_preserving(cosine_alphas_cumprod(100), steps, prediction=prediction)


class Small(nn.Module):
    """A network of two layers, told the time, another time where there is one, and a condition where there is one."""

    def __init__(self, told=0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3 + told, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x, timestep, *told):
        seen = [each.reshape(len(x), -1).to(x.dtype) / 100 for each in (timestep, *told)]
        return self.body(torch.cat([x, *seen], 1))


def small(seed=0, told=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small(told)


class Certain(nn.Module):
    """The denoiser of one point: every path leads there."""

    def __init__(self, point):
        super().__init__()
        self.point, self.rest = point, nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, *told):
        return self.point.to(x).expand_as(x) + 0 * self.rest.to(x)


class Constant(nn.Module):
    """ε̂ the same everywhere."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.rest = eps, nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, *told):
        return self.eps.to(x).expand_as(x) + 0 * self.rest.to(x)


def kernel(network, prediction="epsilon", steps=T, **settings):
    return DiffusionKernel(network, state_shape=(2,), schedule=grid(prediction, steps), **settings)


def draws(n=8):
    noise, x0 = torch.randn(2, n, 2, generator=rng(9))
    return Pairs(noise, x0)


POINT = torch.tensor([0.5, -0.25])
HUBER = 1e-3


def huber(x, y):
    return ((x - y).square() + HUBER**2).sqrt().mean() - HUBER


# pairs


def test_pairs_are_ends_of_the_deterministic_path_whatever_eta():
    network = small()
    found = Pairs.of(kernel(network, eta=1.0), 5, seed=3, batch_size=2)
    assert torch.equal(found.noise, torch.cat([torch.randn(n, 2, generator=g) for g in [rng(3)] for n in (2, 2, 1)]))
    still_kernel = kernel(network, eta=0.0)
    x = found.noise
    for t in range(T, 0, -1):
        x = still_kernel.transition(x, torch.full((5,), t)).mean
    assert torch.allclose(found.x0, x, atol=T * 64 * EPS)


def test_pairs_of_prompts_keep_them_beside_their_rows():
    told = kernel(small(told=1), condition=lambda prompts: torch.tensor([[float(p)] for p in prompts]))
    found = Pairs.of(told, 5, prompts=[1, 7])
    assert found.told["condition"].flatten().tolist() == [1, 7, 1, 7, 1]
    assert found[torch.tensor([1, 2])].told["condition"].flatten().tolist() == [7, 1]
    shared = Pairs(found.noise, found.x0, {"condition": Shared(3)})
    assert shared[torch.tensor([0])].told == {"condition": 3}


# exact forms


def test_paths_of_constant_noise_are_curved_and_exact_in_one_step():
    of = Constant(torch.tensor([0.3, -1.2]))
    x = torch.tensor([[1.0, 2.0]], dtype=F64)
    many, one = (walk(kernel(of, steps=n).to("cpu"), x, n) for n in (29, 1))
    assert torch.allclose(many, one, rtol=1e-12)
    path = invert(kernel(of, steps=29), many.float())
    assert path.diff(dim=0).diff(dim=0).abs().max() > 0.1 * path.diff(dim=0).abs().max()


def test_sub_path_noise_is_the_paper_s_and_the_linear_one_that_of_its_points():
    table = Schedule(torch.tensor([500, 999]), torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.0, 0.6, 0.75**0.5]))
    chain = DiffusionKernel(Small(), state_shape=(2,), schedule=table).chain
    gamma, x = torch.tensor([0.0, 0.3, 1.0]), torch.zeros(3, 2, dtype=F64)
    top = torch.full((3,), 2)
    assert sub_path_sigma(chain, top, gamma, x, "official").flatten().tolist() == pytest.approx(
        [0.375, math.sqrt(0.140625 + 0.09 * 0.609375), math.sqrt(0.75)], abs=1e-7
    )
    x0, eps = torch.randn(2, 3, 2, generator=rng(), dtype=F64)
    x_t, x_s = 0.5 * x0 + 0.75**0.5 * eps, 0.8 * x0 + 0.6 * eps
    point = gamma[:, None] * x_t + (1 - gamma[:, None]) * 0.5 / 0.8 * x_s
    spread = sub_path_sigma(chain, top, gamma, x, "linear")
    assert torch.allclose(point, 0.5 * x0 + spread * eps, atol=4 * EPS)


def test_phases_end_on_levels_and_their_paths_pass_through_both_ends():
    assert boundaries(10, 4).tolist() == [0, 2, 5, 8, 10]
    chain = kernel(small()).chain
    x_t, x_s = torch.randn(2, 4, 2, generator=rng(), dtype=F64)
    t, s = torch.tensor([6, 4, 2, 6]), torch.tensor([3, 2, 0, 0])
    for u, end in ((t, x_t), (s, x_s)):
        assert torch.allclose(between(chain, (x_t, t), (x_s, s), u), end, atol=1e-9)
    straight = kernel(Constant(torch.tensor([0.3, -1.2])))
    x = torch.randn(4, 2, generator=rng(), dtype=F64)
    below = jump(Student(straight.network, straight.chain), x, t, s)
    x_u = between(straight.chain, (x, t), (below, s), s + 1)
    assert torch.allclose(jump(Student(straight.network, straight.chain), x_u, s + 1, s), below, atol=1e-9)


# optima


@pytest.mark.parametrize("target", [Rectified(), Phased(phases=3), Consistency(), SubPath(), FlowMap()])
def test_a_student_that_knows_has_no_loss(target):
    teacher = kernel(Certain(POINT), "sample")
    knowing, wrong = (Student(Certain(p), teacher.chain) for p in (POINT, POINT + 0.1))
    pairs = Pairs(draws().noise, POINT.expand(8, 2).clone())
    none, some = (target.loss(teacher, each, knowing, pairs, rng()).item() for each in (knowing, wrong))
    assert none < 64 * EPS
    assert some > 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_what_a_network_predicts_of_a_sub_path_is_read_as_it_is_meant(prediction):
    levels_of = torch.linspace(0, 0.9, T + 1, dtype=F64)
    table = Schedule.flow(levels_of) if prediction == "flow" else grid(prediction)
    x0, eps = draws().x0, draws().noise

    class Meant(nn.Module):
        def forward(self, x, timestep):
            alpha, _ = levels(teacher.chain, t, x)
            spread = sub_path_sigma(teacher.chain, t, gamma, x, "linear")
            norm = alpha + spread if prediction == "flow" else (alpha**2 + spread**2).sqrt()  # a state of the process
            assert torch.allclose(x, (alpha * x0 + spread * eps) / norm, atol=16 * EPS)
            return from_endpoint(prediction, x0, eps, alpha / norm, spread / norm)

    teacher = DiffusionKernel(Meant(), state_shape=(2,), schedule=table)
    t, gamma = torch.tensor([1, 2, 3, 4, 5, 6, 3, 2]), torch.linspace(0.1, 1, 8)
    (x, below) = (a * x0 + s * eps for a, s in (levels(teacher.chain, at, x0) for at in (t, t - 1)))
    found = SubPath()._endpoint(Student(teacher.network, teacher.chain), x, below, t, gamma, draws())
    assert torch.allclose(found, x0, atol=1e-4)


# formulas


def test_the_rectified_loss_is_its_formula():
    teacher, pairs = kernel(small()), draws(T)
    student = Student(small(1), teacher.chain)
    found = Rectified().loss(teacher, student, student, pairs, rng())
    t = 1 + torch.arange(T)[torch.randperm(T, generator=after_levels(T))]  # one of each level
    alpha, sigma = teacher.chain.schedule.alpha.float()[t, None], teacher.chain.schedule.sigma.float()[t, None]
    x = alpha * pairs.x0 + sigma * pairs.noise
    x0 = (x - sigma * student.network(x, teacher.chain.timestep[t])) / alpha
    assert float(found.detach()) == pytest.approx(float(huber(x0, pairs.x0).detach()), rel=1e-5)


def after_levels(n):
    """A generator as it is once the levels are drawn."""
    g = rng()
    torch.rand(n, generator=g)
    return g


def test_the_consistency_loss_is_its_formula_and_its_gradient_the_student_s_alone():
    teacher, pairs = kernel(small()), draws(T)
    student, average = Student(small(1), teacher.chain), Student(small(2), teacher.chain)
    found = Consistency().loss(teacher, student, average, pairs, rng())
    g = after_levels(T)
    t = 1 + torch.arange(T)[torch.randperm(T, generator=g)]
    alpha, sigma = teacher.chain.schedule.alpha.float(), teacher.chain.schedule.sigma.float()
    x = alpha[t, None] * pairs.x0 + sigma[t, None] * torch.randn(T, 2, generator=g)
    eps = teacher.network(x, teacher.chain.timestep[t])
    below = alpha[t - 1, None] * (x - sigma[t, None] * eps) / alpha[t, None] + sigma[t - 1, None] * eps

    def end(network, x, t):
        return (x - sigma[t, None] * network(x, teacher.chain.timestep[t])) / alpha[t, None]

    goal = torch.where((t > 1)[:, None], end(average.network, below, t - 1), below)
    expected = huber(end(student.network, x, t), goal.detach())
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    found.backward()
    assert all(w.grad is not None for w in student.network.parameters())
    assert all(w.grad is None for other in (average.network, teacher.network) for w in other.parameters())


def test_sub_paths_at_gamma_1_are_consistency_distillation_bit_for_bit():
    teacher, pairs = kernel(small()), draws(32)
    targets = Consistency(), SubPath(gamma=(1.0, 1.0)), SubPath(gamma=(1.0, 1.0), sigma_gamma="official"), SubPath()
    trained = [distil(teacher, small(1), each, pairs, PLAN, batch_size=8) for each in targets]
    weights = [torch.cat([w.flatten() for w in network.parameters()]) for network in trained]
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], weights[2], atol=1e-5)  # a square root of a square
    assert not torch.allclose(weights[0], weights[3], atol=1e-4)


def test_a_flow_map_is_told_both_times_and_stays_where_it_is_asked_to():
    chain = kernel(small()).chain
    student = Student(small(1, told=1), chain)
    x, t = torch.randn(3, 2, generator=rng()), torch.tensor([6, 3, 1])
    assert torch.equal(mapped(student, x, t, t), x)
    s = torch.tensor([2, 0, 0])
    told = torch.tensor([float(chain.timestep[2]), -1.0, -1.0])
    eps = student.network(x, chain.timestep[t], told)
    (a_t, s_t), (a_s, s_s) = levels(chain, t, x), levels(chain, s, x)
    assert torch.allclose(mapped(student, x, t, s), a_s * (x - s_t * eps) / a_t + s_s * eps, atol=1e-6)


def test_the_flow_map_s_loss_is_its_formula_and_its_gradient_the_student_s_alone():
    """Its target is where the mean of the weights leads from the teacher's state, not where the student does."""
    teacher, pairs = kernel(small()), draws(T)
    student, average = (Student(small(seed, told=1), teacher.chain) for seed in (1, 2))
    found = FlowMap().loss(teacher, student, average, pairs, rng())
    g = after_levels(T)
    t = 1 + torch.arange(T)[torch.randperm(T, generator=g)]
    alpha, sigma = teacher.chain.schedule.alpha.float()[:, None], teacher.chain.schedule.sigma.float()[:, None]
    x = alpha[t] * pairs.x0 + sigma[t] * torch.randn(T, 2, generator=g)
    s = (torch.rand(T, generator=g) * t).long()
    assert 0 < (s == t - 1).sum() < T
    eps = teacher.network(x, teacher.chain.timestep[t])
    below = alpha[t - 1] * (x - sigma[t] * eps) / alpha[t] + sigma[t - 1] * eps

    def to_s(network, x, t):
        told = torch.where(s > 0, teacher.chain.timestep[s], -1)
        eps = network(x, teacher.chain.timestep[t.clamp_min(1)], told)
        return alpha[s] * (x - sigma[t] * eps) / alpha[t] + sigma[s] * eps

    goal = torch.where((s == t - 1)[:, None], below, to_s(average.network, below, t - 1)).detach()
    expected = huber(to_s(student.network, x, t), goal)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    found.backward()
    expected_grad = torch.autograd.grad(expected, list(student.network.parameters()))
    for weight, want in zip(student.network.parameters(), expected_grad, strict=True):
        assert torch.allclose(weight.grad, want, rtol=1e-3, atol=1e-6)
    assert all(w.grad is None for other in (average.network, teacher.network) for w in other.parameters())


def test_inconsistency_is_measured():
    exact, other = kernel(Certain(POINT), "sample"), kernel(small())
    assert self_consistency(exact, Student(exact.network, exact.chain), draws(), rng()) < EPS
    assert self_consistency(other, Student(small(1), other.chain), draws(), rng()) > 1e-4
    assert composition_error(Student(exact.network, exact.chain), draws(), rng()) < 1e-9
    assert composition_error(Student(small(1, told=1), other.chain), draws(), rng()) > 1e-6


# score difference


def test_samples_are_drawn_to_where_the_teacher_is_from_where_the_fake_is():
    teacher = kernel(Certain(POINT), "sample")
    fake, made = Certain(POINT + 1), torch.nn.Parameter(torch.zeros(1, 2))

    class Free(nn.Module):
        def forward(self, x, timestep):
            return made.expand_as(x)

    student = Student(Free(), teacher.chain)
    target = ScoreDifference(fake, noise=(0.1, 2.0), scope="fixed", lr=1e-9)
    target.loss(teacher, student, student, draws(), rng()).backward()
    gap = 1 / POINT.abs().mean() * torch.ones(1, 2) / 2  # w (x̂_0 fake - real), and the mean over two entries
    assert torch.allclose(made.grad, gap, rtol=1e-4)


def test_a_scope_follows_the_discrepancy_and_a_fixed_one_does_not():
    teacher = kernel(Certain(POINT), "sample")
    pairs = Pairs(draws().noise, POINT.expand(8, 2).clone())
    for scope, high in (("dynamic", 2 * 0.3), ("fixed", 5.0)):
        target = ScoreDifference(small(3), scope=scope, noise=(0.1, 5.0))
        student = Student(Certain(POINT + 0.3), teacher.chain)
        for _ in range(3):
            target.loss(teacher, student, student, pairs, rng())
        assert float(target.scope_of(pairs.x0)[1]) == pytest.approx(high, rel=1e-5)


def test_scales_lead_away_from_what_nothing_is_told():
    seen = []

    class Told(nn.Module):
        def forward(self, x, timestep, told):
            seen.append(told)
            return told.expand_as(x).clone()

    teacher = kernel(Told(), "sample", condition=lambda prompts: torch.tensor([[float(p)] for p in prompts]))
    rows = Pairs(*torch.zeros(2, 400, 2), {"condition": torch.full((400, 1), 3.0)})
    target = ScoreDifference(small(told=1), scales=(0.5, 4.0), absent=torch.tensor([[1.0]]))
    real = target._real(teacher, rows.noise, torch.full((400,), 2), rows.told, rng())
    kappa = (real[:, 0] - 1) / 2
    assert 0.5 <= kappa.min() < 0.6
    assert 3.9 < kappa.max() <= 4.0
    assert float(kappa.mean()) == pytest.approx(2.25, abs=4 * 3.5 / math.sqrt(12 * 400))
    assert sorted({float(each[0]) for each in seen}) == [1.0, 3.0]


def test_the_fake_score_learns_the_student_s_samples():
    teacher, pairs = kernel(small(), "sample"), draws(256)
    target = ScoreDifference(small(3), noise=(0.1, 5.0), lr=0.02)
    student, losses = Student(Certain(POINT), teacher.chain), []
    for step in range(60):
        target.loss(teacher, student, student, pairs.draw(32, rng(step)), rng(step))
        losses.append(float(target.fake_loss))
    assert losses[-1] < 0.3 * losses[0]


# the distiller


def fake():
    return ScoreDifference(small(5))


@pytest.mark.parametrize("make", [Consistency, fake], ids=["consistency", "score difference"])
def test_a_run_that_was_stopped_repeats_one_that_was_not(tmp_path, make):
    teacher, pairs = kernel(small()), draws(32)

    def stop(epoch, *_):
        raise KeyboardInterrupt

    def run(out, after=None):
        return distil(teacher, small(1), make(), pairs, PLAN, batch_size=8, out=out, after=after)

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", stop)
    assert all(map(torch.equal, run(tmp_path / "run").parameters(), whole.parameters()))


def test_a_student_of_the_right_shape_learns():
    teacher = kernel(Certain(POINT), "sample")
    plan = Plan(epochs=1, steps=100, lr=0.05, warmup=1, cooldown=0.5, ema=0.9, weight_decay=0.0)
    pairs = Pairs(draws().noise, POINT.expand(8, 2).clone())
    student = distil(teacher, small(1), Rectified(), pairs, plan, batch_size=16)
    assert not student.training
    before, after = (net(pairs.noise, teacher.chain.timestep[torch.full((8,), T)]) for net in (small(1), student))
    assert (after - POINT).abs().max() < 0.2 * (before - POINT).abs().max()


@pytest.mark.parametrize("low_rank", [False, True], ids=["full", "lora"])
def test_a_conditional_unet_takes_two_steps(low_rank):
    if low_rank:
        pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = tiny.text_unet().eval()
    teacher = DiffusionKernel(
        copy.deepcopy(network), state_shape=(4, 8, 8), schedule=grid(), condition=lambda p: torch.ones(len(p), 3, 32)
    )
    student = with_lora(network, rank=2) if low_rank else network
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    plan = Plan(epochs=1, steps=2, lr=0.01, warmup=1, cooldown=0.0, ema=0.5)
    distil(teacher, student, Consistency(), Pairs.of(teacher, 4, prompts=["a", "b"]), plan, batch_size=2)
    moved = {name for name, weight in student.named_parameters() if not torch.equal(weight, before[name])}
    assert all("lora_" in name for name in moved) if low_rank else len(moved) > 20
    assert moved
    if low_rank:
        assert set(lora_weights(student)) <= {name.replace(".student.", ".") for name in before if "lora_" in name}


# bad input

CHAINLESS = LinearGaussian()
REFUSED = {
    "a teacher without a chain": (lambda: Pairs.of(CHAINLESS, 2), TypeError, "no steps to distil"),
    "no pairs": (lambda: Pairs.of(kernel(small()), 0), ValueError, "expected 1 or more pairs"),
    "pairs of two shapes": (lambda: Pairs(torch.zeros(2, 2), torch.zeros(3, 2)), ValueError, "rows of the same states"),
    "pairs with NaN": (lambda: Pairs(torch.zeros(1, 2), torch.full((1, 2), math.nan)), ValueError, "not finite"),
    "pairs of other states": (
        lambda: distil(kernel(small()), small(), Consistency(), Pairs(*torch.zeros(2, 4, 3)), PLAN),
        ValueError,
        "the teacher's are",
    ),
    "no rows a step": (
        lambda: distil(kernel(small()), small(), Consistency(), draws(), PLAN, batch_size=0),
        ValueError,
        "expected 1 or more rows",
    ),
    "c": (lambda: Rectified(c=0.0), ValueError, "c is 0.0"),
    "phases": (lambda: Phased(phases=0), ValueError, "phases is 0"),
    "more phases than steps": (lambda: boundaries(3, 4), ValueError, "at most the 3 steps"),
    "form": (lambda: SubPath(sigma_gamma="square"), ValueError, "choose linear or official"),
    "gamma": (lambda: SubPath(gamma=(0.5, 1.5)), ValueError, "within 0..1"),
    "scope": (lambda: ScoreDifference(small(), scope="none"), ValueError, "choose dynamic or fixed"),
    "noise": (lambda: ScoreDifference(small(), noise=(2.0, 1.0)), ValueError, "low first"),
    "scales without absent": (lambda: ScoreDifference(small(), scales=(1.0, 2.0)), ValueError, "go together"),
    "rank": (lambda: with_lora(tiny.text_unet(), rank=0), ValueError, "rank is 0"),
    "no such layers": (lambda: with_lora(small(), rank=2), ValueError, "not found"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused(why):
    call, kind, words = REFUSED[why]
    with pytest.raises(kind, match=words):
        call()


def test_a_step_of_a_teacher_is_without_noise():
    stochastic, plain = (kernel(small(), eta=eta) for eta in (1.0, 0.0))
    x, t = draws().x0, torch.full((8,), 4)
    assert torch.allclose(still(stochastic, x, t, None), plain.transition(x, t).mean, atol=1e-6)
