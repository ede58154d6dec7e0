"""Kernels, rewards and methods by name, for the command line and saved runs.

The names come from the tables of `treesearch.backends`, `treesearch.rewards` and `treesearch.methods`;
`treesearch.registry.expressions` has what may be written with them.
"""

from __future__ import annotations

import ast
from typing import Any

from treesearch import backends, rewards
from treesearch.errors import unknown
from treesearch.methods import METHODS
from treesearch.registry.expressions import (
    Registered,
    SpecError,
    UnknownName,
    bound,
    build,
    load,
    names_in,
    parse,
    public,
)
from treesearch.registry.references import written

KERNELS = {name: f"treesearch.backends.{place}" for name, (place, _) in backends.KERNELS.items()}
REWARDS = {name: f"treesearch.rewards.{place}" for name, (place, _) in rewards.REWARDS.items()}
OPERATORS = {name: f"treesearch.rewards.{place}" for name, (place, _) in rewards.OPERATORS.items()}
METHOD_NAMES = {method.name: name for name, method in METHODS.items()}


def kernel(spec: str) -> Any:
    """The kernel that an expression names."""
    names = {name: Registered(path) for name, path in (REWARDS | OPERATORS | KERNELS).items()}  # guides take all
    try:
        made = build(spec, "kernel", names)
    except UnknownName as error:
        what, known = (
            ("kernel", KERNELS) if error.name == names_in(spec)[0] else ("name", KERNELS | REWARDS | OPERATORS)
        )
        raise SpecError(unknown(what, error.name, known)) from None
    if not hasattr(made, "num_steps"):
        raise SpecError(
            f"{public(spec)} makes a {type(made).__name__}, expected a kernel: see `treesearch list kernels`"
        )
    return made


def reward(spec: str) -> Any:
    """The reward that an expression names."""
    made = build(spec, "reward", {name: Registered(path) for name, path in (REWARDS | OPERATORS).items()})
    if not callable(made):
        raise SpecError(
            f"{public(spec)} makes a {type(made).__name__}, expected a reward: see `treesearch list rewards`"
        )
    return made


def method(spec: str) -> Any:
    """The method that an expression names, such as fk(num_particles=8)."""
    short = {name: METHODS[path] for name, path in METHOD_NAMES.items()}
    head, bracket, settings = spec.partition("(")
    return build(head.replace("-", "_") + bracket + settings, "method", short | METHODS)


def writes(spec: str) -> bool:
    """Whether an expression of a kernel names one of those that write texts."""
    return any(backends.KERNELS[name][0].startswith("text.") for name in names_in(spec) if name in KERNELS)


def same(spec: str, other: str) -> bool:
    """Whether two expressions are written alike, whatever their blanks and quotes."""
    return _plain(spec) == _plain(other)


def _plain(spec: str) -> str:
    node, found = parse(spec, "expression")
    return written(ast.unparse(node), found)


def guide(spec: str) -> str | None:
    """The expression of the reward that a kernel's expression is guided by or has values of, None where it shows
    none."""
    node: ast.expr | None
    node, found = parse(spec, "kernel")
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KERNELS:
        arguments = bound(load(KERNELS[node.func.id]), node)
        if isinstance(reward := arguments.get("reward"), ast.expr):
            return written(ast.unparse(reward), found)
        node = arguments.get("kernel")
    return None
