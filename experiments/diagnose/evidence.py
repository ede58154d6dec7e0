"""Whether what a diagnosis suggests is worth its pilot: `make diagnose-evidence`.

On the MNIST model with ten steps, best reward at equal NFE, seeds 0..9:

    default            TreeSearch as `treesearch run --goal best` takes it, the whole budget
    counted            the suggestion on what the pilot left of the budget; the pilot's own samples count
    apart              the suggestion on the whole budget, the pilot's NFE not counted

Differences are paired by seed, with Student's 95 % interval, in units of the reward's standard deviation under the
model (over the leaves of all pilots). The rewards were named before anything was run on them: a digit, the heavy eight
of `make demo`, and JPEG size, on which an earlier table of this project (docs/evidence.md) has TreeSearch behind beams.
The suggestion's bounds were set on other rewards and seeds: `DESIGN`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import treesearch as ts
from experiments.shared import sweep
from experiments.shared.cells import Cells, Row, where_it_ran
from experiments.shared.stats import over_seeds
from experiments.shared.sweep import Sweep, check_seeds, command_line, reporting
from treesearch.registry import registry
from treesearch.report.tables import markdown_table
from treesearch.session.rebuild import build_method

KEY = ("reward", "arm", "seed")
KERNEL = "mnist(num_steps=10)"
REWARDS = {
    "digit": "digit(8)",
    "heavy eight": "digit(8) + 200*brightness(target=0.2)",
    "JPEG size": "compressibility()",
}
DESIGN = {
    "bright three": "digit(3) + 10*brightness()",
    "heavy one": "digit(1) + 200*brightness(target=0.2)",
    "four": "digit(4)",
    "JPEG size, large": "incompressibility()",
}
DESIGN_SEEDS = (100, 101, 102)
ARMS = ("pilot", "default", "counted", "apart")
NFE, PILOT = 2_000, 600
FEWEST = 3  # seeds of a line
WORSE = -0.01  # standard deviations: a difference that nobody sees


@dataclass(frozen=True)
class Job(sweep.Job):
    """A cell to run."""

    reward: str
    arm: str
    seed: int


@cache
def model() -> Any:
    """The kernel, made once."""
    return registry.kernel(KERNEL)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Fill every cell that is not there; run again to go on."""

    rewards: tuple[str, ...] = tuple(REWARDS)
    """which rewards"""
    seeds: tuple[int, ...] = tuple(range(10))
    """which seeds"""
    nfe: int = NFE
    """of a search"""
    pilot: int = PILOT
    """NFE of a diagnosis"""
    out: Path = Path("runs/results/diagnose.jsonl")
    """one row a cell"""

    def run(self) -> int:
        check_seeds(self.seeds, DESIGN_SEEDS)
        cells = Cells(self.out, KEY, {"nfe": self.nfe, "pilot": self.pilot})

        def run(job: Job) -> Row:
            return self._cell(job, cells)

        every = Sweep(cells, run, said)
        for arms in (ARMS[:3], ARMS[3:]):  # the question first
            every.fill(Job(name, arm, seed) for seed in self.seeds for name in self.rewards for arm in arms)
        return 0

    def _cell(self, job: Job, cells: Cells) -> Row:
        reward = registry.reward((REWARDS | DESIGN)[job.reward])
        if job.arm == "pilot":
            found = ts.diagnose(model(), reward, nfe=self.pilot, seed=job.seed, progress=False)
            return job.row | diagnosed(found) | where_it_ran()
        pilot = cells.where(reward=job.reward, arm="pilot", seed=job.seed)[0]
        nfe = self.nfe - (pilot["nfe"] if job.arm == "counted" else 0)
        method = ts.TreeSearch() if job.arm == "default" else build_method(pilot["method"])
        result = ts.search(model(), reward, method, budget=ts.Budget(nfe=nfe), seed=job.seed, progress=False)
        best = float(result.rewards.max())
        best = max(best, pilot["best"]) if job.arm == "counted" else best
        spent = {"nfe": result.cost.nfe, "reward_calls": result.cost.reward_calls, "seconds": result.cost.seconds}
        return job.row | {"best": best} | spent | where_it_ran()


