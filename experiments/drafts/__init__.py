"""Searches with cheap rollouts: what drafts know of rollouts, and what searches make of it."""
