"""Clips of two dynamics, what trains a memory for them, and the page of what it is worth."""

from pathlib import Path

import torch

from experiments.interventions.clips import FLOOR, GRAVITY, SHAPE, clips_of, flight
from experiments.interventions.memory import flights_of, loss_of, report
from experiments.interventions.train_memory import Args, losses, references, remembering
from experiments.interventions.video_model import VideoNetwork, build_encoder
from experiments.shared.cells import read

RESULTS = Path(__file__).parents[2] / "experiments/results/interventions"


def test_what_flies_is_measured():
    labels = torch.arange(2).repeat(100)
    clips = clips_of(labels, torch.Generator().manual_seed(0))
    assert clips.shape == (200, *SHAPE)
    seen = flight(clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(seen.labels, labels)
    assert (seen.acceleration - GRAVITY * labels).abs().max() < 0.1
    assert flight(clips.flip(3)).labels[1::2].tolist() == [-1] * 100  # thrown upside down: neither
    assert flight(torch.full((1, *SHAPE), FLOOR) + clips[:1, :, :1]).labels.tolist() == [0]  # a dot that stands


def test_both_trainings_have_gradients_and_the_second_only_the_encoders(tmp_path):
    torch.manual_seed(0)
    network, encoder = VideoNetwork(), build_encoder()
    args = Args(out=tmp_path, batch_size=4)
    next(losses(args, 0, lambda x, sigma, labels, rng: network(x, 1000 * sigma))(0)).backward()
    assert network.wan.blocks[0].attn1.to_k.weight.grad.abs().max() > 0
    network.zero_grad()
    network.requires_grad_(False)
    remember = lambda x, sigma, labels, rng: remembering(network, x, sigma, encoder(references(labels, 2, rng)))  # noqa: E731
    again = [next(losses(args, 1, remember)(0)) for _ in range(2)]
    assert torch.equal(*again)  # draws are the epoch's
    again[0].backward()
    assert encoder.high.outward.weight.grad.abs().max() > 0
    assert all(w.grad is None for w in network.parameters())


def test_the_page_is_that_of_its_rows():
    rows = read(RESULTS / "memory.jsonl")
    assert report(rows) == (RESULTS / "memory.md").read_text("utf-8")
    assert "| 0 | 0 | 1 | thrown | 61% | no |" in report(rows)  # what was asked for is not met
    assert "| 0 | 2 | 2 | thrown | 81% | yes |" in report(rows)
    means = {row["memory"]: sum(row["losses"]) / len(row["losses"]) for row in rows if row["part"] == "loss"}
    assert means["right"] < means["none"] < means["shuffled"] < means["other"]


def test_figures_are_of_the_same_clips_and_noise(monkeypatch):
    import experiments.interventions.memory as script

    torch.manual_seed(0)
    monkeypatch.setattr(script, "BATCHES", 1)
    monkeypatch.setattr(script, "SAMPLES", 4)
    monkeypatch.setattr(script, "STEPS", 2)
    network, encoder = VideoNetwork().eval(), build_encoder().eval()
    right, none, other = (torch.tensor(loss_of(network, encoder, name)) for name in ("right", "none", "other"))
    assert len(right) == 64
    assert 0 < (right - none).abs().max() < 0.5 * none.mean()  # an untrained memory changes little of what is paired
    assert not torch.equal(right, other)
    shown = flights_of(network, encoder, "even", 1.0)
    assert sum(shown["shares"].values()) + shown["neither"] == 1
