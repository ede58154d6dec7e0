import numpy as np
import pytest
from scipy import stats

from treesearch.core.noise import Stream, child_keys, hash64, normals, philox, root_key, uniforms

KNOWN = [  # Random123's kat_vectors: counter, key, answer of Philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def keys_of(n, seed=0, task=0):
    return child_keys(np.array([root_key(seed, task)], np.uint64), 6, np.arange(n), at_root=True)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert tuple(map(int, philox(*map(np.uint32, counter + key)))) == answer


def test_a_draw_is_box_muller_of_the_philox_words_of_key_and_counter():
    key, t = 0x0123456789ABCDEF, 7
    words = [int(w) for w in philox(*map(np.uint32, (0, t, 0, 0, key & 0xFFFFFFFF, key >> 32)))]
    radius = [np.sqrt(-2 * np.log((w + 0.5) * 2.0**-32)) for w in words[::2]]
    angle = [2 * np.pi * w * 2.0**-32 for w in words[1::2]]
    want = [radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])]
    np.testing.assert_allclose(normals(np.array([key], np.uint64), np.array([t]), 3)[0], want, rtol=1e-6)


def test_golden_draws():
    keys = keys_of(2)
    assert keys.tolist() == GOLDEN_KEYS
    np.testing.assert_allclose(normals(keys, np.array([5, 5]), 3), GOLDEN_NORMALS, rtol=1e-6)
    np.testing.assert_allclose(uniforms(int(keys[0]), 2, 1, Stream.RESAMPLE), GOLDEN_UNIFORMS, rtol=1e-15)


GOLDEN_KEYS = [11075176978267137471, 7271454610178494506]
GOLDEN_NORMALS = [[0.71333259, -0.93965441, 0.77189851], [0.56943995, 0.46749043, 1.6330822]]
GOLDEN_UNIFORMS = [0.7971201314252717, 0.8118101163322892]


def test_normals_are_standard_and_independent():
    z = normals(keys_of(50_000), np.full(50_000, 5), 4).astype(float)
    assert stats.kstest(z.ravel()[:100_000], "norm").pvalue > 1e-3
    for power, exact, sd in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((z**power).mean() - exact) < 4 * sd / z.size**0.5
    correlation = np.corrcoef(z.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / 50_000**0.5
    lag = (z[:-1, 0] * z[1:, 0]).mean()  # neighbouring keys
    assert abs(lag) < 4 / 50_000**0.5


def test_uniforms_are_uniform():
    u = uniforms(root_key(0, 0), 50_000, 3, Stream.RESAMPLE)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_a_row_does_not_depend_on_its_batch():
    keys, t = keys_of(9), np.arange(9) % 5
    whole = normals(keys, t, 7)
    for i in range(9):
        np.testing.assert_array_equal(normals(keys[[i]], t[[i]], 7)[0], whole[i])
    np.testing.assert_array_equal(normals(keys, t, 5), whole[:, :5])


def test_levels_tasks_seeds_populations_and_streams_are_disjoint():
    roots = {root_key(seed, task, population) for seed in range(5) for task in range(50) for population in range(2)}
    assert len(roots) == 500
    hashes = {int(hash64(np.uint64(k), np.uint32(1), np.uint32(2), np.uint32(s))) for k in range(100) for s in Stream}
    assert len(hashes) == 100 * len(Stream)
    draws = np.concatenate([normals(keys_of(20, 0, task), np.full(20, t), 2) for task in range(3) for t in range(1, 6)])
    assert len(np.unique(draws, axis=0)) == len(draws)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        root_key(seed, 0)


def every_child(keys, t, count, at_root=False):
    return np.concatenate([child_keys(keys[[i]], t, np.arange(count), at_root=at_root) for i in range(len(keys))])


def test_the_first_child_of_an_inner_node_goes_on_with_its_key():
    keys = keys_of(4)
    np.testing.assert_array_equal(child_keys(keys, 5, np.zeros(4, int)), keys)
    assert root_key(0, 0) not in keys_of(4).tolist()


def test_children_of_a_node_and_of_its_unbranched_continuation_have_different_keys():
    key = keys_of(1)
    below = [child_keys(key, t, np.arange(1, 50)) for t in (5, 4, 3, 2, 1)]
    assert len(np.unique(np.concatenate(below))) == 5 * 49


def test_a_full_tree_shares_no_key_except_along_continuations():
    layer, seen = keys_of(6), []
    for t in (5, 4, 3):
        below = every_child(layer, t, 4)
        fresh = below.reshape(-1, 4)[:, 1:].ravel()
        seen += [fresh]
        layer = below
    seen = np.concatenate([keys_of(6), *seen])
    assert len(np.unique(seen)) == len(seen)
