"""Students as kernels, as endpoints of their teacher and as its last steps."""

import math
from importlib.resources import files

import pytest
import torch

import treesearch as ts
from experiments.mnist.judge import grade
from tests.backends.test_distil import POINT, Certain, Small, T, kernel, rng, small
from tests.support.tolerance import float32_tolerance
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS
from treesearch.backends.models.mnist import load_network, mnist_kernel
from treesearch.backends.models.student import WEIGHTS, card_of, load_student, save_student, student
from treesearch.backends.wrappers.completed import Completed
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.backends.wrappers.spliced import Spliced
from treesearch.rewards.base import Reward
from treesearch.testing import check_kernel

STATES = torch.randn(5, 2, generator=rng(4))


def reward(samples, prompts=None):
    return -(samples.double() - 0.2).square().sum(1)


@pytest.fixture(scope="module")
def teacher():
    return kernel(small())


@pytest.fixture(scope="module")
def pupil(teacher):
    return student(small(1), T, teacher=teacher)


def at(t, n=5):
    return torch.full((n,), t)


# the kernel


def test_a_student_is_noised_anew_at_each_of_its_levels(teacher):
    two = student(small(1), 2, teacher=teacher)
    check_kernel(two)
    own, levels = teacher.chain.schedule, [0, 3, 6]
    assert torch.equal(two.chain.schedule.sigma, own.sigma[levels])
    assert torch.equal(two.chain.schedule.timestep, own.timestep[[2, 5]])
    law = two.transition(STATES, at(2))
    eps = small(1)(STATES, own.timestep[at(6) - 1])
    x0 = (STATES - own.sigma[6].float() * eps) / own.alpha[6].float()
    room = float32_tolerance(float(x0.detach().abs().max()), 8, 2)
    assert torch.allclose(law.endpoint, x0, atol=room)
    assert torch.allclose(law.mean, own.alpha[3].float() * x0, atol=room)
    assert torch.allclose(law.std.flatten(), own.sigma[3].float().expand(5))


def test_a_student_of_all_levels_stands_beside_its_teacher(teacher, pupil):
    assert describe(pupil)._replace(fingerprint=None) == describe(teacher)._replace(fingerprint=None)
    assert pupil.fingerprint != teacher.fingerprint
    assert torch.equal(pupil.prior(STATES), teacher.prior(STATES))
    assert teacher.network is not pupil.network
    assert torch.equal(teacher.chain.schedule.alpha, pupil.chain.schedule.alpha)


def test_a_student_of_a_guided_teacher_is_told_its_prompt_alone():
    told = kernel(small(told=1), condition=lambda p: torch.tensor([[float(len(each))] for each in p]), guidance_scale=3)
    made = student(small(1, told=1), 2, teacher=told)
    assert (describe(told).rows_per_nfe[1], describe(made).rows_per_nfe[1]) == (2, 1)
    check_kernel(made, ["a", "bcd"])


def test_files_hold_the_difference_to_the_teacher_in_eight_bits(tmp_path):
    network = load_network()
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=rng())
    save_student(network, tmp_path / "s.safetensors", {"seed": 3})
    assert (tmp_path / "s.safetensors").stat().st_size < 3e6
    assert card_of(tmp_path / "s.safetensors") == {"seed": 3}
    base = load_network().state_dict()
    for name, weight in load_student(tmp_path / "s.safetensors").state_dict().items():
        gap = network.state_dict()[name] - base[name]
        allowed = gap.abs() / 16 + gap.abs().max() / 448 * 2.0**-10 + float32_tolerance(float(base[name].abs().max()))
        assert ((weight - network.state_dict()[name]).abs() <= allowed).all(), name


def test_the_shipped_student_draws_digits_in_one_step_and_says_how_it_came_about():
    one = student(num_steps=1)
    check_kernel(student(num_steps=2))
    x = one.prior(torch.randn(64, 1, 28, 28, generator=rng()))
    drawn = one.decode(one.transition(x, at(1, 64)).mean)
    sure = grade(drawn)[0].amax(1) > 0.9
    assert sure.float().mean() > 0.5  # .74 of 100; six standard errors of 64
    assert files("treesearch.backends").joinpath("weights", WEIGHTS).stat().st_size < 3e6
    card = card_of()
    assert {"teacher", "script", "seed", "pairs", "steps", "epochs", "lr", "stage"} <= set(card)
    beside = Drafted(mnist_kernel(T), student(num_steps=T))
    assert beside.draft_ratio == 1.0


# endpoints of a student


def test_completed_endpoints_are_the_student_s_where_it_is_asked_and_nothing_else_changes(teacher, pupil):
    made = Completed(teacher, pupil, (4, 2))
    check_kernel(made)
    for t in range(1, T + 1):
        plain, law, theirs = (k.transition(STATES, at(t)) for k in (teacher, made, pupil))
        assert torch.equal(law.mean, plain.mean)
        assert torch.equal(law.std, plain.std)
        assert torch.equal(law.endpoint, theirs.endpoint if t in (2, 4) else plain.endpoint)
    assert describe(made).rows_per_nfe == (1, 1, 2, 1, 2, 1, 1)
    assert describe(Completed(teacher, pupil)).rows_per_nfe == (1, *[2] * T)
    assert describe(made).departs is None


