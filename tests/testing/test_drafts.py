"""What drafts can be made of: every wrapper and kernel with a chain, or a reason why not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tests.backends.test_wrappers import CONCRETE, Bed, Known, bed, make
from tests.support import tiny
from treesearch.backends import spd
from treesearch.backends.base import Wrapper, describe
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.guidance import PolicyGuided
from treesearch.backends.interventions import Actions
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.backends.models.multi_task import multi_task_kernel
from treesearch.backends.models.restoration import RestorationKernel
from treesearch.backends.models.trajectory import maze_kernel
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.backends.wrappers.drafted import Drafted
from treesearch.planning.warm_start import WarmStart
from treesearch.testing import CheckFailed, Counting, check_drafts

NONE = {  # drafts cannot leap along them
    *("Bdia", "SecondOrder", "Heun"),  # states remember
    *("Cycle", "Completed", "Spliced"),  # levels are not those of a chain
    *("Actions", "GuidanceScales"),  # steps draw labels
    *("Regional",),  # noise by entry
    *("PolicyGuided",),  # moves without weights
}
OWN = {"Absent", "Aligned", "DiffEditor", "Expanded", "LaCon"}  # of a network that the bed has not


@pytest.mark.parametrize("kind", CONCRETE, ids=lambda c: c.__name__)
def test_wrappers_are_drafted_by_their_chain_or_say_that_they_are_not(kind):
    kernel = make(kind, bed(kind))
    assert describe(kernel, identify=False).drafts == (kind.__name__ not in NONE)
    if kind.__name__ not in NONE | OWN:
        check_drafts(kernel, rows=3)


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
