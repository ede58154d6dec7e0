"""The tree as a graph and as a table."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.export import to_networkx, write_csv, write_graphml
from treesearch.rewards.analytic import linear


@pytest.fixture(scope="module")
def tree() -> ts.Tree:
    reward = linear(1.0).gate(linear(1.0), above=-0.5)  # some rewards are -inf
    return ts.search(LinearGaussian(), reward, ts.DiffusionTreeSampling(), budget=ts.Budget(nfe=400)).tree


def test_graph_is_the_tree(tree: ts.Tree) -> None:
    graph = to_networkx(tree)
    assert nx.is_arborescence(graph)
    assert graph.graph["num_steps"] == 5
    assert list(graph) == list(range(len(tree)))
    assert all(tree.parent[child] == parent for parent, child in graph.edges)
    assert all("reward" in graph.nodes[n] for n in tree.leaves)
    inner = next(n for n in graph if n and tree.t[n] > 0)
    assert "reward" not in graph.nodes[inner]  # not scored: NaN
    assert graph.nodes[0]["key"] == f"{int(tree.key[0]):016x}"


def test_graphml_reads_back(tree: ts.Tree, tmp_path: Path) -> None:
    write_graphml(tree, tmp_path / "tree.graphml")
    again, graph = nx.read_graphml(tmp_path / "tree.graphml", node_type=int), to_networkx(tree)
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    assert {(a, b): d["log_w"] for a, b, d in again.edges(data=True)} == {
        (a, b): d["log_w"] for a, b, d in graph.edges(data=True)
    }
    assert -math.inf in {d.get("reward") for _, d in again.nodes(data=True)}


def test_table_reads_back(tree: ts.Tree, tmp_path: Path) -> None:
    write_csv(tree, tmp_path / "tree.csv")
    with open(tmp_path / "tree.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tree)
    for name in ("parent", "t", "visits", "value", "reward", "log_w"):
        read = np.array([float(row[name]) if row[name] else math.nan for row in rows])
        np.testing.assert_array_equal(read, getattr(tree, name))
    assert [int(row["key"], 16) for row in rows] == tree.key.tolist()


def test_without_networkx_the_error_says_how_to_get_it(tree: ts.Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="graphs need networkx: pip install networkx"):
        to_networkx(tree)
