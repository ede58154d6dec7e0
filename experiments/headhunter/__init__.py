"""Which heads of a network are worth guiding away from, for a reward."""
