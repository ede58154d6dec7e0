"""Iterative selection of attention heads, and what its sets are compared to.

    S = {};  in each round, of the heads h that are left:  score_h = 1/M Σ_j r(x̂_j(S + {h})),  S <- S + the best k
    x̂_j(S)   draw j = (prompt, seed), guided away from the network whose heads S are perturbed (SoftPAG)

Judged on pairs of other seeds: sets of the same size drawn evenly, and PAG on whole layers, the layer being chosen on
the pairs of the hunt as the heads are. Draws share their noise from set to set.

Source: Fine-Grained Perturbation Guidance via Attention Head Selection (Ahn et al., 2025), algorithm 1. Its k, rounds,
M and scale are not published in what we have; those here are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Head = tuple[str, int]
HeadSet = tuple[Head, ...]
Score = Callable[[HeadSet], float]


def every_head(counts: dict[str, int]) -> HeadSet:
    """Heads of a network, from the numbers of its modules."""
    return tuple((name, head) for name, n in counts.items() for head in range(n))


def hunt(heads: HeadSet, score: Score, rounds: int, k: int) -> list[HeadSet]:
    """The set after each round; of equal scores the head that comes first."""
    found: HeadSet = ()
    after = []
    for _ in range(rounds):
        left = [head for head in heads if head not in found]
        if not left:
            break
        best = sorted(left, key=lambda head: -score(ordered(heads, (*found, head))))[:k]
        found = ordered(heads, (*found, *best))
        after.append(found)
    return after


def ordered(heads: HeadSet, some: Sequence[Head]) -> HeadSet:
    """Heads in the order of the network."""
    return tuple(head for head in heads if head in some)


def layers(heads: HeadSet) -> list[HeadSet]:
    """All heads of each module."""
    return [tuple(of) for _, of in itertools.groupby(heads, key=lambda head: head[0])]


def others(heads: HeadSet, chosen: HeadSet, most: int) -> list[HeadSet]:
    """Other sets of the size of a chosen one: all of them, or so many drawn evenly with a fixed seed."""
    size = len(chosen)
    if math.comb(len(heads), size) - 1 <= most:
        return [of for of in itertools.combinations(heads, size) if of != chosen]
    found: list[HeadSet] = []
    rng = np.random.default_rng(0)
    while len(found) < most:
        drawn = tuple(heads[i] for i in sorted(rng.choice(len(heads), size, replace=False)))
        found += [drawn] * (drawn != chosen and drawn not in found)
    return found


def by_part(some: HeadSet) -> dict[str, list[int]]:
    """As `softpag` takes them."""
    return {name: [head for _, head in of] for name, of in itertools.groupby(some, key=lambda head: head[0])}


def written(some: HeadSet) -> str:
    """Such as "mid_block 0 2; up_blocks.0 1"; empty for none."""
    return "; ".join(f"{name} {' '.join(map(str, of))}" for name, of in by_part(some).items())
