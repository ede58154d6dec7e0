"""Rewards that write into what they are given: the next reader, another term or the search, never sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.compose import cached, normalise
from treesearch.rewards.images.video import frames

Scorer = Callable[[Any], Any]
RED = as_reward(lambda x: x[:, 0].flatten(1).mean(1), "red")


def centred(x: torch.Tensor) -> torch.Tensor:
    x.sub_(0.5).mul_(2)
    return x[:, 0].flatten(1).mean(1)


def clamped(x: torch.Tensor) -> torch.Tensor:
    x[0, 0, 0, 0] = 9
    return RED(x)


def through_numpy(x: torch.Tensor) -> torch.Tensor:
    array = x.numpy()
    array -= 0.5
    return RED(x)


def through_data(x: torch.Tensor) -> torch.Tensor:
    x.data.mul_(2)
    return RED(x)


def into_a_part(x: torch.Tensor) -> torch.Tensor:
    x[1:].flip(0).neg_()  # a copy, which is nobody else's
    x.unbind(0)[1].neg_()
    return RED(x)


def own_flags(x: torch.Tensor) -> torch.Tensor:
    """No write: the gradient of what it was lent is its own."""
    value = RED(x)
    x.requires_grad_().flatten(1).sum().backward()
    return value


WRITING: dict[str, Scorer] = {f.__name__: f for f in (centred, clamped, through_numpy, through_data, into_a_part)}
JOINS: dict[str, Callable[[Reward, Reward], Reward]] = {
    "alone": lambda a, b: a,
    "+": lambda a, b: a + b,
    "- after": lambda a, b: b - a,
    "*": lambda a, b: a * b,
    "min": lambda a, b: a.min(b),
    "gate": lambda a, b: b.gate(a, -9),
    "deep": lambda a, b: 2 * (a.clip(-9, 9) + 1) + b,
    "cached": lambda a, b: cached(a) + b,
    "normalise": lambda a, b: normalise(a, 0, 2) + b,
}


def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("writes", WRITING)
def test_a_write_into_a_tensor_is_an_error_that_names_the_term(writes: str, join: str) -> None:
    reward = JOINS[join](as_reward(WRITING[writes]), RED)
    with pytest.raises(RewardError, match=rf"reward '{writes}' wrote into its samples.*compute out of place"):
        reward(images())


@pytest.mark.parametrize("join", JOINS)
def test_what_is_no_write_is_none(join: str) -> None:
    reward = JOINS[join](as_reward(own_flags), RED)
    assert torch.equal(reward(x := images()), JOINS[join](RED, RED)(images()))
    assert (x.shape, x.requires_grad, x.grad) == ((3, 3, 8, 8), False, None)


def test_tensors_are_lent_not_copied() -> None:
    seen: list[int] = []
    look = as_reward(lambda x: seen.append(x.data_ptr()) or RED(x))
    (look + look.clip(0, 1) + 1)(x := images())
    assert seen == [x.data_ptr()] * 2


def test_videos_and_inference_tensors() -> None:
    with pytest.raises(RewardError, match="'centred' wrote into its samples"):
        frames(as_reward(centred))(torch.rand(2, 1, 3, 4, 4))
    with torch.inference_mode():
        x = images()
        with pytest.raises(RewardError, match="'centred' wrote into its samples"):
            as_reward(centred)(x)
        assert torch.equal(RED(images()), RED(images()))


def test_gradients_pass_and_writes_into_their_samples_are_refused() -> None:
    leaf = images().requires_grad_()
    (2 * RED + RED).attached(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].flatten().tolist() == pytest.approx([3 / 64] * 192)
    for x in (leaf, leaf * 1):
        with pytest.raises(RewardError, match=r"reward 'centred' (raised RuntimeError|wrote into its samples)"):
            (as_reward(centred) + RED).attached(x)


def drawn_on(pictures: list[Image.Image]) -> list[float]:
    for picture in pictures:
        ImageDraw.Draw(picture).point((0, 0), 255)
        picture.thumbnail((2, 2))
    return [float(np.asarray(p).mean()) for p in pictures]


def shortened(values: list[Any]) -> list[float]:
    values[0] = values[1]
    return [float(np.asarray(values.pop() if i else values[0]).mean()) for i in range(len(values))]


def emptied(values: list[dict[str, Any]]) -> list[float]:
    return [float(sum(v.pop("atoms"))) for v in values]


def nested(values: list[dict[str, Any]]) -> list[float]:
    return [float(v["atoms"].pop()) for v in values]


@pytest.mark.parametrize(
    ("samples", "writes"),
    [
        ([Image.new("L", (4, 4), 10 * i) for i in range(3)], drawn_on),
        ([Image.new("L", (4, 4), 10 * i) for i in range(3)], shortened),
        ([{"atoms": [1, 2, i]} for i in range(3)], emptied),
        ([{"atoms": [1, 2, i]} for i in range(3)], nested),
    ],
)
def test_lists_dicts_and_pictures_are_handed_out_as_copies(samples: list[Any], writes: Scorer) -> None:
    before, seen = copy.deepcopy(samples), []
    look = as_reward(lambda values: seen.extend(copy.deepcopy(values)) or [0.0] * len(values))
    (as_reward(writes) + look)(samples)
    assert seen == before == samples


@pytest.mark.parametrize("samples", [np.ones((3, 4, 4)), [np.ones((4, 4)) for _ in range(3)], np.ones((4, 4, 3)).T])
def test_a_write_into_an_array_is_an_error(samples: Any) -> None:
    def scaled(values: Any) -> list[float]:
        values[1][0, 0] *= 255
        return [float(v.mean()) for v in values]

    with pytest.raises(RewardError, match="reward 'scaled' wrote into its samples"):
        (as_reward(scaled) + 1)(samples)


def test_prompts_are_lent_too() -> None:
    def greedy(x: Any, prompts: list[dict[str, Any]]) -> list[float]:
        found = [float(p.pop("goal")[0]) for p in prompts]
        prompts.clear()
        return found

    last = as_reward(lambda x, prompts: [p["goal"][-1] for p in prompts])
    prompts = [{"goal": [1, 2]}, {"goal": [3, 4]}, {"goal": [5, 6]}]
    assert (as_reward(greedy) + last)(images(), prompts).tolist() == [3, 7, 11]
    assert prompts == [{"goal": [1, 2]}, {"goal": [3, 4]}, {"goal": [5, 6]}]


@pytest.mark.parametrize("read", ["sample", "state"])
def test_a_search_whose_reward_writes_into_its_states_stops(read: str) -> None:
    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)[:, 0]

    kernel = LinearGaussian(num_steps=3)
    alone = as_reward(shifted, input=read)  # type: ignore[arg-type]
    for reward in (alone, alone.min(alone) + 1):
        with pytest.raises(RewardError, match=r"reward 'shifted' wrote into its samples"):
            ts.search(kernel, reward, ts.FeynmanKac(num_particles=4), budget=ts.Budget(nfe=24))
