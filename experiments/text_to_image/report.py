"""Tables and the figure of `experiments.text_to_image.drawbench`, from its rows alone.

Means over prompts of the best reward (over seeds first), with percentile bootstrap intervals over prompts; the NFE
that best-of-N needs for the same mean, log-linear between its levels; and what the reward does not show: rewards that
were not optimised, roots, distances, time, memory. Only prompts that every method has finished at every level count.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.shared.cells import Row
from experiments.shared.cells import read as read_rows
from experiments.shared.curves import nfe_for
from experiments.shared.stats import DRAWS, F64, bootstrap, resamples
from treesearch.errors import StoreError, missing
from treesearch.report.tables import DASH, markdown_table

ROWS = "cells.jsonl"
LEVELS = (1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000)
PUBLISHED = {  # best ImageReward of a prompt, mean over the 200: figure of Jain et al. (2025), read off by eye, ± .02
    "DTS*": (1.15, 1.31, 1.405, 1.51, 1.605, 1.665, 1.71),
    "best-of-N": (1.14, 1.27, 1.35, 1.415, 1.48, 1.535, 1.565),
    "FK": (1.18, 1.22, 1.32, 1.33, 1.42, 1.505, 1.525),
}


@dataclass(frozen=True)
class Table:
    """Finished rows, by method and level.

    Args:
        header: the first record.
        sessions: machines and versions.
        methods: labels, in order of appearance.
        levels: of each method.
        prompts: indices of the prompts that are complete, out of `asked`.
        baseline: the label of best-of-N.
        rows: (method, level) -> rows[prompt][seed].
    """

    header: Row
    sessions: list[Row]
    methods: tuple[str, ...]
    levels: dict[str, tuple[int, ...]]
    prompts: tuple[int, ...]
    asked: int
    seeds: tuple[int, ...]
    baseline: str | None
    rows: dict[tuple[str, int], list[list[Row]]]

    def values(self, method: str, level: int, of: Callable[[Row], float]) -> F64:
        """A figure of every prompt, mean over seeds, (prompts,)."""
        return np.array([sum(map(of, seeds)) / len(seeds) for seeds in self.rows[method, level]], np.float64)

    def curve(self, method: str) -> F64:
        """Best rewards (levels, prompts)."""
        return np.stack([self.values(method, level, lambda row: row["best"]) for level in self.levels[method]])


def read(folder: Path) -> list[Row]:
    """Records of a folder.

    Raises:
        StoreError: there are none, or the file is damaged before its end.
    """
    file = folder / ROWS
    records = read_rows(file)
    if records and records[0].get("kind") != "header":
        raise StoreError(f"{file} does not begin with a header: it is no file of this experiment")
    return records


def tabulate(records: list[Row]) -> Table:
    """Rows of the prompts that are complete.

    Raises:
        StoreError: no prompt is.
    """
    found: dict[tuple[str, int], dict[int, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    rows = [r for r in records if r["kind"] == "row"]
    for row in rows:
        found[row["method"], row["level"]][row["prompt"]][row["seed"]] = row
    methods, seeds = tuple(dict.fromkeys(r["method"] for r in rows)), tuple(sorted({r["seed"] for r in rows}))
    whole = [{p for p, by_seed in cell.items() if len(by_seed) == len(seeds)} for cell in found.values()]
    prompts = tuple(sorted(set.intersection(*whole))) if whole else ()
    if not prompts:
        raise StoreError("no prompt is finished for every method, level and seed yet: go on with the run")
    return Table(
        header=records[0],
        sessions=[r for r in records if r["kind"] == "session"],
        methods=methods,
        levels={m: tuple(sorted(level for name, level in found if name == m)) for m in methods},
        prompts=prompts,
        asked=records[0]["prompts"]["count"],
        seeds=seeds,
        baseline=next((r["method"] for r in rows if r["kind_of_method"] == "BestOfN"), None),
        rows={key: [[cell[p][s] for s in seeds] for p in prompts] for key, cell in found.items()},
    )


def interval(values: F64, picks: NDArray[np.int64]) -> str:
    """Mean over prompts with the percentile interval."""
    found = bootstrap(values[None], picks=picks)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]".replace("-0.000", "0.000")


def needed(nfe: F64, mean: F64, target: float) -> float:
    """NFE at which a rising curve reaches `target`, linear in log NFE; 0 below its levels and inf above them."""
    return nfe_for((nfe, mean.round(6)), round(target, 6))  # rewards that differ by rounding are equal


def ratios(table: Table, method: str, picks: NDArray[np.int64]) -> list[tuple[float, float, float]]:
    """NFE that best-of-N needs over NFE spent, with its interval, at every level; prompts are resampled in pairs."""
    assert table.baseline is not None
    nfe = np.array(table.levels[table.baseline], float)
    base, own = table.curve(table.baseline), table.curve(method)
    drawn = base[:, picks].mean(2), own[:, picks].mean(2)
    found = []
    for i, level in enumerate(table.levels[method]):
        value = needed(nfe, base.mean(1), float(own.mean(1)[i])) / level
        spread = np.sort([needed(nfe, drawn[0][:, b], drawn[1][i, b]) / level for b in range(len(picks))])
        low, high = spread[int(0.025 * len(spread))], spread[int(0.975 * len(spread))]  # no mean of infinities
        found.append((value, float(low), float(high)))
    return found


def _ratio(value: float, level: int, nfe: tuple[int, ...]) -> str:
    """A ratio, or the bound that the levels of best-of-N give."""
    if value == np.inf:
        return f"> {nfe[-1] / level:.2f}"
    return f"< {nfe[0] / level:.2f}" if value == 0 else f"{value:.2f}"


def best_table(table: Table, picks: NDArray[np.int64]) -> str:
    """Mean of the best reward, by method and level; published figures where they can be compared."""
    levels = sorted({level for found in table.levels.values() for level in found})
    lines = []
    for method in table.methods:
        cells = {n: interval(row, picks) for n, row in zip(table.levels[method], table.curve(method), strict=True)}
        lines.append([method, *(cells.get(n, DASH) for n in levels)])
    for name, values in published(table).items():
        known = {n: f"{v:.3f}" for n, v in zip(LEVELS, values, strict=True)}
        lines.append([f"{name}, published (read off a plot)", *(known.get(n, DASH) for n in levels)])
    return markdown_table(lines, ("NFE a prompt", *(f"{n:,}" for n in levels)))


def ratio_table(table: Table, picks: NDArray[np.int64]) -> str:
    """NFE best-of-N needs for the same reward over NFE spent."""
    assert table.baseline is not None
    nfe, lines = table.levels[table.baseline], []
    levels = sorted({n for m in table.methods if m != table.baseline for n in table.levels[m]})
    for method in table.methods:
        if method == table.baseline:
            continue
        cells = {}
        for level, found in zip(table.levels[method], ratios(table, method, picks), strict=True):
            value, low, high = (_ratio(v, level, nfe) for v in found)
            cells[level] = f"{value} [{low}, {high}]"
        lines.append([method, *(cells.get(n, DASH) for n in levels)])
    return markdown_table(lines, ("NFE a prompt", *(f"{n:,}" for n in levels)))


def rest_table(table: Table) -> str:
    """What the best reward does not show."""
    others = table.header["protocol"]["also"]
    columns = ["method, level", "NFE", *(f"{o} of the best" for o in others), *(f"{o} of the top k" for o in others)]
    columns += ["unique roots", "distance", "reward calls", "backward", "s a prompt", "peak MB"]
    lines = []
    for method, level in ((m, n) for m in table.methods for n in table.levels[m]):
        rows = table.rows[method, level]

        def mean(of: Callable[[Row], float], method: str = method, level: int = level) -> float:
            return float(table.values(method, level, of).mean())

        apart = rows[0][0]["distance"] is not None
        lines.append(
            [
                f"{method}, {level:,}",
                f"{mean(lambda r: r['nfe']):,.0f}",
                *(f"{mean(lambda r, o=o: r['also_best'][o]):.3f}" for o in others),
                *(f"{mean(lambda r, o=o: r['also_top'][o]):.3f}" for o in others),
                f"{mean(lambda r: r['roots']):.2f} of {mean(lambda r: r['k']):.3g}",
                f"{mean(lambda r: r['distance']):.4f}" if apart else DASH,
                f"{mean(lambda r: r['reward_calls']):,.0f}",
                f"{mean(lambda r: r['backward_nfe']):,.0f}",
                f"{mean(lambda r: r['seconds']):.2f}",
                f"{max(r['memory_mb'] for seeds in rows for r in seeds):,.0f}",
            ]
        )
    return markdown_table(lines, columns)


def category_table(table: Table) -> str:
    """Mean best reward by category, at each method's largest level."""
    names = [seeds[0]["category"] for seeds in table.rows[table.methods[0], table.levels[table.methods[0]][0]]]
    lines = []
    for category in dict.fromkeys(names):
        mine = np.array([name == category for name in names])
        cells = [f"{table.curve(m)[-1][mine].mean():.3f}" for m in table.methods]
        lines.append([category, str(mine.sum()), *cells])
    return markdown_table(lines, ("category", "prompts", *(f"{m}, {table.levels[m][-1]:,}" for m in table.methods)))


