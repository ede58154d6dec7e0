"""A reward behind an HTTP endpoint: any scorer that takes samples and prompts and returns numbers.

    POST url {"images": [base64 PNG, ...], "prompts": [...]}  ->  {"scores": [...]},  r(x_i) = scores[i]
    POST url {"texts": [...], "prompts": [...]}               of samples that are texts

Other formats: `build(samples, prompts)` makes the request of a batch, `parse(answer)` takes scores out of what came.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treesearch.rewards.base import Reward
from treesearch.rewards.facts import facts
from treesearch.rewards.images.vision import pixels
from treesearch.rewards.numeric import is_whole
from treesearch.rewards.remote.endpoint import MAX_BYTES, SENT, Ask, Endpoint, address

Build = Callable[[Any, Sequence[Any] | None], Any]
Parse = Callable[[Any], Sequence[float]]


def build_samples(samples: Any, prompts: Sequence[Any] | None) -> dict[str, Any]:
    """{"images": base64 PNGs, "prompts": the prompts or null}, or {"texts": ...} where samples are texts."""
    told = {"texts": list(samples)} if are_texts(samples) else {"images": base64_pngs(samples)}
    return told | {"prompts": None if prompts is None else list(prompts)}


def parse_scores(answer: Any) -> Sequence[float]:
    """The list under "scores"."""
    return answer["scores"]


@facts(
    range="the scorer's",
    differentiable=False,
    prompts=None,
    checkpoint="behind the endpoint",
    licence="the scorer's",
    memory="none here",
    limits=SENT,
)
def HTTPReward(
    url: str | None = None,
    *,
    url_env: str | None = None,
    batch_size: int = 16,
    build: Build = build_samples,
    parse: Parse = parse_scores,
    token_env: str | None = None,
    token_header: str = "Authorization",
    timeout: float = 60.0,
    retries: int = 4,
    backoff: float = 0.5,
    max_pause: float = 60.0,
    concurrency: int = 4,
    max_bytes: int = MAX_BYTES,
) -> Reward:
    """r(samples, prompts) = what the scorer at `url` answers; a scorer that is not deterministic wants `cached()`.

    Args:
        url: of the scorer; its host is part of the reward's name.
        url_env: name of an environment variable that holds the URL instead, for one with a key in its path or query.
        batch_size: samples a request.
        build: called on the samples and prompts of a batch, returns what is sent as JSON.
        parse: called on the JSON value that came, returns one number a sample.
        token_env, token_header, timeout, retries, backoff, max_pause, concurrency, max_bytes: see `Endpoint`.

    Raises:
        ValueError: an argument out of range, credentials in the URL, or no URL.
    """
    if not is_whole(batch_size):
        raise ValueError(f"batch_size is {batch_size!r}, expected at least 1")
    endpoint = Endpoint(
        url=address(url, url_env),
        token_env=token_env,
        token_header=token_header,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        max_pause=max_pause,
        concurrency=concurrency,
        max_bytes=max_bytes,
    )
    return Reward(_Scorer(endpoint, batch_size, build, parse), f"http({endpoint.host})")


@dataclass(frozen=True)
class _Scorer:
    """Batches out, scores back in the order of the samples."""

    endpoint: Endpoint
    batch_size: int
    build: Build
    parse: Parse

    def __call__(self, samples: Any, prompts: Sequence[Any] | None) -> Tensor:
        check_pairs(samples, prompts)

        def score(ask: Ask, rows: Sequence[int]) -> list[float]:
            part = slice(rows[0], rows[-1] + 1)
            answer = ask(self.build(samples[part], None if prompts is None else prompts[part]))
            return self._scores(answer, len(rows))

        starts = range(0, len(samples), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(samples))) for start in starts]
        scores = [score for part in self.endpoint.map(score, batches) for score in part]
        return torch.tensor(scores, dtype=torch.float64, device="cpu")

    def _scores(self, answer: Any, n: int) -> list[float]:
        """One number a sample.

        Raises:
            RewardError: the answer has no scores, too few or too many, or something else than numbers below inf.
        """
        got = f"got {self.endpoint.quote(answer)}"
        try:
            scores = list(self.parse(answer))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"answered no scores ({type(error).__name__}: {self.endpoint.quote(str(error))}), {got}: check parse"
            raise self.endpoint.error(what) from None
        if len(scores) != n:
            raise self.endpoint.error(f"answered {len(scores)} scores for {n} samples, {got}")
        for i, score in enumerate(scores):
            number = isinstance(score, (int, float)) and not isinstance(score, bool)
            if not number or score != score or score > sys.float_info.max:  # of any length: 10**400 is JSON too
                raise self.endpoint.error(
                    f"answered {self.endpoint.quote(score)} as score {i} of {n}, expected finite numbers, {got}"
                )
        return scores


def are_texts(samples: Any) -> bool:
    """Whether samples are texts."""
    return not hasattr(samples, "shape") and len(samples) > 0 and all(isinstance(s, str) for s in samples)


def check_pairs(samples: Any, prompts: Sequence[Any] | None) -> None:
    """Refuse prompts that are not one a sample.

    Raises:
        ValueError: fewer or more.
    """
    if prompts is not None and len(prompts) != len(samples):
        raise ValueError(f"got {len(prompts)} prompts for {len(samples)} samples: give one a sample")


def base64_pngs(samples: Any) -> list[str]:
    """Images as base64 PNGs with 8 bits a channel, for requests.

    Args:
        samples: n images, as `rewards.images.vision.pixels` takes them; those of a sequence may differ in size.
    """
    images = [pixels(samples[i : i + 1])[0] for i in range(len(samples))]
    return [base64.b64encode(_png(image)).decode() for image in images]


def _png(image: Tensor) -> bytes:
    """One image (3, h, w) in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("sending images needs Pillow: pip install pillow") from error
    data = (image.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    height, width, _ = data.shape
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), data.numpy().tobytes()).save(file, "PNG")
    return file.getvalue()
