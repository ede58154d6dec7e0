"""Checkpoints into pipelines: whole, or an error that says what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treesearch.backends.base.devices import as_device
from treesearch.backends.pipelines import assembled
from treesearch.backends.pipelines.checkpoint import (
    PLACES,
    Checkpoint,
    components,
    find,
)
from treesearch.backends.pipelines.networks import class_of, explained, log, whole

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OLDEST = (0, 42)  # of diffusers; the shipped models run with older ones


def as_dtype(dtype: str | torch.dtype, device: str | torch.device | None) -> torch.dtype:
    """A dtype by name.

    Raises:
        ValueError: an unknown one, or one that the device cannot compute in.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    kind = as_device(device).type
    if found == torch.bfloat16 and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("this GPU does not compute in bfloat16: use dtype='float16' or 'float32'")
    if found == torch.float16 and kind == "cpu":
        log.warning("float16 is slow on a CPU: float32 or bfloat16 is faster")
    return found


def load_pipeline(
    checkpoint: Checkpoint,
    index: Mapping[str, Any],
    dtype: torch.dtype,
    variant: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """A diffusers pipeline, without its safety checker; see `DiffusersKernel.from_pretrained`.

    Every network comes from its own file with the list of weights that the file did not have, so that none is made up,
    whatever the logs say.

    Raises:
        CheckpointError: it is gated, incomplete, pickled or made for something else.
        ValueError: a component that the pipeline does not have.
    """
    loader = _loader("controlnet" in (given or {}))
    if PLACES in index:
        return assembled.load(checkpoint, index, dtype, variant, given or {})
    parts: dict[str, Any] = dict(given or {})
    allowed = {name for name in index if name[0] != "_"} | {"controlnet", "requires_safety_checker"}
    if unknown := sorted(set(parts) - allowed):
        raise ValueError(f"{index['_class_name']} has no component {unknown[0]!r}: choose {', '.join(sorted(allowed))}")
    if "safety_checker" in components(dict(index)) and "safety_checker" not in parts:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
        log.info("%s: its safety checker is not loaded, rewards see every image", checkpoint.name)
    checkpoint.refuse(dict(index), parts, variant)
    local = _brought(checkpoint, variant, parts)
    variants = local.refuse(dict(index), parts, variant)
    assert local.folder is not None
    with explained(checkpoint.name):
        kinds = {name: class_of(*index[name]) for name in variants}
    for name, kind in kinds.items():
        if kind.__name__ != "MultiControlNetModel":  # several in one, which the pipeline loads itself
            parts[name] = whole(kind, local.folder / name, f"{checkpoint.name!r}: its {name}", dtype, variants[name])
    with explained(checkpoint.name):
        return loader.from_pretrained(str(local.folder), dtype=dtype, use_safetensors=True, **parts)


def _loader(controlled: bool) -> Any:
    _refuse_old()
    try:
        from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except (ImportError, RuntimeError) as error:  # diffusers wraps what it cannot import
        why = " ".join(str(error).split())[:200]
        raise ImportError(
            f"pipelines need diffusers and transformers: pip install 'treesearch[images]' ({why})"
        ) from error
    return AutoPipelineForText2Image if controlled else DiffusionPipeline


def _refuse_old() -> None:
    import diffusers

    if tuple(map(int, re.findall(r"\d+", diffusers.__version__)[:2])) < OLDEST:
        raise ImportError(
            f"pipelines need diffusers >= {OLDEST[0]}.{OLDEST[1]}, installed is {diffusers.__version__}: "
            "pip install 'treesearch[images]'"
        )


def _brought(checkpoint: Checkpoint, variant: str | None, parts: Collection[str]) -> Checkpoint:
    """The same checkpoint in a folder here, from the hub if need be."""
    if checkpoint.folder is not None:
        return checkpoint
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with explained(checkpoint.name):
        folder = DiffusionPipeline.download(
            checkpoint.name,
            revision=checkpoint.revision,
            variant=variant,
            use_safetensors=True,
            **dict.fromkeys(parts),
        )
    return Checkpoint(checkpoint.name, find(folder).files, Path(folder), checkpoint.revision)


def tiny_decoder(preview: Any, dtype: torch.dtype) -> Any:
    """A decoder for previews, from a checkpoint or as it is.

    Raises:
        CheckpointError: it is absent.
        TypeError: it does not decode.
    """
    if isinstance(preview, str):
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        place = find(preview, markers=("config.json",)).folder or preview
        preview = whole(AutoencoderTiny, place, repr(preview), dtype)
    if preview is None:
        return None
    if not (isinstance(preview, nn.Module) and hasattr(preview, "decode")):
        raise TypeError(f"preview is {type(preview).__name__}, expected a tiny decoder: a checkpoint, or a module")
    return preview
