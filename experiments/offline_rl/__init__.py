"""Offline reinforcement learning on data that a search draws from a behaviour model."""
