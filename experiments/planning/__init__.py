"""Trajectories: mazes, locomotion, data under a policy."""
