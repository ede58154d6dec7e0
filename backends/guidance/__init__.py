"""Guidance: kernels whose steps lean towards a differentiable reward, most of them with exact weights, or whose states
are scored by a declared value."""

from treesearch.backends.guidance.das import DAS
from treesearch.backends.guidance.diffeditor import DiffEditor
from treesearch.backends.guidance.diffuser import Diffuser
from treesearch.backends.guidance.dps import DPS
from treesearch.backends.guidance.elucd import EluCD
from treesearch.backends.guidance.flowchef import FlowChef
from treesearch.backends.guidance.lacon import Aligned, LaCon, Likelihood
from treesearch.backends.guidance.policy import PolicyGuided
from treesearch.backends.guidance.spreads import Spread, spread
from treesearch.backends.guidance.steered import Steered
from treesearch.backends.guidance.tds import TDS
from treesearch.backends.guidance.trust_region import TrustRegion
from treesearch.backends.guidance.universal import Universal
from treesearch.backends.guidance.valued import Value, Valued
from treesearch.backends.wrappers.scales import GuidanceScales

__all__ = [
    "DAS",
    "DPS",
    "TDS",
    "Aligned",
    "DiffEditor",
    "Diffuser",
    "EluCD",
    "FlowChef",
    "GuidanceScales",
    "LaCon",
    "Likelihood",
    "PolicyGuided",
    "Spread",
    "Steered",
    "TrustRegion",
    "Universal",
    "Value",
    "Valued",
    "spread",
]
