"""What inversions miss: the page is that of its rows, and its rows have the order that was measured."""

from pathlib import Path

import numpy as np

from experiments.roots.reconstruction import METHODS, of, page
from experiments.shared.cells import read

RESULTS = Path(__file__).parents[2] / "experiments/results/roots"


def test_the_page_is_that_of_its_rows():
    assert page(read(RESULTS / "reconstruction.jsonl")) == (RESULTS / "reconstruction.md").read_text("utf-8")


def test_the_order_that_was_measured():
    """On states of pictures the published null text misses more than the negative prompt."""
    rows = read(RESULTS / "reconstruction.jsonl")
    miss = {method: float(np.mean([row["rms"] for row in of(rows, method)])) for method in METHODS}
    assert miss["ddim"] > 3 * miss["null text"] > 3 * miss["negative prompt"]
    assert miss["negative prompt"] > miss["null text from the prompt"] > 100 * miss["bdia"] > 100 * miss["direct"]
    assert miss["bdia, pairs in float64"] < 1e-9