def test_a_search_with_completed_states_keeps_its_target(teacher):
    """Ẑ of FK against the mean of exp r over plain rollouts, whatever the student says."""
    wrong = student(Certain(POINT + 0.3), T, teacher=kernel(Certain(POINT), "sample"))
    bed = Completed(kernel(small()), wrong)
    plain = ts.search(teacher, reward, ts.BestOfN(n=2000), seed=1, progress=False).tasks[0]
    truth = torch.as_tensor(plain.rewards).exp()
    method = ts.FeynmanKac(num_particles=32, schedule=(5, 4, 3, 2, 0))
    estimates = torch.tensor(
        [math.exp(ts.search(bed, reward, method, seed=s, progress=False).log_z) for s in range(24)], dtype=torch.float64
    )
    error = (truth.var() / len(truth) + estimates.var() / len(estimates)).sqrt()
    assert abs(float(estimates.mean() - truth.mean())) < 4 * float(error)


# the last steps of a student


def test_spliced_chains_end_in_one_jump(teacher, pupil):
    made = Spliced(teacher, pupil, 4)
    check_kernel(made)
    assert describe(made).num_steps == 3
    assert describe(made).stochastic == (True, False, *describe(teacher).stochastic[5:])
    assert "one jump of a student" in describe(made).departs
    jump = made.transition(STATES, at(1))
    assert torch.equal(jump.sample(torch.ones_like(STATES)), pupil.transition(STATES, at(4)).endpoint)
    assert torch.equal(made.transition(STATES, at(3)).mean, teacher.transition(STATES, at(6)).mean)
    mixed = made.transition(STATES, torch.tensor([1, 3, 2, 1, 1]))
    assert torch.allclose(mixed.mean[[0, 3, 4]], jump.mean[[0, 3, 4]], atol=1e-5)
    assert (mixed.std.flatten()[[0, 3, 4]] == 0).all()
    assert torch.allclose(mixed.mean[1], teacher.transition(STATES, at(6)).mean[1], atol=1e-5)


def test_a_guide_inside_a_spliced_chain_guides_what_is_left(teacher, pupil):
    guided = Spliced(TDS(teacher, Reward(reward, "r")), pupil, 4)
    check_kernel(guided, proposal=True)
    spec = describe(guided)
    assert (spec.rewards_per_nfe[1], spec.backward_per_nfe[1]) == (0, 0)
    assert spec.rewards_per_nfe[2] == 1


KNOWN = torch.tensor([True, False]), torch.tensor([0.7, 0.0])


def test_known_entries_are_known_to_both(teacher, pupil):
    kernels = [Clamp(each, *KNOWN) for each in (teacher, pupil)]
    spliced, completed = Spliced(*kernels, 4), Completed(*kernels, (4, 2))
    ends = spliced.transition(STATES, at(1)).mean, completed.transition(STATES, at(4)).endpoint
    for end in ends:
        assert torch.equal(end[:, 0], torch.full((5,), 0.7))
    assert torch.equal(ends[0][:, 1], pupil.transition(STATES, at(4)).endpoint[:, 1])
    drawn = ts.search(spliced, reward, ts.BestOfN(n=3), seed=0, progress=False).tasks[0].samples
    assert torch.equal(drawn[:, 0], torch.full((3,), 0.7))


# bad input

REFUSED = {
    "a network without a teacher": (lambda k, s: student(Small(), 2), TypeError, "needs its teacher"),
    "another kernel as teacher": (
        lambda k, s: student(Small(), 2, teacher=LinearGaussian()),
        TypeError,
        "got a LinearGaussian",
    ),
    "a file with a teacher": (
        lambda k, s: student("x.safetensors", teacher=k),
        TypeError,
        "students that are networks",
    ),
    "no such file": (lambda k, s: student("x.safetensors"), FileNotFoundError, "no weights"),
    "a file of something else": (lambda k, s: student("mt.safetensors"), ValueError, "no student of the MNIST model"),
    "more steps than the teacher": (lambda k, s: student(Small(), T + 1, teacher=k), ValueError, f"expected 1..{T}"),
    "a kernel without a chain": (lambda k, s: Completed(LinearGaussian(), s), TypeError, "LinearGaussian is no kernel"),
    "a student of fewer steps": (lambda k, s: Completed(k, student(Small(), 2, teacher=k)), ValueError, "num_steps is"),
    "a student of other levels": (lambda k, s: Spliced(mnist_like(), s, 3), ValueError, "noise levels are others"),
    "levels": (lambda k, s: Completed(k, s, (0,)), ValueError, f"one or more of 1..{T}"),
    "no levels": (lambda k, s: Completed(k, s, ()), ValueError, f"one or more of 1..{T}"),
    "at": (lambda k, s: Spliced(k, s, 1), ValueError, f"a level in 2..{T}"),
    "known to the kernel alone": (
        lambda k, s: Spliced(Clamp(k, *KNOWN), s, 3),
        ValueError,
        "the same clamp around both",
    ),
    "known to the student alone": (
        lambda k, s: Completed(k, Clamp(s, *KNOWN)),
        ValueError,
        "the same clamp around both",
    ),
    "other entries known": (
        lambda k, s: Completed(Clamp(k, *KNOWN), Clamp(s, KNOWN[0], 2 * KNOWN[1])),
        ValueError,
        "the same clamp around both",
    ),
    "a guide inside": (
        lambda k, s: Completed(TDS(k, Reward(reward, "r")), s).transition(STATES, at(3)),
        TypeError,
        "no plain Gaussian steps",
    ),
}


def mnist_like():
    from treesearch.backends.chains.diffusion import DiffusionKernel
    from treesearch.backends.chains.schedules import Schedule

    return DiffusionKernel(Small(), state_shape=(2,), schedule=Schedule.flow(torch.linspace(0, 0.9, T + 1)))


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused(why, teacher, pupil):
    call, kind, words = REFUSED[why]
    with pytest.raises(kind, match=words):
        call(teacher, pupil)
