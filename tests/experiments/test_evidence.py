"""What reports share: ratios and crossings of curves, duels by intervals, lines, coverage, files."""

import json
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from experiments.shared import curves, evidence_duels, evidence_report
from experiments.shared.evidence_report import gather
from experiments.shared.stats import over_seeds
from treesearch.errors import StoreError

AT = np.geomspace(1e3, 1e6, 300)


def rising(factor):
    """A method that needs so many times fewer NFE than log n does."""
    return AT, np.log(factor * AT)


def test_means_over_seeds_have_students_bounds():
    values = [1.0, 4.0, 2.0, 8.0]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert over_seeds(values) == pytest.approx((3.75, low, high))
    assert all(map(math.isnan, over_seeds([2.0])[1:]))
    with pytest.raises(ValueError, match="at least one"):
        over_seeds([])


# curves


def test_ratios_of_curves():
    found = curves.match(rising(4), rising(1), 100_000)
    assert found.matched == pytest.approx(4, rel=1e-3)
    assert found.saved == pytest.approx(4, rel=1e-3)
    assert curves.match(rising(1), rising(4), 100_000).matched == pytest.approx(1 / 4, rel=1e-3)
    assert curves.match(rising(1), rising(4e9), 100_000).saved == 0
    assert curves.match(rising(4e9), rising(1), 100_000).matched == math.inf
    assert curves.match(rising(1), rising(4e9), 100_000).matched == 0
    assert curves.area(rising(1), 1_000, 100_000) == pytest.approx(math.log(1e4), rel=1e-3)


def test_where_curves_cross():
    steep = (AT, 2 * np.log(AT) - math.log(3e4))  # meets log n at 30,000
    assert curves.ahead(steep, rising(1)) == pytest.approx(3e4, rel=1e-3)
    assert curves.ahead(rising(1), steep) == math.inf
    assert curves.ahead(rising(2), rising(1)) == 0
    assert curves.ahead(rising(1), rising(1)) == math.inf  # a tie is not ahead
    late = (AT, np.where(AT < 2e4, np.log(AT), np.log(2 * AT)))
    assert curves.ahead(late, rising(1)) == pytest.approx(2e4, rel=0.1)


def test_intervals_are_of_the_seeds_of_both():
    factors = np.array([2.0, 4.0, 8.0])

    def pair(picks):
        return rising(float(np.exp(np.log(factors[picks]).mean()))), (AT, np.log(AT))

    found = curves.compare(pair, 3)
    value, low, high = (float(x) for x in found.saved.replace("(", "").replace(")", "").replace("to ", "").split())
    assert (value, low, high) == (pytest.approx(4, rel=0.01), pytest.approx(2, rel=0.3), pytest.approx(8, rel=0.3))
    assert found.ahead == "all along"
    behind = curves.compare(lambda picks: pair(picks)[::-1], 3)
    assert behind.saved == "< 1"
    assert behind.ahead == "never"


# duels


def cells(place, method, values, settings=None, budget=10, **more):
    known = {"kind": "cell", "bed": place, "method": method, "settings": settings or {}, "budget": budget}
    return [known | {"seed": i, "mmd2": v} | more for i, v in enumerate(values)]


def choice(place, method, picked=None, size=2):
    picked = picked or {}
    grid = [{"settings": {}, "mmd2": 0.5}, {"settings": {"x": 1}, "mmd2": None}][:size]
    return {"kind": "choice", "bed": place, "method": method, "picked": picked, "published": {}, "grid": grid}


def test_differences_are_paired_student_intervals():
    chance = np.random.default_rng(0)
    for scale in (0.0, 0.5, 3.0):
        one, other = chance.normal(size=5), scale + chance.normal(size=5)
        exact = ttest_rel(one, other).confidence_interval(0.95)
        found = evidence_duels.gap(dict(enumerate(one)), dict(enumerate(other)))
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    shared = chance.normal(size=6)
    found = evidence_duels.gap(
        dict(enumerate(shared)), dict(enumerate(shared + np.array([10, 11, 10, 9, 10, 10]) / 100))
    )
    assert found.verdict == "better"  # seeds spread a lot, their differences do not
    assert evidence_duels.gap({0: 1.0}, {0: 2.0}) is None
    assert evidence_duels.gap({0: 1.0, 1: 2.0}, {2: 2.0, 3: 1.0}) is None


@pytest.fixture
def found():
    good, fair, bad = [1.0, 1.1, 0.9], [1.05, 1.1, 0.95], [3.0, 3.2, 3.1]
    rows = [choice("a", "importance", size=1), choice("a", "dts", {"x": 1})]
    rows += [choice("b", "importance", size=1), choice("b", "dts")]
    rows += cells("a", "importance", good) + cells("a", "dts", bad) + cells("a", "dts", fair, {"x": 1})
    rows += cells("b", "importance", bad) + cells("b", "dts", good)
    return gather(rows, "bed", {"a": ["importance", "dts"], "b": ["importance", "dts"]})


