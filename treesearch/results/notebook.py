"""A result as a notebook shows it: figures, what to know before using them, the best samples where they can be seen."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treesearch.errors import StoreError
from treesearch.pictures.sheets import Block, sheet
from treesearch.results.seen import Samples
from treesearch.results.summary import summary
from treesearch.text import plain

if TYPE_CHECKING:
    from treesearch.results.result import SearchResult, TaskResult

SHOWN, SAMPLES = 16, 8  # tasks in a table or on a picture, samples of a single task on it
HEAD = ("task", "samples", "best", "mean", "log Z", "ESS", "status")


def picture(tasks: Sequence[TaskResult]) -> bytes | None:
    """A PNG of the best samples, of several tasks of the best of each; None where there are none to be seen.

    Only those are decoded.
    """
    k, cells = SAMPLES if len(tasks) == 1 else 1, []
    try:
        for task in tasks[:SHOWN]:
            samples = Samples(task)
            cells += samples.cells(samples.ranked(k), prompted=len(tasks) > 1)
    except StoreError:  # read without its kernel, or lost
        return None
    if not cells:
        return None
    out = io.BytesIO()
    sheet([Block("the best samples, with their rewards", cells)]).save(out, format="PNG")
    return out.getvalue()


def page(result: SearchResult) -> str:
    """HTML of a result, every text of others escaped."""
    told = summary(result)
    rows = [_row(i, task) for i, task in enumerate(told[:SHOWN])]
    rows += [[f"… and {len(told) - SHOWN} more"]] * (len(told) > SHOWN)
    notes = dict.fromkeys(warning for task in told for warning in task["warnings"])
    context = result.tasks[0].context
    asked = f"{type(context.method).__name__} on {context.config['kernel']}, reward {context.config['reward']}"
    cost = f"{result.cost.nfe:,} NFE, {result.cost.reward_calls:,} reward calls, {result.cost.seconds:.1f} s"
    cost += f" (kernel {result.cost.model_seconds:.1f}, reward {result.cost.reward_seconds:.1f})"
    parts = [f"<b>{_text(asked)}</b><br>{_text(cost)}", _table(rows)]
    parts += [f"<small>{_text(note)}</small>" for note in notes]
    if (shown := picture(result.tasks)) is not None:
        data = base64.b64encode(shown).decode()
        parts.append(f'<img alt="the best samples" style="max-width:100%" src="data:image/png;base64,{data}">')
    return f"<div>{'<br>'.join(parts)}</div>"


def _row(number: int, task: dict[str, Any]) -> list[str]:
    name = f"{number}" if task["prompt"] is None else f"{task['prompt']}"
    z = _figure(task["log_z"]) + (f" ± {_figure(task['log_z_se'])}" if task["log_z_se"] is not None else "")
    ess = _figure(None if task["log_z"] is None else task["ess"])
    return [name, f"{task['samples']:,}", _figure(task["best"]), _figure(task["mean"]), z, ess, task["status"]]


def _figure(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.4g}"


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(text: Any) -> str:
    return html.escape(plain(text))
