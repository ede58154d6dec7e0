"""The tree as a networkx graph and as GraphML (Gephi, yEd, Cytoscape)."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from treesearch.core.tree import ROOT, Tree
from treesearch.runs.files import replacing

if TYPE_CHECKING:
    import networkx as nx

_NODE = ("t", "visits", "value", "reward")


def to_networkx(tree: Tree) -> nx.DiGraph:
    """A directed graph, parent to child, whose nodes are the tree's numbers.

    Nodes carry `t`, `visits`, `value`, `reward` and `key` (hexadecimal), edges `log_w`; what is NaN is left out.

    Raises:
        ImportError: networkx is not installed.
    """
    networkx = _networkx()
    graph = networkx.DiGraph(num_steps=int(tree.t[ROOT]) - 1)
    columns = [getattr(tree, name).tolist() for name in _NODE]
    for node, (key, *values) in enumerate(zip(tree.key.tolist(), *columns, strict=True)):
        graph.add_node(node, **_known(dict(zip(_NODE, values, strict=True))), key=f"{key:016x}")
    edges = zip(tree.parent.tolist(), tree.log_w.tolist(), strict=True)
    graph.add_edges_from((parent, node, {"log_w": w}) for node, (parent, w) in enumerate(edges) if node != ROOT)
    return graph


def write_graphml(tree: Tree, path: str | os.PathLike[str]) -> None:
    """Write the graph of `to_networkx` as GraphML.

    Raises:
        ImportError: networkx is not installed.
    """
    networkx = _networkx()
    with replacing(path) as scratch:
        networkx.write_graphml(to_networkx(tree), os.fspath(scratch))


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in values.items() if not math.isnan(v)}


def _networkx() -> Any:
    try:
        import networkx
    except ImportError as error:
        raise ImportError("graphs need networkx: pip install networkx") from error
    return networkx
