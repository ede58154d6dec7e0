"""An ∅ of classifier-free guidance for each level and image, put where guidance reads it: no weight and no text moves.

    ε(∅_t) + w (ε(c) - ε(∅_t))

Conditioning `negative_NAME` is the ∅ beside conditioning NAME, of pipelines as of any kernel; here a row of a batch has
that of its own level, and of its own image where there are several: images are tasks, as in `Rooted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from treesearch.backends.base import Cond, Transition, Wrapper, fingerprint
from treesearch.backends.chains.diffusion import NEGATIVE
from treesearch.backends.interventions.base import law_of
from treesearch.backends.roots.rooted import image_of


@final
@dataclass(frozen=True, eq=False)
class Absent(Wrapper):
    """A kernel whose guidance has other ∅.

    Args:
        kernel: under classifier-free guidance.
        table: by name of conditioning, (T, m, ...) for m images: [t - 1] at level t; (1, m, ...) at every level.

    Raises:
        ValueError: a table of other levels, or of several numbers of images.
    """

    table: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        steps, shapes = int(self.kernel.num_steps), [tuple(each.shape[:2]) for each in self.table.values()]
        if not shapes or any(len(s) < 2 or s[0] not in (1, steps) or s[1] != shapes[0][1] for s in shapes):
            raise ValueError(f"tables of ∅ have levels and images {shapes}, expected (1 or T = {steps}, m) for each")
        object.__setattr__(self, "table", {name: each.detach() for name, each in self.table.items()})

    @property
    def base_law(self) -> str:
        """Whose law p is."""
        return f"{law_of(self.kernel)} under an ∅ of its own"

    def transition(self, x: Tensor, t: Tensor, cond: Cond = None) -> Transition:
        return self.kernel.transition(x, t, self.put(t, cond))

    def put(self, t: Tensor, cond: Cond) -> dict[str, Any]:
        """Conditioning of rows at levels t (n,), with their ∅.

        Raises:
            ValueError: conditioning without an ∅ to replace.
        """
        given = guided(self.kernel, cond)
        if missing := [name for name in self.table if name not in given]:
            raise ValueError(f"the table has ∅ for {', '.join(missing)}, guidance reads {', '.join(given)}")
        return dict(cond or {}) | {NEGATIVE + name: self._rows(name, t, cond) for name in self.table}

    def _rows(self, name: str, t: Tensor, cond: Any) -> Tensor:
        values, given = self.table[name], cond[NEGATIVE + name]
        image = image_of(cond, values.shape[1])
        which = torch.zeros_like(t) if image is None else image
        level = torch.zeros_like(t) if len(values) == 1 else t - 1
        return values[level.to(values.device), which.to(values.device)].to(given)

    def _settings(self) -> str | None:
        return fingerprint.of(self.table)


def guided(kernel: Any, cond: Cond) -> list[str]:
    """Names of the conditioning that has an ∅ beside it.

    Raises:
        ValueError: none has.
    """
    names = [name.removeprefix(NEGATIVE) for name in cond or {} if name.startswith(NEGATIVE)]
    if not names:
        raise ValueError(
            f"{type(kernel).__name__} is not told of any ∅: it needs prompts, and classifier-free guidance at a "
            "guidance_scale other than 1"
        )
    return names
