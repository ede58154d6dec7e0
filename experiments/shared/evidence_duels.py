"""Duels of sampling methods: differences by seed, crossings of curves, areas under them.

Distances are squared MMD, unbiased, or others of which less is better. One line is better than another where the 95 %
interval of the mean difference, paired by seed, lies below 0:

    d ± t_{n-1, .975} s / √n,    d, s: mean and standard deviation over n seeds of the difference

Where importance sampling has next to nothing to go by, each line also has an interval of its own, so that intervals can
be seen to be disjoint, which asks for more than a difference whose interval excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.shared.baselines import BASELINES
from experiments.shared.curves import FEW_SEEDS, Compared, Curve, area, compare
from experiments.shared.evidence_report import FAILED, WHICH, Found, Line, Which
from experiments.shared.stats import mean_se, over_seeds
from experiments.shared.tables import NOT_RUN, table
from treesearch.report.tables import DASH, markdown_table

RULE = (
    "Better, worse: the 95 % interval (Student's t) of the mean difference, paired by seed, excludes 0; level: it does "
    "not, so that a method whose seeds spread is easily level. One in twenty comparisons of equals is not level."
)
RARE = 0.01
ALONE = (
    f"Where importance sampling has an ESS fraction below {RARE:.0%}. Intervals: 95 %, of each line by itself, over "
    "its seeds: Student's t for means, order statistics for medians, which hold whatever the tails. Above or "
    "below: disjoint from that of the method. The lowest mean first."
)
CROSSED = (
    "Means over seeds, not below the floor, interpolated in log-log between the budgets; 95 % bootstrap intervals over "
    f"seeds. Above 1 the others pay more; < and > where their budgets do not reach. {FEW_SEEDS}"
)


class Gap(NamedTuple):
    """Mean difference of two lines and its 95 % interval; negative where the first one is better."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of the first line."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "level"

    def text(self, scale: float = 1.0) -> str:
        """Such as better: -1.2 (-2 to -0.4)."""
        mean, low, high = (_short(value * scale) for value in self)
        return f"{self.verdict}: {mean} ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def gap(one: Mapping[int, float], other: Mapping[int, float]) -> Gap | None:
    """Difference of values by seed; None with fewer than two seeds in common."""
    return interval([one[seed] - other[seed] for seed in one if seed in other])


def interval(values: Sequence[float]) -> Gap | None:
    """Mean and its 95 % interval; None of fewer than two values."""
    return Gap(*over_seeds(values)) if len(values) > 1 else None


def leaders(found: Found, place: str, budget: int, metric: str) -> list[Line]:
    """The line of the lowest mean and those that it is not better than, lowest first."""
    values = {line: found.values(place, line, budget, metric) for line in found.lines(place)}
    order = sorted((line for line in values if values[line]), key=lambda line: np.mean(list(values[line].values())))
    gaps = {line: gap(values[order[0]], values[line]) for line in order[1:]}
    return [line for line in order if (d := gaps.get(line)) is None or d.verdict != "better"]