def test_lines_are_tuned_and_published(found):
    assert [line.label for line in found.lines("a")] == ["importance", "dts, tuned", "dts, published"]
    assert [line.label for line in found.lines("b")] == ["importance", "dts, published = tuned"]
    assert list(found.named()) == ["importance", "dts, tuned", "dts, published"]
    assert found.line("a", "dts", "tuned").settings == '{"x": 1}'
    assert found.line("a", "dts", "published").settings == "{}"


def test_who_wins_is_counted(found):
    assert [line.label for line in evidence_duels.leaders(found, "a", 10, "mmd2")] == ["importance", "dts, tuned"]
    assert [line.label for line in evidence_duels.leaders(found, "b", 10, "mmd2")] == ["dts, published = tuned"]
    for which, expected in (("published", "1 / 0 / 1"), ("tuned", "1 / 1 / 0")):
        gaps = [evidence_duels.duel(found, bed, ("dts", "importance"), which, 10, "mmd2") for bed in "ab"]
        assert evidence_duels.tally(gaps) == expected
    text = evidence_duels.duel_section(found, {"mmd2": ("MMD²", 1.0)})
    assert "| importance | 1 / 0 / 1 | 1 / 1 / 0 |" in text
    assert "| a | worse: 2.1 (1.85 to 2.35) |" in text
    assert "| dts, tuned | 2 of 2 |" in evidence_duels.verdict(found, "mmd2")
    assert "| importance | 1 of 2 |" in evidence_duels.verdict(found, "mmd2")


def test_disjoint_intervals_are_told_from_other_means():
    rows = cells("a", "dts", [1.0, 1.1, 1.2]) + cells("a", "importance", [1.3, 1.5, 1.4])
    rows += cells("b", "dts", [1.0, 2.0])
    rows += cells("a", "das", [3.0, 3.1, 3.2]) + cells("a", "tds", [0.1, 0.11, 0.12]) + cells("a", "fk", [1.0])
    rare = [{"kind": "reference", "bed": bed, "ess_fraction": ess} for bed, ess in (("a", 0.0099), ("b", 0.01))]
    text = evidence_duels.rare_section(gather([*rows, *rare], "bed"), "dts", "mmd2", 1.0)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t with two degrees of freedom
    assert f"| dts | 1.1 ({1.1 - half:.3g} to {1.1 + half:.3g}) | - | - | - | 3 |" in text
    assert f"| importance | 1.4 ({1.4 - half:.3g} to {1.4 + half:.3g}) | overlaps | - | - | 3 |" in text
    assert [line.split(" |")[0] for line in text.splitlines()[-5:]] == [
        "| tds",
        "| fk",
        "| dts",
        "| importance",
        "| das",
    ]
    assert (text.count(" | above |"), text.count(" | below |")) == (1, 1)
    broken = [row | {"mmd2": None} for row in cells("a", "smc", [1.0], error="ZeroWeights: no weight")]
    again = evidence_duels.rare_section(gather([*rows, *broken, *rare], "bed", {"a": ["idle"]}), "dts", "mmd2", 1.0)
    assert "| smc | failed | - | - | - | 0 |" in again
    assert "| idle | not run | - | - | - | 0 |" in again
    assert "**b**" not in text  # importance sampling has enough there
    assert evidence_duels.rare_section(gather(rows, "bed"), "dts", "mmd2").endswith("not run")


