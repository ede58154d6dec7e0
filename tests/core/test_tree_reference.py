"""The compiled tree beside a plain one: algorithm 1 with waves, one node at a time, written from the paper."""

import math
from collections import deque

import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support.beds import BEDS
from treesearch.core.noise import Stream, child_keys, hash64, root_key
from treesearch.core.weights import log_mean
from treesearch.rewards.analytic import linear
from treesearch.testing import noise

DTS, DTS_STAR = ts.DiffusionTreeSampling, ts.DiffusionTreeSearch


class Plain:
    def __init__(self, kernel, reward, method, rule, c_uct=1.0, seed=0):
        from treesearch.backends.base import describe

        self.kernel, self.reward, self.method, self.rule, self.c_uct = kernel, reward, method, rule, c_uct
        self.spec, self.steps, self.root = describe(kernel), kernel.num_steps, root_key(seed, 0)
        self.parent, self.t, self.key, self.x = [-1], [self.steps + 1], [self.root], [None]
        self.value, self.visits, self.children, self.log_w = [math.nan], [1], [[]], [0.0]
        self.levels = [self.steps + 1, *range(self.steps, -1, -1)]  # five steps or fewer: every level branches
        self.iteration = 0

    def run(self, iterations):
        untold = deque()
        while self.iteration < iterations:
            leaves = []
            while not leaves and self.iteration < iterations:
                for _ in range(min(self.method.wave, iterations - self.iteration)):
                    leaves += self.iterate()
            untold.append(leaves)
            if len(untold) > self.method.lag:
                self.tell(untold.popleft())
        while untold:
            self.tell(untold.popleft())
        return self

    def iterate(self):
        """One iteration; returns the new leaf, if there is one."""
        path, new = [0], []
        while self.t[path[-1]] > 0:
            node = path[-1]
            valued = [c for c in self.children[node] if not math.isnan(self.value[c])]
            wide = len(self.children[node]) >= self.method.widening_c * self.visits[node] ** self.method.widening_alpha
            if not (wide and valued):
                new = [self.expand(node)]
                break
            path.append(self.pick(node, valued, len(path) - 1))
        for node in path:
            self.visits[node] += 1
        self.iteration += 1
        return new

    def pick(self, node, valued, depth):
        if self.rule == "round_robin":
            return min(valued, key=lambda c: self.visits[c])
        if self.rule == "uct":
            bonus = self.c_uct * math.sqrt(math.log(self.visits[node]))
            return max(valued, key=lambda c: self.value[c] + bonus * (1 / math.sqrt(self.visits[c])))
        bits = hash64(np.uint64(self.root), self.iteration, depth, int(Stream.SELECT))
        score = np.array([self.method.lam * self.value[c] + self.log_w[c] for c in valued])
        cumulative = np.cumsum(np.exp(score - score.max()))
        return valued[int(np.searchsorted(cumulative, (int(bits) >> 11) * 2.0**-53 * cumulative[-1], side="right"))]

    def expand(self, node):
        ordinal, at_root = len(self.children[node]), node == 0
        key = child_keys(np.array([self.key[node]], np.uint64), self.t[node], np.array([ordinal]), at_root=at_root)
        above, x = node, self.x[node]
        while self.t[above] > 0:
            t = self.t[above]
            z, log_w = noise(self.spec, key, t), 0.0
            if t > self.steps:
                x = self.kernel.prior(z)
            else:
                law = self.kernel.transition(x, torch.tensor([t]))
                x = law.sample(z)
                log_w = float(law.log_weight(x))
            self.children[above].append(len(self.t))
            columns = (self.parent, self.t, self.key, self.x, self.value, self.visits, self.children, self.log_w)
            row = (above, t - 1, int(key[0]), x, math.nan, 2, [], log_w)
            for column, entry in zip(columns, row, strict=True):
                column.append(entry)
            above = len(self.t) - 1
        return above

    def tell(self, leaves):
        for leaf in leaves:
            self.value[leaf] = float(self.reward(self.x[leaf]))
        for leaf in leaves:
            node = self.parent[leaf]
            while node >= 0:
                valued = [c for c in self.children[node] if not math.isnan(self.value[c])]
                score = np.array([self.method.lam * self.value[c] + self.log_w[c] for c in valued])
                self.value[node] = log_mean(score) / self.method.lam
                node = self.parent[node]


CASES = [
    (DTS(wave=1, widening_c=1.0, widening_alpha=0.5), "boltzmann"),
    (DTS(wave=7, widening_c=1.0, widening_alpha=0.4), "boltzmann"),
    (DTS(wave=3, lag=1, widening_c=1.0, widening_alpha=0.5), "boltzmann"),
    (DTS(wave=1, lam=0.3), "boltzmann"),
    (DTS(wave=4, selection="round_robin", widening_c=1.0, widening_alpha=0.5), "round_robin"),
    (DTS_STAR(wave=1, widening_c=1.0, widening_alpha=0.5), "uct"),
    (DTS_STAR(wave=6, c_uct=0.3), "uct"),
    (DTS_STAR(wave=3, lag=1, widening_c=2.0, widening_alpha=0.4), "uct"),
    # nodes with more than 4·wave children, where UCT looks at contenders only, under a bonus that matters
    (DTS_STAR(wave=2, c_uct=30.0, widening_c=2.0, widening_alpha=0.6), "uct"),
    (DTS_STAR(wave=5, c_uct=8.0, widening_c=2.0, widening_alpha=0.65), "uct"),
]


@pytest.mark.parametrize("guided", [False, True], ids=["base", "guided"])
@pytest.mark.parametrize(("method", "rule"), CASES, ids=range(len(CASES)))
def test_the_compiled_tree_is_the_plain_one(drifting, method, rule, guided):
    kernel, reward = drifting if guided else BEDS["gaussian"], linear(1.2)
    plain = Plain(kernel, reward, method, rule, getattr(method, "c_uct", 1.0)).run(200)
    result = ts.search(kernel, reward, method, budget=ts.Budget(iterations=200), batch_size=64)
    tree = result.tree
    for name in ("parent", "t", "key", "visits"):
        assert getattr(tree, name).tolist() == getattr(plain, name), name
    np.testing.assert_allclose(tree.value, plain.value, atol=1e-9)
    assert torch.equal(result.samples, torch.cat([plain.x[i] for i in result.leaves]))