def verdict(found: Found, metric: str) -> str:
    """How often each line is best or level with the best, and the lines that are."""
    best = {(place, n): leaders(found, place, n, metric) for n in found.budgets for place in found.places}
    named = found.named()

    def counted(label: str, column: str) -> str | None:
        n = int(column.split()[0].replace(",", ""))
        lines = {place: found.line(place, *named[label]) for place in found.places}
        run = [place for place, line in lines.items() if found.rows(place, line, n)]
        return f"{sum(lines[place] in best[place, n] for place in run)} of {len(run)}" if run else None

    parts = [table(list(named), [f"{n:,} NFE" for n in found.budgets], counted)]
    for n in found.budgets:
        lines = [f"- {p}: {'; '.join(line.label for line in best[p, n])}" for p in found.places if best[p, n]]
        parts.append(f"{n:,} NFE, the lowest mean first:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def duel(found: Found, place: str, methods: tuple[str, str], which: Which, budget: int, metric: str) -> Gap | str:
    """One method against another, both published or both tuned; why there is no difference where there is none."""
    lines = [found.line(place, method, which) for method in methods]
    rows = [row for line in lines for row in found.rows(place, line, budget)]
    if any("error" in row for row in rows):
        return FAILED
    one, other = (found.values(place, line, budget, metric) for line in lines)
    return gap(one, other) or NOT_RUN


def trees(found: Found) -> list[str]:
    """Methods that are no baselines."""
    return [method for method in found.all_methods if method not in BASELINES]


def tally(gaps: Iterable[Gap | str]) -> str | None:
    """Such as 2 / 5 / 1, better, level and worse."""
    found = list(gaps)
    verdicts = [each.verdict for each in found if isinstance(each, Gap)]
    failed = sum(each == FAILED for each in found)
    if not verdicts and not failed:
        return None
    counts = " / ".join(str(verdicts.count(name)) for name in ("better", "level", "worse"))
    return f"{counts}, {failed} failed" if failed else counts


def count_table(found: Found, method: str, metric: str) -> str:
    """A method against every other one: better / level / worse, counted over places."""
    columns: dict[str, tuple[int, Which]] = {f"{n:,} NFE, {w}": (n, w) for n in found.budgets for w in WHICH}

    def one(other: str, column: str) -> str | None:
        budget, which = columns[column]
        mine = [place for place in found.places if {method, other} <= set(found.methods[place])]
        return tally(duel(found, place, (method, other), which, budget, metric) for place in mine)

    return table(_others(found, method), list(columns), one, corner="against")


def gap_table(found: Found, method: str, which: Which, budget: int, metric: str, scale: float) -> str:
    """A method minus every other one, by place."""

    def one(place: str, other: str) -> str:
        if not {method, other} <= set(found.methods[place]):
            return DASH
        each = duel(found, place, (method, other), which, budget, metric)
        return each if isinstance(each, str) else each.text(scale)

    return table(found.places, _others(found, method), one, corner=found.place)


def _others(found: Found, method: str) -> list[str]:
    return [name for name in found.all_methods if name != method]


def duel_section(found: Found, metrics: Mapping[str, tuple[str, float]]) -> str:
    """Every tree against every other method: counts by each metric, then differences in the first one."""
    parts, first = [RULE], next(iter(metrics))
    title, scale = metrics[first]
    for method in trees(found):
        for metric, (name, _) in metrics.items():
            parts.append(f"**{method}**, {name}: better / level / worse, counted over {found.place}s.")
            parts.append(count_table(found, method, metric))
        for n in found.budgets:
            for which in WHICH:
                parts.append(f"{method} minus the others, {title}, {which}, {n:,} NFE:")
                parts.append(gap_table(found, method, which, n, first, scale))
    return "## Trees against the others\n\n" + "\n\n".join(parts)


def median(values: Sequence[float]) -> Gap | None:
    """Median and the interval between order statistics that holds it with 95 % or more, whatever the law.

    None of fewer than six values, of which no two do. Means of MMD² can have tails so heavy that intervals of Student's
    t say little.
    """
    n, low = len(values), 0
    while sum(math.comb(n, i) for i in range(low + 1)) <= 0.025 * 2**n:
        low += 1
    x = np.sort(values)
    return Gap(float(np.median(x)), float(x[low - 1]), float(x[n - low])) if low else None


def rare_section(found: Found, method: str, metric: str, scale: float = 1e3) -> str:
    """A method against every other line by intervals of their own, where importance sampling collapses."""
    parts = [f"## {method} where importance sampling collapses", ALONE]
    for place, reference in found.references.items():
        mine = found.line(place, method, "tuned")
        for budget in found.budgets if reference["ess_fraction"] < RARE else ():
            values = {line: list(found.values(place, line, budget, metric).values()) for line in found.lines(place)}
            if len(values.get(mine, ())) > 1:
                parts.append(f"**{place}**, {budget:,} NFE, ESS fraction {reference['ess_fraction']:.3g}:")
                rows = {line: found.rows(place, line, budget) for line in values}
                why = {line: FAILED if each else NOT_RUN for line, each in rows.items()}
                parts.append(_alone_table(values, why, mine, scale))
    return "\n\n".join(parts if len(parts) > 2 else [*parts[:1], NOT_RUN])


def _stands(one: Gap, other: Gap) -> str:
    """Whether one interval lies above another, below it, or meets it."""
    return "above" if one.low > other.high else "below" if one.high < other.low else "overlaps"


def _alone_table(values: Mapping[Line, Sequence[float]], why: Mapping[Line, str], mine: Line, scale: float) -> str:
    """Mean and median of each line, with intervals beside those of one of them; why there are none."""
    body = []
    for line in sorted(values, key=lambda line: np.mean(values[line]) if values[line] else math.inf):
        if not values[line]:
            body.append([line.label, why[line], *[DASH] * 3, "0"])
            continue
        cells = []
        for of in (interval, median):
            one, other = of(values[line]), of(values[mine])
            if one is None:
                cells += [DASH, DASH]
                continue
            cells.append("{} ({} to {})".format(*(_short(each * scale) for each in one)))
            cells.append(DASH if line == mine or other is None else _stands(one, other))
        body.append([line.label, *cells, str(len(values[line]))])
    return markdown_table(body, ("method", "mean", "its interval", "median", "its interval", "seeds"))


# anytime


def _curves(found: Found, place: str, lines: Sequence[Line], metric: str) -> tuple[list[int], NDArray[np.float64]]:
    """Budgets of all lines at which the seeds of the first of them are there; values (lines, seeds, budgets)."""
    values = {n: [found.values(place, line, n, metric) for line in lines] for n in found.budgets}
    values = {n: each for n, each in values.items() if all(each)}
    common = {n: set.intersection(*map(set, each)) for n, each in values.items()}
    seeds = sorted(next(iter(common.values()), ()))
    budgets = [n for n in values if set(seeds) <= common[n]]
    stacked = [[[values[n][i][seed] for n in budgets] for seed in seeds] for i in range(len(lines))]
    return budgets, np.array(stacked, float)


def crossing(found: Found, place: str, one: Line, other: Line, metric: str, floor: float) -> Compared | None:
    """Ratios and crossing of two lines in -log of mean distances, floored; None with one budget or seed."""
    budgets, values = _curves(found, place, (one, other), metric)
    if len(budgets) < 2 or values.shape[1] < 2:
        return None
    at = np.array(budgets, float)

    def curves(picks: NDArray[np.int64]) -> tuple[Curve, Curve]:
        low = -np.log(np.maximum(values[:, picks].mean(1), floor))
        return (at, low[0]), (at, low[1])

    return compare(curves, values.shape[1])


def crossing_tables(found: Found, method: str, which: Which, metric: str, floors: Mapping[str, float]) -> str:
    """What the others pay for a method's distance, and from where it is ahead of them."""
    known: dict[tuple[str, str], Compared | None] = {}
    for place, other in product(found.places, _others(found, method)):
        lines = [found.line(place, name, which) for name in (method, other)]
        known[other, place] = crossing(found, place, lines[0], lines[1], metric, floors.get(place, 1e-12))

    def of(field: str) -> str:
        def one(other: str, place: str) -> str | None:
            each = known[other, place]
            return None if each is None else getattr(each, field)

        return table(_others(found, method), found.places, one, corner="against")

    paid = f"NFE of the others over NFE of {method}, {which}, at its last distance:"
    return f"{paid}\n\n{of('matched')}\n\nNFE from which {method}, {which}, stays ahead:\n\n{of('ahead')}"


def crossing_section(found: Found, metric: str, floors: Mapping[str, float]) -> str:
    """Crossings of every tree, where several budgets were run."""
    if len(found.budgets) < 2:
        return f"## Crossings\n\n{NOT_RUN}: they need two budgets."
    each = [crossing_tables(found, method, which, metric, floors) for method in trees(found) for which in WHICH]
    return "\n\n".join(["## Crossings", CROSSED, *each])


def area_table(found: Found, metric: str, scale: float = 1e3) -> str:
    """Mean of a distance over log NFE, where several budgets were run."""
    named = found.named()

    def one(label: str, place: str) -> str | None:
        if named[label][0] not in found.methods[place]:
            return DASH
        budgets, values = _curves(found, place, (found.line(place, *named[label]),), metric)
        if len(budgets) < 2:
            return None
        at = np.array(budgets, float)
        mean = mean_se([area((at, each), at[0], at[-1]) for each in values[0]]).text(scale)
        return mean if budgets == found.budgets else f"{mean}, to {budgets[-1]:,} only"

    return table(list(named), found.places, one)
