"""What the blocks of a modular pipeline are told: a user's choices and prompts, up to the state before their loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from treesearch.backends.base import Shared
from treesearch.backends.pipelines.blocks import Program, generator, state_of
from treesearch.backends.pipelines.kinds import Kind
from treesearch.backends.pipelines.meta import to_meta
from treesearch.backends.pipelines.rows import as_blocks_take_them, as_rows
from treesearch.backends.pipelines.settings import Settings

OF_THE_BLOCKS = ("guidance_rescale", "num_frames", "negative_prompt", "max_sequence_length", "image", "sigmas")
ANY = 2  # steps of a grid that is not used: some have none of a single one
_SIZES = ("height", "width", "num_frames")


class Inputs:
    """Values for the blocks of a program.

    Args:
        kind: of the pipeline.
        settings: the user's choices.
        program: the blocks.
        scale: of guidance, for those whose network is told it.
    """

    def __init__(self, kind: Kind, settings: Settings, program: Program, scale: float) -> None:
        self.kind, self.settings, self.program, self.scale = kind, settings, program, scale
        self.rows: dict[str, Sequence[str]] = {}  # names of conditioning, by what the blocks ask for it as
        self.shared: dict[str, Any] = {}  # what the blocks make of pictures, and sizes that they take from them
        self._last: tuple[Any, ...] | None = None
        self.first: dict[str, Any] | None = None  # conditioning of a row without a prompt

    def on(self, program: Program, *, meta: bool) -> Inputs:
        """The same for another copy of the blocks, on the meta device or not."""
        other = copy.copy(self)
        other.program, other._last = program, None
        if meta and self.first is not None:
            other.first = to_meta(self.first)
            other.shared = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, self.shared)
        return other

    def encode(self, pipe: Any, texts: list[str], absent: list[str] | None) -> dict[str, Any]:
        """Conditioning of prompts, as rows (n, ...) and what they share.

        Args:
            pipe: whose text encoders are used.
            texts: the prompts.
            absent: what ∅ says for each of them, where that differs.
        """
        said = {"prompt": texts} | ({} if absent is None else {"negative_prompt": absent})
        state = self.program.encode(pipe, self.state(said, {}))
        self.rows = state.kwargs_mapping
        self.shared = {name: size for name in _SIZES if (size := state.get(name)) is not None}
        out: dict[str, Any] = {}
        for name, is_row in self.program.encoded.items():
            if (value := state.get(name)) is None:
                continue
            if is_row:
                out |= as_rows(name, value, len(texts), each=absent is not None)
            else:
                self.shared[name] = value
        return out

    def example(self, n: int) -> dict[str, Any]:
        """Conditioning of n rows without a prompt, where only shapes matter."""
        assert self.first is not None
        return {k: v.value if isinstance(v, Shared) else v.expand(n, *v.shape[1:]) for k, v in self.first.items()}

    def state(self, values: Mapping[str, Any], kinds: Mapping[str, Sequence[str]]) -> Any:
        """A state of the blocks, with the user's choices and these values."""
        return state_of(self._chosen() | {"generator": generator(), "output_type": "pt"} | dict(values), kinds)

    def ready(self, cond: Mapping[str, Any], num_steps: int = ANY) -> Any:
        """The state of the blocks before their loop, for rows of conditioning."""
        n = len(next(value for name, value in cond.items() if not name.startswith("negative_")))
        values = self.shared | as_blocks_take_them(cond, n)
        values |= {
            name: values[name].expand(n, *values[name].shape[1:]) for name in self.kind.repeats if name in values
        }
        with torch.no_grad():
            return self.program.prepare(self.state(values | {"num_inference_steps": num_steps}, self.rows))

    def kept(self, cond: Mapping[str, Any]) -> Any:
        """The same, made once for as long as the engine hands in the same rows."""
        key = tuple(cond.values())
        if self._last is None or not _same(self._last[0], key):
            self._last = (key, self.ready(cond))
        return self._last[1]

    def forget(self) -> None:
        """Let go of the rows that came last."""
        self._last = None

    def _chosen(self) -> dict[str, Any]:
        """What the user chose, as the blocks call it."""
        taken = self.program.inputs
        chosen = {name: getattr(self.settings, name) for name in ("height", "width", *OF_THE_BLOCKS) if name in taken}
        if self.kind.distilled:
            chosen["guidance_scale"] = self.scale
        if "max_area" in taken and chosen.get("height") and chosen.get("width"):
            chosen["max_area"] = chosen["height"] * chosen["width"]  # a size that is asked for is not rescaled
        return {k: v for k, v in chosen.items() if v is not None} | dict(self.settings.network_inputs)


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))
