"""Interventions for tests: one in attention, one in features, on the MNIST model."""

from dataclasses import dataclass

import torch

from treesearch.backends.base.capture import changed
from treesearch.backends.base.taps import tapped
from treesearch.backends.interventions import Intervention

HEADS = "unet.mid_block.attentions.0"


@dataclass(frozen=True)
class Own(Intervention):
    """Attention of one module towards its own values, by some strengths."""

    strengths: tuple[float, ...] = (1.0,)

    @property
    def settings(self):
        return tuple(f"u = {u:g}" for u in self.strengths)

    def on(self, network, rows):
        def tap(attend, q, k, v):
            u = torch.tensor((0.0, *self.strengths)).to(q)[rows.of_network(q).setting][:, None, None, None]
            out = attend(q, k, v)
            return torch.where(u > 0, torch.lerp(out, v, u), out)

        return tapped(network, {HEADS: tap})


@dataclass(frozen=True)
class Fade(Intervention):
    """The bottleneck, fainter."""

    by: tuple[float, ...] = (0.3,)

    @property
    def settings(self):
        return tuple(f"by {b:g}" for b in self.by)

    def on(self, network, rows):
        def fainter(h, *call):
            setting = rows.of_network(h).setting[:, None, None, None]
            return torch.where(setting > 0, h * (1 - torch.tensor((0.0, *self.by)).to(h)[setting]), h)

        return changed(network, {"unet.mid_block": fainter})
