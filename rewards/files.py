"""What was observed, from files: pictures, arrays, masks.

    png, jpg, webp, ...     a picture, 8 bits: (C, H, W) in [0, 1], C = 1 or 3 as the file has it; one of a palette has
                            its colours, and one that says how it was held is upright
    npy, npz                an array; of an archive its only one
    safetensors, pt, pth    a tensor, the only one; no code is executed

Whole numbers that are no mask are refused: a picture as an array of bytes would be taken for states of size 255.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

File = str | os.PathLike[str]


def is_picture(path: File) -> bool:
    """Whether a file is read as a picture."""
    return Path(path).suffix.lower() not in ARRAYS


def picture(path: File) -> Tensor:
    """A picture, (C, H, W) float64 in [0, 1].

    Raises:
        ValueError: it cannot be read, or has more than eight bits or an alpha channel.
    """
    return _read(path, _picture)


def numbers(path: File) -> Tensor:
    """An array of numbers, (...) float64.

    Raises:
        ValueError: it cannot be read, is not one array, or holds whole numbers.
    """
    found = _array(path)
    if not found.is_floating_point():
        raise ValueError(f"{path} holds {found.dtype}, expected numbers in units of states: images are (2/255) x - 1")
    return found.double()


def mask(path: File) -> Tensor:
    """A mask: (H, W) bool of a picture in black and white, white is seen; or an array of bools, zeros and ones.

    Raises:
        ValueError: it cannot be read, or has other values.
    """
    found = picture(path).amax(0) if is_picture(path) else _array(path)
    if found.dtype != torch.bool and not ((found == 0) | (found == 1)).all():
        raise ValueError(f"{path} is no mask: it has values between black and white, paint it in these two")
    return found.bool()


def opened(image: Any, channels: int | None = None) -> Tensor:
    """A picture that is open, (C, H, W) float64 in [0, 1].

    Args:
        image: a PIL image.
        channels: 1 makes it grey, 3 repeats grey; None leaves it.

    Raises:
        ValueError: it has more than eight bits or an alpha channel.
    """
    import numpy as np
    from PIL import ImageOps

    if image.mode not in ("1", "L", "RGB", "P") or "transparency" in image.info:
        raise ValueError(f"a picture of mode {image.mode}, expected 8-bit grey or RGB without transparency")
    grey = image.mode in ("1", "L") if channels is None else channels == 1
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).copy()).permute(2, 0, 1).double() / 255


def _array(path: File) -> Tensor:
    read = ARRAYS.get(Path(path).suffix.lower())
    if read is None:
        raise ValueError(f"{path} is no array: expected {', '.join(ARRAYS)}")
    return _read(path, read)


def _read(path: File, read: Callable[[File], Tensor]) -> Tensor:
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'a folder, expected a file' if Path(path).is_dir() else 'no such file'}")
    try:
        return read(path)
    except Exception as error:  # of many libraries; whatever it is, the file is not what it should be
        raise ValueError(f"cannot read {path}: {error}") from error


def _picture(path: File) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        return opened(image)


def _npy(path: File) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.load(path, allow_pickle=False))


def _npz(path: File) -> Tensor:
    import numpy as np

    with np.load(path, allow_pickle=False) as found:
        return torch.from_numpy(_only({name: found[name] for name in found.files}))


def _safetensors(path: File) -> Tensor:
    from safetensors.torch import load_file

    return _only(load_file(path))


def _torch(path: File) -> Tensor:
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found if isinstance(found, Tensor) else _only(found)


def _only(found: Any) -> Any:
    if not isinstance(found, Mapping) or len(found) != 1:
        got = f"{len(found)} arrays" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"it holds {got}, expected one")
    return next(iter(found.values()))


ARRAYS: dict[str, Callable[[File], Tensor]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
}
