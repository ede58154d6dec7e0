"""A test that a planted bug does not break is not a test: one bug for each estimator, caught by the check in use."""

import types
from functools import partial

import numpy as np
import pytest

import treesearch as ts
from tests.support import laws
from tests.support.laws import populations, trees
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import Tilt
from treesearch.core import backup, resampling, selection
from treesearch.core.noise import child_key
from treesearch.core.tree import ROOT
from treesearch.core.weights import log_sum
from treesearch.methods import diffusion_tree, population
from treesearch.methods.feynman_kac import Particles
from treesearch.rewards.analytic import linear
from treesearch.session import session
from treesearch.testing import check_noise

FK, DTS = ts.FeynmanKac, ts.DiffusionTreeSampling
DEEP = {"widening_c": 1.0, "widening_alpha": 0.5}
STEP, POTENTIAL, BACKUP = Particles.step, Particles._log_potential, backup.backup


def caught(check):
    """The check holds without the bug's name in it: see the test of the same law. Here it must fail."""
    with pytest.raises(AssertionError):
        check()


def far_off(ratios):
    """`unbiased` fails, and by ten standard errors or more."""
    caught(lambda: laws.unbiased(ratios))
    gap, se = laws.error(ratios)
    assert abs(gap) > 10 * se, f"the bug moves the mean by only {gap / se:.1f} standard errors"


def ratios(gaussian, method, n=1200, c=0.8):
    return populations(gaussian, linear(c), method, gaussian.tilted(Tilt(c=c)).log_z, n)


def test_ancestors_not_applied_to_the_previous_reward(monkeypatch, gaussian):
    def step(self, level, reward, *args):
        ancestors = STEP(self, level, reward, *args)
        self.previous = self.lam * reward
        return ancestors

    method = FK(num_particles=16, ess_threshold=1.0)
    check = partial(laws.potentials_follow_lineages, monkeypatch, gaussian, linear(1.2), method, ts.Budget(nfe=800))
    check()
    monkeypatch.setattr(Particles, "step", step)
    caught(check)


def test_ancestors_not_applied_to_the_running_statistics(monkeypatch, gaussian):
    def log_potential(self, *args):
        log_g = POTENTIAL(self, *args)
        self.unmoved = self.running
        return log_g

    def step(self, *args):
        ancestors = STEP(self, *args)
        self.running = self.unmoved
        return ancestors

    method = FK(num_particles=16, ess_threshold=1.0, potential="max")
    check = partial(laws.potentials_follow_lineages, monkeypatch, gaussian, linear(1.2), method, ts.Budget(nfe=800))
    check()
    monkeypatch.setattr(Particles, "_log_potential", log_potential)
    monkeypatch.setattr(Particles, "step", step)
    caught(check)


def test_ancestors_not_applied_to_the_spent_potentials(monkeypatch, gaussian):
    def log_potential(self, *args):
        log_g = POTENTIAL(self, *args)
        self.unmoved = self.spent
        return log_g

    def step(self, *args):
        ancestors = STEP(self, *args)
        self.spent = self.unmoved
        return ancestors

    monkeypatch.setattr(Particles, "_log_potential", log_potential)
    monkeypatch.setattr(Particles, "step", step)
    far_off(ratios(gaussian, FK(num_particles=8, ess_threshold=1.0)))


def test_weights_dropped_where_resampling_is_skipped(monkeypatch, gaussian):
    """The published code: a difference potential with adaptive resampling steers nothing (research: .302 for 1.068)."""

    def step(self, level, *args):
        ancestors = STEP(self, level, *args)
        if ancestors is None and level < self.levels - 1:
            self.log_w = np.zeros_like(self.log_w)
        return ancestors

    exact, method, budget = 1.068, FK(num_particles=20_000), ts.Budget(nfe=100_000)
    monkeypatch.setattr(Particles, "step", step)
    caught(lambda: laws.steered_to(gaussian, linear(1.2), method, exact, 0.04, budget))
    far_off(ratios(gaussian, FK(num_particles=8, ess_threshold=0.8)))


@pytest.mark.parametrize("potential", ["max", "sum"])
def test_the_running_statistic_closes_the_product(monkeypatch, gaussian, potential):
    def log_potential(self, level, terminal, reward, before):
        if terminal:
            spent = reward + self.running.total
            reward = np.maximum(reward, self.running.maximum) if potential == "max" else spent
        return POTENTIAL(self, level, terminal, reward, before)

    monkeypatch.setattr(Particles, "_log_potential", log_potential)
    far_off(ratios(gaussian, FK(num_particles=8, ess_threshold=0.8, potential=potential), n=1200, c=0.4))


def test_the_mean_weight_of_a_resampling_is_forgotten(monkeypatch, gaussian):
    def step(self, level, *args):
        before = self.log_z
        ancestors = STEP(self, level, *args)
        self.log_z = before
        return ancestors

    monkeypatch.setattr(Particles, "step", step)
    far_off(ratios(gaussian, FK(num_particles=8, ess_threshold=1.0)))


def test_a_resampling_scheme_that_favours_heavy_particles(monkeypatch, gaussian):
    def greedy(w, u):
        return resampling.systematic(w**2 / (w**2).sum(), u)

    monkeypatch.setitem(resampling.SCHEMES, "systematic", greedy)
    far_off(ratios(gaussian, FK(num_particles=8, ess_threshold=0.8, potential="immediate")))


