"""Memory: clips of reference as more tokens for the self-attention of a video transformer.

    x <- x + gate · Attention(q(n(x)), [k(n(x)); k(n(m))], [v(n(x)); v(n(m))]),   n(·) = norm(·) (1 + scale) + shift

m (M, D) are the tokens that an encoder (`backends.models.memory_encoder`) makes of clips; they pass the norm and the
modulation of the very block and of the row's own time, and nothing of them is put out: keys and values are extended,
and that is all. Positions rotate x alone, so that memory has no order. It is attended to in every block, by both
experts where there are two, and, as in the published code, by the rows of ∅ beside those of the prompt.

Each memory is a setting. A file of clips makes them (`memory`), chosen by name, or by the prompt of each search: the
clips whose keys are nearest to its embedding, by the cosine. Which of them is then an action (`Actions`).

Source: Learning Plug-and-Play Memory for Guiding Video Diffusion Models (Song et al., 2025), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from treesearch.backends.base import expand
from treesearch.backends.base.capture import changed, parts
from treesearch.backends.base.taps import Attend, tapped
from treesearch.backends.interventions.base import Intervention, Rows, network_of

MEMORIES = "memories"  # of conditioning: (n, settings, M, D), where they are those of a prompt
_TIME = "condition_embedder.time_proj"
_NEEDED = ("norm1", "attn1", "scale_shift_table")


@final
@dataclass(frozen=True, eq=False)
class Memory(Intervention):
    """Memories of a video transformer.

    Args:
        names: of the settings.
        tokens: (settings, M, D); None where each row brings its own, by the conditioning.
        both: whether the rows of ∅ have it too under classifier-free guidance, as in the published code.

    Raises:
        ValueError: tokens of another number or form, or that are not finite.
    """

    names: tuple[str, ...]
    tokens: Tensor | None = None
    both: bool = True

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("there are no memories: name one or more")
        if self.tokens is None:
            return
        if self.tokens.ndim != 3 or len(self.tokens) != len(self.names):
            got = tuple(self.tokens.shape)
            raise ValueError(f"tokens are {got}, expected (settings, M, D) with a setting for each of {self.names}")
        if not self.tokens.isfinite().all():
            raise ValueError("tokens of memory are not finite: are the clips and the encoder whole?")

    @property
    def settings(self) -> tuple[str, ...]:
        return self.names

    def check(self, kernel: Any) -> None:
        """Refuse what has no blocks of Wan, or blocks of another width."""
        if self.tokens is not None:
            refuse_width(self.tokens.shape[-1], network_of(kernel))
        else:
            blocks_of(network_of(kernel))

    @contextmanager
    def on(self, network: nn.Module | tuple[nn.Module, ...], rows: Rows) -> Iterator[None]:
        tokens, mine = self._by_row(rows)
        blocks, times = blocks_of(network), {}
        notes = {top + _TIME: partial(_note, times, top) for top in {_top(name) for name in blocks}}
        taps = {
            f"{name}.attn1": partial(self._extended, _Place(block, times, _top(name)), tokens, mine)
            for name, block in blocks.items()
        }
        with changed(network, notes), tapped(network, taps):
            yield

    def _by_row(self, rows: Rows) -> tuple[Tensor, Rows]:
        """All tokens (.., M, D), and which of them each row has, from 1."""
        if rows.cond is None or MEMORIES not in rows.cond:
            if self.tokens is None:
                raise ValueError("these memories are those of prompts, and there are none: encode them by this kernel")
            return self.tokens, rows
        found, setting = rows.cond[MEMORIES], rows.setting
        each = torch.arange(len(found), device=setting.device)
        tokens = found[each.to(found.device), (setting - 1).clamp_min(0).to(found.device)]
        return tokens, rows._replace(setting=torch.where(setting > 0, each + 1, 0))

    def _extended(
        self, place: _Place, tokens: Tensor, rows: Rows, attend: Attend, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """What a block's attention puts out with memory among its keys and values."""
        mine = rows.of_network(q)
        on = (mine.setting > 0) & (mine.given | self.both)
        if not tokens.shape[-2] or not on.any():
            return attend(q, k, v)
        more_k, more_v = place.keys_and_values(tokens.to(v)[(mine.setting - 1).clamp_min(0)])
        out = attend(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))
        return out if on.all() else torch.where(expand(on, out), out, attend(q, k, v))


class _Place(NamedTuple):
    """A block, and the times of the rows that its transformer was called on last."""

    block: Any
    times: dict[str, Tensor]
    top: str

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(n, heads, M, width) each, of tokens (n, M, D) by the norm and modulation of x."""
        block, attention = self.block, self.block.attn1
        time = self.times[self.top].unflatten(1, (6, -1))
        shift, scale = (block.scale_shift_table + time.float()).chunk(6, 1)[:2]
        normed = (block.norm1(tokens.float()) * (1 + scale) + shift).to(tokens)
        k, v = attention.norm_k(attention.to_k(normed)), attention.to_v(normed)
        k, v = (each.unflatten(2, (attention.heads, -1)).transpose(1, 2) for each in (k, v))
        return k, v


def _note(times: dict[str, Tensor], top: str, output: Tensor, *call: Any) -> Tensor:
    """Keep what a transformer makes of its rows' times."""
    times[top] = output
    return output


def _top(name: str) -> str:
    """Of the transformer that a block is of: "1." for the second of several."""
    return name[: name.rindex("blocks.")]


def blocks_of(network: nn.Module | tuple[nn.Module, ...]) -> dict[str, nn.Module]:
    """Blocks of a transformer of Wan by name, those of all experts.

    Raises:
        TypeError: another network.
    """
    whole = network if isinstance(network, nn.Module) else nn.ModuleList(network)
    inside = {name + "." * bool(name): top for name, top in whole.named_modules() if hasattr(top, "condition_embedder")}
    names = [f"{top}blocks.{i}" for top, part in inside.items() for i in range(len(getattr(part, "blocks", ())))]
    found = parts(network, names)
    if not found or not all(hasattr(block, name) for block in found.values() for name in _NEEDED):
        raise TypeError(f"{type(network).__name__} has no blocks of Wan, whose self-attention memory extends")
    return found


def refuse_width(width: int, network: nn.Module | tuple[nn.Module, ...]) -> None:
    """Refuse memory of another width than the network's tokens.

    Raises:
        TypeError: no blocks of Wan.
        ValueError: another width.
    """
    block: Any = next(iter(blocks_of(network).values()))
    if width != (own := block.scale_shift_table.shape[-1]):
        raise ValueError(f"memory is {width} wide, and the network's tokens {own}: it is memory of another model")
