"""The methods, one algorithm a file. A new one is a line here, where lists of methods have it."""
# ruff: noqa: I001 - the order is that of the lists

from __future__ import annotations

from treesearch.methods.base import Method as Method
from treesearch.methods.best_of_n import BestOfN as BestOfN
from treesearch.methods.rejection import Rejection as Rejection
from treesearch.methods.feynman_kac import FeynmanKac as FeynmanKac
from treesearch.methods.diffusion_tree import DiffusionTreeSampling as DiffusionTreeSampling
from treesearch.methods.diffusion_tree import DiffusionTreeSearch as DiffusionTreeSearch
from treesearch.methods.tree_sampling import TreeSampling as TreeSampling
from treesearch.methods.tree_search import TreeSearch as TreeSearch
from treesearch.methods.beam import BeamSearch as BeamSearch
from treesearch.methods.svdd import SVDD as SVDD
from treesearch.methods.lookahead_beam import LookaheadBeam as LookaheadBeam
from treesearch.methods.mcts import MCTS as MCTS
from treesearch.methods.depth_first import DepthFirst as DepthFirst
from treesearch.methods.rollover import RolloverBudget as RolloverBudget
from treesearch.methods.noise_search import NoiseSearch as NoiseSearch

METHODS: dict[str, type[Method]] = {
    found.__name__: found
    for found in list(globals().values())
    if isinstance(found, type) and issubclass(found, Method) and found is not Method
}
