"""The kernel protocol, transition laws, wrappers, fingerprints. A name is loaded when it is first asked for, so that
what needs no torch does not wait for it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treesearch.backends.base.kernel import Cond, Kernel, Measured, Shared, bare, describe, optional
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
    from treesearch.backends.base.spec import STEPS, Spec
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
_HOMES = {
    "kernel": "Cond Kernel Measured Shared bare describe optional",
    "laws": "Categorical Gaussian Mixture Transition expand inverse_cdf log_normal uniform",
    "spec": "STEPS Spec",
    "tokens": "Tokens",
    "wrapper": "MAKES_KERNELS PASSED_ON Guide Guided Wrapper shift_mean",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'treesearch.backends.base' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"treesearch.backends.base.{_HOME[name]}"), name)
    globals()[name] = found
    return found
