"""Interventions inside a network: what finds them, and what they are worth as actions of a search."""
