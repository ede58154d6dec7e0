"""The law of tokens of a large vocabulary: logits of the positions that may change, in the dtype of the network.

    P(x_s = x_t)  = 1 - a - b                        a position stays as it is
    P(x_s = v)    = a p(v) + b / (V - 1),  v ≠ x_t   it goes where the network says, or anywhere

p is the softmax of the logits at a temperature, over all tokens but x_t. Masked diffusion is b = 0: x_t is the mask,
which no position goes to (SUBS). No table of all positions and tokens is made in float64: draws and densities are exact
in float64, a few positions at a time, and only for those that move.

One normal a token, read as a uniform u: below a it goes, by the inverse CDF of u / a; below a + b it goes anywhere.

Sources: Structured Denoising Diffusion Models in Discrete State-Spaces (Austin et al., 2021), eq. 3.
Simple and Effective Masked Diffusion Language Models (Sahoo et al., 2024), section 3.2.3, SUBS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treesearch.backends.base.laws import inverse_cdf, uniform

ENTRIES = 2**22  # of float64 at a time, 32 MiB
NOWHERE = -1  # in `at`: of a position that stays


@dataclass(frozen=True)
class Tokens:
    """Independent tokens, of which those with logits may change.

    Rows share logits: `take` copies none of them, unless most are then nobody's.

    Args:
        x: tokens now (n, L), int64.
        at: row of `logits` by position (n, L), NOWHERE where the token stays.
        logits: (M, V) of any floating dtype, -inf for tokens that are never drawn.
        jump: a of the M positions, float64.
        endpoint: predicted x_0 (n, L).
        spread: b of the M positions, float64; None for 0.
        temperature: τ that logits are divided by, in float64.
        base: the same positions under the kernel's own law where this is a proposal.
    """

    x: Tensor
    at: Tensor
    logits: Tensor
    jump: Tensor
    endpoint: Tensor
    spread: Tensor | None = None
    temperature: float = 1.0
    base: Tokens | None = None

    def sample(self, noise: Tensor) -> Tensor:
        (where, rows), u = self._moving(), uniform(noise)
        u, jump = u[where], self.jump[rows]
        go = (u < jump) | (jump >= 1)  # u may be 1
        found = self.x[where]
        found[go] = self._drawn(rows[go], found[go], (u / jump)[go])
        if self.spread is not None:
            spread = self.spread[rows]
            astray = ~go & (u < jump + spread)
            found[astray] = self._anywhere(found[astray], ((u - jump) / spread)[astray])
        x = self.x.clone()
        x[where] = found
        return x

    def endpoints(self, noise: Tensor) -> Tensor:
        """Draws of x_0 (n, L) from the network's law of each position that may change, one normal a token."""
        where, rows = self._moving()
        u, x = uniform(noise)[where], self.x.clone()
        x[where] = torch.cat([inverse_cdf(p, u[part]) for part, p in self._probs(rows)] or [rows])
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        (where, rows), stays = self._moving(), x == self.x
        jump = self.jump[rows]
        spread = torch.zeros_like(jump) if self.spread is None else self.spread[rows]
        drawn = torch.where(jump > 0, jump.log() + self._log_p(rows, self.x[where], x[where]), -math.inf)
        astray = spread / max(self._size - 1, 1)
        went = torch.logaddexp(drawn, torch.where(x[where] < self._size, astray, 0.0).log())
        found = torch.where(stays, 0.0, -math.inf).double()
        found[where] = torch.where(stays[where], torch.log1p(-jump - spread), went)
        return found.sum(1)

    def log_prob_of(self, row: Tensor, column: Tensor, token: Tensor) -> Tensor:
        """log p(v) (m,) of single positions that may change, given that they do."""
        return self._log_p(self.at[row, column], self.x[row, column], token)

    def log_weight(self, x: Tensor) -> Tensor:
        if self.base is None:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return self.base.log_prob(x) - self.log_prob(x)

    def take(self, rows: Tensor) -> Tokens:
        rows = rows.to(self.x.device)
        base = None if self.base is None else self.base.take(rows)
        taken = replace(self, x=self.x[rows], at=self.at[rows], endpoint=self.endpoint[rows], base=base)
        used = taken.at[taken.at != NOWHERE].unique()
        return taken if 2 * len(used) > len(self.logits) else taken._only(used)

    def _only(self, used: Tensor) -> Tokens:
        """The same with the logits of increasing rows alone, which are all that it has positions of."""
        at = torch.where(self.at == NOWHERE, NOWHERE, torch.searchsorted(used, self.at))
        spread = None if self.spread is None else self.spread[used]
        return replace(self, at=at, logits=self.logits[used], jump=self.jump[used], spread=spread)

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """The rows of several in one, of one vocabulary and temperature; all or none have a spread, likewise a base."""
        first, at, before = parts[0], [], 0
        for part in parts:
            at.append(torch.where(part.at == NOWHERE, NOWHERE, part.at + before))
            before += len(part.logits)
        spreads, bases = (
            [p.spread for p in parts if p.spread is not None],
            [p.base for p in parts if p.base is not None],
        )
        return Tokens(
            torch.cat([p.x for p in parts]),
            torch.cat(at),
            torch.cat([p.logits for p in parts]),
            torch.cat([p.jump for p in parts]),
            torch.cat([p.endpoint for p in parts]),
            torch.cat(spreads) if spreads else None,
            first.temperature,
            Tokens.cat(bases) if bases else None,
        )

    @property
    def _size(self) -> int:
        """V."""
        return self.logits.shape[-1]

    def _moving(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Where positions are that may change, and their rows of `logits`."""
        row, column = (self.at != NOWHERE).nonzero(as_tuple=True)
        return (row, column), self.at[row, column]

    def _scaled(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits over temperature of rows (m,), some at a time, float64 of one's own."""
        step = max(1, ENTRIES // self._size)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            yield part, self.logits[rows[part]].double().div_(self.temperature)

    def _probs(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Softmax of rows (m,), some at a time."""
        yield from ((part, logits.softmax(-1)) for part, logits in self._scaled(rows))

    def _drawn(self, rows: Tensor, now: Tensor, u: Tensor) -> Tensor:
        """Tokens (m,) by inverse CDF, other than those of now."""
        found = [inverse_cdf(_without(p, now[part], 0.0), u[part]) for part, p in self._probs(rows)]
        return torch.cat(found) if found else rows

    def _anywhere(self, now: Tensor, u: Tensor) -> Tensor:
        """Tokens (m,), each as probable, other than those of now."""
        found = (u * (self._size - 1)).long().clamp(max=self._size - 2)
        return found + (found >= now)

    def _log_p(self, rows: Tensor, now: Tensor, to: Tensor) -> Tensor:
        """log p(v) (m,) over all tokens but those of now; -inf of what is no token."""
        found, inside = [rows.new_empty(0, dtype=torch.float64)], to < self._size
        for part, scaled in self._scaled(rows):
            scaled = _without(scaled, now[part], -math.inf)
            picked = scaled.gather(-1, torch.where(inside, to, 0)[part, None])[:, 0]
            found.append(picked - scaled.logsumexp(-1))
        return torch.where(inside, torch.cat(found), -math.inf)


def level_normals(t: Tensor, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normals (n, *shape), the same for all states of a level, whatever their path; `draw` tells sets apart.

    Scores that use them are functions of the state alone, so that weights stay exact and siblings are compared on equal
    terms.
    """
    made = {}
    for level in t.unique().tolist():
        own = torch.Generator("cpu").manual_seed((draw << 16) + level)
        made[level] = torch.randn(tuple(shape), generator=own, dtype=torch.float64, device="cpu")
    return torch.stack([made[level] for level in t.tolist()]).to(t.device)


def log_norm(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log Σ_v exp(ℓ_v / τ) of logits (m, V), (m,) float64, a few positions at a time."""
    found = [logits.new_empty(0, dtype=torch.float64)]
    for part in parts_of(logits):
        found.append((logits[part].double() / temperature).logsumexp(-1))
    return torch.cat(found)


def parts_of(rows: Tensor) -> Iterator[slice]:
    """Slices of rows (m, V) that are worked on at a time."""
    step = max(1, ENTRIES // rows.shape[-1])
    yield from (slice(first, first + step) for first in range(0, len(rows), step))


def _without(rows: Tensor, tokens: Tensor, value: float) -> Tensor:
    """Rows (m, V), written into, with a value at one token of each; a mask outside of the vocabulary is no column."""
    known = tokens < rows.shape[-1]
    rows[known.nonzero()[:, 0], tokens[known]] = value
    return rows
