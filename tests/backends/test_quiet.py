"""A search in the middle of a training loop: networks stay as the caller left them, and are called in eval mode."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import treesearch as ts
from tests.support import tiny
from treesearch.backends.base.quiet import Quiet
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.guidance import TDS
from treesearch.backends.models.card import Normalisation
from treesearch.backends.models.trajectory import TrajectoryKernel
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.rewards import cached
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.critic import Critic
from treesearch.rewards.trajectories.dynamics import dynamics_consistency
from treesearch.rewards.trajectories.policy import PolicyLikelihood

SCHEDULE = Schedule.flow(torch.linspace(0, 1, 4, dtype=torch.float64))
REWARD = Reward(lambda samples, prompts: samples.flatten(1).mean(1), "mean")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x, timestep, mask=None):
        return self.line(self.drop(x))


def seeded(network):
    with torch.no_grad():
        for i, weight in enumerate(network.parameters()):
            weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape) + 0.1 * i)
    return network


def diffusion(folder):
    network = seeded(Net())
    return network, lambda: DiffusionKernel(network, state_shape=(2,), schedule=SCHEDULE), None


def trajectory(folder):
    network, channels = seeded(Net()), Channels(1, 1)

    def kernel():
        normal = Normalisation((0.0, 0.0), (1.0, 1.0))
        return TrajectoryKernel(network, channels=channels, normalisation=normal, horizon=4, schedule=SCHEDULE)

    return network, kernel, None


def pipeline(folder):
    pipe = DiffusionPipeline.from_pretrained(str(tiny.checkpoint("sd", folder)))
    parts = nn.ModuleDict({name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)})
    parts.scheduler = pipe.scheduler
    return parts, lambda: DiffusersKernel(pipe, num_steps=3, device="cpu"), ["a cat"]


def standing(network):
    """What a caller sees of a network."""
    told = [(name, part.training) for name, part in network.named_modules()]
    told += [
        (name, w.requires_grad, w.dtype, w.device, w.data_ptr(), w.grad is None)
        for name, w in network.named_parameters()
    ]
    scheduler = getattr(network, "scheduler", None)
    return told, None if scheduler is None else str(vars(scheduler))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [diffusion, trajectory, pipeline])
def test_a_search_leaves_the_network_as_it_was(make, tmp_path):
    network, kernel, prompts = make(tmp_path)
    found = []
    for training in (False, True):
        network.train(training).requires_grad_(training)
        next(iter(network.children())).eval()  # a part that the caller does not train
        before = standing(network)
        for wrapped in (kernel(), TDS(kernel(), REWARD)):
            result = ts.search(wrapped, REWARD, ts.BestOfN(n=3), prompts=prompts)
            assert standing(network) == before
            assert not result.samples.requires_grad
            found.append(result.samples)
    for one, other in zip(found[:2], found[2:], strict=True):
        assert torch.equal(one, other)  # no dropout took part


class Judges(nn.Module):
    """A network of the caller's that a reward asks; dropout and batch statistics would tell how it was called."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs, self.line = inputs, nn.Linear(inputs, outputs)

    def forward(self, *given):
        given = torch.cat([x.flatten(0, -2) if x.ndim > 2 else x for x in given], -1)
        return self.line(given[:, : self.inputs]).reshape(*given.shape[:1], -1)


PAIR = Channels(1, 1)
ASKING = {
    "itself": lambda net: as_reward(lambda x: net(x[:, 0]).sum(1)),
    "critic": lambda net: Critic(net, PAIR),
    "critics": lambda net: Critic([net, net], PAIR) - 1.0,
    "policy": lambda net: PolicyLikelihood(net, PAIR),
    "dynamics": lambda net: dynamics_consistency(PAIR, lambda s, a: net(s, a).reshape(s.shape)),
    "cached": lambda net: cached(Critic(net, PAIR)),
}


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("training", [False, True])
def test_a_reward_leaves_the_network_that_it_asks_as_it_was(name, training, tmp_path):
    net = seeded(Judges(1 if name == "policy" else 2, 1)).train(training).requires_grad_(training)
    before, reward, kernel = standing(net), ASKING[name](net), trajectory(tmp_path)[1]
    for wrapped in (kernel(), TDS(kernel(), reward)):
        found = ts.search(wrapped, reward, ts.BestOfN(n=3))
        assert standing(net) == before
        assert not found.samples.requires_grad


def test_a_call_that_fails_leaves_the_network_as_it_was():
    network = Net()
    kernel = DiffusionKernel(network, state_shape=(2,), schedule=SCHEDULE)
    with pytest.raises(RuntimeError, match="shape"):
        kernel.transition(torch.zeros(1, 3), torch.tensor([1]))
    assert network.drop.training
    assert network.line.weight.requires_grad


def test_calls_within_calls_end_in_turn():
    network, quiet = Net(), None
    quiet = Quiet(network)
    with quiet:
        with quiet:
            pass
        assert not network.training
    assert network.training
