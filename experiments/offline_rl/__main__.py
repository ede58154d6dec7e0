"""Offline RL on data that a search draws: normalised return of TD3+BC and IQL by kind of data.

    python -m experiments.offline_rl run --env halfcheetah-medium --learner iql --data searched
    python -m experiments.offline_rl run --env maze-umaze --data all
    python -m experiments.offline_rl report
    python -m experiments.offline_rl references

`experiments.offline_rl.study` has the protocol, `experiments.offline_rl.synthetic` the kinds of data, and
`experiments.offline_rl.mazes` what returns in mazes are measured by. Source: Policy-Guided Diffusion (Jackson et al.,
2024).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.offline_rl.mazes import References
from experiments.offline_rl.report import page
from experiments.offline_rl.study import KEY, Run
from experiments.shared.sweep import command_line, reporting

Report = reporting("offline_rl", KEY, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return command_line("offline_rl", {"run": Run, "report": Report, "references": References}, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
