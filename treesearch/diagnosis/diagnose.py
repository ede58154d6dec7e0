"""`diagnose`: run a pilot and say what it means.

found = ts.diagnose(kernel, reward, nfe=4_000)
print(found)
ts.search(kernel, reward, found.suggestion("best").method, budget=ts.Budget(nfe=10_000))
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from treesearch import api
from treesearch.backends.base import Kernel, describe
from treesearch.budget import Budget
from treesearch.core.weights import F64
from treesearch.diagnosis import effects, spread
from treesearch.diagnosis.diagnosis import Diagnosis, Level, Spread
from treesearch.diagnosis.effects import Estimate, Nested, finite, jackknife
from treesearch.diagnosis.pilot import Pilot, PilotSearch, size_of
from treesearch.diagnosis.probes import Probes
from treesearch.diagnosis.suggest import suggestions
from treesearch.errors import TreeSearchError, writing
from treesearch.methods.base import Status
from treesearch.methods.settings import check_lam, check_whole
from treesearch.registry.recipe import Recipe
from treesearch.report.progress import Progress, shown
from treesearch.rewards.base import Reward
from treesearch.runs.files import subfolder, write_json
from treesearch.session.interfaces import Options
from treesearch.session.session import Session

NFE = 4_000
FEW = 32  # chains below which figures are rough


def diagnose(
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    *,
    nfe: int = NFE,
    prompts: Sequence[Any] | None = None,
    lam: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Say from a pilot whether a search should branch, and where.

    Args:
        kernel, reward, prompts, batch_size, progress: as in `search`.
        nfe: network evaluations of the pilot, all of what is said here included.
        lam: λ of the target, for the spread of weights and draws of π.
        seed: of all noise; the chains are the rollouts of best-of-N with this seed.
        store: folder for `diagnosis.json` and `outputs/diagnosis.png` (needs matplotlib).

    Raises:
        BudgetError: fewer evaluations than a pilot of eight chains a task takes; the message names the minimum.
        RewardError, KernelError: a reward or kernel broke its contract.
    """
    named = [
        each.what if isinstance(each, Recipe) and isinstance(each.what, str) else None for each in (kernel, reward)
    ]
    typed = (named[0] or "KERNEL", named[1] or "REWARD")
    how: dict[str, Any] = {"prompts": prompts, "lam": lam, "seed": seed, "batch_size": batch_size}
    return diagnosed(kernel, reward, nfe, typed=typed, store=store, progress=progress, **how)


def diagnosed(
    kernel: Kernel | Recipe,
    reward: Reward | Callable[..., Any] | Recipe,
    nfe: int,
    *,
    typed: tuple[str, str],
    store: str | os.PathLike[str] | None,
    progress: bool | None,
    lam: float,
    **how: Any,
) -> Diagnosis:
    """`diagnose`, with the expressions that suggested commands name."""
    check_whole(nfe=nfe)
    check_lam(lam)
    if isinstance(lam, str):
        raise ValueError("lam is 'auto', expected a number: the λ whose weights keep a tenth of their ESS is reported")
    if store is not None and not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"store is {store!r}, expected the path of a folder, or None")
    began = time.perf_counter()
    session, beside = _session(kernel, reward, nfe, lam=lam, **how)
    _run(session, progress)
    probed = beside.measure(session)
    found = _told(session, probed, lam, typed)
    found = replace(found, cost=session.cost.as_dict() | {"seconds": round(time.perf_counter() - began, 2)})
    if store is not None:
        write(found, Path(store))
    return found


def _session(
    kernel: Any, reward: Any, nfe: int, *, prompts: Sequence[Any] | None, lam: float, seed: int, batch_size: int
) -> tuple[Session, Probes]:
    """The pilot's session, and what is measured beside it."""
    kernel = kernel.kernel() if isinstance(kernel, Recipe) else kernel
    spec, options = describe(kernel, identify=False), Options(batch_size)
    tasks = 1 if prompts is None else max(1, len(prompts))
    beside = Probes.of(kernel, spec, nfe)
    pilot = replace(size_of(spec, nfe, tasks, beside.nfe), lam=lam)
    budget = Budget(nfe=nfe)
    return api.make_session(kernel, reward, pilot, prompts, budget, seed, options, None), beside


