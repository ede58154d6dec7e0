"""What image rewards share: pixels of samples, the resize of their networks, and loading of weights.

Networks are held once per process, by checkpoint, device and dtype; a reward holds their names only, so that it is
light and can be sent to workers. Weights are read from safetensors; pickles are refused unless asked for.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from treesearch.rewards.base import Reward, built_from
from treesearch.rewards.numeric import is_whole

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
INSTALL = "pip install 'treesearch[images]'"
Fit = Literal["crop", "stretch", "pad"]
Interpolation = Literal["bicubic", "bilinear"]
_SLACK = 1e-3  # rounding that a decoder may leave outside [0, 1]
_LOCK = threading.RLock()
_CACHES: list[Any] = []

P = ParamSpec("P")
T = TypeVar("T")


class CheckpointError(OSError):
    """Weights that cannot be read; the message says why and what to do."""


def pixels(samples: Any) -> Tensor:
    """Samples as images (n, 3, h, w) in [0, 1], with their graph, where they are.

    Args:
        samples: a tensor (n, 1 or 3, h, w) in [0, 1], or a sequence of PIL images, arrays (h, w[, 3]) in [0, 1] or
            of uint8, or tensors (1 or 3, h, w); those of a sequence have one size.

    Raises:
        ValueError: another shape, values outside [0, 1], NaN, or several sizes.
        TypeError: not images.
    """
    if isinstance(samples, Tensor):
        return _checked(samples)
    images = [_image(s) for s in samples]
    if not images:
        raise ValueError("expected images, got an empty sequence: decode at least one state")
    sizes = sorted({tuple(i.shape[-2:]) for i in images})
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size, got {len(sizes)}, {sizes[0]} and {sizes[1]} among them")
    return torch.cat(images)


def preprocess(
    samples: Any,
    size: int | tuple[int, int],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    fit: Fit = "crop",
    resize: int | tuple[int, int] | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Images as a network reads them, (n, 3, *size), differentiable: antialiased resize, cut, (x - mean) / std.

    The image processors of transformers do the same on 8-bit pixels through PIL, which rounds twice. Before
    normalisation the two differed by at most 1.1 / 255 (0.3 / 255 on average) on noise, edges and ramps. Rows are
    resized before columns, as PIL did before version 13; it now may begin with the columns where the aspect changes.

    Args:
        samples: what `pixels` takes; images of a sequence may differ in size here.
        size: of the result, (height, width) or the side of a square.
        fit: "crop" resizes the shorter side and cuts the centre out (CLIP), "stretch" ignores the aspect (ViT),
            "pad" resizes the longer side and puts black around (HPSv2).
        resize: before a cut, where it is not `size`: the length of the shorter side, or both to stretch to.

    Raises:
        ValueError: images that `pixels` refuses, or a cut larger than the resized image.
    """
    if not isinstance(samples, Tensor) and len(samples):
        parts = [_image(s) for s in samples]
        samples = torch.cat(parts) if len({p.shape for p in parts}) == 1 else parts
    if not isinstance(samples, Tensor):
        one = functools.partial(preprocess, fit=fit, resize=resize, interpolation=interpolation)
        return torch.cat([one(p, size, mean, std) for p in samples])
    height, width = (size, size) if isinstance(size, int) else size
    images = _fitted(pixels(samples), height, width, fit, resize, interpolation)
    shift, scale = (images.new_tensor(tuple(v)).view(1, -1, 1, 1) for v in (mean, std))
    return (images - shift) / scale


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Arguments of `preprocess`, as an image processor of transformers states them; see `recipe`."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit = "crop"
    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(self, samples: Any) -> Tensor:
        return preprocess(
            samples,
            self.size,
            self.mean,
            self.std,
            fit=self.fit,
            resize=self.resize,
            interpolation=self.interpolation,
        )


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


