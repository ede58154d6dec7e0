"""What a pipeline's `encode_prompt` returns, leaf by leaf: rows of conditioning, and back as the call takes it.

Which of the leaves belong to a prompt, to ∅ or to neither is found out by prompts of unequal length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from treesearch.backends.base import Shared
from treesearch.backends.pipelines.proof import FEW, LONG, MORE
from treesearch.backends.pipelines.rows import join

Encode = Callable[[list[str]], list[Any]]
"""Texts to what `encode_prompt` returned, call by call, when the pipeline was called with them."""

_FIXED, _SAME, _ROWS, _WHOLE = range(4)
"""What encoders return: the same whatever the prompts, one row for all, a row a prompt, or one thing for a call."""
_PARTS = "parts"
_NOTHING = -1  # length of a row that is None, as a mask of a text that fills it


class Said:
    """What one pipeline says of prompts.

    Args:
        name: of the pipeline.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kinds: list[int] | None = None
        self._specs: list[TreeSpec] = []
        self._listed: set[int] = set()  # leaves that are lists of rows
        self._rest: list[Any] = []  # what is the same whatever the prompts
        self._known: dict[str, list[Any]] = {}  # leaves of the prompts that are tried, until they have been

    def rows(self, texts: Sequence[str], encode: Encode, device: torch.device, *, each: bool) -> dict[str, Any]:
        """Conditioning of prompts, each encoded alone: what it is padded to must not depend on the others.

        Args:
            texts: the prompts.
            encode: runs the encoders.
            device: of the network.
            each: whether ∅ has a row a prompt.

        Raises:
            ValueError: ∅ is as long as the prompt.
        """
        kinds = self._learnt(encode)
        parts = [self._known.get(text) or self._leaves([text], encode) for text in texts]
        out: dict[str, Any] = {}
        lengths = torch.zeros(len(parts), len(kinds), dtype=torch.int64, device=device)
        for i, (kind, *leaves) in enumerate(zip(kinds, *parts, strict=True)):
            if kind == _SAME and not each:
                if any(leaf.shape != leaves[0].shape for leaf in leaves):
                    raise ValueError(f"{self._name} encodes ∅ by the length of the prompt: make prompts shorter")
                lengths[:, i] = _longest(leaves[0])
                out[f"text_{i}"] = Shared(leaves[0].clone())
            elif kind != _FIXED:
                rows = [leaf[None] if kind == _WHOLE and leaf is not None else leaf for leaf in leaves]
                lengths[:, i] = torch.tensor([_NOTHING if row is None else _longest(row) for row in rows])
                shape = next((row for row in rows if row is not None), torch.zeros(1, 0))
                out[f"text_{i}"] = join([{"": shape[:, :0] if row is None else row} for row in rows])[""]
        return out | {"lengths": lengths}

    def told(self, cond: Mapping[str, Any], rows: Any, n: int) -> list[Any]:
        """What `encode_prompt` would return for n rows of one length."""
        assert self._kinds is not None
        lengths = cond["lengths"][rows][0].tolist() if not cond["lengths"].is_meta else None
        leaves = []
        for i, (rest, kind) in enumerate(zip(self._rest, self._kinds, strict=True)):
            row = None if kind == _FIXED else cond[f"text_{i}"]
            if row is None or (kind == _SAME and len(row) == 1):
                leaves.append(rest if row is None else self._as_said(i, row.expand(n, *row.shape[1:])))
                continue
            if lengths is not None and lengths[i] == _NOTHING:
                leaves.append(None)
                continue
            row = row[rows] if lengths is None or row.ndim < 2 else row[rows][:, : lengths[i]]
            leaves.append(row[0] if kind == _WHOLE else self._as_said(i, row))
        told = []
        for spec in self._specs:
            told.append(tree_map(_turned_back, tree_unflatten(leaves[: spec.num_leaves], spec), is_leaf=_is_turned))
            leaves = leaves[spec.num_leaves :]
        return told

    def _as_said(self, i: int, rows: Tensor) -> Any:
        """Rows of a leaf, listed where the encoders list them."""
        return list(rows) if i in self._listed else rows

    def on_meta(self) -> Said:
        """The same without values."""
        other = copy.copy(self)
        other._rest = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, self._rest)
        return other

    def forget(self) -> None:
        """Let go of the prompts that were tried."""
        self._known = {}

    def _leaves(self, texts: list[str], encode: Encode) -> list[Any]:
        said = [tree_map(_turned, each, is_leaf=lambda node: _is_parted(node, len(texts))) for each in encode(texts)]
        found = [tree_flatten(each, is_leaf=lambda node: _is_listed(node, len(texts))) for each in said]
        self._specs = [spec for _, spec in found]
        leaves = [leaf for leaves, _ in found for leaf in leaves]
        self._listed |= {i for i, leaf in enumerate(leaves) if _is_listed(leaf, len(texts))}
        return [pad_sequence(leaf, batch_first=True) if i in self._listed else leaf for i, leaf in enumerate(leaves)]

    def _learnt(self, encode: Encode) -> list[int]:
        """What each of the leaves is."""
        if self._kinds is None:
            several = self._leaves([FEW, MORE], encode)
            self._known = {text: self._leaves([text], encode) for text in (FEW, MORE, LONG)}
            alone = [*self._known.values()]
            self._kinds = [_kind(both, each) for both, *each in zip(several, *alone, strict=True)]
            self._rest = [leaf if k == _FIXED else None for leaf, k in zip(alone[0], self._kinds, strict=True)]
        return self._kinds


def _kind(both: Any, alone: Sequence[Any]) -> int:
    """Of what two prompts give in one call, and of what each of several gives alone."""
    first = next((each for each in alone if isinstance(each, Tensor)), None)
    if first is None:
        return _FIXED
    same = all(each is not None and each.shape == first.shape and each.equal(first) for each in alone)
    if first.ndim and len(first) == 1 and (both is None or len(both) == 2):
        return _SAME if same else _ROWS
    return _FIXED if same else _WHOLE


def _is_parted(node: Any, n: int) -> bool:
    """Whether something is a list of what n prompts say, each in as many parts (tokens, width)."""
    return (
        isinstance(node, list) and len(node) == n and all(isinstance(e, list) and _is_listed(e, len(e)) for e in node)
    )


def _turned(node: Any) -> Any:
    """Parts of all prompts, part by part, where they were prompt by prompt."""
    parted = isinstance(node, list) and node and isinstance(node[0], list)
    return {_PARTS: [list(part) for part in zip(*node, strict=True)]} if parted else node


def _is_turned(node: Any) -> bool:
    return isinstance(node, dict) and _PARTS in node


def _turned_back(node: Any) -> Any:
    return [list(parts) for parts in zip(*node[_PARTS], strict=True)] if _is_turned(node) else node


def _is_listed(node: Any, n: int) -> bool:
    """Whether something is a list of what n prompts say, each (tokens, width) by itself."""
    return isinstance(node, list) and len(node) == n and all(isinstance(e, Tensor) and e.ndim == 2 for e in node)


def _longest(row: Tensor) -> int:
    return row.shape[1] if row.ndim > 1 else 0
