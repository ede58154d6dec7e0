"""`diagnose`: whether to branch, and where."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from treesearch.cli.arguments import What, count, load
from treesearch.cli.base import Command
from treesearch.diagnosis.diagnose import diagnosed
from treesearch.errors import UsageError
from treesearch.registry import expressions
from treesearch.report.terminal import say


@dataclass(frozen=True, kw_only=True)
class Diagnose(Command):
    """Say from a pilot whether a search should branch, and where: what is decided at which level, what endpoints know,
    how far weights spread, how straight and how conservative the model is; a picture, JSON, and what to type next."""

    what: OmitArgPrefixes[What] = field(default_factory=What)
    nfe: Annotated[str, arg(metavar="N|10k|2M")] = "4k"
    """network evaluations of the pilot"""
    lam: float = 1.0
    """λ of the target, for the spread of weights"""
    store: str = "runs/diagnose"
    """folder for diagnosis.json and outputs/diagnosis.png; what is there is replaced"""
    json: bool = False
    """print the figures as JSON"""

    def run(self) -> int:
        nfe, command = count(self.nfe), self.what.command()
        assert nfe is not None
        if not 0 <= self.lam < float("inf"):
            raise UsageError(f"--lam {self.lam}: expected a number >= 0")
        options, prompts = self.what.options(), self.what.asked()
        kernel, reward = load(command)
        found = diagnosed(
            kernel,
            reward,
            nfe,
            typed=(expressions.public(self.what.kernel), expressions.public(self.what.scored_by())),
            store=self.store,
            progress=False if self.json else None,
            prompts=prompts,
            lam=self.lam,
            seed=self.what.seed,
            batch_size=options.batch_size,
        )
        say(json.dumps(found.as_dict(), indent=2) if self.json else found)
        if not self.json:
            say(f"\nfigures and picture: {self.store}")
        return 0
