"""Pipelines of diffusers as kernels: `DiffusersKernel`, one model family a file."""

from backends.pipelines.kernel import CheckpointError, DiffusersKernel

__all__ = ["CheckpointError", "DiffusersKernel"]
