"""Rewards of any magnitude: numbers, or an error that says what is too large; never NaN without a word."""

import json
import math

import numpy as np
import pytest
import torch

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.core import values
from treesearch.core.weights import WeightOverflow, scaled
from treesearch.methods.base import Readout
from treesearch.registry import registry as specs
from treesearch.rewards.base import RewardError

BED = LinearGaussian()
METHODS = {name: specs.method({"rejection": "rejection(r_max=1e301)"}.get(name, name)) for name in specs.METHOD_NAMES}
METHODS |= {
    "fk, max": ts.FeynmanKac(num_particles=20, potential="max"),
    "fk, sum": ts.FeynmanKac(num_particles=20, potential="sum"),
    "fk, ess": ts.FeynmanKac(tempering="ess", resampling="ssp"),
    "fk, rollout": ts.FeynmanKac(value="rollout", ess_threshold=1.0),
    "dts, round robin": ts.DiffusionTreeSampling(selection="round_robin"),
}


def sized(magnitude):
    """A reward in ± magnitude."""
    return lambda x: magnitude * torch.tanh(x[:, 0].double())


REWARDS = {f"{m:g}": sized(m) for m in (1e-300, 1e100, 1e154, 1e200, 1e300)}
REWARDS |= {"equal": lambda x: torch.full((len(x),), 3.0), "-inf": lambda x: torch.full((len(x),), -math.inf)}


@pytest.mark.parametrize("name", METHODS)
def test_no_magnitude_becomes_nan(name):
    for size, reward in REWARDS.items():
        result = ts.search(BED, reward, METHODS[name], budget=ts.Budget(nfe=400))
        assert not result.log_weights.isnan().any(), size
        assert result.log_z is None or result.log_z < math.inf, size
        json.dumps(result.certificate().asdict(), allow_nan=False)
        assert float(result.best()[1]) == float(result.rewards.max()), size


@pytest.mark.parametrize("name", ["best_of_n", "fk", "fk, ess", "tree_sampling", "svdd", "dts"])
def test_what_floats_cannot_hold_is_named(name):
    with pytest.raises(RewardError, match=r"not finite.*node \d+ \(t = \d\) of task 0"):
        ts.search(BED, sized(1.79e308), METHODS[name], budget=ts.Budget(nfe=400))


def test_a_log_weight_that_floats_cannot_sum_is_named():
    with pytest.raises(WeightOverflow, match="1e302"):
        scaled(1.0, np.array([1.79e308]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_read_out_holds_numbers(bad):
    with pytest.raises(WeightOverflow):
        Readout(np.arange(2), np.array([0.0, bad]))
    with pytest.raises(WeightOverflow):
        Readout(np.arange(2), np.zeros(2), bad)
    assert scaled(math.inf, np.array([1.0])).tolist() == [math.inf]


@pytest.mark.parametrize("unit", [2.0**500, 2.0**900])
def test_values_of_huge_rewards_are_those_of_rewards_in_their_unit(unit):
    rng = np.random.default_rng(0)
    u = 100 * rng.normal(size=300)
    y, log_w = 0.6 * u + 30 * rng.normal(size=300), rng.normal(size=300)
    plain, large = (values.fit(u * s, y * s, log_w, np.zeros(300), 0.5) for s in (1.0, unit))
    np.testing.assert_allclose(np.diff(large.heights) / unit, np.diff(plain.heights), rtol=1e-9, atol=1e-9)
