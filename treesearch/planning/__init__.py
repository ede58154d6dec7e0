"""Receding-horizon planning: a search at every decision."""
