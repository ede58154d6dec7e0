"""How far a chain ends from its endpoints, measured on a pilot of its own rollouts.

    r_t² = mean square of an entry of x_0 - x̂_0(x_t)                      of states, by which steps are pulled
    s_t² = mean square of an entry of A(x_0) - A(x̂_0(x_t))                of what a non-linear measurement sees

over n rollouts, t = 0..T. They decide where a search looks and nothing else: its target is the same whatever they are,
so that an error of 1/√(2 n D) of its size, that of a mean of n D squares, is of no account.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Shared, Spec, describe, optional
from treesearch.backends.guidance.seen import measurement_of, shown, terms
from treesearch.rewards.base import Reward
from treesearch.rewards.numeric import is_number, is_whole
from treesearch.rewards.values import content

CHUNK = 16  # rollouts at once: always the same, so that a spread is the same whatever the size of a batch
N = 64
KEPT = 2**26  # numbers: 256 MB


@final
@dataclass(frozen=True)
class Spread:
    """r_t and s_t of a kernel.

    Args:
        state: r_t, t = 0..T.
        seen: s_t, t = 0..T, of each non-linear measurement of a reward in its order.
        source: what tells it from others: how it was measured, or the numbers themselves.
        nfe: evaluations it took.
        misses: x_0 - x̂_0(x_t) of the rollouts (T + 1, n, *state), where they are kept (`backends.guidance.correlated`).
    """

    state: tuple[float, ...]
    seen: tuple[tuple[float, ...], ...] = ()
    source: str = ""
    nfe: int = 0
    misses: Tensor | None = field(default=None, compare=False, repr=False)


def spread(
    kernel: Any,
    reward: Reward | None = None,
    *,
    n: int = N,
    seed: int = 0,
    prompts: Sequence[Any] = (),
    correlated: bool | None = None,
) -> Spread:
    """r_t of x_0 about x̂_0(x_t), and s_t of what a reward's non-linear measurements see; n · T evaluations.

    Args:
        kernel: any whose laws have an endpoint.
        reward: for s_t; None measures states alone.
        n: rollouts.
        seed: of their noise.
        prompts: that rollouts take in turn, for kernels that need any.
        correlated: keep what each rollout's endpoints missed, so that linear measurements see how misses go together;
            None does where they take no more than 256 MB.

    Raises:
        ValueError: n is no whole number of two or more, or the kernel cannot be run without prompts.
    """
    if not is_whole(n, 2):
        raise ValueError(f"n is {n!r}, expected two rollouts or more")
    inner, correlated = optional(kernel, "fingerprint"), kept(correlated, n, describe(kernel, identify=False))
    found = measured(kernel, () if reward is None else terms(reward).bent, n, seed, tuple(prompts), correlated)
    of = "" if inner is None else f"of {hashlib.sha256(inner.encode()).hexdigest()[:10]} "
    of += rounded(found) if inner is None or found.seen else ""
    return replace(found, source=f"{pilot_of(n, seed, prompts, correlated)} {of}".rstrip())


def kept(asked: bool | None, n: int, spec: Spec) -> bool:
    """Whether a pilot of n rollouts keeps what its endpoints missed: as asked, or where that is little."""
    little = n * (spec.num_steps + 1) * math.prod(spec.state_shape) <= KEPT
    return little if asked is None else asked


def measured(
    kernel: Any, parts: Sequence[Reward], n: int, seed: int, prompts: tuple[Any, ...], correlated: bool = False
) -> Spread:
    """A pilot's figures, `parts` the measurements that s_t is of.

    Raises:
        ValueError: one that is not finite.
    """
    spec, draw = describe(kernel, identify=False), torch.Generator("cpu").manual_seed(seed)
    totals = torch.zeros(1 + len(parts), spec.num_steps + 1, dtype=torch.float64, device="cpu")
    misses: list[Tensor] = []
    counts, encoded = [0] * len(totals), (kernel.encode(prompts) or {}) if prompts else {}

    def noise(rows: int) -> Tensor:
        made = torch.randn(rows, *spec.noise_shape, generator=draw, device="cpu", dtype=torch.float32)
        return made.to(spec.device)

    with torch.no_grad():
        for first in range(0, n, CHUNK):
            rows = torch.arange(first, min(first + CHUNK, n), device=spec.device)
            cond = _conditioning(encoded, rows % max(1, len(prompts)))
            ends, x = _rollouts(kernel, noise, len(rows), spec.num_steps, spec.device, cond)
            if correlated:
                misses.append(torch.stack([torch.zeros_like(x), *(x - end for end in ends)]).float().cpu())
            for i, see in enumerate((None, *parts)):
                final = _seen(kernel, see, x)
                counts[i] += final.numel()
                for t, end in enumerate(ends, 1):
                    totals[i, t] += float((final - _seen(kernel, see, end)).square().sum())
    if not totals.isfinite().all():
        at = (~totals.isfinite()).any(0).nonzero().flatten().tolist()
        raise ValueError(f"a pilot of {type(kernel).__name__} missed by what is not finite at t = {at}: look at what "
                         "its network and the measurements return")  # fmt: skip
    state, *seen = (tuple((total / count).sqrt().tolist()) for total, count in zip(totals, counts, strict=True))
    return Spread(state, tuple(seen), "", n * spec.num_steps, torch.cat(misses, 1) if correlated else None)


def _rollouts(
    kernel: Any, noise: Any, rows: int, steps: int, device: torch.device, cond: Any
) -> tuple[list[Tensor], Tensor]:
    """x̂_0(x_t), t = 1..T, and x_0."""
    try:
        x, ends = kernel.prior(noise(rows), cond), []
        for t in range(steps, 0, -1):
            law = kernel.transition(x, torch.full((rows,), t, device=device), cond)
            ends.append(law.endpoint)
            x = law.sample(noise(rows))
    except (TypeError, KeyError, ValueError) as error:
        if cond is not None:
            raise
        raise ValueError(
            f"a pilot of {type(kernel).__name__} without prompts, by which its spread is measured, failed with "
            f"{type(error).__name__}: {error}: where it needs prompts, say prompts=[...] that stand for yours"
        ) from error
    return ends[::-1], x


def _conditioning(encoded: dict[str, Any], task: Tensor) -> dict[str, Any] | None:
    """Conditioning of rows of given tasks, None without prompts."""
    if not encoded:
        return None
    return {k: v.value if isinstance(v, Shared) else v[task] for k, v in encoded.items()} | {"task": task}


def _seen(kernel: Any, part: Reward | None, states: Tensor) -> Tensor:
    """What is seen of states (n, *state), (n, ...) float64: a measurement's A x, or they themselves."""
    if part is None:
        return states.double()
    return measurement_of(part).seen(shown(kernel, part, states))


