"""Tables of reports, in which what was not run says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treesearch.report.tables import markdown_table

NOT_RUN = "not run"


def table(
    lines: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str | None], *, corner: str = "method"
) -> str:
    """Markdown table; a cell that is None reads "not run"."""
    body = [[line, *(cell(line, column) or NOT_RUN for column in columns)] for line in lines]
    return markdown_table(body, (corner, *columns))
