"""Networks that score, and their parts, by checkpoint: loaded once, asked in batches.

Networks are held once per process, by checkpoint, device and dtype; a reward holds their names only, so that it is
light and can be sent to workers. Weights are read from safetensors; pickles are refused unless asked for.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from treesearch.rewards.numeric import is_whole

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
INSTALL = "pip install 'treesearch[images]'"
_LOCK = threading.RLock()
_CACHES: list[Any] = []

P = ParamSpec("P")
T = TypeVar("T")


class CheckpointError(OSError):
    """Weights that cannot be read; the message says why and what to do."""


def once(build: Callable[P, T], maxsize: int | None = None) -> Callable[P, T]:
    """Cache what a module-level function builds from hashable arguments, for all threads; `release` empties it."""
    cached: Any = functools.lru_cache(maxsize)(build)
    signature = inspect.signature(build)
    _CACHES.append(cached)

    @functools.wraps(build)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # however it is called, one network is one entry
        with _LOCK, torch.inference_mode(False):  # what is built once may be differentiated through later
            return cached(*bound.args, **bound.kwargs)

    return call


def release() -> None:
    """Forget every network that rewards have loaded in this process; the next call loads again."""
    with _LOCK:
        for cached in _CACHES:
            cached.cache_clear()


@once
def load(
    kind: str, checkpoint: str, device: str = "cpu", dtype: torch.dtype = torch.float32, allow_pickle: bool = False
) -> Any:
    """A network of transformers in eval mode without gradients to its weights, read once.

    Args:
        kind: name of its class in transformers, such as "CLIPModel".
        checkpoint: a hub id or a local folder.
        allow_pickle: also read weights that are not safetensors, as tensors only.

    Raises:
        CheckpointError: absent, gated, pickles alone, or weights of something else.
        ImportError: transformers is not installed.
    """
    options = {} if allow_pickle else {"use_safetensors": True}
    network, info = _from_pretrained(kind, checkpoint, output_loading_info=True, **options)
    return ready(_complete(network, info, checkpoint), device, dtype)


def built(kind: str, config: Any, state: dict[str, Tensor], checkpoint: str) -> Any:
    """A network of transformers from its configuration and a state dict; `checkpoint` is for messages.

    Raises:
        CheckpointError: weights are missing or of another shape.
        ImportError: transformers is not installed.
    """
    cls = getattr(needed("transformers"), kind)
    try:
        network, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit {kind}: {error}") from error
    return _complete(network, info, checkpoint)


def ready(network: Any, device: str, dtype: torch.dtype) -> Any:
    """A network for scoring: on the device, in eval mode, its weights without gradients."""
    scale = getattr(network, "logit_scale", None)
    exact = None if scale is None else scale.detach().clone()
    network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if exact is not None:  # exp() of a scale rounded to bfloat16 is off by one per cent
        network.logit_scale.data = exact.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    return network


@once
def load_part(kind: str, checkpoint: str) -> Any:
    """A tokenizer, configuration or image processor of transformers, read once: `load_part("AutoTokenizer", ...)`.

    Raises:
        CheckpointError: absent or gated.
        ImportError: transformers is not installed.
    """
    return _from_pretrained(kind, checkpoint)


def classes(checkpoint: str, label: str | int | Sequence[str | int]) -> tuple[list[int], str]:
    """Numbers of a classifier's classes by label, and the labels as text.

    Args:
        checkpoint: of a classifier of transformers.
        label: a name or a number, or several.

    Raises:
        ValueError: none, or one that the checkpoint does not know.
        CheckpointError: absent or gated.
    """
    labels = [label] if isinstance(label, (str, int)) else list(label)
    names = {int(i): name for i, name in load_part("AutoConfig", checkpoint).id2label.items()}
    if not labels:
        raise ValueError("expected a label or several, got none")
    return [_index(one, names, checkpoint) for one in labels], ", ".join(map(str, labels))


def _index(label: str | int, names: dict[int, str], checkpoint: str) -> int:
    if isinstance(label, int) and label in names:
        return label
    found = next((i for i, name in names.items() if name == label), None)
    if found is not None:
        return found
    near = difflib.get_close_matches(str(label), names.values(), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(list(names.values())[:5])}, ..."
    raise ValueError(f"{checkpoint} has no label {label!r} among its {len(names)}: {hint}")


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating dtype by name; None is float32.

    Raises:
        ValueError: not a floating dtype.
    """
    found = torch.float32 if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or float64")
    return found


