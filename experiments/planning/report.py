"""Tables and the figure of `experiments.planning.evidence`, from its rows alone.

S is 0 or 1 by seed and pair. Success is the mean of S; its interval is of the percentile bootstrap over groups of pairs
with the same cells, with all their seeds: what other cells would give. Differences and ratios use the same draw of
groups for both methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.shared.cells import Row, read
from experiments.shared.curves import Curve, compare
from experiments.shared.stats import F64, Groups, bootstrap, mean_se
from experiments.shared.tables import NOT_RUN, table
from treesearch.report.tables import markdown_table

TASK = ("maze", "horizon", "by")
BASE = "best_of_n"
EXPLAINED = (
    "Success in % with 95 % bootstrap intervals over pairs, seeds pooled. A budget of n rollouts is n·T NFE for each "
    "decision and environment. `whole`: one decision, its actions made open loop. `receding`: replanned."
)
RATIOS = (
    "B: a method's largest budget. Difference: success less best-of-N's at B, in points. Matched: NFE that best-of-N "
    "needs for the method's success at B, over B. Saved: B over the NFE that the method needs for best-of-N's success "
    "at B. In brackets 95 % intervals over pairs; < and > where the budgets do not reach."
)


def grouped(labels: Sequence[str]) -> Groups:
    """Positions of equal labels."""
    known: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        known.setdefault(label, []).append(i)
    return [np.array(rows) for rows in known.values()]


def task_of(row: Row) -> tuple[Any, ...]:
    """Maze, horizon and reward of a row."""
    return tuple(row[name] for name in TASK)


class Found:
    """Rows of one task, by method and budget."""

    def __init__(self, task: tuple[Any, ...], rows: Sequence[Row]) -> None:
        self.task, self.rows = task, [row for row in rows if task_of(row) == task]
        self.pairs = next((row for row in self.rows if row["kind"] == "pairs"), None)
        self.groups = None if self.pairs is None else grouped(self.pairs["routes"])
        self.done = [row for row in self.rows if row.get("split") == "test" and "error" not in row]

    @property
    def title(self) -> str:
        """Such as Medium, H = 48, reward: plan."""
        maze, horizon, reward = self.task
        return f"{maze.capitalize()}{'' if horizon is None else f', H = {horizon}'}, reward: {reward}"

    def cells(self, method: str, rollouts: int | None = None, kind: str = "whole", warm: bool = False) -> list[Row]:
        known: Row = {"method": method, "kind": kind, "warm": warm}
        if rollouts is not None:
            known["rollouts"] = rollouts
        rows = [row for row in self.done if all(row[name] == value for name, value in known.items())]
        return sorted(rows, key=lambda row: row["seed"])

    def budgets(self, kind: str = "whole") -> list[int]:
        return sorted({row["rollouts"] for row in self.done if row["kind"] == kind})

    def success(self, *where: Any) -> F64 | None:
        """(seeds, pairs), None where there are none."""
        rows = self.cells(*where)
        return np.array([row["success"] for row in rows], float) if rows else None

    def curve(self, method: str, kind: str = "whole", warm: bool = False) -> tuple[F64, F64] | None:
        """NFE of each budget, and success by budget and pair; only seeds that all budgets have."""
        budgets = [b for b in self.budgets(kind) if self.cells(method, b, kind, warm)]
        if len(budgets) < 2:
            return None
        shared = set.intersection(*({r["seed"] for r in self.cells(method, b, kind, warm)} for b in budgets))
        rows = [[r for r in self.cells(method, b, kind, warm) if r["seed"] in shared] for b in budgets]
        nfe = np.array([float(np.mean([r["nfe"] for r in some])) for some in rows])
        return nfe, np.array([np.mean([r["success"] for r in some], 0) for some in rows], np.float64)


def pairs_line(found: Found) -> str:
    """What was chosen, and how the base sampler does on it with fresh seeds."""
    if found.pairs is None:
        return NOT_RUN
    rates, test = np.array(found.pairs["rates"]), len(found.pairs["test"])
    base = found.success("base")
    again = "" if base is None else f", with other seeds on the first in {bootstrap(base, found.groups).text()} %"
    return (
        f"{test} pairs with {len(found.groups or ())} routes, {len(found.pairs['tune'])} more for tuning; "
        f"chosen before comparing: the base sampler arrives in {100 * rates.mean():.0f} % of all{again}."
    )


def success_table(found: Found, methods: Sequence[str], kind: str = "whole") -> str:
    """Success by method and budget."""

    def cell(method: str, column: str) -> str | None:
        values = found.success(method, int(column.split()[0]), kind)
        return None if values is None else bootstrap(values, found.groups).text()

    return table(methods, [f"{b} rollouts" for b in found.budgets(kind)], cell)


def ratio_row(found: Found, name: str, one: tuple[F64, F64], other: tuple[F64, F64]) -> list[str]:
    """Difference at the largest budget, and ratios of NFE."""

    groups = found.groups or [np.array([i]) for i in range(one[1].shape[1])]

    def curves(picked: NDArray[np.int64]) -> tuple[Curve, Curve]:
        pairs = np.concatenate([groups[i] for i in picked])
        return (one[0], one[1][:, pairs].mean(1)), (other[0], other[1][:, pairs].mean(1))

    ratios = compare(curves, len(groups))
    same = int(np.argmin(np.abs(np.log(other[0] / one[0][-1]))))  # not every method is run at all budgets
    if not 0.9 < other[0][same] / one[0][-1] < 1.1:
        return [name, NOT_RUN, ratios.matched, ratios.saved]
    gap = bootstrap((one[1][-1] - other[1][same])[None], groups)
    return [name, gap.text(), ratios.matched, ratios.saved]


def ratio_table(found: Found, methods: Sequence[str]) -> str:
    """Every method beside best-of-N."""
    other = found.curve(BASE)
    known = [(m, one) for m in methods if m != BASE and (one := found.curve(m)) is not None]
    if other is None or not known:
        return NOT_RUN
    body = [ratio_row(found, m, one, other) for m, one in known]
    return markdown_table(body, ("method", "difference at B", "matched", "saved"))


def receding_table(found: Found) -> str:
    """Cold and warm, success and NFE per decision; what a warm start saves of a cold one."""
    budgets, methods = found.budgets("receding"), sorted({r["method"] for r in found.done if r["kind"] == "receding"})
    if not methods:
        return NOT_RUN
    body = []
    for method in methods:
        for warm in (False, True):
            cells = [found.cells(method, b, "receding", warm) for b in budgets]
            texts = [_receding_cell(rows, found.groups) for rows in cells]
            cold, own = (found.curve(method, "receding", w) for w in (False, warm))
            saved = ratio_row(found, "", own, cold)[1:] if warm and own and cold else ["", "", ""]
            body.append([f"{method}, {'warm' if warm else 'cold'}", *texts, saved[0], saved[2]])
    return markdown_table(body, ("method", *(f"{b} rollouts" for b in budgets), "warm less cold at B", "saved"))


def _receding_cell(rows: Sequence[Row], groups: Groups | None) -> str:
    if not rows:
        return NOT_RUN
    success = bootstrap(np.array([row["success"] for row in rows], float), groups)
    nfe, decisions = (float(np.mean([row[name] for row in rows])) for name in ("nfe", "decisions"))
    return f"{success.text()}; {nfe:,.0f} NFE × {decisions:.1f}"


def cost_table(found: Found, methods: Sequence[str]) -> str:
    """What a decision costs at the largest budget."""

    def cell(method: str, column: str) -> str | None:
        rows = found.cells(method, max((r["rollouts"] for r in found.cells(method)), default=0))
        if not rows:
            return None
        return mean_se([row[COST[column]] for row in rows]).text()

    return table(methods, list(COST), cell)


COST = {"NFE a decision": "nfe", "seconds a decision": "planning_seconds"}


def settings_table(found: Found) -> str:
    """What was chosen on the tuning pairs."""
    rows = [row for row in found.rows if row["kind"] == "choice"]
    if not rows:
        return NOT_RUN

    def shown(each: Row) -> str:
        return f"{each['settings']}: " + ("failed" if each["score"] is None else f"{100 * each['score'][0]:.0f} %")

    return markdown_table([[r["method"], str(r["picked"]), "; ".join(map(shown, r["grid"]))] for r in rows], HEADS)


HEADS = ("method", "chosen", "grid: success on the tuning pairs")


def failures(found: Found) -> str:
    """Cells that failed, with their reasons."""
    rows = [row for row in found.rows if "error" in row]
    return "\n".join(f"- {r['kind']} {r['method']} {r['settings']} {r['rollouts']}: {r['error']}" for r in rows)


def section(found: Found, methods: Sequence[str]) -> str:
    """All tables of one maze."""
    parts: list[tuple[str, Callable[[], str]]] = [
        ("", lambda: pairs_line(found)),
        ("Success, one decision executed whole", lambda: success_table(found, methods)),
        ("Beside best-of-N", lambda: ratio_table(found, methods)),
        ("Replanned, cold and warm", lambda: receding_table(found)),
        ("Cost", lambda: cost_table(found, methods)),
        ("Settings", lambda: settings_table(found)),
    ]
    if failures(found):
        parts.append(("Failed cells", lambda: failures(found)))
    return "\n\n".join((f"### {title}\n\n" if title else "") + make() for title, make in parts)


def write(rows: Path, to: Path, methods: Sequence[str]) -> str:
    """Write the report, and the figure beside it.

    Raises:
        StoreError: there are no rows.
    """
    known = read(rows)
    finds = [Found(task, known) for task in dict.fromkeys(map(task_of, known))]
    sections = [f"## {found.title}\n\n{section(found, methods)}" for found in finds]
    text = "\n\n".join(["# Planning in PointMaze", f"{EXPLAINED} {RATIOS}", *sections]) + "\n"
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")
    draw(finds, methods, to.with_suffix(".png"))
    return text


def draw(finds: Sequence[Found], methods: Sequence[str], path: Path) -> None:
    """Success against NFE a decision, with intervals."""
    from matplotlib import use

    use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(
        1, len(finds), figsize=(5.6 * len(finds), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for axes, found in zip(all_axes[0], finds, strict=True):
        for i, method in enumerate(methods):
            _draw_line(axes, found, method, f"C{i}")
        axes.set_xscale("log")
        axes.set_xlabel("NFE a decision")
        axes.set_title(found.title)
        axes.grid(alpha=0.25)
        axes.set_ylim(0, 1)
    all_axes[0][0].set_ylabel("success")
    lines = {line.get_label(): line for axes in all_axes[0] for line in axes.get_lines()}
    all_axes[0][0].legend(lines.values(), lines, frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _draw_line(axes: Any, found: Found, method: str, color: str) -> None:
    points = [(b, found.success(method, b)) for b in found.budgets()]
    known = [(found.cells(method, b)[0]["nfe"], bootstrap(s, found.groups)) for b, s in points if s is not None]
    if not known:
        return
    nfe, spans = [n for n, _ in known], [span for _, span in known]
    axes.plot(nfe, [s.mean for s in spans], "o-", color=color, markersize=4, linewidth=1.5, label=method)
    axes.fill_between(nfe, [s.low for s in spans], [s.high for s in spans], color=color, alpha=0.12, linewidth=0)
