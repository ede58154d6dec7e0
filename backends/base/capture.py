"""What parts of a network put out, read or changed by forward hooks while a kernel evaluates a step.

    with captured(kernel.network, ("mid_block", "up_blocks.1")) as seen:
        law = kernel.transition(x, t, cond)
    seen["mid_block"]          that part's output, a row for each row of the call, with its graph where there is one

    with changed(kernel.network, {"mid_block": lambda h, *call: h + direction}):
        law = kernel.transition(x, t, cond)

Hooks stand for the length of the context and are gone after it, whatever happens inside: between evaluations the
network is as its owner left it, so that fingerprints do not change and workers have nothing to carry but names. Other
threads that call the same network meanwhile do not meet them.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


@contextmanager
def captured(network: nn.Module | Sequence[nn.Module], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of named parts by name; of a part that returns several things, the first tensor.

    Args:
        network: of a kernel, as `Kernel.network` has it; parts of the second of several are called "1.mid_block".
        names: as `named_modules` has them; "" is the whole network.

    Raises:
        ValueError: a name that the network does not have.
        RuntimeError: later, a part that one evaluation calls twice: whose output would it be?
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, part in parts(network, names).items():
            keep = partial(_keep, seen, name, threading.get_ident())
            hooks.callback(part.register_forward_hook(keep).remove)
        yield seen


@contextmanager
def changed(network: nn.Module | Sequence[nn.Module], changes: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Replace what parts of a network put out; of a part that returns several things, the first tensor.

    Args:
        network: of a kernel, as for `captured`.
        changes: by name, (output, part, args, kwargs) -> what the part shall have put out.

    Raises:
        ValueError: a name that the network does not have.
    """
    with ExitStack() as hooks:
        for name, part in parts(network, tuple(changes)).items():
            change = partial(_change, changes[name], threading.get_ident())
            hooks.callback(part.register_forward_hook(change, with_kwargs=True).remove)
        yield


def parts(network: nn.Module | Sequence[nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules of a network by name.

    Raises:
        ValueError: a name that it does not have.
    """
    whole = network if isinstance(network, nn.Module) else nn.ModuleList(network)
    known = dict(whole.named_modules())
    if missing := [name for name in names if name not in known]:
        top = difflib.get_close_matches(missing[0], known, 3) + [n for n in known if n.count(".") < 2][1:]
        shown = ", ".join(top[:12]) + (", ..." if len(top) > 12 else "")
        raise ValueError(f"{type(network).__name__} has no part {missing[0]!r}: choose among {shown or 'none'}")
    return {name: known[name] for name in names}


def _keep(seen: dict[str, Tensor], name: str, thread: int, part: nn.Module, given: Any, output: Any) -> None:
    if threading.get_ident() != thread:
        return
    if name in seen:
        raise RuntimeError(f"{name!r} was called twice in one evaluation: capture where each part is called once")
    seen[name] = first_tensor(output)[0]


def _change(change: Callable[..., Tensor], thread: int, part: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    if threading.get_ident() != thread:
        return output
    found, put_back = first_tensor(output)
    return put_back(change(found, part, args, kwargs))


def first_tensor(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The first tensor that a part puts out, and what gives the output with another in its place."""
    if isinstance(output, Tensor):
        return output, lambda new: new
    if isinstance(output, tuple):
        at = next(i for i, each in enumerate(output) if isinstance(each, Tensor))
        return output[at], lambda new: (*output[:at], new, *output[at + 1 :])
    name = next(key for key, each in output.items() if isinstance(each, Tensor))  # a ModelOutput of diffusers
    return output[name], lambda new: type(output)(**{**output, name: new})
