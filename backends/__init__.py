"""Backends: what denoises."""

OWNER = "treesearch"
