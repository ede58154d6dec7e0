"""What a finished run of edits leaves and prints beside the rest, whichever command ran it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treesearch.backends.roots.edited import edited, reconstruction
from treesearch.backends.roots.rooted import Rooted
from treesearch.registry import registry as specs
from treesearch.registry.expressions import bound, parse
from treesearch.report.edits import write_edit
from treesearch.results.result import SearchResult
from treesearch.rewards import files


def report(result: SearchResult, kernel: Any, command: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """Write the sheet and the figures of edits; None of a kernel that makes none.

    Args:
        result: of the search, one task.
        kernel: of the session; with workers a stand-in, and then it is made here.
        command: expressions of the run.
        path: its folder.
    """
    asked = asked_of(command["kernel"])
    if asked is None:
        return None
    rooted = kernel if isinstance(kernel, Rooted) else specs.kernel(command["kernel"])
    again, keep = reconstruction(rooted, asked.get("source")), asked.get("keep")
    mask = None if keep is None else files.mask(keep)
    return write_edit(result.tasks[0], path, picture=files.picture(asked["image"]), again=again, mask=mask)


def asked_of(spec: str) -> dict[str, Any] | None:
    """Files and prompts of an expression edited(...), by name; None of another expression."""
    call, _ = parse(spec, "kernel")
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "edited":
        return None
    given = bound(edited, call)
    return {name: ast.literal_eval(given[name]) for name in ("image", "keep", "source") if name in given}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The figures as text, one line a picture."""
    return [f"{name:<15} {_told(**each)}" for name, each in found.items()]


def _told(reward: float | None, psnr: float | None, ssim: float) -> str:
    kept = "kept exactly" if psnr is None else f"PSNR {psnr:.1f} dB, SSIM {ssim:.3f}"
    return kept if reward is None else f"reward {reward:<10.4g} {kept}"
