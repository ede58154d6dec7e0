"""Measurements of a denoiser that need no reward: whether it is a gradient field, and how straight its paths are."""
