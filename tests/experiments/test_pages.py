"""Pages of figures: those that are committed are what the result files say."""

from pathlib import Path

import pytest

from experiments.shared import pages
from experiments.shared.pages import Report, Template

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def values():
    return pages.known()


@pytest.mark.parametrize("name", pages.NAMES)
def test_committed_pages_are_what_the_command_writes(name, values):
    assert pages.page(name, values) == (DOCS / f"{name}.md").read_text("utf-8"), "run make pages"


def test_what_was_asked_and_missed_says_so():
    text = Template().format("{x[a]:.2f>={bound}}, {x[a]:.2f>=0.8}, {x[a]:.0%<=0.95}", x={"a": 0.9}, bound=0.95)
    assert text == "**0.90, missed**, 0.90, 90%"


def test_cells_of_reports(tmp_path):
    file = tmp_path / "report.md"
    body = "# Top\n\n## Search: a\n\nwords\n\n| method | x, π | y |\n| --- | ---: | ---: |\n| fk, tuned | 1 ± 2 | - |\n"
    file.write_text(
        f"{body}\n| method | z |\n|---|---|\n| fk, tuned | < 3 (1 to > 2) |\n\n7,000 s = 1.94 h in all: x.\n"
    )
    text = "{r[Search: a][fk, tuned][x, π]}; {r[Search: a][fk, tuned][z]}; {r.hours:.1f}"
    assert Template().format(text, r=Report(file)) == "1 ± 2; < 3 (1 to > 2); 1.9"


def test_a_field_without_a_result_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "TEMPLATES", tmp_path)
    (tmp_path / "figures.md").write_text("{bench[a][none]}")
    with pytest.raises(ValueError, match="no result has 'none'"):
        pages.page("figures", {"bench": {"a": {}}})
