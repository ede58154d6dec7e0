"""Outputs of parts of a network, captured while it is called and only then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from treesearch.backends.base import fingerprint
from treesearch.backends.base.capture import captured


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * x, ("rest", x)


class Net(nn.Module):
    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.block, self.out, self.calls = Block(), nn.Identity(), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.block(x)[0]
        return self.out(x) + 1


X = torch.arange(3.0)


def test_it_is_what_the_parts_put_out_with_their_graph():
    x = X.clone().requires_grad_()
    with captured(net := Net(), ("block", "out", "")) as seen:
        out = net(x)
    assert list(seen) == ["block", "out", ""]
    assert torch.equal(seen["block"], 2 * X)  # of several things the first tensor
    assert seen[""] is out
    assert torch.equal(torch.autograd.grad(seen["block"].sum(), x)[0], torch.full((3,), 2.0))


def test_hooks_are_gone_whatever_happens():
    net, before = Net(), fingerprint.of(Net())
    with pytest.raises(ZeroDivisionError), captured(net, ("block", "out")):
        raise ZeroDivisionError
    with captured(net, ("block",)) as seen:
        pass
    net(X)
    assert not seen
    assert fingerprint.of(net) == before
    with pytest.raises(ValueError, match="no part 'mid'"), captured(net, ("block", "mid")):
        pass
    assert not net.block._forward_hooks


def test_parts_of_several_networks():
    networks = (Net(), Net())
    with captured(networks, ("0.block", "1.block")) as seen:
        networks[1](X)
    assert list(seen) == ["1.block"]


def test_a_part_that_is_called_twice_is_ambiguous():
    with pytest.raises(RuntimeError, match="called twice"), captured(net := Net(2), ("block",)):
        net(X)
    assert not net.block._forward_hooks
