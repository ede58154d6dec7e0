"""Misses of endpoints that go together: the pull and the value against dense algebra, and log Z where one r_t fails."""

from __future__ import annotations

import math

import pytest
import torch

import treesearch as ts
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.backends.guidance import Steered, spread
from treesearch.backends.guidance.correlated import Correlated, shrunk
from treesearch.backends.guidance.stacked import Stacked
from treesearch.rewards.observation import Measurement, masked, matrix, measurement
from treesearch.testing import check_kernel

F64 = torch.float64
AT = torch.arange(8, dtype=F64)[:, None]
KERNEL = GaussianStates(
    torch.zeros(8, dtype=F64), (-0.5 * (torch.cdist(AT, AT) / 3) ** 2).exp() + 0.05 * torch.eye(8), num_steps=10
)
MASK = torch.arange(8) % 2 == 0
EVERY = ts.FeynmanKac(schedule=(*range(9, 1, -1), 0), num_particles=256)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def seen(tolerance: float, seed: int = 1):
    """The reward of a noisy draw, and its evidence."""
    mean, cov = KERNEL.law
    x0 = mean + torch.linalg.cholesky(cov) @ draws(8, seed=seed)
    y = x0 + tolerance * draws(8, seed=seed + 50)
    evidence = KERNEL.given(torch.eye(8, dtype=F64), y, tolerance).log_evidence
    return measurement(masked(torch.ones(8, dtype=torch.bool)), y, tolerance=tolerance), evidence


def test_the_share_of_what_is_not_correlated():
    e = draws(5, 6) @ (torch.eye(6, dtype=F64) + 0.8)
    cov = e.T @ e / 5
    apart = (cov - cov.trace() / 6 * torch.eye(6, dtype=F64)).square().sum()
    chance = sum((torch.outer(row, row) - cov).square().sum() for row in e) / 25
    rho, square = shrunk(e)
    assert 0.1 < rho < 0.9
    assert math.isclose(rho, float(chance / apart), rel_tol=1e-12)
    assert math.isclose(square, float(cov.trace() / 6), rel_tol=1e-12)
    assert shrunk(torch.zeros(5, 6, dtype=F64)) == (1.0, 0.0)


@pytest.mark.parametrize(("name", "n"), [("mask", 5), ("matrix", 5), ("two", 5), ("mask", 20), ("two", 20)])
def test_the_pull_and_the_value_are_those_of_dense_algebra(name, n):
    rows = draws(3, 8, seed=2)
    of = {
        "mask": [Measurement(masked(MASK), draws(4, seed=3), 0.3)],
        "matrix": [Measurement(matrix(rows), draws(3, seed=4), 0.3)],
    }
    of["two"] = [*of["mask"], Measurement(matrix(rows), draws(3, seed=4), 0.7)]
    stacked, misses = Stacked(of[name], (8,)), 0.7 * draws(3, n, 8, seed=5) @ (torch.eye(8, dtype=F64) + 0.3)
    endpoint, t = draws(4, 8, seed=6), torch.tensor([2, 1, 2, 2])
    value, pull = Correlated(stacked, misses)(stacked.gap(endpoint), t)
    a = torch.cat([part.operator(torch.eye(8, dtype=F64)).T for part in of[name]])
    y = torch.cat([part.observed for part in of[name]])
    noise = torch.cat([torch.full((part.observed.numel(),), part.tolerance**2, dtype=F64) for part in of[name]]).diag()
    for row, level in enumerate(t.tolist()):
        rho, square = shrunk(misses[level])
        s = (1 - rho) * misses[level].T @ misses[level] / n + rho * square * torch.eye(8, dtype=F64)
        law = torch.distributions.MultivariateNormal(a @ endpoint[row], a @ s @ a.T + noise)
        assert math.isclose(float(value[row]), float(law.log_prob(y)), rel_tol=1e-11)
        want = s @ a.T @ torch.linalg.solve(a @ s @ a.T + noise, y - a @ endpoint[row])
        assert (pull[row] - want).abs().max() < 1e-11


def test_log_z_where_neighbours_miss_together():
    """One r_t a level takes eight misses of a smooth line for eight opinions."""
    reward, evidence = seen(0.3)
    options = {"batch_size": 256, "budget": ts.Budget(nfe=256 * 10), "progress": False}
    found = {
        correlated: [
            ts.search(Steered(KERNEL, reward, correlated=correlated), reward, EVERY, seed=s, **options).log_z - evidence
            for s in range(8)
        ]
        for correlated in (False, True)
    }
    error = {name: torch.tensor(values, dtype=F64) for name, values in found.items()}
    assert abs(float(error[True].mean())) < 0.1
    assert float(error[True].square().mean()) < 0.5 * float(error[False].square().mean())
    ratio = error[True].exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_a_pilot_s_misses_are_those_of_its_rollouts():
    plain, kept = spread(KERNEL, n=20, correlated=False), spread(KERNEL, n=20)
    assert plain.misses is None
    assert kept.misses is not None
    assert kept.misses.shape == (11, 20, 8)
    assert not kept.misses[:2].any()  # the last step has no noise
    assert torch.allclose(kept.misses.square().mean((1, 2)).sqrt().double(), torch.tensor(kept.state).double())
    assert kept.state == plain.state
    reward, _ = seen(0.3)
    own, given = (
        Steered(KERNEL, reward, correlated=True),
        Steered(KERNEL, reward, spread=spread(KERNEL, correlated=True)),
    )
    x, t = draws(3, 8), torch.tensor([2, 5, 9])
    assert torch.equal(own.transition(x, t).mean, given.transition(x, t).mean)
    assert not torch.equal(own.transition(x, t).mean, Steered(KERNEL, reward, correlated=False).transition(x, t).mean)
    assert len({k.fingerprint for k in (own, given, Steered(KERNEL, reward, correlated=False))}) == 3
    assert Steered(KERNEL, reward).fingerprint == own.fingerprint  # so few are kept unasked
    assert (
        Steered(KERNEL, reward, pilot=2**20).fingerprint
        == Steered(KERNEL, reward, pilot=2**20, correlated=False).fingerprint
    )


def test_its_steps_obey_the_laws():
    check_kernel(Steered(KERNEL, seen(0.3)[0], correlated=True), rows=6, proposal=True)


def test_a_spread_without_misses_is_refused_where_they_are_asked_for():
    with pytest.raises(ValueError, match="keeps no misses"):
        Steered(KERNEL, seen(0.3)[0], spread=spread(KERNEL, correlated=False), correlated=True)
