"""Environments of gymnasium by the names that people type."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from treesearch.errors import UsageError, unknown

HOMES = {"PushT-v0": "gym_pusht", "AlohaInsertion-v0": "gym_aloha", "AlohaTransferCube-v0": "gym_aloha"}
"""Packages of environments that LeRobot's policies are of."""


def environment(name: str, settings: Mapping[str, Any]) -> Any:
    """The environment that `gymnasium.make` knows by a name, with its package where LeRobot leaves it out.

    Raises:
        ImportError: gymnasium, or the environment's package, is not installed.
        UsageError: an unknown name.
        ValueError: settings that it does not take.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("environments need gymnasium: pip install 'treesearch[rl]'") from error
    package = HOMES.get(name, name.partition("/")[0] if "/" in name and ":" not in name else None)
    if package is not None and package.isidentifier():
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package or name in HOMES:
                raise ImportError(
                    f"{name} needs {error.name}, which is not installed: pip install {error.name}"
                ) from error
    full = f"{package}/{name}" if name in HOMES else name
    try:
        return gymnasium.make(full, **settings)
    except gymnasium.error.NameNotFound:
        raise UsageError(
            unknown("environment", name, [*gymnasium.registry, *HOMES])
            + "; those of another package are package:Name-v0"
        ) from None
    except gymnasium.error.Error as error:
        raise ValueError(f"{name}: {error}") from error
    except TypeError as error:
        raise ValueError(f"{name} with {dict(settings)}: {error}") from error


def told(name: str, features: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by which an environment of LeRobot shows what a policy is told."""
    if not name.endswith("PushT-v0"):
        return {}
    pictures = any(feature.startswith("observation.image") for feature in features)
    return {"obs_type": "pixels_agent_pos" if pictures else "environment_state_agent_pos"}
