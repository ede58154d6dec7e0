"""Checkpoints into pipelines: whole, or an error that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
log = logging.getLogger("treesearch.backends")


class CheckpointError(OSError):
    """A checkpoint that cannot be loaded, or lacks something."""


def as_device(device: str | torch.device | None) -> torch.device:
    """A device; None is the GPU if there is one.

    Raises:
        ValueError: it is not there.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: choose cpu, cuda, cuda:1, ...") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(found)!r}, but torch {torch.__version__} sees no GPU: use device='cpu'")
    return found


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
    checkpoint: str,
    dtype: torch.dtype,
    variant: str | None = None,
    revision: str | None = None,
    components: Mapping[str, Any] | None = None,
) -> Any:
    """A diffusers pipeline, without its safety checker; see `DiffusersKernel.from_pretrained`.

    Raises:
        CheckpointError: it is absent, gated, incomplete or made for something else.
        ValueError: a component that the pipeline does not have.
    """
    try:
        from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except (ImportError, RuntimeError) as error:  # diffusers wraps what it cannot import
        why = " ".join(str(error).split())[:200]
        raise ImportError(
            f"pipelines need diffusers and transformers: pip install 'treesearch[images]' ({why})"
        ) from error
    given: dict[str, Any] = dict(components or {})
    with _explained(checkpoint):
        config: Any = DiffusionPipeline.load_config(checkpoint, revision=revision)
    parts = {name for name in config if name[0] != "_"} | {"controlnet", "requires_safety_checker"}
    if unknown := sorted(set(given) - parts):
        raise ValueError(
            f"{config.get('_class_name')} has no component {unknown[0]!r}: choose {', '.join(sorted(parts))}"
        )
    if config.get("safety_checker", [None])[0] is not None and "safety_checker" not in given:
        given |= {"safety_checker": None, "requires_safety_checker": False}
        log.info("%s: its safety checker is not loaded, rewards see every image", checkpoint)
    loader: Any = AutoPipelineForText2Image if "controlnet" in given else DiffusionPipeline
    with _explained(checkpoint), _no_made_up_weights():
        pipe = loader.from_pretrained(
            checkpoint, dtype=dtype, variant=variant, revision=revision, use_safetensors=True, **given
        )
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and (lost := [n for n, p in module.named_parameters() if p.is_meta]):
            raise CheckpointError(
                f"cannot load {checkpoint!r}: its {name} lacks {len(lost)} weights, such as {lost[0]}"
            )
    return pipe


def load_lora(pipe: Any, lora: str) -> None:
    """Load LoRA weights into a pipeline.

    Raises:
        CheckpointError: they are absent, or made for another model.
    """
    with _explained(lora):
        pipe.load_lora_weights(lora)
    if not any(pipe.get_list_adapters().values()):
        raise CheckpointError(f"{lora!r} holds no LoRA weights for {type(pipe).__name__}: is it for another model?")


def tiny_decoder(preview: Any, dtype: torch.dtype) -> Any:
    """A decoder for previews, from a checkpoint or as it is.

    Raises:
        CheckpointError: it is absent.
        TypeError: it does not decode.
    """
    if isinstance(preview, str):
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        with _explained(preview):
            preview = AutoencoderTiny.from_pretrained(preview, dtype=dtype, use_safetensors=True)
    if preview is None:
        return None
    if not (isinstance(preview, nn.Module) and hasattr(preview, "decode")):
        raise TypeError(f"preview is {type(preview).__name__}, expected a tiny decoder: a checkpoint, or a module")
    return preview


@contextmanager
def _explained(checkpoint: str) -> Iterator[None]:
    """Turn whatever a loader raises into what to do about it."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(_why(checkpoint, error)) from error


def _why(checkpoint: str, error: Exception) -> str:
    kinds, said = {cls.__name__ for cls in type(error).__mro__}, " ".join(str(error).split())
    folder = Path(checkpoint)
    pickled = any(folder.glob("**/*.bin")) and not any(folder.glob("**/*.safetensors"))
    if "GatedRepoError" in kinds or "gated" in said.lower() or " 401 " in said:
        cure = "accept its licence on its page and log in with `hf auth login`, or name a local folder"
    elif "RepositoryNotFoundError" in kinds or "not a valid model identifier" in said:
        cure = "there is no such repository: check the name, or name a local folder"
    elif pickled or "necessary `safetensors` weights" in said:
        cure = "it has no safetensors weights, and pickles are not loaded: convert it first"
    elif folder.exists():
        cure = "a file is missing or broken: load it again"
    else:
        cure = "there is no such folder here, and the hub gave nothing: check the name, the connection and the login"
    return f"cannot load {checkpoint!r}: {cure} ({type(error).__name__}: {said[:300]})"


@contextmanager
def _no_made_up_weights() -> Iterator[None]:
    """transformers fills weights that a file lacks with random ones and says so in its log; here that is an error.

    Raises:
        CheckpointError: it did.
    """
    heard = _Listener()
    source = logging.getLogger("transformers")
    source.addHandler(heard)
    try:
        yield
    finally:
        source.removeHandler(heard)
    if heard.said:
        raise CheckpointError(f"weights are missing: {' '.join(heard.said[0].split())[:300]}")


class _Listener(logging.Handler):
    """Keeps what is said of missing weights."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "newly initialized" in text or "MISSING" in text:
            self.said.append(text)