def micro_batches(
    score: Callable[[Any, Sequence[Any] | None], Tensor], samples: Any, prompts: Sequence[Any] | None, batch_size: int
) -> Tensor:
    """score(samples, prompts) -> (n,), evaluated on at most `batch_size` samples at a time.

    Raises:
        ValueError: batch_size below 1, or another number of prompts than samples.
    """
    if not is_whole(batch_size):
        raise ValueError(f"batch_size is {batch_size!r}, expected at least 1")
    if prompts is not None and len(prompts) != len(samples):
        raise ValueError(f"got {len(prompts)} prompts for {len(samples)} samples: give one to each")
    starts = range(0, len(samples), batch_size)
    parts = [
        score(samples[i : i + batch_size], None if prompts is None else prompts[i : i + batch_size]) for i in starts
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")


def weights(checkpoint: str, filename: str = "model.safetensors", *, allow_pickle: bool = False) -> dict[str, Any]:
    """The state dict in a file, on the CPU.

    Args:
        checkpoint: the file itself, here or on the hub ("owner/name/file.safetensors"), or a hub id or local folder
            that holds `filename`.
        allow_pickle: also read .pt, .pth, .bin and .ckpt files, with torch.load(weights_only=True).

    Raises:
        CheckpointError: absent, gated, not readable, or a pickle that was not allowed.
        ImportError: safetensors or huggingface_hub is not installed.
    """
    check_file(checkpoint, filename, allow_pickle)
    path = _local_file(checkpoint, filename)
    try:
        if path.suffix in PICKLES:
            return torch.load(path, map_location="cpu", weights_only=True)
        return needed("safetensors.torch").load_file(str(path))
    except ImportError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read weights from {path}: {type(error).__name__}: {error}") from error


def check_file(checkpoint: str, filename: str = "model.safetensors", allow_pickle: bool = False) -> None:
    """Refuse early, before anything is downloaded.

    Raises:
        CheckpointError: a pickle that was not allowed, or a local file that does not exist.
    """
    name = checkpoint if _is_file(checkpoint) else filename
    if Path(name).suffix in PICKLES and not allow_pickle:
        raise CheckpointError(
            f"{name} is a pickle, which may run code when it is read: give a .safetensors file, or pass "
            "allow_pickle=True to read it as tensors only"
        )
    if _is_file(checkpoint) and not Path(checkpoint).is_file() and _on_hub(checkpoint) is None:
        raise CheckpointError(f"there is no file {checkpoint}: give an existing file, a folder or a hub id")


def _is_file(checkpoint: str) -> bool:
    return Path(checkpoint).suffix in (*PICKLES, ".safetensors") and not Path(checkpoint).is_dir()


def _on_hub(checkpoint: str) -> tuple[str, str] | None:
    """(hub id, file) of "owner/name/file"."""
    parts = checkpoint.split("/", 2)
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 and parts[0] not in ("", ".", "..", "~") else None


def _local_file(checkpoint: str, filename: str) -> Path:
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    if Path(checkpoint).is_dir():
        path = Path(checkpoint, filename)
        if not path.is_file():
            raise CheckpointError(f"the folder {checkpoint} holds no {filename}: give the file itself")
        return path
    hub = needed("huggingface_hub")
    repository, file = (_on_hub(checkpoint) if _is_file(checkpoint) else None) or (checkpoint, filename)
    try:
        return Path(hub.hf_hub_download(repository, file))
    except Exception as error:
        raise explained(checkpoint, error) from error


def _complete(network: Any, info: dict[str, Any], checkpoint: str) -> Any:
    """The network, if every weight of it came from the checkpoint: others would be random."""
    wrong = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in info[name])
    if wrong:
        kind = type(network).__name__
        raise CheckpointError(f"{checkpoint} lacks {len(wrong)} weights of {kind}, {wrong[0]} among them: wrong model?")
    return network


def _from_pretrained(kind: str, checkpoint: str, **options: Any) -> Any:
    transformers = needed("transformers")
    try:
        return getattr(transformers, kind).from_pretrained(checkpoint, **options)
    except ImportError:
        raise
    except Exception as error:
        raise explained(checkpoint, error) from error


def explained(checkpoint: str, error: Exception) -> CheckpointError:
    """What to do about whatever a loader of transformers raised."""
    text, chain = "", error
    while chain is not None:
        text, chain = f"{text} {type(chain).__name__} {chain}", chain.__cause__ or chain.__context__
    if not checkpoint:
        why = "the checkpoint's name is empty: give a hub id or a folder"
    elif "gated" in text.lower():
        why = f"{checkpoint} is gated: accept its terms on its page, then log in with `hf auth login`"
    elif "safetensors" in text and "no file named" in text:
        why = f"{checkpoint} has no safetensors weights: convert them, or pass allow_pickle=True"
    elif Path(checkpoint).is_dir():
        why = f"the folder {checkpoint} is not a complete checkpoint: save it with save_pretrained"
    elif _is_path(checkpoint):
        why = f"there is no folder {checkpoint}: give the path of an existing one, or a hub id"
    else:
        why = f"{checkpoint} was not found on the hub or on disk: check the name and the network, or give a folder"
    return CheckpointError(
        f"{why} ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    )


def _is_path(checkpoint: str) -> bool:
    """Whether this is a path, which the hub has no names like."""
    return checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1


def needed(module: str) -> Any:
    """A module of an optional library.

    Raises:
        ImportError: it is not installed; the message has the line that installs it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this checkpoint needs {module.split('.')[0]}: {INSTALL}") from error
