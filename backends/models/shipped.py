"""Trained weights by the name of a shipped file or by a path."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def shipped_file(name: str | Path) -> AbstractContextManager[Path]:
    """The file of a path, or the one of that name in `backends/weights`, while the context lasts.

    Raises:
        FileNotFoundError: neither exists.
        TypeError: no name and no path.
    """
    if not isinstance(name, (str, Path)):
        raise TypeError(f"{name!r} is no name of a file of weights, and no path of one")
    path = Path(name)
    if path.is_file():
        return nullcontext(path)
    shipped = resources.files("treesearch.backends").joinpath("weights", path.name)
    if path.name != str(name) or not shipped.is_file():
        raise FileNotFoundError(f"no weights {str(name)!r}: neither a file nor the name of one that is shipped")
    return resources.as_file(shipped)


@contextmanager
def whole(name: str | Path, what: str) -> Iterator[None]:
    """Says in a sentence that a file of weights with a card is cut off or damaged, while one is read.

    Raises:
        ValueError: it is.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{Path(name).name} is no {what}, or a damaged one: copy or save it anew") from error


def load_weights(build: Callable[[], Network], name: str | Path) -> Network:
    """A network with trained weights: eval mode, float32, no gradients to weights.

    Args:
        build: makes it with other weights.
        name: of a file in `backends/weights`, or the path of another.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: a file of other weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("cpu"):  # whatever torch's default device and dtype
        network = build().float()
    try:
        with shipped_file(name) as path:
            network.load_state_dict({key: w.float() for key, w in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{str(name)!r} has no weights of a {type(network).__name__}") from error
    return network.eval().requires_grad_(False)
