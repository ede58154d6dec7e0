"""Kernels with closed forms, for tests and evidence."""
