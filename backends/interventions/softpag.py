"""SoftPAG: guidance away from a network some of whose heads attend to themselves; PAG is the whole of it.

    A' = (1 - u) A + u I        of the heads S, u in [0, 1]:   out = (1 - u) softmax(Q K^T / √d) V + u V
    ε̃  = ε + w (ε - ε_{S, u})

u = 0 is the network, u = 1 on every head of a layer is PAG there. A is never made: a head's output is led towards its
own values, by the attention that the network uses. Only self-attention is perturbed. Where the tokens of a text attend
jointly (SD3, FLUX), the rows of A of the image become the identity, and those of the text stay; kind="block" is what
diffusers' PAG does there instead: image tokens attend to themselves and to the whole text, and not to each other.
Attention of the image alone has but one kind.

Under classifier-free guidance both ε(∅) and ε(c) are perturbed, so that the weak kernel is the perturbed network under
the same guidance; diffusers' pipelines perturb ε(c) alone and add w (ε(c) - ε_S(c)) to what is guided.

Sources: Fine-Grained Perturbation Guidance via Attention Head Selection (Ahn et al., 2025), section 3. Self-Rectifying
Diffusion Sampling with Perturbed-Attention Guidance (Ahn et al., 2024), eqs. 13-16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from treesearch.backends.base.taps import Attend, tapped
from treesearch.backends.interventions.away import Away
from treesearch.backends.interventions.base import Intervened, Intervention, Rows, network_of
from treesearch.backends.interventions.heads import (
    Heads,
    Network,
    attentions,
    check_heads,
    chosen,
    image_tokens,
    told,
)
from treesearch.rewards.numeric import is_number


@final
@dataclass(frozen=True)
class SoftPAG(Intervention):
    """Heads that attend to themselves.

    Args:
        heads: S, numbers of heads by part, such as {"mid_block.attentions.0": [0, 2]}; [] or "all" are all of them;
            or several such sets.
        u: strengths in [0, 1]; each with each set is a setting.
        kind: "identity", or "block" as above.

    Raises:
        TypeError: no such sets.
        ValueError: a strength out of range, or an unknown kind.
    """

    heads: Heads | tuple[Heads, ...]
    u: float | tuple[float, ...] = 1.0
    kind: Literal["identity", "block"] = "identity"

    def __post_init__(self) -> None:
        for heads in self._sets or (self.heads,):
            check_heads(heads)
        if not self._strengths or not all(is_number(u, 0, 1) for u in self._strengths):
            raise ValueError(f"u is {self.u!r}, expected numbers in [0, 1]")
        if self.kind not in ("identity", "block"):
            raise ValueError(f"kind is {self.kind!r}, expected 'identity' or 'block'")

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(f"{told(heads)}, u = {u:g}" for heads in self._sets for u in self._strengths)

    def check(self, kernel: Any) -> None:
        for heads in self._sets:
            chosen(network_of(kernel), heads)

    @contextmanager
    def on(self, network: Network, rows: Rows) -> Iterator[None]:
        with image_tokens(network) as image:
            taps = {
                name: partial(self._tap, rows, strengths, partial(image, name))
                for name, strengths in self.strengths(network).items()
            }
            with tapped(network, taps):
                yield

    def strengths(self, network: Network) -> dict[str, Tensor]:
        """u of every setting and head (settings + 1, heads), by module; row 0 is off."""
        sets, counts = [chosen(network, heads) for heads in self._sets], attentions(network)
        shape = 1 + len(self.settings)
        tables = {name: torch.zeros(shape, counts[name], device="cpu") for heads in sets for name in heads}
        every = [(heads, u) for heads in sets for u in self._strengths]
        for i, (heads, u) in enumerate(every, 1):
            for name, numbers in heads.items():
                tables[name][i, list(numbers)] = u
        return tables

    def _tap(
        self, rows: Rows, strengths: Tensor, image: Callable[[int], slice], attend: Attend, *qkv: Tensor
    ) -> Tensor:
        q, k, v = qkv
        out = attend(q, k, v)
        u = strengths.to(out)[rows.of_network(q).setting][..., None, None]  # (B, heads, 1, 1)
        if not u.any():
            return out
        mine = image(q.shape[2])
        own = v[:, :, : q.shape[2]][:, :, mine] if self.kind == "identity" else _block(q, k, v, mine)
        changed = out.clone()
        changed[:, :, mine] = torch.lerp(out[:, :, mine], own, u)
        return torch.where(u > 0, changed, out)

    @property
    def _sets(self) -> tuple[Heads, ...]:
        return self.heads if isinstance(self.heads, tuple) else (self.heads,)

    @property
    def _strengths(self) -> tuple[float, ...]:
        return self.u if isinstance(self.u, tuple) else (self.u,)


def _block(q: Tensor, k: Tensor, v: Tensor, image: slice) -> Tensor:
    """What image tokens attend to where they do not see each other."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen[image, image] = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)[image, image]
    with torch._C.DisableTorchFunction():  # other taps are of the attention itself
        return F.scaled_dot_product_attention(q[:, :, image], k, v, attn_mask=seen[image])


def softpag(
    kernel: Any,
    heads: Heads | tuple[Heads, ...],
    u: float | tuple[float, ...] = 1.0,
    scale: float = 1.0,
    levels: tuple[int, int] | None = None,
    kind: Literal["identity", "block"] = "identity",
) -> Away:
    """A kernel away from itself with perturbed heads.

    Args:
        kernel: with a `network` that attends.
        heads: S, numbers of heads by part, such as {"mid_block.attentions.0": [0, 2]}; [] or "all" are all of them; or
            several such sets in a tuple.
        u: strengths in [0, 1], one or several; each with each set is a setting of `actions`.
        scale: w.
        levels: (low, high), t at which it acts, both included; None are all.
        kind: "identity", or "block": image tokens see themselves and the text.

    Raises:
        TypeError: a kernel that names no network, or no such sets.
        ValueError: a part that it does not have, heads or strengths out of range.
    """
    return Away(kernel, Intervened(kernel, SoftPAG(heads, u, kind), levels=levels), scale)


def pag(
    kernel: Any,
    parts: str | Sequence[str],
    scale: float = 1.0,
    levels: tuple[int, int] | None = None,
    kind: Literal["identity", "block"] = "identity",
) -> Away:
    """A kernel away from itself with whole layers perturbed, u = 1.

    Args:
        kernel: with a `network` that attends.
        parts: names of attention modules or of blocks of them, such as "mid_block", perturbed together.
        scale: w.
        levels: (low, high), t at which it acts, both included; None are all.
        kind: "identity", or "block": image tokens see themselves and the text.

    Raises:
        TypeError: a kernel that names no network, or no names.
        ValueError: a part that it does not have.
    """
    return softpag(kernel, all_of(parts), 1.0, scale, levels, kind)


def all_of(parts: str | Sequence[str]) -> Heads:
    """All heads of parts.

    Raises:
        TypeError: no names.
    """
    names = (parts,) if isinstance(parts, str) else parts
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"parts are {parts!r}, expected names such as 'mid_block'")
    return dict.fromkeys(names, "all")
