"""Kernels around models that this library trains and ships."""
