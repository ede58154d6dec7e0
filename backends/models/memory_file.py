"""A library of clips as a file: their latents, what they are called, what they are found by, and an encoder of memory.

    clips (N, C, F, H, W), keys (N, E) and encoder.* in safetensors, with the plan of the encoder and the captions
    as metadata

Keys are vectors in the space of a kernel's prompts; without them the captions are embedded as the prompts are. All of a
library is read at once: some hundreds of clips, not ten thousand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from treesearch.backends.models.memory_encoder import MemoryEncoder, Plan
from treesearch.backends.models.shipped import shipped_file

PREFIX = "encoder."


@final
@dataclass(frozen=True, eq=False)
class Library:
    """Clips and their encoder.

    Args:
        encoder: trained for a video transformer.
        clips: latents (N, C, F, H, W), as its plan has them.
        captions: of the clips, no two alike.
        keys: (N, E), or None.

    Raises:
        ValueError: numbers or shapes that do not fit, captions twice, entries that are not finite.
    """

    encoder: MemoryEncoder
    clips: Tensor
    captions: tuple[str, ...]
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        expected = (len(self.captions), *self.encoder.plan.clip)
        if not self.captions or tuple(self.clips.shape) != expected:
            raise ValueError(f"clips are {tuple(self.clips.shape)}, expected {expected} by their captions and the plan")
        if len(set(self.captions)) < len(self.captions):
            raise ValueError("two clips have one caption: a memory could not name its clips")
        if self.keys is not None and (self.keys.ndim != 2 or len(self.keys) != len(self.captions)):
            raise ValueError(f"keys are {tuple(self.keys.shape)}, expected ({len(self.captions)}, E), one a clip")
        for name, values in (("clips", self.clips), ("keys", self.keys)):
            if values is not None and not values.isfinite().all():
                raise ValueError(f"the {name} of this library are not finite")

    def memory(self, which: Tensor) -> Tensor:
        """Tokens (n, 2 k m, width) of sets of clips (n, k)."""
        with torch.no_grad():
            return self.encoder(self.clips[which])

    def named(self, captions: Sequence[str]) -> list[int]:
        """Which clips have these captions.

        Raises:
            ValueError: a caption that none has.
        """
        for caption in captions:
            if caption not in self.captions:
                shown = ", ".join(map(repr, self.captions[:8])) + (", ..." if len(self.captions) > 8 else "")
                raise ValueError(f"no clip is called {caption!r}: choose among {shown}")
        return [self.captions.index(caption) for caption in captions]

    def save(self, path: Path) -> None:
        """Write the file, replaced atomically; clips and weights as float16, statistics and keys as they are."""
        from safetensors.torch import save_file

        weights = {PREFIX + name: _stored(name, w) for name, w in self.encoder.state_dict().items()}
        held = {"clips": self.clips.half(), **({} if self.keys is None else {"keys": self.keys.float()}), **weights}
        told = json.dumps({"plan": asdict(self.encoder.plan), "captions": self.captions})
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        save_file({name: w.detach().cpu().contiguous() for name, w in held.items()}, part, {"memory": told})
        part.chmod(0o644)
        part.replace(path)

    @staticmethod
    def load(name: str | Path) -> Library:
        """A library by path: encoder in evaluation mode, float32, no gradients.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with shipped_file(name) as path, safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["memory"])
                held = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  # not a mapping
            with torch.device("cpu"):  # whatever torch's default device and dtype
                encoder = MemoryEncoder(Plan(**told["plan"])).float()
            weights = {key.removeprefix(PREFIX): w for key, w in held.items() if key.startswith(PREFIX)}
            encoder.load_state_dict(weights)
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{str(name)!r} is no library of clips: save one with Library.save") from error
        encoder.eval().requires_grad_(False)
        return Library(encoder, held["clips"], tuple(told["captions"]), held.get("keys"))


def _stored(name: str, weight: Tensor) -> Tensor:
    """As float16, less what is too small or counted."""
    return weight if name.rpartition(".")[2].startswith(("running", "num_batches")) else weight.half()