def _run(session: Session, progress: bool | None) -> None:
    session.start(None)
    after = api.PATIENCE if progress is None else 0.0
    with Progress("pilot", quiet=not shown(progress), error=True, after=after) as line:
        for snapshot in session.waves():
            line(snapshot)
    if any(search.status != Status.FINISHED for search in session.searches):
        raise TreeSearchError("the pilot ended before its chains did: run it again")


def _told(session: Session, probed: Probes, lam: float, typed: Sequence[str]) -> Diagnosis:
    """The figures of a finished pilot."""
    searches = [s for s in session.searches if isinstance(s, PilotSearch)]
    pilot = session.method
    assert isinstance(pilot, Pilot)
    rewards = [s.rewards() for s in searches]
    nested = Nested(np.stack([e for e, _ in rewards]), np.stack([r for _, r in rewards]))
    log_p = np.stack([s.log_p() for s in searches])
    levels = _levels(nested, pilot.levels, probed)
    weights = _spread(nested, log_p, lam)
    spec = session.spec
    return Diagnosis(
        kernel=session.config()["kernel"],
        reward=session.reward.name,
        num_steps=spec.num_steps,
        chains=pilot.chains,
        tasks=len(searches),
        seed=session.seed,
        levels=levels,
        spread=weights,
        rewards=_summary(nested.leaves),
        suggestions=suggestions(
            spec,
            levels,
            weights,
            varies=bool(np.ptp(finite(nested.leaves)) > 0),
            kernel=typed[0],
            reward=typed[1],
            seed=session.seed,
        ),
        skipped=probed.skipped,
        notes=tuple(_notes(session, pilot, nested, log_p)),
        cost={},
    )


def _levels(nested: Nested, levels: Sequence[int], probed: Probes) -> tuple[Level, ...]:
    values, errors = jackknife(effects.statistics, nested)
    rows = [
        [Estimate(float(v), float(e)) for v, e in zip(value, error, strict=True)]
        for value, error in zip(values.T, errors.T, strict=True)
    ]
    return tuple(
        Level(
            t=t,
            decided=d,
            upper=u,
            rank=r,
            slope=s,
            known=k,
            one_step=probed.one_step(t),
            asymmetry=probed.asymmetry(t),
        )
        for t, (d, u, r, s, k) in zip(levels, rows, strict=True)
    )


def _spread(nested: Nested, log_p: F64, lam: float) -> Spread:
    """The weights' figures; chains are left out together with their log p/q."""
    both = Nested(log_p, nested.leaves)
    values, errors = jackknife(lambda some: spread.statistics(some.leaves, some.endpoints, lam), both)
    figures = [Estimate(float(v), float(e)) for v, e in zip(values, errors, strict=True)]
    return Spread(
        lam=lam, ess=figures[0], variance=figures[1], kl=figures[2], lam_tenth=spread.tenth(nested.leaves, log_p)
    )


def _summary(leaves: F64) -> dict[str, float]:
    known = leaves[np.isfinite(leaves)]
    if not len(known):
        return dict.fromkeys(("lowest", "mean", "sd", "highest"), -math.inf) | {"forbidden": 1.0}
    figures = {"lowest": known.min(), "mean": known.mean(), "sd": known.std(), "highest": known.max()}
    return {name: float(v) for name, v in figures.items()} | {"forbidden": 1 - len(known) / leaves.size}


def _notes(session: Session, pilot: Pilot, nested: Nested, log_p: F64) -> list[str]:
    """What a reader must know."""
    notes = []
    if pilot.chains * len(session.searches) < FEW:
        notes.append(f"{pilot.chains} chains: figures are rough, and their errors too; more --nfe gives more")
    if not np.isfinite(nested.leaves).all():
        notes.append("rewards of -inf count as far below the lowest finite one as that is below the highest")
    if log_p.any():
        notes.append("steps carry log p/q: shares and correlations are of the chain that proposes, weights lead to p")
    if session.spec.departs is not None:
        notes.append(session.spec.departs)
    if not np.ptp(finite(nested.leaves)) > 0:
        notes.append("the rewards of the pilot do not vary: there is no variance to share out")
    return notes


def write(found: Diagnosis, folder: Path) -> Path:
    """Write diagnosis.json and, where matplotlib is, outputs/diagnosis.png; returns the first."""
    from treesearch.diagnosis.picture import draw

    with writing(folder, "{mend} and diagnose again"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "diagnosis.json", found.as_dict())
        with suppress(ImportError):  # nothing fails for want of a picture
            draw(found, subfolder(folder / "outputs") / "diagnosis.png")
    return folder / "diagnosis.json"
