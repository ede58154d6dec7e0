"""Pipelines of diffusers as kernels: `DiffusersKernel`, one model family a file."""

from treesearch.backends.pipelines.checkpoint import CheckpointError
from treesearch.backends.pipelines.kernel import DiffusersKernel

__all__ = ["CheckpointError", "DiffusersKernel"]
