"""Rewards: what scores samples."""

OWNER = "treesearch"
