"""Pipelines of diffusers as kernels: `DiffusersKernel`, one model family a file."""

from backends.pipelines.checkpoint import CheckpointError
from backends.pipelines.kernel import DiffusersKernel

__all__ = ["CheckpointError", "DiffusersKernel"]
