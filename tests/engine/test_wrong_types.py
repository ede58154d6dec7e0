"""Settings of a wrong type: an error that names the setting, what it is and what is expected, never Python's own."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support.flows import GaussianFlow, log_snr, spectrum
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.mean_reverting import MeanReverting
from treesearch.backends.chains.residual import Residual
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian
from treesearch.backends.exact.teleport import Teleport
from treesearch.backends.guidance import DAS, DPS, TDS, Diffuser, TrustRegion
from treesearch.backends.models.restoration import restoration_kernel
from treesearch.methods import METHODS
from treesearch.registry import registry as specs
from treesearch.rewards import cached, normalise, wall_collision
from treesearch.rewards.analytic import linear, quadratic
from treesearch.rewards.remote.http import HTTPReward
from treesearch.rewards.remote.judge import VLMJudge

WRONG = ("x", b"x", [None], {}, True, float("nan"), 1j, object(), np.bool_(True), lambda: 0)
BED = LinearGaussian()
BARS = torch.linspace(0.9, 0.1, 20)
NEEDED = {"Rejection": {"r_max": 1.0}}


def numbers(function):
    """Names of parameters whose defaults are numbers."""
    given = inspect.signature(function).parameters.values()
    return [p.name for p in given if isinstance(p.default, (int, float)) and not isinstance(p.default, bool)]


MADE = {name: METHODS[path] for name, path in specs.METHOD_NAMES.items()}
CASES = [(m, f.name, NEEDED.get(m.__name__, {})) for m in MADE.values() for f in dataclasses.fields(m)]
GUIDES = [(g, n, {"kernel": BED, "reward": linear(1.0)}) for g in (TDS, DAS, DPS, TrustRegion, Diffuser)
          for n in (*numbers(g), *sorted({"window", "max_shift"} & set(inspect.signature(g).parameters)))]  # fmt: skip
KERNELS = [(LinearGaussian, n, {}) for n in ("num_steps", "dim", "std")]
KERNELS += [(GaussianMixture.ring, n, {}) for n in ("num_steps", "std")]
KERNELS += [(Schedule.variance_preserving, "num_steps", {"alphas_cumprod": BARS})]
KERNELS += [(MeanReverting, n, {}) for n in numbers(MeanReverting)]
KERNELS += [(MeanReverting().schedule, "num_steps", {}), (Residual().schedule, "num_steps", {})]
KERNELS += [(Residual, n, {}) for n in numbers(Residual)]
KERNELS += [(restoration_kernel, n, {}) for n in ("process", "order")]
KERNELS += [(Chain, "eta", {"schedule": Schedule.variance_preserving(BARS, 4)})]
FLOW = {"kernel": GaussianFlow(log_snr(4), spectrum())}
KERNELS += [(SecondOrder, "order", FLOW), (Teleport, "skip", FLOW | {"moments": spectrum()})]
REWARDS = [(quadratic, "k", {}), (cached, "size", {"reward": linear()})]
REWARDS += [(normalise, n, {"reward": linear(), "mean": 0.0, "std": 1.0}) for n in ("mean", "std")]
REWARDS += [(linear().clip, n, {}) for n in ("low", "high")]
REWARDS += [(wall_collision, n, {"maze_map": "umaze"}) for n in ("margin", "softness")]
REWARDS += [(HTTPReward, n, {"url": "http://h/"}) for n in numbers(HTTPReward)]
REWARDS += [(VLMJudge, n, {"url": "http://h/", "model": "m"}) for n in numbers(VLMJudge)]
WORKERS = [(ts.RayWorkers, n, {"num_workers": 1}) for n in ("num_workers", *numbers(ts.RayWorkers))]
LIMITS = [(ts.Budget, n, {}) for n in ("nfe", "seconds", "reward_calls", "iterations")]


@pytest.mark.parametrize(
    ("make", "name", "others"),
    [*CASES, *GUIDES, *KERNELS, *REWARDS, *WORKERS, *LIMITS],
    ids=lambda v: getattr(v, "__name__", v) if not isinstance(v, dict) else "",
)
def test_a_setting_of_a_wrong_type_is_named(make, name, others):
    for value in WRONG:
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b") as caught:
            make(**others | {name: value})
        assert re.search("expected|unknown|needs|choose", str(caught.value)), value


@pytest.mark.parametrize("value", WRONG)
def test_a_number_of_samples_of_a_wrong_type_is_told(value):
    found = ts.search(BED, linear(1.0), ts.BestOfN(n=4))
    for ask in (lambda: found.best(value), lambda: found.draw(value), lambda: found.draw(2, seed=value)):
        with pytest.raises(ValueError, match=r"got .*, expected a whole number, at least"):
            ask()
    assert len(found.draw(np.int64(3))) == len(found.best(np.int32(3))[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": 3}, "store is 3, expected the path of a run folder"),
        ({"store": None}, "store is None, expected the path of a run folder"),
        ({"budget": 100}, r"budget is 100, expected ts.Budget\(nfe=...\)"),
        ({"callbacks": print}, "callbacks is .*, expected a list of functions"),
        ({"batch_size": "8"}, "batch_size is '8', expected a whole number"),
        ({"workers": 2}, r"workers is 2, expected ts.RayWorkers\(num_workers, ...\) or None"),
    ],
    ids=str,
)
def test_arguments_of_resume_of_a_wrong_type_are_told(tmp_path, options, message):
    ts.search(BED, linear(1.0), ts.BestOfN(n=4), store=tmp_path / "run")
    with pytest.raises(TypeError, match=message):
        ts.resume(**{"store": tmp_path / "run", "kernel": BED, "reward": linear(1.0)} | options)
