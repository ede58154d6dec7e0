"""Trained weights by the name of a shipped file or by a path."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def load_weights(build: Callable[[], Network], name: str | Path) -> Network:
    """A network with trained weights: eval mode, float32, no gradients to weights.

    Args:
        build: makes it with other weights.
        name: of a file in `backends/weights`, or the path of another.

    Raises:
        FileNotFoundError: neither exists.
    """
    from safetensors.torch import load

    path = Path(name)
    shipped = resources.files("treesearch.backends").joinpath("weights", path.name)
    if path.is_file():
        blob = path.read_bytes()
    elif path.name == str(name) and shipped.is_file():
        blob = shipped.read_bytes()
    else:
        raise FileNotFoundError(f"no weights {str(name)!r}: neither a file nor the name of one that is shipped")
    with torch.device("cpu"):  # whatever torch's default device and dtype
        network = build().float()
    network.load_state_dict({key: w.float() for key, w in load(blob).items()})
    return network.eval().requires_grad_(False)
