"""A pilot's figures against closed forms, its suggestions against cases that have one answer, and any kernel."""

import json
import math
import shlex

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support import tiny
from treesearch.backends import discrete, gaussian, heun, masked_chain, maze, mnist, ring, tds
from treesearch.backends.base import Guided, describe, shift_mean
from treesearch.cli.main import main
from treesearch.diagnosis import effects, spread
from treesearch.diagnosis.diagnosis import Level, Spread
from treesearch.diagnosis.effects import Estimate, Nested, jackknife, monotone
from treesearch.diagnosis.pilot import levels_of, price
from treesearch.diagnosis.suggest import Seen, changed, for_best, for_draws
from treesearch.rewards import brightness, linear, maze_plan
from treesearch.testing.chains import bare_chain

KERNEL = gaussian(num_steps=10)


def close(figure, truth):
    """Within four standard errors, which are small enough to tell."""
    return abs(figure.value - truth) < 4 * figure.se < 0.5


def test_figures_of_a_linear_gaussian_chain_are_the_closed_ones():
    found = ts.diagnose(KERNEL, linear(1.0), nfe=5_000)
    reverse, std = KERNEL.reverse, KERNEL.std
    for level in found.levels:
        # Var E[x_0 | x_t] / Var x_0; the endpoint is E[x_0 | x_t], so that its slope and `known` are 1
        share = float(reverse.bar[level.t] * std**2 / reverse.var[level.t, 0])
        assert close(level.decided, share)
        if share > 0.3:
            assert close(level.known, 1.0)
            assert close(level.slope, 1.0)
            rank = 6 / math.pi * math.asin(math.sqrt(share) / 2)  # Spearman's of a Gaussian pair
            assert close(level.rank, rank)
        assert math.isnan(level.asymmetry.value) or level.asymmetry.value < 1e-12
    # exp(λ x) of N(m, s²): ESS exp(-λ² s²), KL λ² s² / 2, Var λ² s²
    assert close(found.spread.ess, math.exp(-(std**2)))
    assert close(found.spread.kl, std**2 / 2)
    assert close(found.spread.variance, std**2)
    assert found.spread.lam_tenth == pytest.approx(math.sqrt(math.log(10)) / std, rel=0.2)
    assert found.skipped["one step"].startswith("the kernel has no Gaussian chain")


def test_variances_by_level_are_unbiased():
    chance, levels = np.random.default_rng(0), 3
    shares, totals = [], []
    for _ in range(2000):
        effect = chance.normal(size=(levels + 1, 6))  # of each level on six chains
        chain = effect.sum(0)
        leaves = np.stack(
            [chain, *(effect[: i + 1].sum(0) + chance.normal(size=(levels - i, 6)).sum(0) for i in range(levels))], 1
        )
        shares.append(effects.decided(leaves[None], levels) * effects.covariance(leaves[None], leaves[None]).mean())
        totals.append(effects.covariance(leaves[None], leaves[None]).mean())
    error = np.std(shares, 0) / math.sqrt(len(shares))
    assert (np.abs(np.mean(shares, 0) - [1, 2, 3]) < 4 * error).all()
    assert (error < 0.1).all()
    assert abs(np.mean(totals) - 4) < 4 * np.std(totals) / math.sqrt(len(totals))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    leaves = np.random.default_rng(1).normal(size=(1, 30, 2))
    _, error = jackknife(lambda n: n.leaves.mean((0, 1)), Nested(leaves, leaves))
    assert np.allclose(error, leaves[0].std(0, ddof=1) / math.sqrt(30))


def test_shares_are_made_to_rise():
    assert np.allclose(monotone(np.array([-0.1, 0.5, 0.3, 1.2]), np.ones(4)), [0.0, 0.4, 0.4, 1.0])


def test_chains_are_best_of_ns_rollouts_and_nothing_is_spent_that_is_not_counted():
    found = ts.diagnose(KERNEL, linear(1.0), nfe=700, seed=5)
    spec = describe(KERNEL)
    jacobians = 4 * int(0.05 * 700 / 4)
    assert found.cost["nfe"] == found.chains * price(spec, levels_of(spec)) + jacobians
    assert 700 - price(spec, levels_of(spec)) < found.cost["nfe"] <= 700
    assert found.cost["rows"] == found.cost["nfe"]
    assert found.cost["repeated_nfe"] == 0
    chains = bare_chain(KERNEL, found.chains, seed=5)[-1][:, 0]
    assert float(chains.max()) <= found.rewards["highest"]
    assert float(chains.min()) >= found.rewards["lowest"]


