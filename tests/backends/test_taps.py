"""Taps: which attention they are handed, in which thread, and what is left when a part fails."""

import contextlib
import threading

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from treesearch.backends.base.taps import on_rows, rows_called, tapped

X = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))


class Attending(nn.Module):
    """Attends, after a part of its own; fails where it is told to."""

    def __init__(self, inside=None, fails=False):
        super().__init__()
        self.inside, self.fails = inside or nn.Identity(), fails

    def forward(self, x):
        if self.fails:
            raise ArithmeticError("no")
        return scaled_dot_product_attention(*[self.inside(x)] * 3)


class Forgiving(nn.Module):
    """Goes on after a part that failed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attending(fails=True), Attending()

    def forward(self, x):
        try:
            return self.first(x)
        except ArithmeticError:
            return self.second(x)


def value(number):
    """A tap that puts out a number."""
    return lambda attend, q, k, v: torch.full_like(q, number)


def test_a_part_that_failed_is_over():
    net, plain = Forgiving(), Attending()(X)
    with tapped(net, {"first": value(1.0)}):
        assert torch.equal(net(X), plain)


def test_attention_is_that_of_the_innermost_part():
    net = Attending(Attending())
    with tapped(net, {"": value(2.0), "inside": value(1.0)}):
        assert torch.equal(net.inside(X), torch.ones_like(X))
        assert torch.equal(net(X), torch.full_like(X, 2.0))
    with tapped(net, {"": lambda attend, q, k, v: q, "inside": value(1.0)}):
        assert torch.equal(net(X), torch.ones_like(X))


def test_calls_of_another_thread_are_not_running_in_this_one():
    net, plain = nn.ModuleList([Attending(), Attending()]), Attending()(X)
    with tapped(net, {"0": value(1.0)}):
        other = threading.Thread(target=lambda: net[0](X))
        other.start()
        other.join()
        assert torch.equal(net[1](X), plain)
        assert torch.equal(net[0](X), torch.ones_like(X))


def test_rows_of_a_call_end_with_it():
    one, two = torch.tensor([True, False]), torch.tensor([0])
    with on_rows(one):
        with contextlib.suppress(ArithmeticError), on_rows(two):
            assert rows_called() is two
            raise ArithmeticError
        assert rows_called() is one
    assert rows_called() is None
