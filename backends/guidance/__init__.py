"""Gradient guidance as a proposal: kernels whose steps lean towards a differentiable reward and carry exact weights."""

from backends.guidance.das import DAS
from backends.guidance.dps import DPS
from backends.guidance.tds import TDS

__all__ = ["DAS", "DPS", "TDS"]
