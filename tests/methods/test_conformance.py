"""The suites of `treesearch.testing` on everything that ships for exact beds, and on plug-ins with one fault each."""

import pytest
import torch

import treesearch as ts
from tests.support.beds import BEDS
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.budget import Share
from treesearch.methods import diffusion_tree
from treesearch.rewards.analytic import constant, linear, log_mixture, quadratic
from treesearch.session import recorder
from treesearch.testing import check_kernel, check_method, check_reward, check_store

DTS, DTS_STAR, FK = ts.DiffusionTreeSampling, ts.DiffusionTreeSearch, ts.FeynmanKac
DEEP = {"widening_c": 1.0, "widening_alpha": 0.4}


def test_every_bed_is_a_kernel(bed):
    check_kernel(bed, atol=0)


def test_a_guided_kernel_is_a_proposal(drifting):
    check_kernel(drifting, atol=0, proposal=True)
    with pytest.raises(AssertionError, match="expected zeros of a base kernel"):
        check_kernel(drifting)


class Faulty:
    """The Gaussian bed with one method replaced."""

    num_steps, state_shape, dtype = 5, (1,), torch.float64

    def __init__(self, **faults):
        self.base = LinearGaussian()
        self.faults = faults

    def __getattr__(self, name):
        if name in ("base", "faults") or name.startswith("__"):
            raise AttributeError(name)
        return self.faults[name] if name in self.faults else getattr(self.base, name)

    def prior(self, noise, cond=None):
        return self.faults.get("prior", self.base.prior)(noise, cond)

    def transition(self, x, t, cond=None):
        return self.faults.get("transition", self.base.transition)(x, t, cond)

    def decode(self, x0):
        return self.faults.get("decode", self.base.decode)(x0)

    encode = None


def with_prompts(kernel):
    kernel.encode = lambda prompts: {"drift": torch.tensor([[float(len(p))] for p in prompts])}
    return kernel


def conditional(x, t, cond=None):
    law = LinearGaussian().transition(x, t)
    return Gaussian(law.mean + cond["drift"], law.std, law.endpoint)


def test_a_conditional_kernel_is_checked_with_its_prompts():
    check_kernel(with_prompts(Faulty(transition=conditional)), prompts=["a", "bb", "cccc"], atol=0)


BASE = LinearGaussian()
FAULTS = {
    "expected shape": {"prior": lambda z, c: BASE.prior(z)[:, 0]},
    "expected kernel.dtype": {"prior": lambda z, c: BASE.prior(z).float()},
    "global generator|two calls with one noise": {"prior": lambda z, c: BASE.prior(z) + torch.randn(len(z), 1)},
    "mixed levels|take with repeats": {
        "transition": lambda x, t, c: BASE.transition(x, t.max().expand(len(t)))  # one level for the whole batch
    },
    "take with repeats": {
        "transition": lambda x, t, c: (lambda g: Gaussian(g.mean + x.mean(), g.std, g.endpoint))(BASE.transition(x, t))
    },
    "wrote into its input": {"transition": lambda x, t, c: BASE.transition(x.mul_(1.01), t)},
    r"log_prob .* beside N": {
        "transition": lambda x, t, c: type(
            "Law", (Gaussian,), {"log_prob": lambda self, y: Gaussian.log_prob(self, y) + 1}
        )(*vars(BASE.transition(x, t)).values())
    },
    r"stochastic\[3\]": {"stochastic": (True, True, True, False, True, True)},
    "decode": {"decode": lambda x: x[:3]},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_kernel_is_named(message):
    with pytest.raises(AssertionError, match=message):
        check_kernel(Faulty(**FAULTS[message]), atol=0)


def test_a_search_that_changes_p_is_caught(monkeypatch):
    search = diffusion_tree.DiffusionTree.ask

    def shifted(self, capacity):
        segments = search(self, capacity)
        self.tree.key[segments.first] += 1
        return segments

    monkeypatch.setattr(diffusion_tree.DiffusionTree, "ask", shifted)
    with pytest.raises(AssertionError, match="DiffusionTreeSampling with lam = 0"):
        check_kernel(BASE)


SAMPLES = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "reward",
    [
        linear(1.2),
        quadratic(1.0, 0.5),
        log_mixture(((0.0, 1.0), (1.0, 0.0)), (0.5, 0.5), 0.3),
        constant(2.0),
        2 * linear(1.0) - quadratic().clip(-1.0, 0.0).min(linear(0.1)),
        lambda samples, prompts=None: samples.sum(1) * torch.tensor([len(p) for p in prompts]),
    ],
    ids=["linear", "quadratic", "log_mixture", "constant", "algebra", "prompted"],
)
def test_rewards_obey_their_laws(reward):
    check_reward(reward, SAMPLES, prompts=["a", "bb", "ccc", "d", "ee", "ffffff", "g"])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: x[:, 0] - x[:, 0].mean(), "single rows"),
        (lambda x: torch.rand(len(x)), "two calls"),
        (lambda x, prompts=None: x[:, 0] * len(prompts[0]), "single rows|reverse"),
        (lambda x: x.mul_(0.99)[:, 0], "two calls|wrote into"),
        (lambda x: x[:, 0] * (len(x) > 1), "single rows"),
        (lambda x: x.sort(0).values[:, 0], "single rows|reverse"),
    ],
    ids=["batch mean", "random", "first prompt", "in place", "single", "order"],
)
def test_a_faulty_reward_is_named(reward, message):
    with pytest.raises(AssertionError, match=message):
        check_reward(reward, SAMPLES.clone(), prompts=["a", "bb", "ccc", "d", "ee", "ffffff", "g"])


