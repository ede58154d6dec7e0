"""A run recorded from Python has what the command line leaves for people, where that is asked for."""

import json

import pytest

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear

KERNEL, METHOD = LinearGaussian(num_steps=3), ts.BestOfN()


def test_a_run_from_python_has_a_card(tmp_path):
    plain = ts.search(KERNEL, linear(1.0), METHOD, budget=ts.Budget(nfe=30), store=tmp_path / "plain")
    assert plain.store == str(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
    ts.search(KERNEL, linear(1.0), METHOD, budget=ts.Budget(nfe=30), store=tmp_path / "r", outputs=True)
    assert "BestOfN run" in (tmp_path / "r" / "README.md").read_text("utf-8")
    assert (tmp_path / "r" / "outputs" / "best").is_dir()
    ts.resume(tmp_path / "r", KERNEL, linear(1.0), budget=ts.Budget(nfe=60), outputs=True)
    assert json.loads((tmp_path / "r" / "summary.json").read_text("utf-8"))["cost"]["nfe"] == 60


def test_outputs_need_a_folder():
    with pytest.raises(ValueError, match="outputs=True without a store: name a folder"):
        ts.search(KERNEL, linear(1.0), METHOD, budget=ts.Budget(nfe=30), outputs=True)
