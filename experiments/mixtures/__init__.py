"""Sampling on mixtures with a known target."""
