"""Edits of given pictures, measured."""
