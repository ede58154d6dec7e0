"""Noise schedules and the diffusion chains on them."""
