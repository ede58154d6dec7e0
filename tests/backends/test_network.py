"""`Kernel.network` is the very module that a step calls, through wrappers too."""

import pytest
import torch
from torch import nn

from treesearch.backends.base import Guided, describe, optional
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS, Valued
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.trajectory import TrajectoryKernel
from treesearch.rewards.analytic import linear
from treesearch.rewards.channels import Channels

SHARE = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
SCHEDULE = Schedule(torch.arange(1, 5), (1 - SHARE).sqrt(), SHARE.sqrt())


class Net(nn.Module):
    multiple = 1

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, timestep, mask=None):
        return self.scale * x


def plain():
    return DiffusionKernel(Net(), state_shape=(2,), schedule=SCHEDULE)


def trajectories():
    normalisation = Normalisation((0.0, 0.0), (1.0, 1.0))
    return TrajectoryKernel(Net(), channels=Channels(1, 1), normalisation=normalisation, horizon=4, schedule=SCHEDULE)


def worth(x, t, law, cond):
    return -t.double()


AROUND = {
    "bare": lambda k: k,
    "tds": lambda k: TDS(k, linear()),
    "valued": lambda k: Valued(k, linear(), worth),
    "both": lambda k: Guided(Valued(k, linear(), worth), lambda x, t, law, cond: law),
}


@pytest.mark.parametrize("make", [plain, trajectories])
@pytest.mark.parametrize("name", AROUND)
def test_a_hook_on_the_network_sees_every_step(make, name):
    bare = make()
    kernel, called = AROUND[name](bare), []
    assert kernel.network is bare.network
    kernel.network.register_forward_hook(lambda *_: called.append(1))
    x = torch.zeros(3, *describe(kernel).state_shape)
    for t in (4, 1):
        kernel.transition(x, torch.full((3,), t))
    assert len(called) == 2


def test_a_kernel_without_a_module_names_none():
    assert DiffusionKernel(lambda x, t: x, state_shape=(2,), schedule=SCHEDULE).network is None
    assert optional(TDS(LinearGaussian(), linear()), "network") is None
