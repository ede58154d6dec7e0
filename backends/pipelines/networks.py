"""Parts of checkpoints, read whole or refused in a sentence that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from treesearch.backends.pipelines.checkpoint import CheckpointError

log = logging.getLogger("treesearch.backends")


def class_of(library: str, kind: str) -> Any:
    """A component's class, by its library and name."""
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    return simple_get_class_obj(library, kind)


def read(kind: Any, folder: str | Path, **options: Any) -> Any:
    """A component from its files, by a class of the library: code beside them is not run, nor asked about."""
    own = {"trust_remote_code": False} if kind.__module__.startswith("transformers.models.auto") else {}
    return kind.from_pretrained(str(folder), **own, **options)


def whole(kind: Any, folder: str | Path, name: str, dtype: torch.dtype, variant: str | None = None) -> Any:
    """A network of which every weight comes from its file.

    Raises:
        CheckpointError: one does not; the message says how many, and which.
    """
    chosen = {} if variant is None else {"variant": variant}
    with explained(str(folder)):
        module, said = read(kind, folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **chosen)
    lost = {*said["missing_keys"], *(key[0] for key in said["mismatched_keys"])}
    lost |= {key for key, weight in module.named_parameters() if weight.is_meta}
    if lost:
        raise CheckpointError(
            f"cannot load {name}: it lacks {len(lost)} weights, such as {min(lost)}, which would be made up: "
            "load the file again"
        )
    return module


@contextmanager
def explained(checkpoint: str) -> Iterator[None]:
    """Turn whatever a loader raises into what to do about it."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(_why(checkpoint, error)) from error


def _why(checkpoint: str, error: Exception) -> str:
    kinds, said = {cls.__name__ for cls in type(error).__mro__}, " ".join(str(error).split())
    if "GatedRepoError" in kinds or "gated" in said.lower() or " 401 " in said:
        cure = "accept its licence on its page and log in with `hf auth login`, or name a local folder"
    elif "RepositoryNotFoundError" in kinds or "not a valid model identifier" in said:
        cure = "there is no such repository: check the name, or name a local folder"
    elif "trust_remote_code" in said:
        cure = "it is code of its own, which is not run: load it and bring it, components={...: ...}"
    elif "GPU" in said and "quantiz" in said:
        cure = "its weights are quantised by a library that needs a GPU"
    elif isinstance(error, (AttributeError, ImportError)):
        cure = "it names something that is not installed here: update diffusers and transformers"
    else:
        cure = "its files do not make what they say"
    return f"cannot load {checkpoint!r}: {cure} ({type(error).__name__}: {said[:300]})"
