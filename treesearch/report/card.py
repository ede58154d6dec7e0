"""The card of a run folder, a page of Markdown: texts of others go through `treesearch.text`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treesearch.report.tables import COLUMNS, markdown_table
from treesearch.runs.files import write_text
from treesearch.text import code, markdown


def card(
    path: Path,
    title: str,
    command: Mapping[str, Any],
    lines: Sequence[Sequence[str]],
    notes: Mapping[str, Sequence[str]],
    pictures: Sequence[tuple[str, str]],
    certificates: Mapping[str, Sequence[str]],
    columns: Sequence[str] = COLUMNS,
    *,
    texts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write README.md of a run folder: what was asked, what came out, what to know, what it may claim, the pictures.

    `texts` are headings and tables, in Markdown, of samples that are texts.
    """
    asked = "\n".join(f"- {markdown(key)}: {code(value)}" for key, value in command.items())
    told = [f"- {markdown(name)}: {markdown(note)}" for name, found in notes.items() for note in found]
    known = "\n".join(told) or "- none"
    claimed = "\n\n".join(
        "\n".join([f"{markdown(name)}:", "", *(f"- {markdown(line)}" for line in found)])
        for name, found in certificates.items()
    )
    head, *body = ([markdown(cell) for cell in line] for line in [columns, *lines])
    shown = "\n\n".join(f"![{markdown(caption)}]({file})\n\n{markdown(caption)}" for file, caption in pictures)
    read = "".join(f"### {markdown(heading)}\n\n{table}\n\n" for heading, table in texts)
    best = f"## The best texts\n\n{read}" if texts else ""
    write_text(
        path / "README.md",
        f"# {markdown(title)}\n\n{asked}\n\n{markdown_table(body, head)}\n\n"
        "log Z estimates log E_p[exp(λ r)] (± standard error where one exists; a dash where the method has none). "
        "ESS is the effective number of samples among the weights. Roots: beginnings (draws of x_T) among the samples "
        f"that carry weight.\n\n{best}## To know before using the numbers\n\n{known}\n\n## Certificate\n\n{claimed}\n\n"
        f"{shown}\n",
    )


def resume_command(path: str | Path) -> str:
    """What to type to go on with a run."""
    return f"treesearch resume {shlex.quote(str(path))}"
