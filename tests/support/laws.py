"""Checks that several tests share; `test_mutations.py` plants a bug for each and sees that it fails."""

import numpy as np
import torch

import treesearch as ts
from treesearch.core.tree import ROOT
from treesearch.core.weights import log_mean
from treesearch.methods.feynman_kac import Particles
from treesearch.rewards.potentials import POTENTIALS, Running

WIDE = 4096  # batch size: many replicates share a pass


def error(ratios):
    """(mean - 1, standard error) of independent estimates of 1."""
    ratios = np.asarray(ratios)
    return ratios.mean() - 1, ratios.std(ddof=1) / len(ratios) ** 0.5


def unbiased(ratios):
    """The mean of independent Ẑ/Z is 1: z-score below 4 at a standard error of at most 1 %."""
    gap, se = error(ratios)
    assert se <= 0.01, f"standard error {se:.4f}: more replicates, or a milder reward"
    assert abs(gap) < 4 * se, f"E[Ẑ]/Z = {1 + gap:.4f}, standard error {se:.4f}, z = {gap / se:.1f}"


def populations(kernel, reward, method, log_z, n, seed=0):
    """Ẑ/Z of n independent populations, all in one task."""
    result = ts.search(kernel, reward, method, budget=ts.Budget(iterations=n), seed=seed, batch_size=WIDE)
    ends = np.cumsum(result.diagnostics["populations"])[:-1]
    return np.exp([log_mean(w) - log_z for w in np.split(result.log_weights.numpy(), ends)])


def trees(kernel, reward, method, log_z, n, iterations, seed=0):
    """exp(λ v_root)/Z of n independent trees, a task each."""
    budget = ts.Budget(iterations=n * iterations)
    result = ts.search(kernel, reward, method, prompts=list(range(n)), budget=budget, seed=seed, batch_size=WIDE)
    return np.exp([task.log_z - log_z for task in result.tasks])


def children(tree, node):
    return np.flatnonzero(tree.parent == node)


def values_add_up(tree, lam):
    """Stored values are log-MEAN-exp over children, computed here from the leaves' rewards, bottom up."""
    value = np.where(tree.t == 0, tree.reward, np.nan)
    for node in range(len(tree) - 1, -1, -1):
        if tree.t[node] > 0:
            below = children(tree, node)
            with np.errstate(divide="ignore"):
                if lam == 0:
                    value[node] = np.average(value[below], weights=np.exp(tree.log_w[below]))
                elif np.isinf(lam):
                    value[node] = value[below].max()
                else:
                    value[node] = log_mean(lam * value[below] + tree.log_w[below]) / lam
    np.testing.assert_allclose(tree.value, value, rtol=0, atol=1e-9)


def visits_add_up(tree, iterations):
    """Every iteration through a node goes on to one of its children, terminals included."""
    assert tree.visits[ROOT] == iterations + 1
    through = np.bincount(tree.parent[1:], weights=tree.visits[1:] - 1, minlength=len(tree))
    inner = tree.t > 0
    np.testing.assert_array_equal(through[inner], tree.visits[inner] - 1)


def potentials_follow_lineages(monkeypatch, kernel, reward, method, budget):
    """Along every surviving lineage: each log G is the potential of the lineage's own rewards, their sum is λ r(x_0).

    Returns the number of resamplings, so that a test can see that some happened.
    """
    traces, step, potential = [], Particles.step, Particles._log_potential

    def traced_potential(self, *args):
        self.last_log_g = potential(self, *args)
        return self.last_log_g

    def traced_step(self, level, *args):
        ancestors = step(self, level, *args)
        if level == 0:
            self.trace = []
            traces.append(self)
        self.trace.append((self.last_log_g, ancestors))
        return ancestors

    with monkeypatch.context() as patch:
        patch.setattr(Particles, "_log_potential", traced_potential)
        patch.setattr(Particles, "step", traced_step)
        result = ts.search(kernel, reward, method, budget=budget, batch_size=WIDE)
    tree, at = result.tree, 0
    lam = float(result.tasks[0].lam)
    for particles in traces:
        k = len(particles.log_w)
        node, slot = result.leaves[at : at + k], np.arange(k)
        rewards, log_g = [tree.reward[node]], [particles.trace[-1][0]]
        for increments, ancestors in particles.trace[-2::-1]:
            slot, node = (slot if ancestors is None else ancestors[slot]), tree.parent[node]
            rewards.insert(0, tree.reward[node])
            log_g.insert(0, increments[slot])
        factors = method.tempering or (1.0,) * len(rewards)
        previous, running = np.zeros(k), Running(np.full(k, -np.inf), np.zeros(k))
        for r, factor, got in zip(rewards[:-1], factors, log_g, strict=False):
            now = lam * factor * r
            running = Running(np.maximum(running.maximum, now), running.total + now)
            np.testing.assert_allclose(got, POTENTIALS[method.potential](now, previous, running), atol=1e-9)
            previous = now
        np.testing.assert_allclose(np.sum(log_g, 0), lam * rewards[-1], atol=1e-9)
        at += k
    return sum(result.diagnostics["resamplings"])


def posterior_mean(result):
    """Mean of the method's estimate of π over one-dimensional samples."""
    return float((result.log_weights.softmax(0) * result.samples[:, 0]).sum())


def steered_to(kernel, reward, method, exact, tolerance, budget):
    """The weighted mean of one large population is the target's."""
    got = posterior_mean(ts.search(kernel, reward, method, budget=budget, batch_size=WIDE))
    assert abs(got - exact) < tolerance, f"mean {got:.3f}, exact {exact:.3f}"


def descent_probabilities(tree, leaves, lam):
    """P(leaf) of descending from the root, a child c with probability ∝ exp(λ v_c + log_w_c) at each node."""
    probability = np.zeros(len(tree))
    probability[ROOT] = 1.0
    for node in range(len(tree)):
        if len(below := children(tree, node)):
            score = torch.from_numpy(lam * tree.value[below] + tree.log_w[below])
            probability[below] = probability[node] * score.softmax(0).numpy()
    return probability[leaves]


class ShiftedPrior:
    """Starts from another normal than p(x_T) and says so: prior_log_weight carries log p/q."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.fingerprint = f"shifted({kernel.fingerprint})"
        self.q = torch.distributions.Normal(kernel.reverse.mu[-1, 0] + 0.3, 1.1 * kernel.reverse.var[-1, 0].sqrt())
        self.p = torch.distributions.Normal(kernel.reverse.mu[-1, 0], kernel.reverse.var[-1, 0].sqrt())

    def prior(self, noise, cond=None):
        return self.q.mean + self.q.stddev * noise.double()

    def prior_log_weight(self, x, cond=None):
        return (self.p.log_prob(x) - self.q.log_prob(x)).sum(1)

    def __getattr__(self, name):
        if name == "kernel":
            raise AttributeError(name)
        return getattr(self.kernel, name)


def exact_bed(kernel, lam=1.0):
    """(reward, log Z) on an enumerable chain: a table over its states."""
    if hasattr(kernel, "states"):
        values = torch.linspace(-1, 1.5, len(kernel.states), dtype=torch.float64)
        return (lambda x: values[kernel.index(x)]), kernel.tilted(values, lam).log_z
    values = torch.linspace(-1, 1.5, len(kernel.prior_probs), dtype=torch.float64)
    return (lambda x: values[x[:, 0]]), kernel.tilted(values, lam).log_z
