"""Views of a tree for people and their tools; no search reads them."""

from treesearch.export.graph import to_networkx, write_graphml
from treesearch.export.hf import push, write_hf
from treesearch.export.minari import write_minari
from treesearch.export.table import write_csv

__all__ = ["push", "to_networkx", "write_csv", "write_graphml", "write_hf", "write_minari"]