def place(samples: Any, device: str | torch.device | None) -> str:
    """The device to score on: the one asked for, else where the samples are, else the CPU."""
    if device is None:
        first = samples if isinstance(samples, Tensor) else next(iter(samples), None)
        device = first.device if isinstance(first, Tensor) else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return str(device)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating dtype by name; None is float32.

    Raises:
        ValueError: not a floating dtype.
    """
    found = torch.float32 if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or float64")
    return found


def need_prompts(prompts: Sequence[Any] | None, name: str) -> list[str]:
    """The prompts as strings.

    Raises:
        ValueError: there are none, or one is not a string.
    """
    if prompts is None:
        raise ValueError(f"{name} compares images with prompts and got none: pass prompts=[...] to the search")
    for p in prompts:
        if not isinstance(p, str):
            raise ValueError(f"{name} reads prompts that are strings, got {type(p).__name__}: pass prompts=['...']")
    return list(prompts)


def unread(tokenizer: Any, prompts: Sequence[Any], most: int, name: str) -> list[list[str]]:
    """`Reward.remarks` of a network that reads the first `most` tokens of a prompt, the tokenizer's marks included."""
    room = most - tokenizer.num_special_tokens_to_add()

    def remark(prompt: Any) -> list[str]:
        if not isinstance(prompt, str):
            return []  # refused when it is scored
        n = len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        told = f"{name} reads {room} tokens of a prompt, this one has {n}: the last {n - room} do not count"
        return [told] if n > room else []

    return [remark(prompt) for prompt in prompts]


