"""Drafts as values of states: on noise of their own they leave Ẑ unbiased, on that of the path they do not."""

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import laws
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.engine import drafting
from treesearch.rewards.base import Reward

T, LAM = 6, 1.2
BED = GaussianStates(torch.full((1,), 0.3).double(), torch.eye(1).double(), num_steps=T)
REWARD = Reward(lambda x, prompts: x[:, 0].double(), "first")
MEAN, COV = BED.law
LOG_Z = float(LAM * MEAN[0] + LAM**2 * COV[0, 0] / 2)
STEERED = ts.FeynmanKac(lam=LAM, num_particles=2, schedule=(6, 0), ess_threshold=1.0, value="draft", draft=6)


def ratios(populations=2500, seed=2):
    """Ẑ/Z of independent pairs of particles."""
    return laws.populations(BED, REWARD, STEERED, LOG_Z, populations, seed)


def test_drafts_on_noise_of_their_own_leave_z_unbiased():
    gap, se = laws.error(ratios())
    assert abs(gap) < 4 * se
    assert se < 0.03


def test_drafts_on_the_noise_of_the_path_bias_z(monkeypatch):
    """The test above can fail: the first child takes the noise that its parent's draft has shown."""
    monkeypatch.setattr(drafting, "draft_keys", lambda keys, levels: keys)
    gap, se = laws.error(ratios())
    assert abs(gap) > 6 * se


@pytest.mark.parametrize(
    "method", [STEERED, ts.TreeSampling(lam=LAM, schedule=(4, 2, 0), draft=3)], ids=["steering", "tree-sampling"]
)
def test_they_are_paid_for_and_runs_resume(method, tmp_path):
    found, spec = ts.search(BED, REWARD, method, budget=ts.Budget(nfe=2000), seed=3), describe(BED)
    each = T + sum(spec.draft_prices(method.draft, held=True)[t] for t in method.levels(spec)[:-1])
    assert found.cost.nfe == len(found.rewards) * each <= 2000
    assert 2000 - found.cost.nfe < 2 * each
    assert found.cost.draft_nfe == len(found.rewards) * (each - T)
    assert method.unit(spec).nfe == each * (method.num_particles if method == STEERED else 1)
    ts.search(BED, REWARD, method, budget=ts.Budget(nfe=1000), seed=3, store=tmp_path / "run")
    longer = ts.resume(tmp_path / "run", BED, REWARD, budget=ts.Budget(nfe=2000))
    assert 1000 < longer.cost.nfe <= 2000
    assert longer.cost.repeated_nfe == 0


def test_tree_sampling_on_drafts_is_unbiased_and_fits_what_they_are_worth():
    method = ts.TreeSampling(lam=LAM, schedule=(4, 2, 0), draft=3)
    budget = ts.Budget(nfe=60 * 1200)
    found = ts.search(BED, REWARD, method, prompts=list(range(60)), budget=budget, batch_size=laws.WIDE)
    gap, se = laws.error(np.exp([task.log_z - LOG_Z for task in found.tasks]))
    assert abs(gap) < 4 * se
    assert se < 0.04
    slopes = [task.diagnostics["slopes"] for task in found.tasks]
    assert 0 < np.mean([s[4] for s in slopes]) < np.mean([s[2] for s in slopes]) < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": "draft"}, "draft=None"),
        ({"draft": 5}, "value='endpoint' with draft=5"),
        ({"value": "draft", "draft": 1}, "draft is 1, expected"),
        ({"value": "draft", "draft": (3, 5)}, "draft is"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ts.FeynmanKac(**wrong)


def test_kernels_that_cannot_draft_are_refused():
    for method in (ts.FeynmanKac(value="draft", draft=2), ts.TreeSampling(draft=2)):
        with pytest.raises(ValueError, match="no `chain`"):
            ts.search(LinearGaussian(), lambda x: x[:, 0], method, budget=ts.Budget(nfe=500))
