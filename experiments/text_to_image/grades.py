"""What the samples of a search are worth: best reward a level, other rewards, roots, distances, and their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.text_to_image.searches import Job, anytime
from treesearch.core.tree import Tree
from treesearch.pictures.media import write_image
from treesearch.results.result import SearchResult, TaskResult
from treesearch.rewards.base import Reward

CLIP = "openai/clip-vit-large-patch14"
Features = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Graders:
    """What looks at the samples that a cell returns.

    Args:
        others: rewards that were not optimised, by their expressions.
        features: samples -> (n, d) in float64, compared by `distance`.
        distance: features -> distances (n, n).
        top_k: how many of the best samples.
        label: what the prompts are, for every row.
    """

    others: dict[str, Reward]
    features: Features
    distance: Callable[[Tensor], Tensor]
    top_k: int
    label: str = ""


def spent(tree: Tree, num_steps: int) -> NDArray[np.int64]:
    """NFE up to each sample of an anytime search, in order of creation.

    An iteration adds a chain of nodes that ends in a sample; it costs the level that the chain leaves from.
    """
    t = tree.t.astype(np.int64)
    first = np.flatnonzero(np.concatenate([[False, True], t[1:-1] == 0])[: len(t)])
    return np.minimum(t[tree.parent[first]], num_steps).cumsum()


# grades


def grade(job: Job, result: SearchResult, i: int, graders: Graders) -> Iterator[dict[str, Any]]:
    """Rows of one prompt, one a level."""
    task, batch = result.tasks[i], len(job.prompts)
    if anytime(job.method):
        price = [spent(t.tree, int(t.tree.t[0]) - 1) for t in result.tasks]
        cuts = [[int(np.searchsorted(p, level, side="right")) for p in price] for level in job.levels]
        nfe = [[int(p[n - 1]) for p, n in zip(price, cut, strict=True)] for cut in cuts]
        calls = [cut[i] for cut in cuts]
    else:
        cuts = [[len(t.leaves) for t in result.tasks]]
        nfe = [[result.cost.nfe // batch] * batch]
        calls = [int((~np.isnan(task.tree.reward)).sum())]
    seen = look(task, [cut[i] for cut in cuts], graders)
    known = {"method": job.label, "kind_of_method": type(job.method).__name__, "seed": job.seed}
    known |= {"prompt": job.prompts[i].index, "text": job.prompts[i].text, "category": job.prompts[i].category}
    for level, cost, scored, found in zip(job.levels, nfe, calls, seen, strict=True):
        yield known | {
            "level": level,
            "nfe": cost[i],
            "reward_calls": scored,
            "backward_nfe": round(cost[i] * result.cost.backward_nfe / result.cost.nfe),
            "seconds": round(elapsed(result.history, sum(cost)) / batch, 4),
            **found,
        }


def look(task: TaskResult, cuts: Sequence[int], graders: Graders) -> list[dict[str, Any]]:
    """Best reward, other rewards, roots and distances of the k best among the first n samples, for each n."""
    rewards = task.rewards.numpy()
    tops = [np.argsort(-rewards[:n], kind="stable")[: graders.top_k] for n in cuts]
    union = np.unique(np.concatenate(tops))
    samples, prompts = task.fetch(task.leaves[union]), [task.prompt] * len(union)
    others = {name: other(samples, prompts).numpy() for name, other in graders.others.items()}
    gaps = graders.distance(graders.features(samples))
    found = []
    for n, top in zip(cuts, tops, strict=True):
        at, k = np.searchsorted(union, top), len(top)
        between = gaps[np.ix_(at, at)].sum() / (k * (k - 1)) if k > 1 else None
        found.append(
            {
                "samples": n,
                "k": k,
                "best": float(rewards[top[0]]),
                "top": float(rewards[top].mean()),
                "also_best": {name: float(values[at[0]]) for name, values in others.items()},
                "also_top": {name: float(values[at].mean()) for name, values in others.items()},
                "roots": len(np.unique(task.tree.roots(task.leaves[top]))),
                "distance": None if between is None else float(between),
            }
        )
    return found


def elapsed(history: Sequence[dict[str, Any]], nfe: int) -> float:
    """Seconds until a search had spent this much, linear between its waves."""
    return float(np.interp(nfe, [0, *(h["nfe"] for h in history)], [0.0, *(h["seconds"] for h in history)]))


def extractor(spec: str, device: torch.device) -> tuple[Features, Callable[[Tensor], Tensor]]:
    """Features and their distance.

    Raises:
        ValueError: an unknown extractor.
        CheckpointError: CLIP's weights are absent; nothing has been spent yet.
    """
    if spec == "pixels":
        return flat_pixels, lambda x: torch.cdist(x, x) / x.shape[1] ** 0.5
    name, _, checkpoint = spec.partition(":")
    if name != "clip":
        raise ValueError(f"unknown features {spec!r}: expected clip, clip:FOLDER_OR_HUB_ID or pixels")
    return clip_features(checkpoint or CLIP, str(device)), lambda x: 1 - x @ x.T


def flat_pixels(samples: Any) -> Tensor:
    """Pixels of images, (n, c h w)."""
    if not isinstance(samples, Tensor):
        from treesearch.rewards.images.vision import pixels

        samples = pixels(samples)
    return samples.double().flatten(1).cpu()


def clip_features(checkpoint: str, device: str) -> Features:
    """Unit image embeddings of a CLIP model of transformers."""
    from treesearch.rewards.images.clip import Clip

    clip = Clip(checkpoint=checkpoint, processor=checkpoint)

    @torch.no_grad()
    def features(samples: Any) -> Tensor:
        parts = [clip.images(samples[start : start + 32], device) for start in range(0, len(samples), 32)]
        return torch.cat(parts).double().cpu()

    features(torch.zeros(1, 3, 64, 64))  # absent weights are an error before anything is spent
    return features


def picture(samples: Any, file: Path) -> None:
    """One row of images, if the samples are images."""
    if isinstance(samples, Tensor) and samples.ndim == 4 and samples.shape[1] in (1, 3):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_image(torch.cat(list(samples), 2), file)
