"""The page of models is what the classes of diffusers meet."""

from pathlib import Path

import diffusers
import pytest

from experiments.bench import models

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_committed_page_is_what_the_command_writes():
    text = PAGE.read_text("utf-8")
    if f"diffusers {diffusers.__version__} " not in text:
        pytest.skip("it is of another diffusers")
    assert models.page() == text, "run python -m experiments.bench.models --out docs/models.md"
    listed, _, others = text.partition("## Not in the auto pipelines")
    assert listed.count("| works, by hand |") >= 9
    assert "| `CogVideoXPipeline` | works, by its call |" in others
