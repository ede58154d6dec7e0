"""The folder of a plan: what was asked, a line an episode, a summary and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from treesearch.errors import StoreError
from treesearch.report import tables as report
from treesearch.runs.files import write_json, write_text

COMMAND, EPISODES = "plan.json", "episodes.jsonl"
COLUMNS = ("seed", "success", "return", "actions", "decisions", "NFE", "seconds")


def begun(folder: Path, command: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of episodes that are there.

    Raises:
        StoreError: of another plan, or a folder that is something else.
    """
    if not (folder / COMMAND).exists():
        if folder.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} is no plan and not empty: name another --store")
        return []
    kept = json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    for name, value in command.items():
        if kept.get(name) != value:
            raise StoreError(f"{folder} is of another plan: its {name} is {kept.get(name)!r}, not {value!r}")
    lines = (folder / EPISODES).read_text(encoding="utf-8").splitlines() if (folder / EPISODES).exists() else []
    return [json.loads(line) for line in lines]


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
    asked = "\n".join(f"- {name}: {value}" for name, value in command.items() if value is not None)
    head = f"# A policy searched at every decision\n\n{asked}\n\n"
    return head + report.markdown_table(rows(played), COLUMNS) + f"\n\nreturn {found['return']:.4g}\n"
