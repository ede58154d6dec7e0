"""Kernels around kernels that are no guides."""
