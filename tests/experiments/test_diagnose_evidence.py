"""What the report of `make diagnose-evidence` says of rows whose answer is known."""

import pytest

from experiments.diagnose.evidence import REWARDS, Run, compared, difference, main, report


def rows(gain):
    """Five seeds in which the suggestion is `gain` better, half a unit of spread apart from seed to seed."""
    found = []
    for seed in range(5):
        base, how = -float(seed), "ts.search(kernel, reward, ts.BeamSearch(), budget=ts.Budget(nfe=10_000), seed={})"
        pilot = {"best": base - 9, "sd": 2.0, "nfe": 590, "python": how.format(seed)}
        for arm, row in {"pilot": pilot, "default": {"best": base}, "counted": {"best": base + gain}}.items():
            found.append({"reward": "digit", "arm": arm, "seed": seed} | row)
    return found


def test_differences_are_paired_and_in_units():
    gap = difference([1.0, 2.0, 3.0], [0.0, 1.5, 2.0], 2.0)
    assert gap[0] == pytest.approx(2.5 / 3 / 2)
    assert gap[1] < gap[0] < gap[2]
    assert gap[2] - gap[0] == pytest.approx(4.302653 * 0.288675 / 2 / 3**0.5, rel=1e-5)  # t of two degrees of freedom
    for found, verdict in (([1, 1.1], "better"), ([0, 0], "not worse"), ([-1, -1.1], "worse"), ([-1, 1], "open")):
        assert difference(found, [0, 0], 1.0).verdict == verdict


def test_the_report_says_what_the_rows_hold():
    assert compared(rows(0.5), "digit")["counted"]["gap"][0] == pytest.approx(0.25)
    page = report(rows(0.5))
    assert f"| `{REWARDS['digit']}` | counted | -2 | -1.5 | +0.250 (+0.250 to +0.250) | better | 5 |" in page
    assert "| digit | 5 | `ts.BeamSearch()` |" in page
    assert "| apart |" not in page
    assert "worse" in report(rows(-0.5))


def test_nothing_is_reported_on_seeds_of_the_design(tmp_path, capsys):
    with pytest.raises(ValueError, match="overlap"):
        Run(seeds=(100,), out=tmp_path / "rows.jsonl").run()
    assert main(["report", "--rows", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "r.md")]) == 1
    assert "none.jsonl: fill some by run" in capsys.readouterr().err
