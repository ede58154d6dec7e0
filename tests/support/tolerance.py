"""How far two orders of the same float32 sums may differ: tolerances from the arithmetic, on any processor."""

import math

EPS = 2.0**-23
"""Distance of neighbouring float32 numbers at 1."""


def float32_tolerance(magnitude: float, terms: int = 1, layers: int = 1) -> float:
    """eps × magnitude × √terms × layers, an absolute tolerance.

    Kernels of a processor sum in their own order, with or without fused multiply-adds: each of `terms` additions rounds
    by up to eps / 2 of the running sum, with either sign, so that errors grow as a random walk; each of `layers` sums
    one after the other adds its own.

    Args:
        magnitude: of the largest value that is added, not of a difference of such.
        terms: length of the longest sum, the width of a layer.
        layers: sums in a row, from input to output.
    """
    return EPS * magnitude * math.sqrt(terms) * layers
