"""Text of others in tables, terminals, cards and pictures: it is shown, never obeyed."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import treesearch as ts
from treesearch.cli.main import main
from treesearch.report import plots, terminal
from treesearch.report import tables as report
from treesearch.report.progress import Progress
from treesearch.text import code, file_name, label, markdown, plain, printable

TEXTS = {
    "closing [/tag] bracket": "closing [/tag] bracket",
    "photo [masterpiece] of a cat": "photo [masterpiece] of a cat",
    "esc \x1b]0;title\x07\x1b[2J": r"esc \x1b]0;title\x07\x1b[2J",
    "line\nbreak\r\ttab": r"line\nbreak\r\ttab",
    "c1 \x9b31m, \x85, \u2028": r"c1 \x9b31m, \x85, \u2028",
    "right \u202eto left\u2066": r"right \u202eto left\u2066",
    "hidden \u200b\ufeff\U000e0041": r"hidden \u200b\ufeff\U000e0041",
    "lone \ud800": r"lone \ud800",
    "nul \x00": r"nul \x00",
    "日本\u3000語 é 👩\u200d🔬": "日本\u3000語 é 👩\u200d🔬",
    "": "",
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.items())
def test_a_terminal_s_line_is_printable(text: str, shown: str) -> None:
    assert plain(text) == shown
    plain(text).encode("utf-8")
    assert printable(f"a\n{text.split(chr(10))[0]}").count("\n") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("![x](http://h/beacon)", r"\!\[x\](http&#58;//h/beacon)"),
        ("[a][b] [c]: d", r"\[a\]\[b\] \[c\]: d"),
        ("a | b", r"a \| b"),
        ("line\n# heading", r"line\\n\# heading"),
        ("`code` $x$ ~y~ *z*", r"\`code\` \$x\$ \~y\~ \*z\*"),
        ("a_b best_of_n _c_", r"a_b best_of_n \_c\_"),
        ("www.h.org a@h.org &amp;", "www&#46;h.org a&#64;h.org &amp;amp;"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("2.185 ± -1.5", "2.185 ± -1.5"),
    ],
)
def test_a_card_s_line_holds_no_markup(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_code_where_nothing_can_leave_it() -> None:
    assert code("10*brightness()") == "`10*brightness()`"
    assert code("a`b") == r"a\`b"
    assert code("a|b") == r"a\|b"
    assert code("<b>") == "&lt;b&gt;"


def test_names_of_files_and_pictures() -> None:
    assert file_name("../../etc/passwd") == "_.._etc_passwd"
    assert file_name("a b\x00$(c)") == "a_b_x00__c_"
    assert file_name("..") == "_"
    assert label("$\\frac{1}$") == r"\$\frac{1}\$"
    assert label("_hidden") == " _hidden"
    assert len(label("x" * 1000)) == 80


PROMPTS = [
    "[/tag] [red]x",
    "\x1b]0;title\x07\x1b[2J",
    "<script>alert(1)</script> ![x](http://h/b)",
    "a | b\n# c",
    "\ud800",
    "",
]


def test_prompts_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "run")
    words = ["run", "best-of-n", "--kernel", "gaussian", "--reward", "linear(1.0)", "--nfe", "300", "--store", store]
    assert main([*words, "--prompts", *PROMPTS]) == 0
    assert main(["show", store]) == 0
    assert main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("BestOfN: [/tag] [red]x") == 2
    assert r"BestOfN: \x1b]0;title\x07\x1b[2J" in out
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert "<script>" not in card
    assert "![x](http" not in card
    assert "# c" not in card.splitlines()
    rows = [line for line in card.splitlines() if line.startswith("| BestOfN")]
    assert len(rows) == len(PROMPTS)
    assert {line.replace(r"\|", "").count("|") for line in rows} == {len(report.COLUMNS) + 1}


def test_names_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a [b] \x1b[31m"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    assert main(["ls", str(tmp_path)]) == 0
    assert main(["show", str(folder)]) == 1
    assert main(["run", "best-of-n", "--kernel", "\x1b[31m[/x]", "--nfe", "100"]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert r"a [b] \x1b[31m" in said.out
    curves = {"$x": [plots.Curve([1, 2], [0.0, 1.0])], "_$\\oops{$": [plots.Curve([1], [0.5])]}
    panels = [plots.Panel("$\\frac$ 日本", "_$y{", curves), plots.Panel("two", "", curves)]
    assert plots.draw_panels(panels, tmp_path / "p.png").stat().st_size > 1000


def test_a_terminal_of_a_small_alphabet(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.say("π̂ ± 1")
    report.print_table([["é", *["1"] * (len(report.COLUMNS) - 1)]])
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"\\u03c0\\u0302 \\xb1 1\n")  # type: ignore[attr-defined]


def test_the_progress_line_has_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = ts.Snapshot.__new__(ts.Snapshot)
    record = {"wave": 0, "nfe": 1, "best_reward": None, "ess": 0.0, "nodes": 1}
    snapshot.wave, snapshot.record, snapshot.total = 0, record, None
    with Progress("[/x]\x1b[2J") as progress:
        progress(snapshot)
    assert r"[/x]\x1b[2J" in capsys.readouterr().out


@pytest.mark.parametrize(("weighed", "shown"), [(True, "ESS     9.0"), (False, "ESS       -")])
def test_a_search_without_weights_has_no_ess(weighed: bool, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = ts.Snapshot.__new__(ts.Snapshot)
    record = {"wave": 0, "nfe": 20, "best_reward": 1.0, "ess": 9.0, "nodes": 3}
    snapshot.wave, snapshot.record, snapshot.total = 0, record, None
    with Progress("x", weighed=weighed) as progress:
        progress(snapshot)
    assert shown in capsys.readouterr().out