def test_medians_have_intervals_between_order_statistics():
    assert evidence_duels.median([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert evidence_duels.median([6.0, 1.0, 2.0, 3.0, 5.0, 4.0]) == (3.5, 1.0, 6.0)
    found = evidence_duels.median([float(i) for i in range(1, 41)])
    assert found == (20.5, 14.0, 27.0)  # Conover, Practical Nonparametric Statistics, table A3: 14 of 40
    chance, held = np.random.default_rng(0), []
    for _ in range(2_000):
        each = evidence_duels.median(list(np.exp(3 * chance.standard_normal(20))))
        held.append(each.low <= 1.0 <= each.high)
    assert 0.95 <= np.mean(held) <= 0.975  # exactly .9586


def test_one_wild_seed_widens_the_interval_of_the_mean_and_not_of_the_median():
    rows = cells("a", "dts", [1.0 + i for i in range(12)]) + cells("a", "das", [900.0 + i for i in range(11)] + [1e6])
    rare = {"kind": "reference", "bed": "a", "ess_fraction": 0.005}
    text = evidence_duels.rare_section(gather([*rows, rare], "bed"), "dts", "mmd2", 1.0)
    last = text.splitlines()[-1].split(" | ")
    assert (last[0], last[2], last[4]) == ("| das", "overlaps", "above")


def test_failed_and_missing_cells_are_no_wins():
    rows = cells("a", "dts", [1.0, 2.0]) + cells("a", "importance", [3.0, 4.0], error="ZeroWeights: no weight")
    rows += cells("b", "dts", [1.0, 2.0])
    found = gather(rows, "bed", dict.fromkeys("ab", ("importance", "dts")))
    gaps = [evidence_duels.duel(found, bed, ("dts", "importance"), "tuned", 10, "mmd2") for bed in "ab"]
    assert gaps == ["failed", "not run"]
    assert evidence_duels.tally(gaps) == "0 / 0 / 0, 1 failed"
    assert evidence_duels.tally(["not run"]) is None
    assert "| a | 2 of 2 lines |" in evidence_report.coverage_table(found, (), 2)
    assert "| b | 1 of 2 lines |" in evidence_report.coverage_table(found, (), 2)


def test_another_method_enters_every_table():
    rows = [row for name in ("dts", "newcomer") for row in [choice("a", name), *cells("a", name, [1.0, 1.2])]]
    found = gather(rows, "bed", {"a": ["importance", "dts"]})
    assert evidence_duels.trees(found) == ["dts", "newcomer"]
    text = evidence_duels.duel_section(found, {"mmd2": ("MMD²", 1.0)})
    assert "**newcomer**, MMD²" in text
    assert "| newcomer |" in text
    assert "newcomer, published = tuned" in evidence_report.metric_table(found, "a", 10, {"mmd2": ("MMD²", 1.0)})


def test_crossings_and_areas_of_distances():
    rows = []
    for budget, one, other in ((1_000, 1.0, 0.5), (10_000, 0.1, 0.2), (100_000, 0.01, 0.08)):
        rows += cells("a", "dts", [one, one * 1.01], budget=budget)
        rows += cells("a", "importance", [other, other], budget=budget)
    found = gather(rows, "bed", {"a": ["importance", "dts"]})
    lines = [found.line("a", name, "tuned") for name in ("dts", "importance")]
    compared = evidence_duels.crossing(found, "a", *lines, "mmd2", 1e-6)
    assert compared.matched == "> 1"
    where = 1_000 * 10 ** (math.log(1 / 0.5) / (math.log(1 / 0.5) + math.log(0.2 / 0.1)))
    assert float(compared.ahead.split()[0].replace(",", "")) == pytest.approx(where, rel=0.03)
    area = evidence_duels.area_table(found, "mmd2", 1.0)
    assert f"| importance | {(0.35 + 0.14) / 2:.4g} |" in area
    text = evidence_duels.crossing_section(found, "mmd2", {})
    assert f"| importance | {compared.matched} |" in text
    assert f"| importance | {compared.ahead} |" in text
    assert evidence_duels.crossing(gather(cells("a", "dts", [1.0]), "bed"), "a", *lines, "mmd2", 1e-6) is None


# rows


def test_distances_to_the_largest_pool_are_merged():
    row = cells("a", "dts", [1.0])[0]
    far, near = (row | {"kind": "cell distances", "pool": pool, "mmd2": v} for pool, v in ((50, 3.0), (400, 2.0)))
    found = gather([near, far, row], "bed")
    assert found.values("a", found.line("a", "dts", "tuned"), 10, "mmd2") == {0: 2.0}


def test_files_are_read_together_once(tmp_path):
    rows = cells("a", "dts", [1.0, 2.0])
    for name, part in (("one", rows), ("two", rows[1:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    files = [tmp_path / name for name in ("one", "none", "two")]
    assert evidence_report.read_all(files, ("kind", "method", "seed")) == rows
    with pytest.raises(StoreError, match="run the experiment first"):
        evidence_report.read_all(files[1:2], ("kind",))


def test_grids_and_choices_are_shown(found):
    text = evidence_report.tuning_section(found)
    assert "| dts | `{}` | `" in text
    assert '| a | dts | `{"x": 1}` | 500, **failed** |' in text
    assert "| b | dts | `{}` | **500**, failed |" in text


def test_seconds_of_several_machines_are_not_compared():
    rows = [row | {"seconds": 1.0, "nfe": 10, "machine": name} for name in "xx" for row in cells("a", "dts", [1.0])]
    assert "seconds" in evidence_report.cost_table(gather(rows, "bed"), 10)
    other = cells("a", "importance", [1.0])[0] | {"seconds": 1.0, "nfe": 10, "machine": "y"}
    assert "seconds" not in evidence_report.cost_table(gather([*rows, other], "bed"), 10)
