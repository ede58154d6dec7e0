"""The methods, one algorithm a file."""

from __future__ import annotations

from typing import Any

from treesearch.methods.beam import BeamSearch
from treesearch.methods.best_of_n import BestOfN
from treesearch.methods.depth_first import DepthFirst
from treesearch.methods.diffusion_tree import DiffusionTreeSampling, DiffusionTreeSearch
from treesearch.methods.feynman_kac import FeynmanKac
from treesearch.methods.lookahead_beam import LookaheadBeam
from treesearch.methods.mcts import MCTS
from treesearch.methods.noise_search import NoiseSearch
from treesearch.methods.rejection import Rejection
from treesearch.methods.rollover import RolloverBudget
from treesearch.methods.svdd import SVDD
from treesearch.methods.tree_sampling import TreeSampling
from treesearch.methods.tree_search import TreeSearch

METHODS: dict[str, Any] = {
    method.__name__: method
    for method in (
        BestOfN,
        Rejection,
        FeynmanKac,
        DiffusionTreeSampling,
        DiffusionTreeSearch,
        TreeSampling,
        TreeSearch,
        BeamSearch,
        SVDD,
        LookaheadBeam,
        MCTS,
        DepthFirst,
        RolloverBudget,
        NoiseSearch,
    )
}

__all__ = [
    "MCTS",
    "METHODS",
    "SVDD",
    "BeamSearch",
    "BestOfN",
    "DepthFirst",
    "DiffusionTreeSampling",
    "DiffusionTreeSearch",
    "FeynmanKac",
    "LookaheadBeam",
    "NoiseSearch",
    "Rejection",
    "RolloverBudget",
    "TreeSampling",
    "TreeSearch",
]
