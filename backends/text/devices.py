"""Where a network of text runs."""

from __future__ import annotations

import torch


def as_device(device: str | torch.device | None) -> torch.device:
    """A device; None is a GPU where there is one.

    Raises:
        ValueError: an unknown one, or one that is not there.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}: choose cpu, cuda, cuda:1, ...") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(found)!r}, torch sees {torch.cuda.device_count()} GPUs: use device='cpu'")
    return found
