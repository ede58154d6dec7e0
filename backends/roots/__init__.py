"""Where a chain begins other than at its prior, and how it got there: images that are given, noised or inverted."""

from treesearch.backends.roots.direct import Direct, direct
from treesearch.backends.roots.edited import edited
from treesearch.backends.roots.regional import Regional
from treesearch.backends.roots.rooted import Rooted, image_of

__all__ = ["Direct", "Regional", "Rooted", "direct", "edited", "image_of"]
