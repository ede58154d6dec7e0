"""`edit`: a picture in, edits of it out: invert, keep what a mask keeps, search the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from treesearch import api as loop
from treesearch.backends.base import describe
from treesearch.backends.roots.edited import INVERSIONS, takes_prompts
from treesearch.budget import Budget
from treesearch.cli.arguments import Limits, Where, load, rows, written
from treesearch.cli.base import Command, pick
from treesearch.cli.run import drive, new_folder
from treesearch.cli.saved import begin
from treesearch.errors import UsageError
from treesearch.methods import BestOfN
from treesearch.registry import registry as specs
from treesearch.report.terminal import say
from treesearch.session.interfaces import Options

CONTROLS = ("either", "replace", "refine", "kv", "none")
NFE = 2_000  # where no limit is named


@dataclass(frozen=True, kw_only=True)
class Edit(Command):
    """Edit a picture: its inverted path is the root of a search, what a mask keeps stays as it is, and the rest is
    searched for a reward. Leaves a run folder with a sheet of source, reconstruction and the best edits."""

    image: Positional[str]
    reward: Annotated[str, arg(aliases=["--to"])]
    """what the edit should be, such as "digit(3)"; what happens to the kept region can be part of it"""
    keep: str | None = None
    """mask of the picture, white is kept; none keeps nothing"""
    kernel: str = "mnist(num_steps=25)"
    """as for run, of pictures"""
    source: str | None = None
    """prompt that describes the picture"""
    target: str | None = None
    """prompt of the edit"""
    inversion: str = "ddim"
    """how the picture becomes noise: ddim, direct, negative_prompt, null_text, bdia or noise"""
    control: str = "either"
    """attention that direct takes from the picture's path: either, replace, refine, kv or none"""
    strength: float = 1.0
    """share of the steps that are taken"""
    method: str = "tree-search"
    """name(settings) of a method"""
    seed: int = 0
    """of all noise"""
    batch_size: int = 64
    """rows of a forward pass"""
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)
    where: OmitArgPrefixes[Where] = field(default_factory=Where)
    store: str | None = None
    """run folder; a new one under runs/ by default"""
    json: bool = False
    """print the figures as JSON"""

    def run(self) -> int:
        budget, method = self.limits.budget(), specs.method(self.method)
        budget = Budget(nfe=NFE) if budget.empty else budget
        command = written(self._expression(), self.reward)
        path = Path(self.store or new_folder("edit"))
        with self.where.running() as workers:
            kernel, reward = load(command, workers)
            made = specs.kernel(command["kernel"]) if workers is not None else kernel
            prompts = self._prompts(made)
            root, *steps = describe(made, identify=False).stochastic
            if not any(steps) and not root:
                method = BestOfN(n=1)
                say(f"{self.kernel} has no noise and the picture one root: there is one edit, and nothing to search")
            elif not any(steps) and self.method == Edit.method:
                method = BestOfN()
                say(f"{self.kernel} has no noise below its root: {self.method} cannot branch, BestOfN draws roots")
            options = Options(rows(self.batch_size))
            session = loop.make_session(kernel, reward, method, prompts, budget, self.seed, options, workers)
            begin(session, path, command)
            return drive(session, path, command, as_json=self.json)

    def _expression(self) -> str:
        """The kernel of the edits."""
        pick("inversion", self.inversion, INVERSIONS)
        pick("control", self.control, CONTROLS)
        names = ("keep", "source", "inversion", "control", "strength")
        settings = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Edit, name)}
        said = "".join(f", {name}={None if value == 'none' else value!r}" for name, value in settings.items())
        return f"edited({self.kernel}, {self.image!r}{said})"

    def _prompts(self, kernel: Any) -> list[str] | None:
        """The prompt of the edit.

        Raises:
            UsageError: a kernel of prompts that is told none, or a prompt for a kernel that takes none.
        """
        takes = takes_prompts(kernel)
        if takes and self.target is None:
            raise UsageError(f"--target: {self.kernel} is told what to draw, say what the edit should be")
        if self.target is not None and not takes:
            raise UsageError(f"--target: {self.kernel} takes no prompts, leave it out")
        return None if self.target is None else [self.target]
