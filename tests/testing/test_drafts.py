"""What drafts can be made of: every wrapper and kernel with a chain, or a reason why not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import treesearch as ts
from tests.backends.test_wrappers import CONCRETE, REWARD, Bed, Known, bed, make
from tests.support import tiny
from treesearch.backends import spd
from treesearch.backends.base import Wrapper, describe
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.guidance import TDS, GuidanceScales, PolicyGuided
from treesearch.backends.interventions import Actions
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.backends.models.multi_task import multi_task_kernel
from treesearch.backends.models.restoration import RestorationKernel
from treesearch.backends.models.student import student
from treesearch.backends.models.trajectory import maze_kernel
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.planning.warm_start import WarmStart
from treesearch.testing import CheckFailed, Counting, check_drafts

NONE = {  # drafts cannot leap along them
    **dict.fromkeys(("Bdia", "SecondOrder", "Heun"), "remembers"),
    **dict.fromkeys(("Cycle", "Spliced", "Composed"), "levels of a"),
    **dict.fromkeys(("Actions", "GuidanceScales"), "steps draw labels"),
    "Completed": "endpoints are a student's",
    "Regional": "from entry to entry",
    "PolicyGuided": "moves without weights",
}
TOKENS = {"Drawn", "FieldOrder", "Rescored", "Scaffold"}  # of kernels of tokens, which have no chain
OWN = {"Absent", "Aligned", "DiffEditor", "Expanded", "LaCon", "NoiseLaw", "NoiseProposal"}  # of networks or prompts


@pytest.mark.parametrize("kind", [k for k in CONCRETE if k.__name__ not in TOKENS], ids=lambda c: c.__name__)
def test_wrappers_are_drafted_by_their_chain_or_say_that_they_are_not(kind):
    kernel = make(kind, bed(kind))
    assert describe(kernel, identify=False).drafts == (kind.__name__ not in NONE)
    if kind.__name__ not in OWN | {*NONE}:
        check_drafts(kernel, rows=3)


@pytest.mark.parametrize("name", NONE)
def test_a_search_with_drafts_that_cannot_be_made_says_why_before_it_runs(name):
    kind = next(kind for kind in CONCRETE if kind.__name__ == name)
    spec = describe(Counting(make(kind, bed(kind))))
    with pytest.raises(ValueError, match=NONE[name]):
        ts.BestOfN(draft=3).unit(spec)


class Guess(nn.Module):
    """A function of (y, μ), told apart by output."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, timestep):
        y, mu = x.chunk(2, 1)
        return torch.cat([torch.tanh(y + (i + 1) * mu) for i in range(self.outputs)], 1)


def restored(process):
    network = Guess(process.outputs)
    degraded = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return RestorationKernel(network, process=process, num_steps=4, degraded=degraded)


PLAN = [{"start": [1.0, 1.0, 0.0, 0.0], "goal": [2.0, 1.0]}]
MODELS = {
    "mnist": (lambda: mnist_kernel(num_steps=4), None),
    "multitask": (lambda: multi_task_kernel(num_steps=4), None),
    "maze": (lambda: maze_kernel("medium", num_steps=4), PLAN),
    "mean reverting": (lambda: restored(MeanReverting()), None),
    "another's": (lambda: Drafted(*[restored(MeanReverting())] * 2, 1.0).drafter, None),
    "residual": (lambda: restored(Residual(predicts="residual")), None),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_drafted_by_their_chain(name):
    make, prompts = MODELS[name]
    check_drafts(make(), prompts, rows=2)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_pipelines_are_drafted_by_their_chain(name, tiny_root):
    kernel = DiffusersKernel.from_pretrained(str(tiny.checkpoint(name, tiny_root)), num_steps=3)
    check_drafts(kernel, ["a cat"], rows=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spd(num_steps=2), "no `chain` that drafts can leap along"),
        (lambda: restored(Residual()), "mean at t"),  # two outputs that do not add up to x_t
        (lambda: Moved(Bed()), "mean at t"),
        (lambda: Wider(Bed()), "std at t"),
    ],
    ids=["by entry", "two outputs", "mean", "std"],
)
def test_what_drafts_would_make_something_else_of_is_told(make, message):
    with pytest.raises(CheckFailed, match=message):
        check_drafts(make(), rows=2)


@dataclass(frozen=True)
class Moved(Wrapper):
    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t, cond)
        return replace(law, mean=law.mean + 0.01)


@dataclass(frozen=True)
class Wider(Wrapper):
    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t, cond)
        return replace(law, std=1.01 * law.std)


def test_what_refuses_drafts_refuses_them_for_what_is_around_it():
    policy = make(PolicyGuided, Bed())
    assert describe(Counting(policy)).draft_times == ()
    assert not describe(Counting(make(Actions, Known()))).drafts


def test_a_warm_start_is_drafted_along_the_steps_that_are_left():
    kernel = make(WarmStart, Bed())
    assert describe(kernel).draft_times == describe(Bed()).draft_times[:4]


# Drafted: what may draft for what.


def guided():
    return TDS(Bed(), REWARD)


def clamped():
    return make(Clamp, Bed())


def told(scale):
    """Classifier-free guidance on the prompt's length."""

    def network(x, t, condition):
        return 0.5 * x + condition

    def condition(prompts):
        return torch.tensor([[float(len(p))] * 4 for p in prompts])

    grid = Schedule.flow(torch.linspace(0, 1, 5))
    return DiffusionKernel(network, state_shape=(4,), schedule=grid, condition=condition, guidance_scale=scale)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (lambda: (Bed(), guided()), "a guide drafts for the kernel: put it around both"),
        (lambda: (clamped(), Bed()), "put the clamp around both"),
        (lambda: (Bed(), clamped()), "put the clamp around both"),
        (lambda: (clamped(), clamped()), "put the clamp around both"),
        (lambda: (make(GuidanceScales, Bed()),) * 2, "steps draw labels"),
        (lambda: (mnist_kernel(num_steps=4), student()), "make it with num_steps=4"),
    ],
    ids=["a guide", "one clamp", "another's clamp", "two clamps", "labels", "steps"],
)
def test_what_cannot_draft_for_another_kernel_says_what_to_do(pair, message):
    with pytest.raises(ValueError, match=message):
        Drafted(*pair(), 1.0)


def test_a_drafting_kernel_of_more_guidance_is_told_too_little():
    budget = ts.Budget(nfe=40)
    with pytest.raises(ValueError, match="search the kernel of more guidance"):
        ts.search(
            Drafted(told(1.0), told(3.0), 2.0),
            total,
            ts.BestOfN(draft=2),
            prompts=["ab"],
            budget=budget,
            progress=False,
        )


def total(samples, prompts=None):
    return samples.double().sum(1)


def test_what_drafts_and_what_it_costs_tell_drafted_kernels_apart():
    made = [Drafted(Bed(), Bed(name), ratio) for name in ("a", "b") for ratio in (0.5, 0.25)]
    assert len({kernel.fingerprint for kernel in made}) == 4


def test_a_drafted_kernel_moves_with_what_drafts():
    assert Drafted(Bed(), Bed("other"), 1.0).to("cpu").other.name == "to cpu"
