"""The bench of token laws runs, in both forms."""

import pytest

from experiments.bench import tokens


@pytest.mark.parametrize("form", ["table", "tokens"])
def test_each_form_is_measured(form):
    found = tokens.measure(tokens.Args(rows=2, length=6, vocabulary=50, form=form))
    assert found["seconds"] >= 0
    assert found["form"] == form