def frames(reward: Reward, which: Literal["all", "first", "middle", "last"] = "all") -> Reward:
    """The mean of an image reward over frames of videos (n, f, c, h, w), over all of them or one.

    Raises:
        ValueError: an unknown choice of frames.
    """
    picks = {"all": lambda f: range(f), "first": lambda f: (0,), "middle": lambda f: (f // 2,), "last": lambda f: (-1,)}
    if which not in picks:
        raise ValueError(f"which is {which!r}, expected one of {', '.join(picks)}")

    def fn(videos: Any, prompts: Sequence[Any] | None) -> Tensor:
        if not isinstance(videos, Tensor) or videos.ndim != 5:
            got = f"shape {tuple(videos.shape)}" if isinstance(videos, Tensor) else type(videos).__name__
            raise ValueError(f"expected videos (n, f, c, h, w), got {got}")
        chosen = videos[:, list(picks[which](videos.shape[1]))]
        repeated = None if prompts is None else [p for p in prompts for _ in range(chosen.shape[1])]
        return reward.attached(chosen.flatten(0, 1), repeated).view(chosen.shape[:2]).mean(1)

    name, source = f"frames({reward.name}, {which})", built_from("frames", reward, which)
    return replace(reward, fn=fn, name=name, calls=None, source=source)


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
    cls = getattr(_needed("transformers"), kind)
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


@once
def recipe(checkpoint: str) -> Recipe:
    """What the image processor of a checkpoint does, for `preprocess`.

    Raises:
        CheckpointError: absent, gated, or a processor that does something else too.
    """
    processor = load_part("AutoImageProcessor", checkpoint)
    get = functools.partial(getattr, processor)
    side, sizes = _sides(get("size", None)), _sides(get("crop_size", None))
    odd = [name for name in ("include_top", "rescale_offset", "do_pad") if get(name, None)]
    if isinstance(side, int) and not get("do_center_crop", False) and get("crop_pct", None) is None:
        odd.append("no crop")
    resample = {2: "bilinear", 3: "bicubic"}.get(int(get("resample", 3)))
    if odd or side is None or resample is None or not get("do_rescale", True) or not get("do_resize", True):
        name = type(processor).__name__
        raise CheckpointError(f"{checkpoint} prepares images with {name} in a way that is not supported: {odd or name}")
    plain = not get("do_normalize", True)
    fixed: dict[str, Any] = {
        "mean": (0.0,) * 3 if plain else tuple(processor.image_mean),
        "std": (1.0,) * 3 if plain else tuple(processor.image_std),
        "interpolation": resample,
    }
    if get("do_center_crop", False) and sizes is not None:
        return Recipe(size=(sizes, sizes) if isinstance(sizes, int) else sizes, resize=side, **fixed)
    if isinstance(side, tuple):
        return Recipe(size=side, fit="stretch", **fixed)
    if side >= 384:  # with crop_pct: ConvNeXt stretches large images
        return Recipe(size=(side, side), fit="stretch", **fixed)
    return Recipe(size=(side, side), resize=int(side / processor.crop_pct), **fixed)


def _sides(size: Any) -> int | tuple[int, int] | None:
    """The shorter side, or (height, width), of a size as image processors write it."""
    if size is None or isinstance(size, int):
        return size
    found = dict(size)
    if found.get("shortest_edge") and not found.get("longest_edge"):
        return int(found["shortest_edge"])
    return (int(found["height"]), int(found["width"])) if found.get("height") and found.get("width") else None


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
        return _needed("safetensors.torch").load_file(str(path))
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


def _image(sample: Any) -> Tensor:
    """One image as (1, 3, h, w)."""
    if isinstance(sample, Tensor):
        return _checked(sample[None])
    if hasattr(sample, "convert"):
        sample = sample.convert("RGB")
    if not hasattr(sample, "__array__") and not hasattr(sample, "__array_interface__"):
        raise TypeError(f"expected images, got {type(sample).__name__}: decode to a tensor (n, 3, h, w) or PIL images")
    import numpy as np

    array = torch.from_numpy(np.array(sample))
    array = array[..., None] if array.ndim == 2 else array
    return _checked(array.movedim(-1, 0)[None])


def _checked(images: Tensor) -> Tensor:
    if images.ndim == 5:
        raise ValueError(f"expected images (n, 3, h, w), got videos {tuple(images.shape)}: use frames(reward)")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"expected images (n, 1 or 3, h, w), got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        images = images / 255
    images = images if images.dtype == torch.float64 else images.float()
    if images.numel() and not (images.min() >= -_SLACK and images.max() <= 1 + _SLACK):
        low, high = float(images.min()), float(images.max())
        hint = "map them in kernel.decode" if low == low else "the decoder overflowed, use another dtype"
        raise ValueError(f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}: {hint}")
    return images.expand(-1, 3, -1, -1)


def _fitted(
    images: Tensor, height: int, width: int, fit: Fit, resize: int | tuple[int, int] | None, mode: Interpolation
) -> Tensor:
    if fit == "stretch":
        return _resize(images, height, width, mode)
    if fit == "pad":
        return _padded(images, height, width, mode)
    if fit != "crop":
        raise ValueError(f"fit is {fit!r}, expected 'crop', 'stretch' or 'pad'")
    if isinstance(resize, tuple):
        return _centre(_resize(images, *resize, mode), height, width)
    side, (h, w) = resize or min(height, width), images.shape[-2:]
    target = (int(side * h / w), side) if w < h else (side, int(side * w / h))
    return _centre(_resize(images, *target, mode), height, width)


def _resize(images: Tensor, height: int, width: int, mode: Interpolation) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    for size in ((images.shape[-2], width), (height, width)):  # PIL clamps after either pass, and so do we
        images = nn.functional.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    return images


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    if top < 0 or left < 0:
        got = tuple(images.shape[-2:])
        raise ValueError(f"cannot cut {(height, width)} out of images resized to {got}: resize to at least that")
    return images[..., top : top + height, left : left + width]


def _padded(images: Tensor, height: int, width: int, mode: Interpolation) -> Tensor:
    scale = min(height / images.shape[-2], width / images.shape[-1])
    images = _resize(images, round(images.shape[-2] * scale), round(images.shape[-1] * scale), mode)
    rows, columns = height - images.shape[-2], width - images.shape[-1]
    return nn.functional.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


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
    hub = _needed("huggingface_hub")
    repository, file = (_on_hub(checkpoint) if _is_file(checkpoint) else None) or (checkpoint, filename)
    try:
        return Path(hub.hf_hub_download(repository, file))
    except Exception as error:
        raise _explained(checkpoint, error) from error


def _complete(network: Any, info: dict[str, Any], checkpoint: str) -> Any:
    """The network, if every weight of it came from the checkpoint: others would be random."""
    wrong = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in info[name])
    if wrong:
        kind = type(network).__name__
        raise CheckpointError(f"{checkpoint} lacks {len(wrong)} weights of {kind}, {wrong[0]} among them: wrong model?")
    return network


def _from_pretrained(kind: str, checkpoint: str, **options: Any) -> Any:
    transformers = _needed("transformers")
    try:
        return getattr(transformers, kind).from_pretrained(checkpoint, **options)
    except ImportError:
        raise
    except Exception as error:
        raise _explained(checkpoint, error) from error


def _explained(checkpoint: str, error: Exception) -> CheckpointError:
    text, chain = "", error
    while chain is not None:
        text, chain = f"{text} {type(chain).__name__} {chain}", chain.__cause__ or chain.__context__
    if "gated" in text.lower():
        why = f"{checkpoint} is gated: accept its terms on its page, then log in with `hf auth login`"
    elif "safetensors" in text and "no file named" in text:
        why = f"{checkpoint} has no safetensors weights: convert them, or pass allow_pickle=True"
    elif Path(checkpoint).is_dir():
        why = f"the folder {checkpoint} is not a complete checkpoint: save it with save_pretrained"
    else:
        why = f"{checkpoint} was not found on the hub or on disk: check the name and the network, or give a folder"
    return CheckpointError(
        f"{why} ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    )


def _needed(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"image rewards need {module.split('.')[0]}: {INSTALL}") from error
