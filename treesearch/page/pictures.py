"""Samples as small pictures, without the kernel that would decode them.

What a run left under `outputs/best` is decoded: it is shown as it is. Of other nodes there is the state as it is
stored: of a model of pixels that is the sample, of one of latents its first channels, which say little. Every picture
is made anew from numbers: no byte of a file in the folder is handed on.
"""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treesearch.core.tree import NONE
from treesearch.engine.states import LostStates
from treesearch.errors import StoreError
from treesearch.page.view import View
from treesearch.pictures.sheets import thumbnail
from treesearch.report import best
from treesearch.runs.shards import ShardStates

DECODED, STORED = "decoded", "state"
SHOWN = 24  # samples of a gallery
NUMBERS = 12  # of a state that is no picture
_LARGEST = 2**26  # bytes of a state that is made a picture of


def gallery(view: View, task: int) -> list[dict[str, Any]]:
    """The best samples of a task, best first: node, reward, and what there is to see of each; of texts the written."""
    with view.lock:
        table = view.table(task)
        leaves = np.flatnonzero((table["t"] == 0) & ~np.isnan(table["reward"]))
        decoded = _decoded(view, task)
        if any(isinstance(line.get("text"), str) for line in decoded.values()):  # the states of texts are tokens
            leaves = leaves[np.isin(leaves + 1, list(decoded))]
        order = leaves[np.argsort(-table["reward"][leaves], kind="stable")[:SHOWN]]
        return [leaf(view, task, int(row) + 1, decoded) for row in order]


def leaf(view: View, task: int, node: int, decoded: dict[int, dict[str, Any]] | None = None) -> dict[str, Any]:
    """One node: level, reward, key, and what there is to see: a picture, a text, numbers or nothing.

    Raises:
        LookupError: there is no such node.
    """
    row = _row(view, task, node)
    decoded = _decoded(view, task) if decoded is None else decoded
    reward = float(row["reward"])
    found = {"node": node, "t": int(row["t"]), "reward": reward if np.isfinite(reward) else None}
    found["key"] = f"{int(row['key']):#018x}"
    if (line := decoded.get(node)) is not None:
        if isinstance(line.get("text"), str):
            return found | {"kind": "text", "text": line["text"][:4_000]}
        if isinstance(line.get("file"), str) and line["file"].endswith(".png"):
            return found | {"kind": "picture", "of": DECODED}
    if _pictured(view.config["state_shape"]):
        return found | {"kind": "picture" if row["slot"] != NONE else "nothing", "of": STORED}
    state = _state(view, row)
    return found | ({"kind": "nothing"} if state is None else {"kind": "numbers", "text": _numbers(state)})


def picture(view: View, task: int, node: int) -> bytes | None:
    """A PNG of a node, None where there is nothing to see."""
    from PIL import Image

    row = _row(view, task, node)
    pixels = best.picture(folder, task, node) if (folder := _written(view)) is not None else None
    if pixels is None and _pictured(view.config["state_shape"]) and (state := _state(view, row)) is not None:
        pixels = _pixels(state)
    if pixels is None:
        return None
    out = io.BytesIO()
    thumbnail(Image.fromarray(pixels)).save(out, format="PNG")
    return out.getvalue()


def _written(view: View) -> Path | None:
    """Where the run left its best samples; None where a link leads to what is not the run's."""
    with suppress(StoreError):
        return best.folder_of(view.path)
    return None


def _decoded(view: View, task: int) -> dict[int, dict[str, Any]]:
    """Lines of the index of a task's best samples by node."""
    folder = _written(view)
    return {} if folder is None else best.known(folder, task)


def _row(view: View, task: int, node: int) -> Any:
    table = view.table(task)
    if not 1 <= node <= len(table):
        raise LookupError(f"task {task} has nodes 1..{len(table)} below its root")
    return table[node - 1]


def _state(view: View, row: Any) -> NDArray[Any] | None:
    """The stored state of a node; None where it is not kept, lost or damaged."""
    config = view.config
    shape, dtype = tuple(config["state_shape"]), getattr(torch, config["dtype"].removeprefix("torch."))
    if row["slot"] == NONE or np.prod(shape) * dtype.itemsize > _LARGEST:
        return None
    states = ShardStates(view.path, shape, dtype, int(row["slot"]) + 1, run=config["id"], look=True)
    slots = np.array([row["slot"]], np.int64)
    states.recall(slots, np.array([row["sum"]], np.uint32))
    try:
        state = states.get(slots)[0]
    except (LostStates, MemoryError):
        return None
    return (state.float() if state.dtype == torch.bfloat16 else state).numpy()


def _pictured(shape: list[int]) -> bool:
    """Whether states of a shape can be seen: (channels, h, w), or several of those packed into one."""
    return len(shape) in (3, 4) and shape[-3] in (1, 3, 4, 16) and min(shape[-2:]) >= 4 and shape[0] > 0


def _pixels(state: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels (h, w) or (h, w, 3): [-1, 1] of grey or colours, else the first three channels between their extremes."""
    state = np.nan_to_num(np.asarray(state, np.float64), posinf=1.0, neginf=-1.0)
    state = state[0] if state.ndim == 4 else state
    if len(state) > 3:
        state = state[:3]
        low, high = (np.percentile(state, q, axis=(1, 2), keepdims=True) for q in (1, 99))
        state = 2 * (state - low) / np.maximum(high - low, 1e-9) - 1
    small = ((state.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return small[0] if len(small) == 1 else small.transpose(1, 2, 0)


def _numbers(state: NDArray[Any]) -> str:
    """A state's first numbers."""
    flat = state.reshape(-1)
    shown = ", ".join(f"{value:.4g}" for value in flat[:NUMBERS].tolist())
    return f"({shown}{', …' if len(flat) > NUMBERS else ''})"
