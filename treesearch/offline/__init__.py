"""Logged episodes of reinforcement learning from files of others: D4RL, Minari, OGBench, npz."""
