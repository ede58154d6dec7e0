"""Rewards of texts: language models, classifiers, lexicons, patterns, schemas and sources."""
