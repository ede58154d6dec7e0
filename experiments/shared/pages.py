"""Writes docs/figures.md, docs/evidence.md and docs/verified.md from the result files: make pages.

    python -m experiments.shared.pages --out docs

The words are templates, experiments/pages/*.md; a field in braces is a place in a result file, such as
{bench[a][fk][ratio]:.3f}. Two additions to Python's format strings:

    {x:.3f>=0.95}                  bold and "missed" where the relation does not hold (also <=)
    {mnist[SECTION][ROW][COLUMN]}  a cell of a report's table, as the report has it
"""

from __future__ import annotations

import json
import operator
import re
import string
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.bench import async_quality, exactness
from treesearch.report.tables import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS, TEMPLATES = ROOT / "results", ROOT / "pages"
NAMES = ("figures", "evidence", "verified")
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {">=": operator.ge, "<=": operator.le}
METHODS = ("best_of_n", "fk", "dts_async")
FAMILIES = {"sd": "SD", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX"}
BY_BLOCKS = {"qwen_image": "Qwen-Image", "wan": "Wan 2.1, 1.3B"}
CLOSE = 0.03


class Template(string.Formatter):
    """Format strings with relations."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """A value, bold and "missed" where its relation does not hold."""
        how, relation, bound = re.fullmatch(r"(.*?)(?:(>=|<=)(.*))?", format_spec).groups()  # type: ignore[union-attr]
        text = format(value, how)
        held = relation is None or RELATIONS[relation](value, float(bound))
        return text if held else f"**{text}, missed**"


class Report:
    """Cells of a report's tables by section, row and column; tables of a section are read together."""

    def __init__(self, file: Path) -> None:
        self.text = file.read_text("utf-8")

    @cached_property
    def _sections(self) -> dict[str, dict[str, dict[str, str]]]:
        found: dict[str, dict[str, dict[str, str]]] = {}
        for part in re.split(r"^#+ ", self.text, flags=re.MULTILINE)[1:]:
            title, _, body = part.partition("\n")
            columns: list[str] = []
            for line in body.splitlines():
                cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
                if not cells:
                    columns = []
                elif not columns:
                    columns = cells
                elif not cells[0].startswith("---"):
                    known = found.setdefault(title, {}).setdefault(cells[0], {})
                    known |= dict(zip(columns[1:], cells[1:], strict=True))
        return found

    def __getitem__(self, section: str) -> dict[str, dict[str, str]]:
        return self._sections[section]

    @property
    def hours(self) -> float:
        """Of all rows, from the last line."""
        found = re.search(r"= ([\d.]+) h in all", self.text)
        if found is None:
            raise ValueError("the report does not say how many hours its rows took")
        return float(found[1])


def known() -> dict[str, Any]:
    """What templates may name."""
    found: dict[str, Any] = {
        name: json.loads((RESULTS / file).read_text("utf-8"))
        for name, file in (
            ("bench", "bench/bench.json"),
            ("pipelines", "bench/bench_pipelines.json"),
            ("ray", "bench/bench_ray.json"),
            ("exact", "bench/exactness.json"),
            ("lively", "bench/async_quality.json"),
            ("digits", "mnist/figures.json"),
            ("checked", "verified.json"),
        )
    }
    found |= {
        name: Report(RESULTS / file)
        for name, file in (("mixtures", "mixtures/mixtures.md"), ("mnist", "mnist/mnist_evidence.md"))
    }
    rounds = [each for part in found["bench"]["a"].values() for each in (part["lowest"], part["highest"])]
    ratios = [each["model_over_measured"] for each in found["ray"]["model"]["validation"].values()]
    shares = found["digits"]["quality"]["samples_50_steps"]["class_shares"]
    own, memory = found["pipelines"], found["pipelines"]["m"]
    speeds = {name: {"ms": own["1"][name]["ms_per_step"], "asked": own["1"][name]["target"]} for name in FAMILIES}
    return found | {
        "pipelines": speeds | {"m": {"over": memory["latents_64"]["measured_over_plan"]}},
        "lowest_round": min(rounds),
        "highest_round": max(rounds),
        "rarest": min(shares),
        "commonest": max(shares),
        "close": f"{sum(abs(each - 1) <= CLOSE for each in ratios)} of {len(ratios)}",
        "pipelines_table": pipelines_table(own),
        "full_size_table": full_size_table(own.get("g", {})),
        "ray_table": ray_table(found["ray"]["a"]["cases"]),
        "exact_table": exactness.table(found["exact"]["cells"]),
        "lively_table": lively_table(found["lively"]["rows"]),
        "checked_table": markdown_table(found["checked"]["rows"], ["", *found["checked"]["columns"]]),
    }


def pipelines_table(found: Mapping[str, Any]) -> str:
    """Overhead and shared batches, by model; medians with the range."""

    def shown(each: Mapping[str, float], asked: str = "") -> str:
        return Template().format(f"{{ratio:.3f{asked}}} ({{lowest:.3f}} to {{highest:.3f}})", **each)

    asked = f">={found['1']['sd']['target']}"
    body = [[title, shown(found["1"][name], asked), shown(found["2"][name])] for name, title in FAMILIES.items()]
    return markdown_table(body, ("model", "best-of-N over `__call__`", "shared batches over prompt by prompt"))


def full_size_table(found: Mapping[str, Any]) -> str:
    """Full-size architectures on a GPU, at the best batch size of each side; what was not run says so."""
    body = []
    for name, title in (FAMILIES | BY_BLOCKS).items():
        each = found.get(name, {})
        if "ratio" not in each:
            body.append([title, *["not run"] * 4])
            continue
        best = each["by_batch"][str(each["best_batch"]["search"])]
        numbers = {
            "speed": each["nfe_per_s"]["search"],
            "ratio": each["ratio"],
            "peak": best["search_peak_over_plan"],
            "beside": each["shares"]["decode"] + each["shares"]["reward"],
        }
        cells = ("{speed:.2f}", "{ratio:.3f}", "{peak:.2f}", "{beside:.0%}")
        body.append([title, *(Template().format(cell, **numbers) for cell in cells)])
    return markdown_table(
        body, ("model", "NFE/s", "over `__call__`", "peak over plan", "decoding and reward in the time")
    )


def ray_table(cases: Mapping[str, Any]) -> str:
    """Efficiency by size, workers and method; medians with the range."""
    body = []
    for size in ("16KB", "256KB"):
        for workers in (4, 8):
            each = [cases[f"{size} {method} {workers}"] for method in METHODS]
            asked = each[0]["target"]
            how = f"{{efficiency:.3f>={asked}}} ({{range[0]:.3f}} to {{range[1]:.3f}})"
            body.append([f"{size}, {workers} workers", f"≥ {asked}", *(Template().format(how, **one) for one in each)])
    return markdown_table(body, ("states", "asked", "best-of-N", "FK, 64 particles a worker", 'DTS, `mode="async"`'))


def lively_table(rows: list[dict[str, Any]]) -> str:
    """What asynchrony costs DTS*, over all tasks that were run."""
    shown = [row for row in rows if row["what"] == "DTS*"]
    return markdown_table(
        [async_quality.line(row, "more" if row["more"] else "decides") for row in shown], async_quality.COLUMNS
    )


def page(name: str, values: Mapping[str, Any]) -> str:
    """A page from its template.

    Raises:
        ValueError: a field names nothing in the result files.
    """
    template = (TEMPLATES / f"{name}.md").read_text("utf-8")
    try:
        return Template().vformat(template, (), values)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"pages/{name}.md: no result has {error}: a report that was rebuilt may name it anew"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments."""

    out: Path = Path("runs/docs")
    """folder of the pages"""


def main(args: Args) -> None:
    """Write all pages."""
    args.out.mkdir(parents=True, exist_ok=True)
    values = known()
    for name in NAMES:
        (args.out / f"{name}.md").write_text(page(name, values), "utf-8")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        print(f"pages: {error}", file=sys.stderr)
        sys.exit(1)