def pilot_of(n: int, seed: int, prompts: Sequence[Any], correlated: bool = False) -> str:
    """How a spread is measured."""
    pilot = f"{'correlated ' if correlated else ''}pilot of {n}, seed {seed}"
    if not prompts:
        return pilot
    return f"{pilot}, prompts {hashlib.sha256(b''.join(content(list(prompts)))).hexdigest()[:10]}"


def rounded(found: Spread) -> str:
    """Its numbers, to three digits: another machine's differ in the last ones."""
    return str([[float(f"{r:.3g}") for r in table] for table in (found.state, *found.seen)])


def as_spread(given: Any, spec: Spec, seen: int) -> Spread:
    """A spread that was given, checked; where nothing tells it from others, its numbers do.

    Raises:
        ValueError: none of T + 1 finite numbers >= 0, without s_t where those are needed, or with misses of other
            levels or states.
    """
    steps = spec.num_steps
    found = given if isinstance(given, Spread) else Spread(tuple(given) if isinstance(given, (tuple, list)) else ())
    for table in (found.state, *found.seen):
        if len(table) != steps + 1 or not all(is_number(r, 0) and r < math.inf for r in table):
            got = f"{len(table)} entries" if table else repr(given)
            raise ValueError(f"spread has {got}, expected a finite number >= 0 for each t in 0..{steps}")
    if len(found.seen) != seen:
        raise ValueError(
            f"spread tells of {len(found.seen)} non-linear measurements, the reward has {seen}: spread(kernel, reward)"
        )
    if found.misses is not None:
        _check_misses(found.misses, spec)
    state, others = tuple(map(float, found.state)), tuple(tuple(map(float, table)) for table in found.seen)
    exact = replace(found, state=state, seen=others)
    return exact if found.source else replace(exact, source=_numbers(exact))


def _check_misses(misses: Tensor, spec: Spec) -> None:
    want, got = (spec.num_steps + 1, *spec.state_shape), tuple(misses.shape)
    if misses.ndim < 2 or (got[0], *got[2:]) != want or not got[1] or not misses.isfinite().all():
        shape = f"({want[0]}, n, {', '.join(map(str, want[1:]))})"
        raise ValueError(f"misses have shape {got}, expected finite numbers of shape {shape}")


def _numbers(found: Spread) -> str:
    """What it is made of."""
    told: list[object] = [found.state, *found.seen]
    if found.misses is not None:
        told.append(hashlib.sha256(b"".join(content(found.misses))).hexdigest()[:10])
    return ", ".join(map(str, told))
