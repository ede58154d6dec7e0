"""Python blocks of pages: found where they stand, made small by stated rules, and run one after another.

- The blocks of a page share one namespace. `given` may put names there that the page leaves to its reader.
- Numbers after the words of `AT_MOST` are lowered to them: `nfe=100_000` runs as `nfe=800`.
- The network of the MNIST model is one small convolution where a page changes nothing inside of it: `small_mnist`.
- `swaps` puts tiny checkpoints in place of published ones; each must be found.
- A block whose first line is a comment with a file's name is that file, and is run as a script.
- A block below `<!-- not run: why -->` is not run.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md")
FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)
AT_MOST = {"nfe": 800, "num_particles": 4, "samples": 40, "epochs": 1, "steps": 8}
NUMBER = re.compile(rf"\b({'|'.join(AT_MOST)})=([\d_]+)")


class Block(NamedTuple):
    """A block of Python on a page.

    Attributes:
        page: its path from the root.
        line: where its first line stands, from 1.
        code: what it says.
        why: the reason why it is not run, or None.
    """

    page: str
    line: int
    code: str
    why: str | None


def blocks() -> dict[str, list[Block]]:
    """The blocks of each page that has any."""
    found: dict[str, list[Block]] = {}
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        page, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("code")) + 1
            found.setdefault(page, []).append(Block(page, line, match["code"], match["why"]))
    return found


class OneConvolution(nn.Module):
    """v of the MNIST model for the impatient: what it draws is noise with an edge."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 0 * timestep.reshape(-1, 1, 1, 1)


def small_mnist() -> nn.Module:
    """Stands for `backends.models.mnist.load_network`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OneConvolution().eval().requires_grad_(False)


def small(code: str, swaps: dict[str, str]) -> str:
    """`code` with numbers lowered and what stands for something big put in its place."""
    for old, new in swaps.items():
        code = code.replace(old, new)
    return NUMBER.sub(lambda m: f"{m[1]}={min(int(m[2]), AT_MOST[m[1]])}", code)


def run(block: Block, scope: dict, swaps: dict[str, str]) -> None:
    """Run a block in `scope`, with lines numbered as on its page; files are written where the process is."""
    code = small(block.code, swaps)
    if named := re.match(r"# (\w+\.py)\n", code):
        Path(named[1]).write_text(code, "utf-8")
        scope.update(runpy.run_path(named[1], run_name="__main__"))
    else:
        exec(compile("\n" * (block.line - 1) + code, ROOT / block.page, "exec"), scope)
