"""The pages as a site: every link and anchor leads somewhere, and nothing is loaded from elsewhere."""

import json
import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r'<(?:script|img|iframe)[^>]+src="?(?:https?:)?//|<link[^>]+rel="?stylesheet[^>]+href="?(?:https?:)?//'
)
DEAD = "# Methods\n\n[a page](nowhere.md), [an anchor](../methods.md#nowhere), [a file](../../experiments/nothing.json)"


def words(path):
    """What a notebook says beside its code."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_what_leads_nowhere_is_found_and_the_pages_have_none(tmp_path, monkeypatch, caplog):
    """One build, in which a page of the API is one of dead links: the warnings, errors to `make docs`, are its own."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), plugins=[], site_dir=str(tmp_path))
    assert config.strict
    config.strict = False
    (hook,) = config.plugins.events["files"]
    names = hook.__globals__["api"]()
    assert "::: treesearch.rewards.images.classifier.digit" in names["docs/api/rewards.md"]
    monkeypatch.setitem(hook.__globals__, "executed", lambda path: (words(path), {}))
    monkeypatch.setitem(hook.__globals__, "api", lambda: names | {"docs/api/methods.md": DEAD})
    with caplog.at_level(logging.INFO, "mkdocs"):
        build(config)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("mkdocs")]
    warned = sorted(line for line in said if "contains a link" in line or 'not included in the "nav"' in line)
    assert len(warned) == len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 3
    assert all("docs/api/methods.md" in line for line in warned)
    pages = list(tmp_path.rglob("*.html"))
    assert tmp_path / "docs/notebooks/first_search/index.html" in pages
    assert tmp_path / "experiments/results/mixtures/mixtures/index.html" in pages  # docs/evidence.md links to it
    assert not [page for page in pages if LOADED.search(page.read_text("utf-8"))]
