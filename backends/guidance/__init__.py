"""Gradient guidance: kernels whose steps lean towards a differentiable reward, most of them with exact weights."""

from backends.guidance.das import DAS
from backends.guidance.diffuser import Diffuser
from backends.guidance.dps import DPS
from backends.guidance.policy import PolicyGuided
from backends.guidance.scales import GuidanceScales
from backends.guidance.tds import TDS
from backends.guidance.trust_region import TrustRegion

__all__ = ["DAS", "DPS", "TDS", "Diffuser", "GuidanceScales", "PolicyGuided", "TrustRegion"]
