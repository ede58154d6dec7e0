"""Interventions: what is changed inside a network while a kernel evaluates a step. A paper a file."""

from treesearch.backends.interventions.actions import Actions
from treesearch.backends.interventions.away import Away
from treesearch.backends.interventions.base import Intervened, Intervention, Rows
from treesearch.backends.interventions.proposal import Proposal

__all__ = ["Actions", "Away", "Intervened", "Intervention", "Proposal", "Rows"]