def published(table: Table) -> dict[str, tuple[float, ...]]:
    """The paper's figures, where prompts and reward are the paper's."""
    prompts = table.header["prompts"]
    rewarded = re.fullmatch(r"image_reward(\([^()]*\))?", table.header["protocol"]["reward"].strip())
    return PUBLISHED if prompts["official"] and rewarded and prompts["of"] == prompts["count"] else {}


def draw(table: Table, picks: NDArray[np.int64], path: Path) -> Path:
    """Mean best reward against NFE, a band for each method's interval."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing("matplotlib", "plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    levels = sorted({level for found in table.levels.values() for level in found})
    figure, axes = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    markers = cycle("os^Dv*")
    for method in table.methods:
        nfe, found = table.levels[method], [bootstrap(row[None], picks=picks) for row in table.curve(method)]
        (line,) = axes.plot(nfe, [f.mean for f in found], marker=next(markers), markersize=5, label=method)
        axes.fill_between(nfe, [f.low for f in found], [f.high for f in found], alpha=0.2, color=line.get_color())
    for name, values in published(table).items():
        axes.plot(LEVELS, values, "--", linewidth=1, label=f"{name}, published (read off a plot)")
    axes.set_xscale("log")
    axes.set_xticks(levels, [f"{n / 1000:g}k" if n >= 1000 else str(n) for n in levels])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations (NFE) a prompt")
    axes.set_ylabel(f"best {table.header['protocol']['reward']}")
    axes.set_title(f"{table.header['label']}\n{len(table.prompts)} of {table.asked} prompts", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def write(folder: Path) -> str:
    """Write report.md and curve.png into the folder; returns the report."""
    table = tabulate(read(folder))
    picks = resamples(len(table.prompts))
    draw(table, picks, folder / "curve.png")
    text = compose(table, picks)
    folder.joinpath("report.md").write_text(text, "utf-8")
    return text


def compose(table: Table, picks: NDArray[np.int64]) -> str:
    """The report."""
    known, k = table.header["protocol"], table.header["protocol"]["top_k"]
    parts = [f"# Best reward against NFE\n\nPrompts: **{table.header['label']}**.", _asked(table)]
    parts += ["![mean best reward against NFE](curve.png)", "## Best reward\n\n" + best_table(table, picks)]
    parts.append(
        f"Mean over {len(table.prompts)} of {table.asked} prompts (those finished everywhere) of the best "
        f"`{known['reward']}` of a prompt, mean over {len(table.seeds)} seed(s) first, with 95 % percentile bootstrap "
        f"intervals over prompts ({DRAWS:,} draws)."
    )
    if published(table):
        parts.append(
            "Published: Jain et al. (2025), Stable Diffusion 1.5, read off a plot by eye (± 0.02), one run, no "
            "intervals; c_uct and the guidance scale are not given there."
        )
    if table.baseline and len(table.methods) > 1:
        parts.append("## NFE that best-of-N needs for the same reward, over NFE spent\n\n" + ratio_table(table, picks))
        parts.append(
            "Above 1 the method is cheaper than best-of-N. Linear in log NFE between levels of best-of-N; > and < "
            "where they do not reach. Intervals resample prompts for both methods together."
        )
    parts.append("## What the best reward does not show\n\n" + rest_table(table))
    parts.append(
        f"Rewards that were not optimised, on the returned samples: the best one, and the mean of the k = {k} best. "
        f"Unique roots: draws of x_T that the k best descend from. Distance: mean over pairs (`{known['features']}`). "
        "NFE, reward calls, backward passes and seconds are per prompt; seconds are a share of a batch of "
        f"{known['prompts_per_batch']}. Peak memory is the search's: of the GPU, or of the whole process on a CPU. "
        "FK steering is a search of its own at every level, with K = NFE / T; of the others one search serves all."
    )
    parts.append("## By category\n\n" + category_table(table))
    return "\n\n".join(parts) + "\n"


def _asked(table: Table) -> str:
    """What was asked, and where it ran."""
    known = table.header["protocol"]
    lines = [f"- {name}: `{known[name]}`" for name in ("kernel", "reward", "also", "features")]
    methods = {name: method for s in table.sessions for name, method in s["methods"].items()}
    lines += [f"- {name}: `{method}`" for name, method in methods.items()]
    machines = dict.fromkeys(json.dumps([s["machine"], s["versions"]]) for s in table.sessions)
    for text in machines:
        where, versions = json.loads(text)
        lines.append(f"- machine: {where['device']}, {where['cores']} cores; {versions}")
    return "\n".join(lines)
