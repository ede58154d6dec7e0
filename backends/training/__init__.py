"""Training of few-step students: one loop, one distiller, and one file a target.

Knows kernels and chains, never a search. What it makes is an ordinary network: `models.student` makes a kernel of it.
Nothing of it is imported where a search runs.
"""
