"""Modular repositories: `modular_model_index.json` says of each component where it is, here or in another repository.

Everything is looked at before any weight is read. The pipeline is the modular one, with the blocks and settings that
the index names; where a family of the whole pipeline has it, it is that.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treesearch.backends.pipelines.checkpoint import (
    PLACES,
    Checkpoint,
    CheckpointError,
    find,
    has_weights,
    is_hub_id,
)
from treesearch.backends.pipelines.networks import class_of, explained, read, whole

_LIBRARIES = ("diffusers", "transformers")
_CODE = "modular_config.json"
_LISTED = (
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "guider_config.json",
)


@dataclass(frozen=True)
class Part:
    """One component of a modular repository.

    Args:
        name: of the component.
        entry: its library and its class.
        home: the repository where it is.
        folder: there; "" for the repository itself.
        variant: of its weights.
    """

    name: str
    entry: list[str]
    home: Checkpoint
    folder: str
    variant: str | None

    def load(self, dtype: torch.dtype) -> Any:
        """The component, its files fetched if need be."""
        with explained(self.home.name):
            kind, place = class_of(*self.entry), self._brought() / self.folder
        if has_weights(self.entry):
            return whole(kind, place, f"{self.home.name!r}: its {self.name}", dtype, self.variant)
        with explained(self.home.name):
            return read(kind, place)

    def _brought(self) -> Path:
        if self.home.folder is not None:
            return self.home.folder
        from huggingface_hub import snapshot_download

        start = f"{self.folder}/" if self.folder else ""
        files = self.home.read(self.folder, self.variant, weights=has_weights(self.entry))
        wanted = [start + file for file in files]
        return Path(snapshot_download(self.home.name, revision=self.home.revision, allow_patterns=wanted))


def load(
    checkpoint: Checkpoint, index: Mapping[str, Any], dtype: torch.dtype, variant: str | None, given: Mapping[str, Any]
) -> Any:
    """A pipeline from a modular repository; see `loading.load_pipeline`.

    Args:
        checkpoint: the repository.
        index: what its index says.
        dtype: of the weights.
        variant: of the weights, where the index names none.
        given: components that the user brings, None for those to leave out.

    Raises:
        CheckpointError: a component is not where the index says, or is code of the repository's own.
        ValueError: a component that the pipeline does not have.
    """
    if _CODE in checkpoint.files:
        raise checkpoint.error("its blocks are code of its own, which is not run: load it and wrap it if its class is "
                               "a known one, DiffusersKernel(pipe, ...)")  # fmt: skip
    import diffusers

    form, settings = getattr(diffusers, index["_class_name"]), _settings(index)
    pipe = form(modular_config_dict=settings) if "Modular" in form.__name__ else None
    names = list(inspect.signature(form.__init__).parameters) if pipe is None else pipe.component_names
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"{form.__name__} has no component {unknown[0]!r}: choose {', '.join(sorted(names))}")
    wanted = {name: place for name, place in index[PLACES].items() if name in names and name not in given}
    found = [_part(checkpoint, name, index[name], place, variant) for name, place in wanted.items()]
    if variant is not None and variant not in {part.variant for part in found}:
        raise checkpoint.error(f"it has no weights of variant {variant!r}: leave variant out")
    parts = {part.name: part.load(dtype) for part in found} | dict(given)
    if pipe is None:
        settings = {name: value for name, value in settings.items() if name in names}
        return form(**dict.fromkeys(_components(form)) | settings | parts)
    pipe.update_components(**parts)
    return pipe


def _settings(index: Mapping[str, Any]) -> dict[str, Any]:
    """What an index says beside its components."""
    gone = [name for name, value in index.items() if value == [None, None]]  # components that are left out
    return {name: value for name, value in index.items() if name not in (PLACES, *index[PLACES], *gone)}


def _components(form: Any) -> list[str]:
    taken = inspect.signature(form.__init__).parameters.values()
    return [each.name for each in taken if each.default is inspect.Parameter.empty and each.name != "self"]


def _part(checkpoint: Checkpoint, name: str, entry: list[str], place: Mapping[str, Any], variant: str | None) -> Part:
    """A component, where it is, with all that it needs there.

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    if entry == [None, None]:
        raise checkpoint.error(f"its index does not say what its {name} is: load it and bring it, "
                               f"components={{{name!r}: ...}}")  # fmt: skip
    if entry[0] not in _LIBRARIES:
        raise checkpoint.error(f"its {name} is code of its own ({'.'.join(entry)}), which is not run: load it and "
                               f"bring it, components={{{name!r}: ...}}")  # fmt: skip
    folder = place.get("subfolder") or ""
    home = _home(checkpoint, name, place, folder)
    home.refuse_part(folder or name, entry) if folder else None
    if not has_weights(entry):
        return Part(name, entry, home, folder, None)
    return Part(name, entry, home, folder, home.variant_of(folder, variant or place.get("variant")))


def _home(checkpoint: Checkpoint, name: str, place: Mapping[str, Any], folder: str) -> Checkpoint:
    """Here, where there is such a folder, as in a copy of a repository that was moved; else where the index says."""
    where = place.get("pretrained_model_name_or_path", place.get("repo"))
    moved = checkpoint.folder is not None or where == checkpoint.name or not is_hub_id(where)
    if folder and moved and checkpoint.inside(folder):
        return checkpoint
    start = f"{folder}/" if folder else ""
    try:
        return find(where, place.get("revision"), [start + each for each in _LISTED])
    except CheckpointError as error:
        raise checkpoint.error(f"its {name} is in {where!r}, by its index, and that is not there: bring it, "
                               f"components={{{name!r}: ...}} ({error})") from error  # fmt: skip
