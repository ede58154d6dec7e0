"""Policies that are frozen: their noise steered, their chunks searched."""
