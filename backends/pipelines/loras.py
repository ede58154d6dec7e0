"""LoRA weights: found before anything is loaded, and loaded whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from treesearch.backends.pipelines.checkpoint import LORA, PICKLES, Checkpoint, CheckpointError, find
from treesearch.backends.pipelines.networks import explained, log


@dataclass(frozen=True)
class Lora:
    """LoRA weights.

    Args:
        name: as the user wrote it.
        place: a folder or a hub id.
        options: which file of it.
        weight: in a stack; None where they are alone.
    """

    name: str
    place: str
    options: dict[str, str]
    weight: float | None = None


def find_loras(loras: str | os.PathLike[str] | Mapping[str, float] | None) -> list[Lora]:
    """Where LoRA weights are: one place of them, or several with the weight of each.

    Raises:
        CheckpointError: they are absent, pickled or broken.
    """
    if loras is None:
        return []
    several = loras if isinstance(loras, Mapping) else {os.fspath(loras): None}
    found: list[Lora] = []
    for name, weight in several.items():
        try:
            found.append(Lora(os.fspath(name), *_lora_file(os.fspath(name)), None if weight is None else float(weight)))
        except CheckpointError as error:
            raise CheckpointError(f"lora: {error}") from error
    return found


def load_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load LoRA weights into a pipeline.

    Raises:
        CheckpointError: they are incomplete, or made for another model.
    """
    if not loras or loras[0].weight is None:
        for lora in loras:
            _load(pipe, lora)
        return
    names = [f"lora_{i}" for i in range(len(loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is asked for
        for name, lora in zip(names, loras, strict=True):
            _load(pipe, lora, adapter_name=name)
    pipe.set_adapters(names, [lora.weight for lora in loras])


def _load(pipe: Any, found: Lora, **named: str) -> None:
    """Load LoRA weights into a pipeline, under a name of their own if one is given."""
    lora, place, options = found.name, found.place, found.options
    before = len(_lora_weights(pipe))
    with explained(lora):
        pipe.load_lora_weights(place, use_safetensors=True, **options, **named)
    if not any(pipe.get_list_adapters().values()):
        raise CheckpointError(f"{lora!r} holds no LoRA weights for {type(pipe).__name__}: is it for another model?")
    with explained(lora):
        said = pipe.lora_state_dict(place, use_safetensors=True, **options)
    weights = said[0] if isinstance(said, tuple) else said
    held, taken = sum(".alpha" not in key for key in weights), len(_lora_weights(pipe)) - before
    if taken > held:
        raise CheckpointError(f"{lora!r} lacks {taken - held} of {taken} LoRA weights, which would be made up: load it "
                              "again")  # fmt: skip
    if taken < held:
        log.warning("%s: %d of its %d weights are not of %s and are left out", lora, held - taken, held, type(pipe))


def _lora_weights(pipe: Any) -> list[str]:
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    names = [f"{name}.{key}" for name, part in networks.items() for key, _ in part.named_parameters()]
    return [name for name in names if ".lora_" in name]


def _lora_file(lora: str) -> tuple[str, dict[str, str]]:
    """Where LoRA weights are, a folder or a hub id, and which file."""
    path = Path(lora).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            what = "it is a pickle, and pickles are not loaded" if path.suffix in PICKLES else "it is no safetensors"
            raise CheckpointError(f"cannot load {lora!r}: {what}: convert it first")
        Checkpoint(lora, frozenset([path.name]), path.parent).refuse_broken(path.name)
        return str(path.parent), {"weight_name": path.name}
    owner, _, rest = lora.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}" if file.endswith(".safetensors") and not path.parent.exists() else lora
    found = find(repository, markers=(LORA,))
    return str(found.folder or repository), {"weight_name": file if repository != lora else _one_lora(found)}


def _one_lora(found: Checkpoint) -> str:
    top = sorted(name for name in found.files if "/" not in name)
    weights = [name for name in top if name.endswith(".safetensors")]
    chosen = LORA if LORA in weights else weights[0] if len(weights) == 1 else None
    if chosen is None and weights:
        raise found.error(f"it holds {len(weights)} files of weights: name one, such as {weights[0]!r} in it")
    if chosen is None:
        pickled = any(name.endswith(PICKLES) for name in top)
        what = "its weights are a pickle, and pickles are not loaded" if pickled else "it holds no safetensors weights"
        raise found.error(f"{what}: convert it first")
    found.refuse_broken(chosen)
    return chosen