def diagnosed(found: ts.Diagnosis) -> Row:
    """What a pilot's row keeps."""
    told, suggested = found.as_dict(), found.suggestion("best")
    spent = {name: found.cost[name] for name in ("nfe", "reward_calls", "backward_nfe", "seconds")}
    return {
        "best": found.rewards["highest"],
        "sd": found.rewards["sd"],
        "method": told["suggestions"][0]["method"],
        "python": suggested.python,
        "chains": found.chains,
        "levels": told["levels"],
        "ess": told["spread"]["ess"],
    } | spent


def said(row: Row) -> str:
    """What a cell says."""
    return f"{row['best']:.4g}"


class Difference(tuple[float, float, float]):
    """Mean of paired differences and Student's 95 % bounds."""

    def __str__(self) -> str:
        return f"{self[0]:+.3f} ({self[1]:+.3f} to {self[2]:+.3f})"

    @property
    def verdict(self) -> str:
        """Better, not worse or worse."""
        if self[1] > 0:
            return "better"
        return "not worse" if self[1] >= WORSE else "worse" if self[2] < WORSE else "open"


def difference(a: Sequence[float], b: Sequence[float], unit: float) -> Difference:
    """Of a to b, in units."""
    return Difference(over_seeds((np.asarray(a) - np.asarray(b)) / unit))


def compared(rows: Sequence[Row], reward: str) -> dict[str, Any]:
    """A reward's arms: means, differences to the default over the seeds of both, what was suggested."""
    arms: Mapping[str, dict[int, Row]] = {
        arm: {r["seed"]: r for r in rows if (r["reward"], r["arm"]) == (reward, arm)} for arm in ARMS
    }
    pilots, default = arms["pilot"], arms["default"]
    unit = float(np.sqrt(np.mean([row["sd"] ** 2 for row in pilots.values()])))
    found: dict[str, Any] = {"sd": unit, "nfe": float(np.mean([row["nfe"] for row in pilots.values()]))}
    found["suggested"] = [row["python"] for row in pilots.values()]
    found["default"] = float(np.mean([row["best"] for row in default.values()]))
    for arm in ("counted", "apart"):
        seeds = sorted(set(arms[arm]) & set(default))
        if len(seeds) < FEWEST:
            continue
        best, base = ([of[seed]["best"] for seed in seeds] for of in (arms[arm], default))
        found[arm] = {"mean": float(np.mean(best)), "gap": difference(best, base, unit), "seeds": len(seeds)}
    return found


COLUMNS = ("reward", "pilot", "default", "suggested", "suggested − default, sd", "is", "seeds")


def report(rows: Sequence[Row]) -> str:
    """The page.

    Raises:
        ValueError: no rows.
    """
    names = [name for name in REWARDS if any(row["reward"] == name for row in rows)]
    if not names:
        raise ValueError("there are no rows: run the experiment first")
    found = {name: compared(rows, name) for name in names}
    body = []
    for arm in ("counted", "apart"):
        for name in (name for name in names if arm in found[name]):
            each, of = found[name], found[name][arm]
            means = [f"{each['default']:.4g}", f"{of['mean']:.4g}"]
            body.append([f"`{REWARDS[name]}`", arm, *means, str(of["gap"]), of["gap"].verdict, str(of["seeds"])])
    pilot = np.mean([each["nfe"] for each in found.values()])
    return (
        f"# Diagnose: the suggestion beside the default\n\n`{KERNEL}`, best reward at {NFE:,} NFE. The pilot "
        f"takes {pilot:.0f} of them where it is counted. Means over seeds; paired differences with 95 % intervals, in "
        f"standard deviations of the reward. Better: the interval is above 0; not worse: above {WORSE}; open: neither. "
        f"Below {FEWEST} seeds: not shown.\n\n{markdown_table(body, COLUMNS)}\n\n## What was suggested\n\n"
        f"{suggested(found)}\n"
    )


def suggested(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How often each suggestion was made."""
    lines = []
    for name, each in found.items():
        methods = [text.split("reward, ", 1)[1].rsplit(", budget", 1)[0] for text in each["suggested"]]
        lines += [[name, str(count), f"`{method}`"] for method, count in sorted(Counter(methods).items())]
    return markdown_table(lines, ("reward", "seeds", "method"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("diagnose_evidence", {"run": Run, "report": reporting("diagnose", KEY, report)}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
