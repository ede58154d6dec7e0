"""Writes docs/models.md: what becomes of every class that diffusers' auto pipelines list.

    python -m experiments.bench.models --out docs/models.md

Each class is asked for as a checkpoint's index asks for it; what is refused has the words of the refusal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers

from treesearch.backends.pipelines.families import FAMILIES, family_of, tasks, why_not
from treesearch.backends.pipelines.kinds import KINDS
from treesearch.backends.pipelines.listed import CALLED

HEAD = """# Models

What becomes of every class that the auto pipelines of diffusers {version} list, {works} of {all} of which load. Written
by `python -m experiments.bench.models --out docs/models.md`; the words of a refusal are those that a user meets.

"Works" is: the same noise gives the same pictures as the pipeline's own `__call__`, to 1e-4 in float32, on a tiny
checkpoint of random weights, saved and loaded as a real one; rows of a batch do not depend on each other. By hand is a
family of its own, by blocks is diffusers' modular form of the pipeline, by its call is the pipeline's own `__call__`,
one step at a time ([pipelines.md](pipelines.md)).
"""
OTHERS = "\n## Not in the auto pipelines\n\n| class | |\n|---|---|\n"


def page() -> str:
    """The whole page."""
    names = {name for classes in tasks().values() for name in classes.values()}
    works = len(names & set(FAMILIES))
    text = HEAD.format(version=diffusers.__version__, works=works, all=len(names))
    for task, classes in tasks().items():
        text += f"\n## {task.capitalize()}\n\n| class | | why, and what to do |\n|---|---|---|\n"
        rows = (verdict(name, task) for name in dict.fromkeys(classes.values()))
        text += "".join(f"| `{name}` | {what} | {why} |\n" for name, what, why in rows)
    others = sorted(set(FAMILIES) - names)
    return text + OTHERS + "".join(f"| `{name}` | works, {_how(name)} |\n" for name in others)


def verdict(name: str, task: str) -> tuple[str, str, str]:
    """A class, what becomes of it, and why."""
    try:
        family_of(name)
    except ValueError:
        why = why_not(name)
        return name, "not tried" if "not been tried" in why else "refused", why
    how = f"works, {_how(name)}"
    if name in CALLED and CALLED[name].names.get("mask"):
        return name, how, "its ControlNet is told `control_image=` and `mask=`"
    if task.startswith("text") and not _wants_a_picture(name):
        return name, how, ""
    if "Inpaint" in name:
        return name, how, "`image=`, `mask=` and `strength=`"
    if "Img2Img" in name:
        return name, how, "`image=` and `strength=`"
    return name, how, "the picture is `image=`" if _wants_a_picture(name) else "from text alone"


def _wants_a_picture(name: str) -> bool:
    return (name in KINDS and KINDS[name].edits) or "ImageToVideo" in name


def _how(name: str) -> str:
    return "by blocks" if name in KINDS else "by its call" if name in CALLED else "by hand"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.parse_args(arguments).out.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
