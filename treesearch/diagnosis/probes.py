"""What is measured beside the rewards: straightness and asymmetry of the kernel, where it has a Gaussian chain.

A guide is looked through: both are of the kernel p that it proposes for. Of several tasks the first one's prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treesearch.backends.base import Kernel, Spec, optional
from treesearch.backends.diagnostics.conservative import asymmetry, endpoint_field
from treesearch.backends.diagnostics.straightness import gaps, path
from treesearch.core.noise import child_keys
from treesearch.diagnosis.diagnosis import NONE
from treesearch.diagnosis.effects import Estimate
from treesearch.diagnosis.pilot import PilotSearch
from treesearch.engine.asking import Asking, without_graph
from treesearch.engine.engine import Engine
from treesearch.engine.model import Model
from treesearch.session.session import Session

SHARE = 0.05  # of the budget, for each of the two
FEWEST, MOST = 4, 16  # paths, and states of a level
LEVELS = 4  # at which Jacobians are looked at
CHAINLESS = "the kernel has no Gaussian chain, and with it no deterministic path"
PACKED = "states hold more than x_t, such as the memory of a solver"
BACKWARD = 3  # passes for J z and Jᵀz


@dataclass
class Probes:
    """Measurements to be made and, afterwards, made.

    Args:
        kernel: p.
        paths: deterministic paths, 0 for none.
        states: of each level whose Jacobians are looked at, 0 for none.
        num_steps: T.
        skipped: what is not measured, and why.
    """

    kernel: Kernel
    paths: int
    states: int
    num_steps: int
    skipped: dict[str, str] = field(default_factory=dict)
    gaps: dict[int, Estimate] = field(default_factory=dict)
    asymmetries: dict[int, Estimate] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: Kernel, spec: Spec, nfe: int) -> Probes:
        """What can be measured of a kernel, sized for a pilot of `nfe` evaluations."""
        p: Any = optional(kernel, "proposes_for")
        p = kernel if p is None else p
        found, chain = cls(p, 0, 0, spec.num_steps), optional(p, "chain")
        if optional(p, "bare") is not None:
            found.skipped |= dict.fromkeys(("one step", "asymmetry"), PACKED)
            return found
        if chain is None:
            found.skipped["one step"] = CHAINLESS
        else:
            found.paths = _between(SHARE * nfe / spec.num_steps)
        if spec.dtype.is_floating_point:
            found.states = _between(SHARE * nfe / LEVELS)
        else:
            found.skipped["asymmetry"] = "states are no floating-point numbers"
        return found

    @property
    def nfe(self) -> int:
        """What they cost."""
        return self.paths * self.num_steps + self.states * min(LEVELS, self.num_steps)

    def one_step(self, t: int) -> Estimate:
        """gap_t."""
        return self.gaps.get(t, NONE)

    def asymmetry(self, t: int) -> Estimate:
        """Of the Jacobian at level t."""
        return self.asymmetries.get(t, NONE)

    @without_graph()
    def measure(self, session: Session) -> Probes:
        """Make them, on states of the pilot."""
        search, engine = session.searches[0], session.engine
        assert isinstance(search, PilotSearch)
        assert isinstance(engine, Engine)
        size = session.options.batch_size
        if self.paths:
            self._straightness(engine.model, search, session, size)
        if self.states:
            self._asymmetry(engine.model, search, session, size)
        return self

    def _straightness(self, model: Model, search: PilotSearch, session: Session, size: int) -> None:
        keys = child_keys(search.tree.key[:1], self.num_steps + 1, np.arange(self.paths), at_root=True)
        task = np.zeros(self.paths, np.int64)
        x, _ = model.prior(task, model.prior_noise(keys))
        parts = []
        for some in x.split(size):
            with Asking(lambda: "the deterministic paths of the diagnosis"):
                parts.append(path(self.kernel, some, model.conditioning(task[: len(some)])))
        self._charge(session, range(1, self.num_steps + 1), self.paths)
        ends = {t: torch.cat([part[t] for part, _ in parts]) for t in parts[0][0]}
        for t, each in gaps(ends, torch.cat([last for _, last in parts])).items():
            self.gaps[t] = Estimate(float(each.mean()), float(each.std()) / math.sqrt(len(each)))

    @staticmethod
    def _charge(session: Session, levels: Iterable[int], rows: int) -> None:
        """Enter an evaluation of so many rows at each of the levels."""
        for t in levels:
            session.cost.nfe += rows
            session.cost.rows += rows * session.spec.rows_per_nfe[t]

    def _asymmetry(self, model: Model, search: PilotSearch, session: Session, size: int) -> None:
        at = np.unique(np.linspace(0, len(search.chain) - 1, min(LEVELS, self.num_steps)).round().astype(int))
        for i in at.tolist():
            nodes = search.chain[i][: min(self.states, size)]
            t, task = int(search.tree.t[nodes[0]]), np.zeros(len(nodes), np.int64)
            x = session.states.get(search.tree.slot[nodes]).to(model.spec.device)
            z = _probe(search, nodes, x)
            try:
                found = asymmetry(endpoint_field(self.kernel, t, model.conditioning(task)), x, z)
            except (ValueError, RuntimeError) as error:  # of any kernel that does not let gradients through
                self.skipped["asymmetry"] = f"the kernel's endpoints have no second derivative here: {str(error)[:120]}"
                return
            self._charge(session, (t,), len(nodes))
            session.cost.backward_nfe += BACKWARD * len(nodes)
            self.asymmetries[t] = Estimate(found.value, found.se)


def _probe(search: PilotSearch, nodes: Any, x: Tensor) -> Tensor:
    """Normals of the shape of states, from a key that no other draw uses."""
    from treesearch.core.noise import normals

    keys = child_keys(search.tree.key[nodes], int(search.tree.t[nodes[0]]), np.full(len(nodes), 2))
    z = normals(keys, np.full(len(nodes), search.problem.num_steps + 2), int(np.prod(x.shape[1:])))
    return torch.from_numpy(z).reshape(x.shape).to(x)


def _between(wanted: float) -> int:
    return max(FEWEST, min(MOST, int(wanted)))
