"""Memories from a file of clips: by name, or by the prompt of each search.

    key of a prompt    the mean of its tokens' embeddings, those that are not padding, at length 1
    i-th memory        the clips (i - 1) k + 1 .. i k in the order of their keys' cosines with that of the prompt

With one set of k clips this is the paper's retrieval, in the embedding of the pipeline's own text encoder instead of
another model's. With several the i-th setting is the i-th best set, and a search over `Actions` finds which helps.

    memory(kernel, "clips.safetensors", k=5)                                 the five nearest, together
    actions(memory(kernel, "clips.safetensors", k=2, sets=3), levels=(50,))  the two nearest, the next two, ... or none
    memory(kernel, "clips.safetensors", clips=("a ball falls", "a ball rolls"))    by name, for kernels without prompts

Source: Learning Plug-and-Play Memory for Guiding Video Diffusion Models (Song et al., 2025), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from treesearch.backends.base import Shared, fingerprint
from treesearch.backends.interventions.base import Intervened, network_of
from treesearch.backends.interventions.memory import MEMORIES, Memory, refuse_width
from treesearch.backends.models.memory_file import Library
from treesearch.rewards.numeric import is_whole

EMBEDS = "prompt_embeds"  # of a kernel's conditioning, (n, tokens, E)


def memory(
    kernel: Any,
    file: str | Path | Library,
    k: int = 5,
    sets: int = 1,
    clips: Sequence[str | Sequence[str]] | None = None,
    both: bool = True,
    levels: tuple[int, int] | None = None,
) -> Intervened:
    """A kernel of Wan with memory.

    Args:
        kernel: a pipeline, or what is around one.
        file: a library of clips, see `backends.models.memory_file`.
        k: clips of a memory, for each prompt the nearest.
        sets: how many memories there are to choose among, the nearest first.
        clips: captions instead of retrieval, each a memory, or several captions one memory; k and sets are not used.
        both: whether the rows of ∅ have it too under classifier-free guidance.
        levels: (low, high), t at which it acts, both included; None are all.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a kernel without blocks of Wan.
        ValueError: a file of something else or of another width, more clips than there are, or captions of none.
    """
    library = file if isinstance(file, Library) else Library.load(file)
    refuse_width(library.encoder.plan.width, network_of(kernel))
    if clips is not None:
        return Intervened(kernel, _named(library, clips, both), levels=levels)
    if not (is_whole(k) and is_whole(sets)) or k * sets > len(library.captions):
        raise ValueError(f"{sets!r} sets of {k!r} clips are asked for, and the library has {len(library.captions)}")
    names = ("the nearest", *(f"nearest {i * k + 1} to {(i + 1) * k}" for i in range(1, sets)))
    return Retrieved(kernel, Memory(names, both=both), library, k=k, levels=levels)


def _named(library: Library, clips: Sequence[str | Sequence[str]], both: bool) -> Memory:
    """Memories of clips by their captions."""
    groups = [(each,) if isinstance(each, str) else tuple(each) for each in clips]
    if not groups or len({len(group) for group in groups}) != 1 or not groups[0]:
        raise ValueError("clips are captions, or groups of as many captions each: one memory a group")
    which = torch.tensor([library.named(group) for group in groups], device="cpu")
    return Memory(tuple(" & ".join(group) for group in groups), library.memory(which), both)


@final
@dataclass(frozen=True)
class Retrieved(Intervened):
    """A kernel whose memories are retrieved by prompt.

    Args:
        kernel: of Wan, with prompts.
        intervention: a `Memory` without tokens of its own.
        library: where the clips are.
        k: clips of each memory.
    """

    library: Library
    _: KW_ONLY
    k: int

    def encode(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Conditioning of the kernel, and memories (n, sets, M, D).

        Raises:
            TypeError: a kernel without embeddings of prompts.
            ValueError: keys of another width.
        """
        captions = () if self.library.keys is not None else self.library.captions
        cond, n = self.kernel.encode([*prompts, *captions]) or {}, len(prompts)
        own = pooled(cond, type(self.kernel).__name__)
        keys = own[n:] if self.library.keys is None else F.normalize(self.library.keys.to(own), dim=-1)
        if keys.shape[-1] != own.shape[-1]:
            raise ValueError(f"keys are {keys.shape[-1]} wide, and embeddings of prompts {own.shape[-1]}: make the "
                             "keys with this kernel, keys_of(kernel, captions)")  # fmt: skip
        nearest = (own[:n] @ keys.T).sort(dim=1, descending=True, stable=True).indices.cpu()
        sets = nearest[:, : len(self.intervention.settings) * self.k].reshape(-1, self.k)
        tokens = self.library.memory(sets).unflatten(0, (n, -1))
        rows = {name: value if isinstance(value, Shared) else value[:n] for name, value in cond.items()}
        return rows | {MEMORIES: tokens.to(own.device)}

    def _settings(self) -> str | None:
        return fingerprint.of([super()._settings(), self.library, self.k])


def keys_of(kernel: Any, captions: Sequence[str]) -> Tensor:
    """Keys (N, E) of captions, in the space of a kernel's prompts.

    Raises:
        TypeError: a kernel without embeddings of prompts.
    """
    return pooled(kernel.encode(captions) or {}, type(kernel).__name__)


def pooled(cond: dict[str, Any], name: str) -> Tensor:
    """Keys (n, E) at length 1, of the conditioning of a kernel of this name."""
    if EMBEDS not in cond:
        raise TypeError(f"{name} has no embeddings of prompts to retrieve by: name the memories, clips=('a ball', ...)")
    embeds = cond[EMBEDS].float()
    kept = (embeds != 0).any(-1, keepdim=True)  # the rest is padding
    return F.normalize((embeds * kept).sum(1) / kept.sum(1).clamp_min(1), dim=-1)
