"""Curves of best reward: what a band is, which runs share their axes."""

import numpy as np
import pytest

from treesearch.report import plots
from treesearch.report.plots import Curve

CONFIG = {
    "kernel": "K",
    "fingerprint": "f",
    "num_steps": 5,
    "state_shape": [1],
    "prompts": None,
    "reward": "r",
    "reward_settings": [],
    "method": {"name": "M", "lam": 1.0},
}
HISTORY = [{"nfe": n, "best_reward": b} for n, b in [(5, None), (10, 1.0), (20, 3.0)]]


def panels(*runs):
    return plots.panels({path: (CONFIG | changed, HISTORY) for path, changed in runs})


def test_a_curve_begins_with_the_first_sample():
    assert plots.curve(HISTORY) == Curve([10, 20], [1.0, 3.0])


def test_a_band_has_quantiles_at_every_step_as_far_as_all_go():
    found = plots.band([Curve([10, 30], [0.0, 5.0]), Curve([20, 30, 40], [1.0, 2.0, 9.0]), Curve([10, 50], [2.0, 3.0])])
    assert found.nfe.tolist() == [20, 30]
    assert found.middle.tolist() == [1.0, 2.0]
    assert found.low == pytest.approx([0.2, 2.0])
    assert found.high == pytest.approx([1.8, 4.4])


def test_a_band_of_one_is_its_curve():
    line = Curve([10, 20, 40], [0.0, 1.0, 2.0])
    found = plots.band([line])
    assert (found.nfe.tolist(), found.middle.tolist()) == (line.nfe, line.best)
    assert (found.low == found.high).all()
    with pytest.raises(ValueError, match="without a sample"):
        plots.band([line, Curve([], [])])


def test_curves_that_never_overlap_have_a_band_at_one_place():
    found = plots.band([Curve([10], [0.0]), Curve([100], [1.0])])
    assert (found.nfe.tolist(), found.middle.tolist()) == ([100], [0.5])


def test_runs_that_differ_in_their_seed_are_one_name():
    [panel] = panels(("x/a", {"seed": 0}), ("x/b", {"seed": 1}), ("x/c", {"method": {"name": "N"}}))
    assert {name: len(curves) for name, curves in panel.curves.items()} == {"M": 2, "c": 1}
    assert (panel.title, panel.ylabel) == ("K", "best reward: r")


def test_methods_of_one_name_are_told_apart_by_what_differs():
    other = {"method": {"name": "M", "lam": 2.0}}
    [panel] = panels(("a", {}), ("b", {}), ("c", other), ("d", other))
    assert list(panel.curves) == ["M(lam=1.0)", "M(lam=2.0)"]


def test_other_searches_have_panels_of_their_own():
    found = panels(("a", {}), ("b", {"reward": "s"}), ("c", {"prompts": ["x", "y"]}))
    assert [panel.title for panel in found] == ["K", "K", "K, 2 prompts"]
    assert [panel.ylabel for panel in found] == ["best reward: r", "best reward: s", "best reward: r"]


def test_folders_of_one_name_are_told_apart_by_their_paths():
    [panel] = panels(("a/run", {}), ("b/run", {"method": {"name": "N"}}))
    assert list(panel.curves) == ["a/run", "b/run"]


def test_pictures_of_one_run_of_several_and_of_none(tmp_path):
    line = Curve([10, 1000], [0.0, 1.0])
    sizes = []
    for curves in ({"a": [line]}, {"a": [line, Curve([5, 1000], [3.0, 4.0])], "b": [Curve([], [])]}, {"b": []}):
        sizes.append(plots.draw_curves(curves, tmp_path / "c.png", title="t", ylabel="r").stat().st_size)
    assert np.diff(sizes)[0] > 0
    assert min(sizes) > 1000
