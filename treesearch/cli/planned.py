"""The folder of a plan: what was asked, a line an episode, a summary and a card."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from treesearch.errors import StoreError
from treesearch.report import tables as report
from treesearch.runs.files import write_json, write_text

COMMAND, EPISODES = "plan.json", "episodes.jsonl"
LINE = ("seed", "success", "returns", "actions", "ended", "decisions", "nfe", "reward", "seconds")
COLUMNS = ("seed", "success", "return", "actions", "decisions", "NFE", "seconds")


def begun(folder: Path, command: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of episodes that are there, one a seed; one that a crash cut off is none.

    Raises:
        StoreError: of another plan, damaged, or a folder that is something else.
    """
    if not (folder / COMMAND).exists():
        if folder.is_file():
            raise StoreError(f"{folder} is a file: name a folder with --store")
        if folder.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} is no plan and not empty: name another --store")
        return []
    kept = _object(folder / COMMAND, (folder / COMMAND).read_text(encoding="utf-8", errors="replace"), command.keys())
    for name, value in command.items():
        if kept.get(name) != value:
            what = _differs(name, kept.get(name), value)
            raise StoreError(f"{folder} is of another plan: its {what}; ask for the same, or name another --store")
    file = folder / EPISODES
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    if (whole := text[: text.rfind("\n") + 1]) != text:
        write_text(file, whole)
    found = [_object(file, line, LINE, i) for i, line in enumerate(whole.splitlines(), 1)]
    return list({line["seed"]: line for line in reversed(found)}.values())


def _differs(name: str, kept: Any, asked: Any) -> str:
    """How a plan's setting is another; a digest tells a person nothing."""
    if (content := name.removesuffix("_digest")) != name:
        return f"{content} has other content by now"
    return f"{name} is {_said(kept)}, not {_said(asked)}"


def _said(value: Any) -> str:
    """A setting as a person would say it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={one}" for name, one in value.items() if one is not None) or "none"
    return str(value)


def _object(file: Path, text: str, names: Iterable[str], line: int | None = None) -> dict[str, Any]:
    """What a plan wrote there.

    Raises:
        StoreError: it wrote no such thing.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= set(names):
        where = "" if line is None else f", line {line},"
        raise StoreError(f"{file}{where} is damaged: {'remove the line' if line else 'name another --store'}")
    return found


def kept(folder: Path, command: dict[str, Any], line: dict[str, Any]) -> None:
    """Write an episode down."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / COMMAND).exists():
        write_json(folder / COMMAND, command)
    with (folder / EPISODES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def summary(played: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Figures of all episodes; success of those whose environment says so."""
    known = [line["success"] for line in played if line["success"] is not None]
    return {
        "episodes": len(played),
        "success": sum(known) / len(known) if known else None,
        "return": sum(line["returns"] for line in played) / len(played),
        "nfe": sum(line["nfe"] for line in played),
        "seconds": round(sum(line["seconds"] for line in played), 1),
        "store": str(folder),
    }


def write(folder: Path, command: dict[str, Any], played: list[dict[str, Any]], found: dict[str, Any]) -> None:
    """The summary and the card."""
    write_json(folder / "summary.json", found)
    write_text(folder / "README.md", _card(command, played, found))


def rows(played: list[dict[str, Any]]) -> list[list[str]]:
    """Of a table."""
    names = {None: report.DASH, True: "yes", False: "no"}
    return [
        [str(line["seed"]), names[line["success"]], f"{line['returns']:.3g}", str(line["actions"]),
         str(line["decisions"]), str(line["nfe"]), f"{line['seconds']:.1f}"]
        for line in played
    ]  # fmt: skip


def sentence(line: dict[str, Any]) -> str:
    """What became of an episode."""
    how = {None: "ended" if line["ended"] else "ran out", True: "succeeded", False: "did not succeed"}[line["success"]]
    return f"episode {line['seed']}: {how}, return {line['returns']:.3g} after {line['actions']} actions"


def _card(command: dict[str, Any], played: list[dict[str, Any]], found: dict[str, Any]) -> str:
    asked = "\n".join(f"- {name}: {_said(value)}" for name, value in command.items() if value is not None)
    head = f"# A policy searched at every decision\n\n{asked}\n\n"
    return head + report.markdown_table(rows(played), COLUMNS) + f"\n\n{outcome(found)}\n"


def outcome(found: dict[str, Any]) -> str:
    """Success and return of all episodes."""
    rate = "" if found["success"] is None else f"{100 * found['success']:.0f} % succeed, "
    return f"{rate}return {found['return']:.3g}"
