"""The published rule of steering, spreads that are given, and pilots that fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Guided, Wrapper, shift_mean
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.backends.guidance import Spread, Steered, spread
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.base import Reward
from treesearch.rewards.observation import matrix, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
KERNEL = GaussianStates(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64) + 0.3, num_steps=5)
ROWS, R = [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.5]], (0.5,) * 6
MASK = torch.tensor([True, False, False, True])


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def seen(tolerance: float = 0.1) -> Reward:
    return measurement(matrix(ROWS), torch.tensor([1.0, -0.5]), tolerance=tolerance)


def bowl(x):
    """Two entries of a state, bent."""
    return x[:, :2] ** 2


def bent(function=bowl) -> Reward:
    return measurement(function, torch.zeros(2), tolerance=0.3)


def test_it_leaves_no_weights_of_an_inner_guide():
    inner = Guided(KERNEL, shift_mean(lambda x, t, law, cond: torch.full_like(x, 0.01)), "shift")
    kernel = Steered(inner, seen(), rule="paper")
    check_kernel(kernel, rows=6)
    found = ts.search(kernel, seen(), ts.BestOfN(n=4))
    assert torch.equal(torch.as_tensor(found.log_weights), torch.as_tensor(seen()(found.samples)))


@pytest.mark.parametrize("path", [False, True])
def test_it_leaves_what_is_held(path):
    held = torch.full((6, 4) if path else (4,), 0.5, dtype=F64)
    kernel = Steered(Clamp(KERNEL, MASK, held), seen(), rule="paper")
    found = ts.search(kernel, seen(), ts.BestOfN(n=4)).samples
    assert (found[:, MASK] == 0.5).all()
    free = ts.search(kernel.kernel, seen(), ts.BestOfN(n=4)).samples
    assert (found != free)[:, ~MASK].all()


def test_what_is_seen_twice_is_projected_once():
    """A Aᵀ has eigenvalues of 0 then, up to rounding."""
    x, t = draws(4, 4), torch.tensor([1, 2, 4, 5])
    twice = seen() + measurement(matrix(ROWS), seen().fn.observed, tolerance=0.2)
    found, want = (Steered(KERNEL, of, rule="paper").transition(x, t).endpoint for of in (twice, seen()))
    assert (found - want).abs().max() < 1e-9


class Half(Wrapper):
    """In bfloat16."""

    dtype = torch.bfloat16

    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x.double(), t)
        return replace(law, mean=law.mean.bfloat16(), std=law.std.bfloat16(), endpoint=law.endpoint.bfloat16())


@pytest.mark.parametrize("options", [{"rule": "paper"}, {"spread": R}])
def test_a_step_keeps_the_precision_of_its_kernel(options):
    kernel = Steered(Half(KERNEL), seen(), **options)
    assert kernel.transition(draws(2, 4).bfloat16(), torch.tensor([2, 4])).mean.dtype == torch.bfloat16


def test_spreads_that_differ_have_kernels_that_differ():
    e = draws(6, 5, 4)
    spreads = [Spread(R, ((s,) * 6,), misses=of) for s in (0.1, 9.0) for of in (None, e, e + 1)]
    kernels = [Steered(KERNEL, seen() + bent(), spread=of) for of in spreads]
    assert len({kernel.fingerprint for kernel in kernels}) == 6
    assert kernels[1].spread.misses is e
    assert spread(KERNEL, bent(), n=4).source != spread(KERNEL, bent(lambda x: 3 * bowl(x)), n=4).source


class Lost(Wrapper):
    """A kernel whose last step is lost."""

    def transition(self, x, t, cond=None):
        law = self.kernel.transition(x, t)
        return replace(law, mean=torch.where((t == 1)[:, None], torch.nan, law.mean))


def given(*shape: int) -> Steered:
    return Steered(KERNEL, seen(), spread=Spread(R, misses=torch.zeros(shape)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: given(6, 5, 3), r"misses have shape \(6, 5, 3\), expected finite numbers of shape \(6, n, 4\)"),
        (lambda: given(7, 5, 4), "misses have shape"),
        (lambda: given(6, 0, 4), "misses have shape"),
        (lambda: spread(Lost(KERNEL), n=2), r"pilot of Lost .* not finite at t = \[1, 2, 3, 4, 5\]"),
    ],
)
def test_what_is_no_spread_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
