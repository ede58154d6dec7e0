"""The folder of a learner of noise: an index, and one file of tensors that it names. No pickle.

dsrl.json                  steps, episodes, and what tells this learner from others
state-STEPS.safetensors    weights, states of the optimisers, the replay buffer
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treesearch.errors import StoreError

if TYPE_CHECKING:
    from treesearch.policies.learner import NoiseSAC

INDEX = "dsrl.json"
ROWS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")  # of the replay buffer


def write(folder: Path, learner: NoiseSAC, told: dict[str, Any]) -> None:
    """Keep a learner and what is told of it; a crash leaves this state or the one before."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{told['steps']}.safetensors"
    save_file(_tensors(learner), folder / f"{name}.tmp")
    (folder / f"{name}.tmp").replace(folder / name)
    (folder / f"{INDEX}.tmp").write_text(json.dumps({"state": name, **told}), encoding="utf-8")
    (folder / f"{INDEX}.tmp").replace(folder / INDEX)
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def read_index(folder: Path) -> dict[str, Any]:
    """What was told.

    Raises:
        StoreError: there is no learner, or it cannot be read.
    """
    if not (folder / INDEX).exists():
        raise StoreError(f"no learner in {folder}: name one of treesearch steer, or learn one there")
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, INDEX) from error
    if not isinstance(found, dict) or not {"state", "steps", "episodes"} <= found.keys():
        raise _damaged(folder, INDEX)
    return found


def put_back(learner: NoiseSAC, folder: Path, index: dict[str, Any]) -> None:
    """Make a learner what it was.

    Raises:
        StoreError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(folder / index["state"])
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, index["state"]) from error
    weights, moments = (
        {k.removeprefix(part): v for k, v in found.items() if k.startswith(part)} for part in ("weights.", "optimizer.")
    )
    learner.restore(weights, moments)
    buffer: Any = learner.replay_buffer
    for name in ROWS:
        rows = found[f"replay.{name}"].numpy()
        getattr(buffer, name)[: len(rows)] = rows
    buffer.pos, buffer.full = int(found["replay.pos"]), bool(found["replay.full"])
    learner.num_timesteps = index["steps"]


def _damaged(folder: Path, name: str) -> StoreError:
    return StoreError(f"{folder / name} is damaged or gone: put a copy of the folder back, or learn in another one")


def _tensors(learner: NoiseSAC) -> dict[str, Tensor]:
    """Weights, states of optimisers, replay."""
    found = {f"weights.{k}": v.detach().clone().contiguous() for k, v in learner.weights().items()}
    found |= {f"optimizer.{k}": v.clone() for k, v in learner.moments().items()}
    buffer: Any = learner.replay_buffer
    count = buffer.size()
    found |= {f"replay.{k}": torch.from_numpy(getattr(buffer, k)[:count].copy()) for k in ROWS}
    return found | {"replay.pos": torch.tensor(buffer.pos), "replay.full": torch.tensor(buffer.full)}
