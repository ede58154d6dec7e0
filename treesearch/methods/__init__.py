"""The methods, one algorithm a file."""

from __future__ import annotations

from typing import Any

from treesearch.methods.beam import BeamSearch
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.feynman_kac import FeynmanKac
from treesearch.methods.tree_sampling import DiffusionTreeSampling, DiffusionTreeSearch

METHODS: dict[str, Any] = {
    method.__name__: method for method in (BestOfN, FeynmanKac, DiffusionTreeSampling, DiffusionTreeSearch, BeamSearch)
}

__all__ = ["METHODS", "BeamSearch", "BestOfN", "DiffusionTreeSampling", "DiffusionTreeSearch", "FeynmanKac"]
