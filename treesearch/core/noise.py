"""Counter-based noise: every draw is a pure function of (key, level, stream).

A node's 64-bit key stands for its path: key(child) = H(key(parent), t, ordinal), where the first child of an inner
node keeps its parent's key, so that an unbranched continuation is the rollout that best-of-N would have made. The
level t enters the hash: without it, child j of a node and child j of that node's unbranched continuation, which
share a key, would share their noise. The noise of the step t -> t-1 is the Philox stream (key, counter t); streams
for keys, selection, resampling and read-out are disjoint. So batch size, worker, retry or resume change no draw.

Philox4x32-10: "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., 2011). Normals: Box-Muller in float64,
rounded to float32, which absorbs the last-digit differences between maths libraries.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numba import uint32, uint64
from numpy.typing import NDArray

from treesearch.core.compiled import compiled

U64 = NDArray[np.uint64]


class Stream(IntEnum):
    """What a counter is for; one Philox word, so that streams never meet."""

    NOISE = 0
    CHILD = 1
    ROOT = 2
    SELECT = 3
    RESAMPLE = 4
    READOUT = 5
    DRAFT = 6


@compiled(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four counter words under two key words; returns four random uint32 words."""
    for _ in range(10):
        p0 = uint64(c0) * uint64(0xD2511F53)
        p1 = uint64(c2) * uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            uint32(uint32(p1 >> uint64(32)) ^ c1 ^ k0),
            uint32(p1),
            uint32(uint32(p0 >> uint64(32)) ^ c3 ^ k1),
            uint32(p0),
        )
        k0 = uint32(k0 + uint32(0x9E3779B9))
        k1 = uint32(k1 + uint32(0xBB67AE85))
    return c0, c1, c2, c3


@compiled(inline="always")
def hash64(key, a, b, stream):
    """64 random bits for (key, 32-bit a and b, stream)."""
    w0, w1, _, _ = philox(
        uint32(a), uint32(b), uint32(stream), uint32(0), uint32(key), uint32(uint64(key) >> uint64(32))
    )
    return (uint64(w1) << uint64(32)) | uint64(w0)


@compiled(inline="always")
def child_key(parent, t, ordinal, at_root):
    """Key of child number `ordinal` of a node at level t; the first child of an inner node continues its path."""
    if ordinal == 0 and not at_root:
        return uint64(parent)
    return hash64(parent, ordinal, t, uint32(1))


@compiled
def _fill_normals(keys, counters, out):
    """Standard normals (n, d): row i is the stream (keys[i], counters[i])."""
    n, d = out.shape
    for i in range(n):
        key = uint64(keys[i])
        k0, k1, t = uint32(key), uint32(key >> uint64(32)), uint32(counters[i])
        for j in range(0, d, 4):
            words = philox(uint32(j // 4), t, uint32(0), uint32(0), k0, k1)
            for pair in range(2):
                # (w + 1/2) / 2^32 lies inside (0, 1): the logarithm is finite.
                radius = math.sqrt(-2.0 * math.log((words[2 * pair] + 0.5) * 2.0**-32))
                angle = 2.0 * math.pi * words[2 * pair + 1] * 2.0**-32
                if j + 2 * pair < d:
                    out[i, j + 2 * pair] = radius * math.cos(angle)
                if j + 2 * pair + 1 < d:
                    out[i, j + 2 * pair + 1] = radius * math.sin(angle)


@compiled
def _fill_sums(keys, weights, out):
    """Σ_u weights[i, u] ε(keys[i], u), (n, d), each ε rounded as `_fill_normals` rounds it."""
    n, d = out.shape
    one = np.empty((1, d), np.float32)
    total = np.empty(d, np.float64)
    for i in range(n):
        total[:] = 0.0
        for u in range(weights.shape[1]):
            if weights[i, u] != 0.0:
                _fill_normals(keys[i : i + 1], np.array([u]), one)
                for j in range(d):
                    total[j] += weights[i, u] * one[0, j]
        for j in range(d):
            out[i, j] = total[j]


@compiled
def _draft_keys(keys, levels, out):
    for i in range(len(out)):
        out[i] = hash64(keys[i], uint32(0), uint32(levels[i]), uint32(6))


@compiled
def _child_keys(parents, t, ordinals, at_root, out):
    for i in range(len(out)):
        out[i] = child_key(parents[i], t, ordinals[i], at_root)


def root_key(seed: int, task: int, population: int = 0) -> int:
    """Key of a task's root.

    Raises:
        ValueError: a seed outside 0..2^64-1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0..2^64-1")
    return int(hash64(np.uint64(seed), np.uint32(task), np.uint32(population), np.uint32(Stream.ROOT)))


def child_keys(parents: U64, t: int, ordinals: NDArray[np.int64], *, at_root: bool = False) -> U64:
    """Keys (n,) of children at level t of nodes with the given keys."""
    out = np.empty(len(ordinals), np.uint64)
    _child_keys(np.broadcast_to(parents, out.shape), t, ordinals, at_root, out)
    return out


def normals(keys: U64, counters: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """Standard normals (n, size), float32: row i belongs to (keys[i], counters[i])."""
    out = np.empty((len(keys), size), np.float32)
    _fill_normals(keys, counters, out)
    return out


def sums_of_normals(keys: U64, weights: NDArray[np.float64], size: int) -> NDArray[np.float32]:
    """Σ_u weights[i, u] ε_u, (n, size), of the normals ε_u that `normals(keys[i], u)` are; zero weights cost nothing.

    Args:
        keys: (n,).
        weights: by counter u, (n, counters).
        size: of a row.
    """
    out = np.empty((len(keys), size), np.float32)
    _fill_sums(keys, weights, out)
    return out


def draft_keys(keys: U64, levels: NDArray[np.int64]) -> U64:
    """Keys (n,) of noise apart from that of the paths: of drafts from nodes with the given keys and levels."""
    out = np.empty(len(keys), np.uint64)
    _draft_keys(keys, levels, out)
    return out


@compiled
def _fill_uniforms(key, a, stream, out):
    for i in range(len(out)):
        out[i] = float(hash64(key, i, a, stream) >> uint64(11)) * 2.0**-53


def uniforms(key: int, count: int, a: int, stream: Stream) -> NDArray[np.float64]:
    """`count` uniforms in [0, 1) with 53 bits: the stream (key, a, stream)."""
    out = np.empty(count, np.float64)
    _fill_uniforms(np.uint64(key), np.uint32(a), np.uint32(stream), out)
    return out
