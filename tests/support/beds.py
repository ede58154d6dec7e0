"""Beds that most tests use: kernels whose laws are known, and a proposal that is wrong on purpose."""

from treesearch.backends.exact.enumerable import DiscreteChain, MaskedChain
from treesearch.backends.exact.gaussian import GaussianMixture, LinearGaussian


def half_a_step(x, t, base, cond):
    """A deliberately wrong proposal: every step drifts by 0.3 standard deviations."""
    return 0.3 * base.std


BEDS = {
    "gaussian": LinearGaussian(),
    "gaussian-3d": LinearGaussian(dim=3, num_steps=7),
    "mixture": GaussianMixture(num_steps=6, weights=(1.0, 3.0), means=((-1.0,), (1.0,)), stds=(0.5, 0.3)),
    "ring": GaussianMixture.ring(10),
    "discrete": DiscreteChain.random(),
    "masked": MaskedChain.random(),
}
