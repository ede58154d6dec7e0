"""What parts of a network put out, read by forward hooks while a kernel evaluates a step.

    with captured(kernel.network, ("mid_block", "up_blocks.1")) as seen:
        law = kernel.transition(x, t, cond)
    seen["mid_block"]          that part's output, a row for each row of the call, with its graph where there is one

Hooks stand for the length of the context and are gone after it, whatever happens inside: between evaluations the
network is as its owner left it, so that fingerprints do not change and workers have nothing to carry but names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
            hooks.callback(part.register_forward_hook(partial(_keep, seen, name)).remove)
        yield seen


def parts(network: nn.Module | Sequence[nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules of a network by name.

    Raises:
        ValueError: a name that it does not have.
    """
    whole = network if isinstance(network, nn.Module) else nn.ModuleList(network)
    known = dict(whole.named_modules())
    if missing := [name for name in names if name not in known]:
        top = [name for name in known if name.count(".") < 2][1:]
        shown = ", ".join(top[:12]) + (", ..." if len(top) > 12 else "")
        raise ValueError(f"{type(network).__name__} has no part {missing[0]!r}: choose among {shown or 'none'}")
    return {name: known[name] for name in names}


def _keep(seen: dict[str, Tensor], name: str, part: nn.Module, given: Any, output: Any) -> None:
    if name in seen:
        raise RuntimeError(f"{name!r} was called twice in one evaluation: capture where each part is called once")
    found = output if isinstance(output, Tensor) else next(o for o in output if isinstance(o, Tensor))
    seen[name] = found
