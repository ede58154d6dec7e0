"""Tiny pipelines whose networks attend: a kernel of each class, with four rows of states, levels and conditioning."""

from typing import Any, NamedTuple

import torch

import treesearch as ts
from tests.support import tiny
from treesearch.backends import mnist
from treesearch.backends.base import Shared

SMALL = {"height": 16, "width": 16, "num_steps": 5}
CLASSES = {
    "sd": SMALL,
    "sd3": SMALL | {"components": {"text_encoder_3": None, "tokenizer_3": None}},
    "flux": SMALL | {"max_sequence_length": 32},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32, "num_steps": 5},
    "ltx": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32, "num_steps": 5},
}


class Bed(NamedTuple):
    kernel: Any
    x: torch.Tensor
    t: torch.Tensor
    cond: Any

    def mean(self, kernel):
        """Means of steps of four rows at four levels."""
        return kernel.transition(self.x, self.t, self.cond).mean


def bed(name, root, **settings):
    """A model and its rows; "mnist", or a class of pipelines."""
    if name == "mnist":
        kernel, cond = mnist(num_steps=5), None
    else:
        kernel = ts.backends.diffusers(str(tiny.checkpoint(name, root)), **CLASSES[name] | settings)
        cond = rows_of(kernel, ("a cat", "a red house"))
    x = torch.randn(4, *kernel.state_shape, generator=torch.Generator().manual_seed(0))
    return Bed(kernel, x, torch.tensor([5, 4, 2, 1]), cond)


def rows_of(kernel, prompts):
    """Conditioning of four rows, as an engine gathers it."""
    pick = torch.arange(4) % len(prompts)
    return {k: v.value if isinstance(v, Shared) else v[pick] for k, v in kernel.encode(list(prompts)).items()}
