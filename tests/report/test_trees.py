"""Pictures of trees: where nodes stand, what shares a mark, whose path is marked."""

import numpy as np
import pytest
from PIL import Image

import treesearch as ts
from tests.support.beds import BEDS
from tests.support.kernels import total
from treesearch.core.tree import Tree
from treesearch.report import trees


def grown(n, levels=5, seed=0):
    """A random tree of n nodes: each hangs below one of the level above, leaves are scored."""
    rng = np.random.default_rng(seed)
    tree, above = Tree(levels, 7), np.array([0])
    for t in range(levels, -1, -1):
        size = n // (levels + 1)
        above = tree.append(rng.choice(above, size), np.full(size, t), rng.integers(0, 2**60, size).astype(np.uint64))
    tree.reward[above] = rng.normal(size=len(above))
    tree.value[:] = np.where(tree.t == 0, tree.reward, rng.normal(size=len(tree)) - 1)
    return tree


def test_a_small_tree_is_drawn_node_by_node():
    tree = grown(60)
    data = trees.layout(tree)
    assert len(data.x) == len(tree) == data.nodes
    assert (data.count == 1).all()
    assert {tuple(edge) for edge in data.edges.tolist()} == {(int(tree.parent[i]), i) for i in range(1, len(tree))}
    assert (data.levels[data.row] == tree.t).all()
    assert (data.value == tree.value).all()
    for t in range(6):  # nobody stands in another's place, and nobody outside the picture
        x = np.sort(data.x[tree.t == t])
        assert (np.diff(x) > 1e-9).all()
        assert (x[0] > 0, x[-1] < 1) == (True, True)


def test_edges_do_not_cross():
    tree = grown(200)
    data = trees.layout(tree)
    for t in range(5):
        nodes = np.flatnonzero(tree.t == t)
        nodes = nodes[np.argsort(data.x[nodes])]
        assert (np.diff(data.x[tree.parent[nodes]]) >= 0).all()


def test_the_best_stands_in_the_middle_and_has_its_path():
    tree = grown(60)
    data = trees.layout(tree)
    leaves = np.flatnonzero(tree.t == 0)
    top = leaves[np.argsort(-tree.reward[leaves])]
    assert list(data.best) == top[:8].tolist()
    assert list(data.best.values()) == [(data.x[i], tree.reward[i]) for i in top[:8]]
    path, node = [], int(top[0])
    while node >= 0:
        path.append((data.x[node], data.row[node]))
        node = int(tree.parent[node])
    assert data.path.tolist() == [list(place) for place in path[::-1]]
    fan = Tree(1, 3)
    kids = fan.append(np.zeros(7, int), np.zeros(7, int), np.arange(7, dtype=np.uint64))
    fan.reward[kids] = [3.0, 1.0, 6.0, 2.0, 5.0, 4.0, 0.0]
    x = trees.layout(fan).x[1:]
    assert fan.reward[kids][np.argsort(x)].tolist() == [0.0, 2.0, 4.0, 6.0, 5.0, 3.0, 1.0]


@pytest.mark.parametrize("levels", [5, 200])
def test_a_large_tree_shares_marks(levels):
    tree = grown(12_000, levels)
    data = trees.layout(tree)
    assert len(data.x) <= trees.DRAWN_NODES
    assert data.count.sum() == len(tree) == data.nodes
    assert len(data.levels) <= trees.ROWS
    assert data.levels[0] == levels + 1
    assert data.row.max() == len(data.levels) - 1
    assert (np.diff(data.levels) < 0).all()
    assert np.nanmax(data.value) == tree.value.max()
    assert (data.row[data.edges[:, 0]] <= data.row[data.edges[:, 1]]).all()
    assert len(set(range(len(data.x))) - set(data.edges[:, 1])) <= 1  # but for the root's, every mark hangs below one


def test_a_mark_has_the_mean_place_and_the_best_value_of_its_nodes():
    tree = Tree(1, 3)
    kids = tree.append(np.zeros(400, int), np.zeros(400, int), np.arange(400, dtype=np.uint64))
    tree.reward[kids] = np.arange(400.0)
    data, alone = trees.layout(tree, limit=200), trees.layout(tree)
    shared = data.row == 1
    assert data.count[shared].tolist() == [4] * 100
    order = np.argsort(alone.x[1:])
    assert np.sort(data.x[shared]) == pytest.approx(alone.x[1:][order].reshape(100, 4).mean(1))
    by_place = data.value[shared][np.argsort(data.x[shared])]
    assert by_place.tolist() == tree.reward[kids][order].reshape(100, 4).max(1).tolist()


def test_a_picture_marks_the_path_and_shows_the_samples(tmp_path):
    data = trees.layout(grown(60))
    green = np.zeros((9, 9, 3), np.uint8)
    green[..., 1] = 255
    plain, full = tmp_path / "plain.png", tmp_path / "full.png"
    trees.draw_tree(data, plain, title="$\\oops{")
    trees.draw_tree(data, full, pictures=dict.fromkeys([*list(data.best)[:2], 10**6], green))
    for path, shown in ((plain, False), (full, True)):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        red = (np.abs(pixels - [0xD6, 0x27, 0x28]) < 8).all(-1)
        assert red.sum() > 300
        assert ((pixels == [0, 255, 0]).all(-1).sum() > 2 * 50**2) == shown


def test_a_tree_is_coloured_by_what_led_to_its_nodes(tmp_path):
    tree = grown(60)
    data = trees.layout(tree)
    kinds = np.arange(len(tree)) % 3
    for name, shown in (("some", kinds), ("one", 0 * kinds)):
        path = trees.draw_tree(data, tmp_path / f"{name}.png", kinds=shown, names=("none", "$a", "b"))
        with Image.open(path) as image:
            found = np.asarray(image.convert("RGB")).astype(int)[:-60]  # without the legend
        orange = (np.abs(found - [0xFF, 0x7F, 0x0E]) < 8).all(-1)
        assert (orange.sum() > 50) == (name == "some")
    with pytest.raises(ValueError, match="at most 3000 nodes"):
        trees.draw_tree(data, tmp_path / "no.png", kinds=kinds[1:], names=("a", "b", "c"))


def test_trees_without_values_or_samples_are_drawn(tmp_path):
    tree = Tree(3, 1)
    trees.draw_tree(trees.layout(tree), tmp_path / "root.png")
    kids = tree.append(np.zeros(3, int), np.full(3, 3), np.arange(3, dtype=np.uint64))
    tree.value[kids[0]] = -np.inf
    data = trees.layout(tree)
    assert np.isnan(data.value).all()
    assert (data.path.shape, data.best) == ((0, 2), {})
    assert trees.draw_tree(data, tmp_path / "tree.png").stat().st_size > 1000


def test_a_population_s_genealogy_is_a_tree_too():
    tree = ts.search(BEDS["gaussian"], total, ts.FeynmanKac(num_particles=16), seed=1).tree
    data = trees.layout(tree)
    assert len(data.x) == len(tree)
    assert data.best[next(iter(data.best))][1] == np.nanmax(tree.reward[tree.t == 0])