METHODS = [
    ts.BestOfN(),
    ts.BestOfN(lam="auto"),
    FK(),
    FK(num_particles=8, lam=2.0, ess_threshold=1.0),
    FK(num_particles=7, potential="max", resampling="residual", schedule=(4, 2, 0)),
    DTS(),
    DTS(wave=10, **DEEP),
    DTS(wave=8, lag=1, **DEEP),
    DTS_STAR(wave=8, c_uct=0.5, **DEEP),
    ts.BeamSearch(),
    ts.TreeSampling(),
    ts.TreeSearch(wave=8),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_obeys_the_laws(gaussian, method):
    check_method(method, gaussian, linear(1.2))


@pytest.mark.parametrize("name", ["masked", "mixture"])
def test_methods_obey_the_laws_on_other_beds(name):
    branch_at = (3, 2) if name == "masked" else None
    check_method(DTS(wave=16, branch_at=branch_at, **DEEP), BEDS[name], lambda x: x.double().sum(1))


def test_a_store_cut_at_many_places_goes_on(gaussian, tmp_path):
    check_store(DTS(wave=8, **DEEP), gaussian, linear(1.2), tmp_path, cuts=25)


def test_a_store_that_rounds_is_caught(gaussian, tmp_path, monkeypatch):
    records = recorder.records

    def rounded(*args):
        out = records(*args)
        out["reward"] = out["reward"].astype("f4")
        return out

    monkeypatch.setattr(recorder, "records", rounded)
    with pytest.raises(AssertionError, match="log cut"):
        check_store(DTS(wave=8, **DEEP), gaussian, linear(1.2), tmp_path, cuts=4)


def test_a_method_that_overspends_is_caught(gaussian, monkeypatch):
    less = Share.less
    monkeypatch.setattr(Share, "less", lambda self, nfe, *spent: less(self, nfe - 10, *spent))
    with pytest.raises(AssertionError, match="budget of"):
        check_method(ts.BestOfN(), gaussian)


def test_a_method_that_depends_on_the_batch_is_caught(gaussian, monkeypatch):
    ask = diffusion_tree.DiffusionTree.ask

    def greedy(self, capacity):
        object.__setattr__(self.method, "wave", capacity)
        return ask(self, capacity)

    monkeypatch.setattr(diffusion_tree.DiffusionTree, "ask", greedy)
    with pytest.raises(AssertionError, match="batch_size"):
        check_method(DTS(**DEEP), gaussian)
