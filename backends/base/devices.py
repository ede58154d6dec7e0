"""Where networks run."""

from __future__ import annotations

import torch


def as_device(device: str | torch.device | None) -> torch.device:
    """A device; None is a GPU where there is one.

    Raises:
        TypeError: no name of a device.
        ValueError: an unknown one, or one that is not there.
    """
    if not isinstance(device, (str, torch.device, type(None))):
        raise TypeError(f"device is {device!r}, expected a name such as cpu or cuda")
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: choose cpu, cuda, cuda:1, ...") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(found)!r}, but torch {torch.__version__} sees no GPU: use device='cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(found)!r}, but there are {torch.cuda.device_count()} GPUs: count from cuda:0")
    return found
