"""The kernel protocol, transition laws, wrappers, fingerprints."""

from treesearch.backends.base.kernel import STEPS, Cond, Kernel, Measured, Shared, Spec, bare, describe, optional
from treesearch.backends.base.laws import (
    Categorical,
    Gaussian,
    Mixture,
    Transition,
    expand,
    inverse_cdf,
    log_normal,
    uniform,
)
from treesearch.backends.base.tokens import Tokens
from treesearch.backends.base.wrapper import MAKES_KERNELS, PASSED_ON, Guide, Guided, Wrapper, shift_mean

__all__ = [
    "MAKES_KERNELS",
    "PASSED_ON",
    "STEPS",
    "Categorical",
    "Cond",
    "Gaussian",
    "Guide",
    "Guided",
    "Kernel",
    "Measured",
    "Mixture",
    "Shared",
    "Spec",
    "Tokens",
    "Transition",
    "Wrapper",
    "bare",
    "describe",
    "expand",
    "inverse_cdf",
    "log_normal",
    "optional",
    "shift_mean",
    "uniform",
]
