"""Runs for the live page to show."""

from __future__ import annotations

import torch

import treesearch as ts
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear

HOSTILE = ('<img src=x onerror="window.owned=1">', "</script><script>window.owned=1</script>", "\u202eto left {{7*7}}")


class Pixels:
    """A Gaussian chain on images of 8 × 8."""

    num_steps, state_shape = 3, (1, 8, 8)

    def __init__(self):
        self._flat = LinearGaussian(num_steps=3, dim=64)

    def prior(self, noise, cond=None):
        return noise

    def transition(self, x, t, cond=None):
        law = self._flat.transition(x.flatten(1), t, cond)
        shape = (len(x), 1, 8, 8)
        mean, std, endpoint = (part.float() for part in (law.mean, law.std, law.endpoint))
        return Gaussian(mean.view(shape), std.view(-1, 1, 1, 1), endpoint=endpoint.view(shape))

    def encode(self, prompts):
        return {"bias": torch.zeros(len(prompts))}

    def decode(self, x0):
        return x0


def brightness(images):
    """A reward of images."""
    return images.flatten(1).mean(1)


def pixels(folder, prompts=HOSTILE, nfe=90, outputs=False):
    """A run of images with hostile prompts."""
    budget = ts.Budget(nfe=nfe)
    return ts.search(
        Pixels(), brightness, ts.FeynmanKac(), prompts=prompts, budget=budget, store=folder, outputs=outputs
    )


def growing(folder, iterations=40, wave=4):
    """The snapshots of a tree of vectors."""
    method, budget = ts.DiffusionTreeSampling(wave=wave), ts.Budget(iterations=iterations)
    return ts.stream(LinearGaussian(num_steps=4), linear(1.0), method, budget=budget, store=folder)
