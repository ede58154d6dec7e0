"""How a network of logits is asked: the tokens around a text, what it is told of the time, where its answers stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from treesearch.backends.text.corruption import Corruption

SMALLEST = 1e-3  # α_T that a network is told, which was taught on no less


class Asked(NamedTuple):
    """How a network is asked.

    Args:
        before, after: tokens around a state that the network sees too, such as [CLS] and [SEP].
        told: what it is told of the time: "nothing", "sigma" (-log α_t, as MDLM) or "time" (t/T).
        shifted: its logits at a position are of the next one, as Dream's.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    told: Literal["nothing", "sigma", "time"] = "nothing"
    shifted: bool = False

    def logits(self, network: Callable[..., Any], x: Tensor, t: Tensor, corruption: Corruption) -> Tensor:
        """What a network says of states x (n, L) at levels t (n,): (n, L, V).

        Raises:
            ValueError: it returned something else, or knows no such tokens.
        """
        before, after = (torch.tensor(marks, device=x.device).expand(len(x), -1) for marks in (self.before, self.after))
        tokens = torch.cat([before.long(), x, after.long()], 1)
        try:
            output = network(tokens, *self._time(t, corruption))
        except IndexError as error:
            highest = int(tokens.max()) if tokens.numel() else 0
            raise ValueError(f"the network stopped at tokens up to {highest}, is that one of its vocabulary? It said: "
                             f"{error}") from error  # fmt: skip
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape or logits.ndim != 3:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the network returned {got} for tokens {tuple(tokens.shape)}, expected logits (n, L, V)")
        if self.shifted:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        return logits[:, len(self.before) : tokens.shape[1] - len(self.after)]

    def _time(self, t: Tensor, corruption: Corruption) -> tuple[Tensor, ...]:
        if self.told == "nothing":
            return ()
        if self.told == "time":
            return ((t.double() / corruption.num_steps).float(),)
        return (-corruption.alpha.to(t.device)[t].clamp_min(SMALLEST).log().float(),)


PLAINLY = Asked()