def sum_for_mean(tree, leaves, rule, lam):
    """λ v = log Σ exp(λ v_c): without 1/|C|."""
    BACKUP(tree, leaves, rule, lam)
    for node in range(len(tree) - 1, -1, -1):
        below = laws.children(tree, node)
        below = below[~np.isnan(tree.value[below])]
        if len(below):
            tree.value[node] = log_sum(lam * tree.value[below] + tree.log_w[below]) / lam


def test_the_backup_sums_where_it_should_average(monkeypatch, gaussian):
    method, reward = DTS(selection="round_robin", wave=8, **DEEP), linear(0.5)
    log_z = gaussian.tilted(Tilt(c=0.5)).log_z

    def add_up():
        laws.values_add_up(ts.search(gaussian, reward, method, budget=ts.Budget(iterations=64)).tree, 1.0)

    add_up()
    monkeypatch.setattr(backup, "backup", sum_for_mean)
    caught(add_up)
    gap, se = laws.error(trees(gaussian, reward, method, log_z, 80, 16))
    assert gap > 10 * se


def test_the_backup_counts_visits(monkeypatch, gaussian):
    """A visit-weighted mean: what MCTS does, and biased here."""

    def by_visits(tree, leaves, rule, lam):
        BACKUP(tree, leaves, rule, lam)
        for node in range(len(tree) - 1, -1, -1):
            below = laws.children(tree, node)
            below = below[~np.isnan(tree.value[below])]
            if len(below):
                share = np.log(tree.visits[below] / tree.visits[below].sum())
                tree.value[node] = log_sum(lam * tree.value[below] + tree.log_w[below] + share) / lam

    monkeypatch.setattr(backup, "backup", by_visits)
    method = DTS(wave=8, **DEEP)
    tree = ts.search(gaussian, linear(1.2), method, budget=ts.Budget(iterations=64)).tree
    caught(lambda: laws.values_add_up(tree, 1.0))


def test_an_iteration_that_counts_no_visit(gaussian):
    tree = ts.search(gaussian, linear(1.2), DTS(wave=8, **DEEP), budget=ts.Budget(iterations=64)).tree
    laws.visits_add_up(tree, 64)
    tree.visits[laws.children(tree, ROOT)[0]] -= 1
    caught(lambda: laws.visits_add_up(tree, 64))


def test_edge_weights_are_dropped(monkeypatch, gaussian, drifting):
    monkeypatch.setattr(Gaussian, "log_weight", lambda self, x: x[:, 0].double() * 0)
    log_z, reward = gaussian.tilted(Tilt(c=0.5)).log_z, linear(0.5)
    far_off(populations(drifting, reward, FK(num_particles=8, ess_threshold=0.8), log_z, 1200))
    far_off(trees(drifting, reward, DTS(selection="round_robin", wave=8, **DEEP), log_z, 200, 40))


# Noise.


def shares_noise(gaussian, method, prompts=("a", "b")):
    found = ts.search(gaussian, linear(1.2), method, prompts=list(prompts), budget=ts.Budget(nfe=2000))
    check_noise([task.tree for task in found.tasks], 5)


@pytest.mark.parametrize("method", [ts.BestOfN(), FK(num_particles=16), DTS(wave=8, **DEEP)], ids=["bon", "fk", "dts"])
def test_noise_shared_between_tasks(monkeypatch, gaussian, method):
    shares_noise(gaussian, method)
    key = session.root_key
    monkeypatch.setattr(session, "root_key", lambda seed, task, stream: key(seed, 0, stream))
    caught(lambda: shares_noise(gaussian, method))


def test_the_level_left_out_of_the_key_of_a_tree_s_child(monkeypatch, gaussian):
    method = DTS(wave=8, widening_c=1.0, widening_alpha=0.3)
    shares_noise(gaussian, method)
    names = vars(selection) | {"child_key": lambda parent, t, ordinal, at_root: child_key(parent, 0, ordinal, at_root)}
    for name in ("_rollout", "select_wave"):  # the same source, uncompiled
        names[name] = types.FunctionType(names[name].py_func.__code__, names)
    monkeypatch.setattr(diffusion_tree.selection, "select_wave", names["select_wave"])
    caught(lambda: shares_noise(gaussian, method))


def test_the_level_left_out_of_the_key_of_an_offspring(monkeypatch, gaussian):
    method, keys = FK(num_particles=16, ess_threshold=1.0), population.child_keys
    shares_noise(gaussian, method)

    def child_keys(parents, t, ordinals, *, at_root=False):
        return keys(parents, 0, ordinals, at_root=at_root)

    monkeypatch.setattr(population, "child_keys", child_keys)
    caught(lambda: shares_noise(gaussian, method))


def test_siblings_that_share_a_key(monkeypatch, gaussian):
    method, keys = FK(num_particles=16, ess_threshold=1.0), population.child_keys

    def child_keys(parents, t, ordinals, *, at_root=False):
        return keys(parents, t, ordinals if at_root else ordinals * 0, at_root=at_root)

    monkeypatch.setattr(population, "child_keys", child_keys)
    caught(lambda: shares_noise(gaussian, method))
