"""The line that tells how far a search in Python is: where somebody watches, and nowhere else."""

import sys
import types
from collections import deque

import pytest

import treesearch as ts
from treesearch import api
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.report import progress as line_of

KERNEL, BUDGET = LinearGaussian(), ts.Budget(nfe=400)


def search(**options):
    return ts.search(KERNEL, lambda x: x.double().sum(1), ts.BestOfN(), budget=BUDGET, **options)


@pytest.fixture
def watched(monkeypatch):
    """A terminal on stderr, and no wait for slow searches."""
    monkeypatch.setattr(api, "PATIENCE", 0.0)

    def watch():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    return watch


def test_a_log_has_no_line_unless_asked_for(capsys, watched):
    found = search()
    assert capsys.readouterr() == ("", "")
    search(progress=True)
    printed, told = capsys.readouterr()
    assert printed == ""
    assert told.splitlines()[-1].startswith("BestOfN      NFE    400/400  best")
    assert f"ESS {found.diagnostics['ess']:>7.1f}" in told


def test_a_terminal_has_one_unless_told_otherwise(capsys, watched, tmp_path):
    watched()
    search(store=tmp_path / "r")
    assert "NFE    400/400" in capsys.readouterr().err
    ts.resume(tmp_path / "r", KERNEL, lambda x: x.double().sum(1), budget=ts.Budget(nfe=800))
    assert "NFE    800/800" in capsys.readouterr().err
    search(progress=False)
    deque(ts.stream(KERNEL, lambda x: x.double().sum(1), ts.BestOfN(), budget=BUDGET), 0)
    assert capsys.readouterr() == ("", "")


def test_quick_searches_leave_no_lines(capsys, watched, monkeypatch):
    watched()
    monkeypatch.setattr(api, "PATIENCE", 60.0)
    search()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kept", [True, False])
def test_a_search_that_will_compile_first_says_so(watched, monkeypatch, kept):
    watched()
    shown = []
    monkeypatch.setattr(line_of, "kept", lambda function: kept)
    monkeypatch.setattr(line_of.Terminal, "update", lambda self, text: shown.append(text))
    search()
    first = f"BestOfN      {line_of.COMPILING}"
    assert (shown[0] == first, shown.count(first)) == (not kept, int(not kept))
    assert "NFE    400/400" in shown[-1]


def test_a_notebook_has_one_in_its_cell(capsys, watched, monkeypatch):
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=None))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    search()
    printed, told = capsys.readouterr()
    assert told == ""
    assert printed.startswith("\rBestOfN")
    assert printed.endswith("NFE/s\n")


@pytest.mark.parametrize("often", [True, False])  # however seldom it is read, the line's last word is right
def test_the_best_text_stands_on_the_line(capsys, watched, monkeypatch, often):
    monkeypatch.setattr(line_of, "TEXT_SECONDS", -1.0 if often else 1e9)

    class Writes(type(KERNEL)):
        writes = True

        def decode(self, x0):
            return [f"{float(x):.3f} \x1b[2J" + "long " * 40 for x in x0[:, 0]]

    def score(texts):
        return [float(text.split()[0]) for text in texts]

    found = ts.search(Writes(), score, ts.BestOfN(), budget=BUDGET, progress=True, batch_size=4)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "NFE    400/400" in line
    assert r"\x1b[2J" in line
    assert "\x1b" not in line
    shown = line.partition("“")[2]
    assert 60 < len(shown) < 65
    assert shown.startswith(found.best(1)[0][0][:5])
