"""A trained trajectory model as a file: its weights, and a card that says what it is of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from treesearch.backends.chains.schedules import Prediction
from treesearch.backends.models.shipped import whole
from treesearch.backends.models.unet1d import WIDTHS, TrajectoryNetwork
from treesearch.rewards.channels import Channels


@dataclass(frozen=True)
class Normalisation:
    """z = (x - mean) / std, channel by channel.

    Args:
        mean, std: (C,) numbers in data units.

    Raises:
        ValueError: lengths that differ, or a std that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(f"expected as many means as positive stds, got {self.mean} and {self.std}")

    @staticmethod
    def of(rows: Tensor) -> Normalisation:
        """Mean and std of rows (n, C); a constant channel keeps its scale."""
        std, mean = torch.std_mean(rows.double(), 0, correction=0)
        return Normalisation(tuple(mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist()))

    def encode(self, x: Tensor) -> Tensor:
        """Data units (..., C) to z."""
        mean, std = self._tables(x)
        return (x - mean) / std

    def decode(self, z: Tensor) -> Tensor:
        """z (..., C) to data units."""
        mean, std = self._tables(z)
        return mean + std * z

    def _tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_tensor(self.mean), x.new_tensor(self.std)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a trained model is of; stored with its weights.

    Args:
        channels: how a row is split.
        normalisation: of the training data.
        horizon: rows of a plan H, the longest that it was trained with.
        stride: environment steps a row; its action is the mean over them, its reward the sum.
        prediction: what the network returns.
        widths: channels of the U-Net by resolution.
        environment: gymnasium id.
        maze_map: 1 for walls, row by row; empty without a maze.
    """

    channels: Channels
    normalisation: Normalisation
    horizon: int
    stride: int = 1
    prediction: Prediction = "sample"
    widths: tuple[int, ...] = WIDTHS
    environment: str = ""
    maze_map: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Card:
        fields = json.loads(text)
        fields["channels"] = Channels(**fields["channels"])
        fields["normalisation"] = Normalisation(**{k: tuple(v) for k, v in fields["normalisation"].items()})
        fields["widths"] = tuple(fields["widths"])
        fields["maze_map"] = tuple(tuple(row) for row in fields["maze_map"])
        return Card(**fields)


def save_model(network: nn.Module, card: Card, path: Path) -> None:
    """Weights as float16 safetensors with the card as metadata, replaced atomically."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    save_file({k: w.half().contiguous() for k, w in network.state_dict().items()}, part, {"card": card.to_json()})
    part.chmod(0o644)
    part.replace(path)


def load_model(path: str | Path) -> tuple[TrajectoryNetwork, Card]:
    """A saved network, in float32, and its card.

    Raises:
        ValueError: a file of another kind, or a damaged one.
    """
    from safetensors import safe_open

    with whole(path, "trajectory model"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "card" not in metadata:
            raise ValueError(f"{Path(path).name} is no trajectory model: it has no card; save one with save_model")
        card = Card.from_json(metadata["card"])
        with torch.device("cpu"):  # whatever torch's default device and dtype
            network = TrajectoryNetwork(card.channels.size, card.widths).float()
        network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return network, card
