"""How fluid the live page is: a tree of some 100,000 nodes that grows while chromium shows it.

    python -m experiments.bench.page

first_paint   seconds from asking for the page until the whole tree is on it
update        milliseconds from nodes or values in the browser until they are drawn, the median and the most
shown         seconds from the end of a wave in the search until its nodes are drawn: looking, fetching and drawing

The server is `treesearch serve` in a process of its own; the search, the browser and it share the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import treesearch as ts
from experiments.shared.cells import where_it_ran
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear
from treesearch.runs.files import write_json

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1440,1100",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LEVELS = 5


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        nodes: of the tree when the page is opened.
        wave: leaves that are added at once.
        updates: waves that are watched.
        opened: times that the page is opened.
        out: file of the figures.
    """

    nodes: int = 100_000
    wave: int = 256
    updates: int = 20
    opened: int = 5
    out: Path = Path("runs/page.json")


def measure(args: Args) -> dict[str, Any]:
    """Figures of one run."""
    with tempfile.TemporaryDirectory() as folder, _browser() as browser, _server(Path(folder)) as address:
        waves = _waves(args, Path(folder) / "run")
        record = next(record for record in waves if record["nodes"] > args.nodes)
        paints = [_opened(browser, f"{address}#run", record["nodes"]) for _ in range(args.opened)]
        browser.execute_script("performance.clearMeasures()")
        shown = []
        for record, _ in zip(waves, range(args.updates), strict=False):
            began = time.perf_counter()
            _until_drawn(browser, record["nodes"])
            shown.append(time.perf_counter() - began)
        took = browser.execute_script("return performance.getEntriesByName('update').map(e => e.duration)")
    return {
        "nodes": record["nodes"],
        "first_paint": round(float(np.median(paints)), 3),
        "first_paint_most": round(max(paints), 3),
        "update": round(float(np.median(took)), 1),
        "update_most": round(max(took), 1),
        "updates": len(took),
        "shown": round(float(np.median(shown)), 3),
        "shown_most": round(max(shown), 3),
    } | where_it_ran()


def _waves(args: Args, store: Path) -> Iterator[dict[str, Any]]:
    method = ts.DiffusionTreeSampling(wave=args.wave)
    budget = ts.Budget(iterations=2 * args.nodes)
    search = ts.stream(
        LinearGaussian(num_steps=LEVELS), linear(1.0), method, budget=budget, store=store, batch_size=512
    )
    for snapshot in search:
        yield snapshot.record


def _opened(browser: Any, address: str, nodes: int) -> float:
    """Seconds until the tree is drawn, by the browser's own clock."""
    browser.get("about:blank")
    browser.get(address)
    _until_drawn(browser, nodes)
    script = "const first = performance.getEntriesByName('update')[0]; return first.startTime + first.duration"
    return browser.execute_script(script) / 1000


def _until_drawn(browser: Any, nodes: int) -> None:
    shown = f"{nodes - 1:,} nodes"
    drawn = "performance.getEntriesByName('update').length"
    script = f"return document.querySelector('#size')?.innerText === arguments[0] && {drawn}"
    while not browser.execute_script(script, shown):
        time.sleep(0.01)


@contextmanager
def _browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "treesearch", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def main() -> None:
    args = tyro.cli(Args)
    found = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
