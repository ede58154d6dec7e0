"""Attention modules of a network: which there are, which of their heads are meant, and which tokens are the image's.

    self    tokens of the image attend to each other
    joint   tokens of the image and of the text attend to all of both (SD3, FLUX)
    cross   tokens of the image attend to the text

Names are those of `named_modules`, or the end of one where no other ends so; the name of a block means the modules
below it. Of a network that is a tuple of experts, a name without a number is the part of each.
"""

from __future__ import annotations

import difflib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from treesearch.rewards.numeric import is_whole

Network = nn.Module | tuple[nn.Module, ...]
Heads = Mapping[str, Sequence[int] | str]
"""Numbers of heads by the name of a part; "all", or none, are all of them."""
OWN = ("self", "joint")
_TEXT_FIRST = ("FluxAttention",)  # classes that put the tokens of the text before the image's, where others append them


def attentions(network: Network, kinds: Sequence[str] = OWN) -> dict[str, int]:
    """Numbers of heads of a network's attention modules, by name.

    Args:
        network: of a kernel, as `Kernel.network` has it.
        kinds: "self", "joint" or "cross".
    """
    return {
        name: int(getattr(part, "heads", 0))
        for name, part in _whole(network).named_modules()
        if _kind(name, part) in kinds
    }


def chosen(network: Network, heads: Heads, kinds: Sequence[str] = OWN) -> dict[str, tuple[int, ...]]:
    """Heads of attention modules, by the modules' full names.

    Raises:
        ValueError: a part that the network does not have, or that has no attention below it; a head out of range.
    """
    there, found = attentions(network, kinds), {}
    for name, numbers in heads.items():
        for part in _below(network, name, there):
            every = tuple(range(there[part]))
            mine = every if isinstance(numbers, str) or not len(numbers) else tuple(numbers)
            if (isinstance(numbers, str) and numbers != "all") or not set(mine) <= set(every):
                raise ValueError(f"{part} has the heads 0..{there[part] - 1}, got {numbers!r}")
            found[part] = tuple(sorted({*found.get(part, ()), *mine}))
    return found


def check_heads(heads: Any) -> None:
    """Refuse what is no choice of heads.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(heads, Mapping) or not heads or not all(isinstance(name, str) for name in heads):
        raise TypeError(f"heads are {heads!r}, expected such as {{'mid_block.attentions.0': [0, 2]}}")
    for name, numbers in heads.items():
        if numbers != "all" and not (isinstance(numbers, (list, tuple)) and all(is_whole(n, 0) for n in numbers)):
            raise TypeError(f"heads of {name!r} are {numbers!r}, expected a list of numbers from 0, or 'all'")


def told(heads: Heads) -> str:
    """Heads in words."""
    return "; ".join(
        f"{name} {' '.join(map(str, sorted(set(n)))) if n and n != 'all' else 'all'}" for name, n in heads.items()
    )


@contextmanager
def image_tokens(network: Network) -> Iterator[Callable[[str, int], slice]]:
    """Says within it which of n queries of a module, called by its name, are the image's.

    Where text and image attend jointly, the length of the text is seen as the network is called.
    """
    length: dict[str, int] = {}
    parts = dict(_whole(network).named_modules())
    with ExitStack() as hooks:
        for at in experts(network):
            see = partial(_see, length, threading.get_ident())
            hooks.callback(parts[at].register_forward_pre_hook(see, with_kwargs=True).remove)
        yield lambda name, n: _image(name, parts[name], n, length.get("text", 0))


def _see(length: dict[str, int], thread: int, network: nn.Module, args: Any, kwargs: Any) -> None:
    if threading.get_ident() == thread:
        given = inspect.signature(network.forward).bind_partial(*args, **kwargs).arguments
        text = given.get("encoder_hidden_states")
        length["text"] = text.shape[1] if isinstance(text, Tensor) and text.ndim > 2 else 0


def _image(name: str, part: nn.Module, n: int, text: int) -> slice:
    if _kind(name, part) != "joint":
        return slice(0, n)
    return slice(text, n) if type(part).__name__ in _TEXT_FIRST else slice(0, n - text)


def _kind(name: str, part: nn.Module) -> str:
    """The kind of a module, "" where it does not attend."""
    if not isinstance(getattr(part, "heads", None), int) or not hasattr(part, "to_q"):
        return ""
    if getattr(part, "is_cross_attention", type(part).__name__ == "LTXAttention" and name.endswith("attn2")):
        return "cross"
    joint = getattr(part, "added_kv_proj_dim", None) is not None or type(part).__name__ in _TEXT_FIRST
    return "joint" if joint else "self"


def _below(network: Network, name: str, there: Mapping[str, int]) -> list[str]:
    """The modules of `there` that a name means."""
    parts = [part for part, _ in _whole(network).named_modules() if part]
    found = []
    for at in experts(network):
        mine = [part for part in parts if not at or f"{part}.".startswith(f"{at}.")]
        exact = [part for part in (name, f"{at}.{name}") if part in mine]
        ends = exact[:1] or [part for part in mine if part.endswith(f".{name}")]
        if len(ends) > 1:
            raise ValueError(f"{name!r} is the end of several names, say which: {', '.join(ends[:8])}")
        found += [part for part in there if any(part == top or part.startswith(f"{top}.") for top in ends)]
    if not found:
        raise ValueError(_missing(name, parts, there))
    return found


def _missing(name: str, parts: Sequence[str], there: Mapping[str, int]) -> str:
    known = [part for part in parts if part == name or part.endswith(f".{name}")]
    near = difflib.get_close_matches(name, [*there, *parts], 3)
    why = f"part {known[0]!r} has no attention of this kind below it" if known else f"no part is called {name!r}"
    listed = ", ".join(f"{part} ({heads})" for part, heads in list(there.items())[:40])
    more = f", and {len(there) - 40} more" if len(there) > 40 else ""
    hint = f": did you mean {' or '.join(near)}?" if near and not known else ""
    return f"{why}{hint} Attention modules, with their numbers of heads: {listed or 'none'}{more}"


def _whole(network: Network) -> nn.Module:
    return network if isinstance(network, nn.Module) else nn.ModuleList(network)


def experts(network: Network) -> list[str]:
    """Names of the networks that are called: one, or several experts."""
    return [""] if isinstance(network, nn.Module) else [str(i) for i in range(len(network))]