def test_the_same_seed_gives_the_same_figures_whatever_the_batch():
    told = [ts.diagnose(KERNEL, linear(1.0), nfe=600, seed=3, batch_size=size).as_dict() for size in (64, 7)]
    for each in told:
        each["cost"] = {name: n for name, n in each["cost"].items() if not name.endswith("seconds")}
    assert told[0] == told[1]
    assert ts.diagnose(KERNEL, linear(1.0), nfe=600, seed=4).as_dict()["levels"] != told[0]["levels"]


def test_the_defaults_of_torch_change_nothing():
    want = ts.diagnose(KERNEL, linear(1.0), nfe=600, seed=3).as_dict()["levels"]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = ts.diagnose(KERNEL, linear(1.0), nfe=600, seed=3).as_dict()["levels"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == want


def half(x, t, base, cond):
    return 0.3 * base.std


def first(samples):
    """A number of any sample."""
    return torch.as_tensor(samples).double().flatten(1).sum(1)


KERNELS = {
    "ring": ring(num_steps=6),
    "discrete": discrete(),
    "masked_chain": masked_chain(),
    "guided": Guided(KERNEL, shift_mean(half), "half"),
    "tds": tds(KERNEL, linear(1.0)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_any_kernel(name):
    found = ts.diagnose(KERNELS[name], first, nfe=600)
    assert {each.goal for each in found.suggestions} == {"best", "draws"}
    assert all(level.decided.se > 0 for level in found.levels)
    json.dumps(found.as_dict(), allow_nan=False)
    assert "not measured: one step" in str(found)
    if name in ("guided", "tds"):
        assert any("log p/q" in note for note in found.notes)


def test_the_shipped_model_has_every_figure():
    found = ts.diagnose(mnist(num_steps=3), brightness(), nfe=110, batch_size=32)
    assert not found.skipped
    assert all(level.one_step.value >= 0 and 0 <= level.asymmetry.value < 2 for level in found.levels)
    assert found.levels[0].one_step.value > found.levels[-1].one_step.value


def test_a_solver_with_memory_has_no_paths_of_its_own():
    for kernel in (mnist(num_steps=3, solver="2m"), heun(mnist(num_steps=2, eta=0.0))):
        found = ts.diagnose(kernel, brightness(), nfe=90)
        assert set(found.skipped) == {"one step", "asymmetry"}


def test_a_maze_and_a_pipeline_with_prompts(tiny_root):
    from treesearch.backends.pipelines import DiffusersKernel

    starts = [{"start": [-2.0, 2.0, 0.0, 0.0], "goal": goal} for goal in ([2.0, -2.0], [2.0, -2.0])]
    found = ts.diagnose(maze("medium", num_steps=3, horizon=16), maze_plan("medium"), prompts=starts, nfe=150)
    assert found.tasks == 2
    kernel = DiffusersKernel.from_pretrained(str(tiny.checkpoint("sd", tiny_root)), num_steps=2)
    found = ts.diagnose(kernel, lambda images: images.flatten(1).mean(1), prompts=["a cat"], nfe=64)
    assert found.levels[0].asymmetry.value > 0


def levels(rows):
    """Levels of (t, decided, rank)."""
    zero = Estimate(0.0, 0.0)
    return [
        Level(t=t, decided=Estimate(d, 0.1), upper=Estimate(d, 0.1), rank=Estimate(r, 0.1), slope=zero, known=zero)
        for t, d, r in rows
    ]


def weights(ess):
    zero = Estimate(0.0, 0.0)
    return Spread(lam=1.0, ess=Estimate(ess, 0.0), variance=zero, kl=zero, lam_tenth=None)


SPEC = describe(KERNEL)
CASES = {
    "decided by x_T": ([(10, 0.95, 0.9), (5, 0.98, 0.9), (1, 1.0, 1.0)], "BestOfN", False, "x_T decides"),
    "decided at the end": ([(10, 0.0, 0.0), (5, 0.01, 0.0), (1, 0.05, 0.1)], "TreeSearch", True, "draw costs 1 steps"),
    "endpoints know": ([(10, 0.0, 0.2), (5, 0.5, 0.8), (1, 1.0, 1.0)], "BeamSearch", True, "endpoints rank states"),
    "endpoints know late": ([(10, 0.0, 0.0), (5, 0.8, 0.2), (1, 1.0, 0.3)], "TreeSearch", True, "too late"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_suggested_for_the_best(case):
    rows, method, branch, words = CASES[case]
    found, branches, reason = for_best(SPEC, Seen.of(levels(rows)), varies=True)
    assert (type(found).__name__, branches) == (method, branch)
    assert words in reason
    if case == "endpoints know":
        assert changed(found)["schedule"] == (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    if case == "decided at the end":
        assert changed(found) == {"branch_at": (1,)}
    if case == "endpoints know late":
        assert changed(found) == {"branch_at": tuple(range(9, 1, -1))}


def test_what_is_suggested_for_draws():
    seen = Seen.of(levels(CASES["endpoints know"][0]))
    assert isinstance(for_draws(SPEC, seen, weights(0.8), varies=True)[0], ts.BestOfN)
    found, branches, _ = for_draws(SPEC, seen, weights(0.01), varies=True)
    assert branches
    assert isinstance(found, ts.TreeSampling)
    assert (found.schedule or (1,))[-1] == 0
    blind = Seen.of(levels([(10, 0.0, 0.0), (5, 0.5, 0.1), (1, 1.0, 0.2)]))
    assert isinstance(for_draws(SPEC, blind, weights(0.01), varies=True)[0], ts.BestOfN)


def test_a_deterministic_kernel_and_a_constant_reward_have_nothing_to_branch():
    found = ts.diagnose(mnist(num_steps=3, eta=0.0), brightness(), nfe=80)
    assert isinstance(found.suggestion("best").method, ts.NoiseSearch)
    assert all(level.decided.value == 1.0 for level in found.levels)
    for value in (1.5, -math.inf):
        found = ts.diagnose(KERNEL, lambda x, value=value: torch.full((len(x),), value), nfe=600)
        assert not found.suggestion("best").branch
        assert all(math.isnan(level.decided.value) for level in found.levels)
        json.dumps(found.as_dict(), allow_nan=False)
        assert "do not vary" in str(found)


def test_forbidden_samples_count_as_low_and_are_named():
    found = ts.diagnose(KERNEL, lambda x: torch.where(x[:, 0] > 0, x[:, 0], -math.inf), nfe=1200)
    assert 0 < found.rewards["forbidden"] < 1
    assert any("-inf" in note for note in found.notes)
    assert all(math.isfinite(level.decided.value) for level in found.levels)
    assert 0 < found.spread.ess.value < 1


TOY = ["--kernel", "gaussian(num_steps=4)", "--reward", "linear(1.0)"]


def test_the_command_line_leaves_a_picture_and_json_and_says_what_to_type(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *TOY, "--nfe", "300", "--store", "d"]) == 0
    printed = capsys.readouterr().out
    assert "for best: " in printed
    assert (tmp_path / "d/outputs/diagnosis.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "d/diagnosis.json").read_text())
    assert {"levels", "spread", "suggestions", "cost"} <= set(told)
    for line in [line.strip() for line in printed.splitlines() if line.startswith("  treesearch run")]:
        assert main([*shlex.split(line)[1:-1], "900", "--store", str(tmp_path / str(len(line)))]) == 0
    assert main(["diagnose", *TOY, "--nfe", "300", "--json", "--store", "d"]) == 0
    printed = capsys.readouterr().out
    again = json.loads(printed[printed.rindex('\n{\n  "kernel"') :])
    assert again["levels"] == told["levels"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--nfe", "30"], 1, "the minimum is"),
        (["--nfe", "ten"], 2, "10k"),
        (["--lam", "-1"], 2, "expected a number >= 0"),
        (["--lam", "nan"], 2, "expected a number >= 0"),
        (["--kernel", "gausian"], 2, "did you mean 'gaussian'"),
        (["--reward", "kernel"], 2, "no reward that guides it"),
        (["--batch-size", "0"], 2, "at least 1"),
        (["--reward", "digit(8)"], 1, "expected images"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(capsys, tmp_path, words, code, said):
    assert main(["diagnose", *TOY, "--store", str(tmp_path / "d"), *words]) == code
    printed = capsys.readouterr()
    assert said in " ".join((printed.out + printed.err).replace("│", " ").split())
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("how", [{"nfe": 2.5}, {"nfe": 0}, {"lam": "auto"}, {"lam": -1.0}, {"seed": "x"}, {"store": 3}])
def test_python_refuses_the_same(how):
    with pytest.raises((TypeError, ValueError)):
        ts.diagnose(KERNEL, linear(1.0), **how)


def test_spreads_of_several_tasks_are_means():
    leaves, log_p = np.random.default_rng(2).normal(size=(2, 8, 3)), np.zeros((2, 8, 3))
    each = [spread.statistics(leaves[[i]], log_p[[i]], 1.0) for i in range(2)]
    assert np.allclose(spread.statistics(leaves, log_p, 1.0), np.mean(each, 0))
