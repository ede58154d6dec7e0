"""Checkpoints into pipelines: whole, or an error that says what to do."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treesearch.backends.base.devices import as_device
from treesearch.backends.pipelines import assembled
from treesearch.backends.pipelines.checkpoint import (
    LORA,
    PICKLES,
    PLACES,
    Checkpoint,
    CheckpointError,
    components,
    find,
)
from treesearch.backends.pipelines.networks import class_of, explained, whole

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OLDEST = (0, 42)  # of diffusers; the shipped models run with older ones
log = logging.getLogger("treesearch.backends")


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


def load_loras(pipe: Any, loras: str | os.PathLike[str] | Mapping[str, float]) -> None:
    """Load LoRA weights into a pipeline: one place of them, or several with the weight of each.

    Raises:
        CheckpointError: see `load_lora`.
    """
    if not isinstance(loras, Mapping):
        load_lora(pipe, os.fspath(loras))
        return
    names = [f"lora_{i}" for i in range(len(loras))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is asked for
        for name, place in zip(names, loras, strict=True):
            load_lora(pipe, place, adapter_name=name)
    pipe.set_adapters(names, [float(weight) for weight in loras.values()])


def load_lora(pipe: Any, lora: str, **named: str) -> None:
    """Load LoRA weights into a pipeline, under a name of their own if one is given.

    Raises:
        CheckpointError: they are absent, pickled, incomplete, or made for another model.
    """
    place, options = _lora_file(lora)
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
