"""The shipped experts, and what the page of `make experts-evidence` says of rows whose answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.observations import experts, train_experts
from experiments.shared.cells import Cells
from treesearch.backends.guidance import Valued
from treesearch.backends.models.mnist import TRAIN_STEPS, mnist_kernel
from treesearch.backends.models.restoration_file import load_model
from treesearch.backends.models.shipped import shipped_file
from treesearch.registry import registry
from treesearch.rewards.images.classifier import digit

RESULTS = Path(experts.__file__).parents[1] / "results" / "observations"
SHOWN = (8, 3, 5, 9, 2, 6, 0, 4, 7, 1)  # the clean digits that the restoration model brings


def test_shipped_experts_read_noisy_digits_better_than_the_classifier_itself():
    kernel, reward = mnist_kernel(TRAIN_STEPS), digit(8)
    files = {"x_t": "ppap.safetensors", "x̂_0": "ppap_endpoint.safetensors"}
    families = {name: Valued(kernel, reward, file).value for name, file in files.items()}
    with shipped_file("blur.safetensors") as path:
        x0 = 2 * load_model(path).clean.repeat(2, 1, 1, 1) - 1
    found = experts.accuracies(kernel, families, x0, torch.tensor(SHOWN * 2), 0)
    naive, taught, of_end = found["as it is, of x_t"], found["x_t"], found["x̂_0"]
    assert sum(taught[3:]) > sum(naive[3:]) + 0.15
    assert sum(of_end[3:]) > sum(naive[3:]) + 0.15
    assert min(taught[0], of_end[0]) > 0.95


@pytest.mark.parametrize("file", ["ppap.safetensors", "ppap_endpoint.safetensors"])
@pytest.mark.parametrize("form", ["valued(mnist(num_steps={}), {}, '{}')", "tds(mnist(num_steps={}), {}, value='{}')"])
def test_shipped_experts_serve_every_grid_and_every_digit_by_their_name(form, file):
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for steps, reward in ((3, "digit(8)"), (7, "even()"), (4, "digits([1, 3])")):
        kernel = registry.kernel(form.format(steps, reward, file))
        assert kernel.transition(x, torch.tensor([steps])).rewards.isfinite().all()
        assert kernel.scores == registry.reward(reward)


def test_the_training_script_makes_every_family(tmp_path):
    train_experts.main(train_experts.Args(out=tmp_path, samples=4, num_steps=2, steps=1, batch_size=4))
    assert {file.stem for file in tmp_path.iterdir()} == set(train_experts.FAMILIES)
    for name, reward in (("ppap", "digit(8)"), ("jpeg", "compressibility()")):
        assert registry.kernel(f"valued(mnist(num_steps=2), {reward}, '{tmp_path / name}.safetensors')").valued


def rows(spread, gain):
    """Five seeds of endpoints, and of experts with `spread` times their spread and a higher ESS."""
    found = []
    for seed in range(5):
        row = {"bed": "digit", "seed": seed, "nfe": 800, "reward_calls": 192}
        found += [
            row | {"arm": "endpoints", "log_z": -2.0 + seed / 10, "ess": [30.0, 20.0, 20.0, 20.0, 10.0 + seed]},
            row
            | {
                "arm": "experts of x_t",
                "log_z": -2.0 + spread * seed / 10,
                "ess": [31.0, 20.0, 20.0, 20.0, 10.0 + seed + gain],
            },
        ]
    return found


ACCURACY = {"settings": {"share": 0.084, "images": 2000}, "accuracy": {"as it is, of x_t": [0.9, 0.5, 0.2, 0.1, 0.1]}}


def test_the_page_says_what_the_rows_hold():
    page = experts.report(rows(0.5, 2.0), ACCURACY)
    assert "| experts of x_t | -1.900 ± 0.098 | 0.079 | 0.50 (0.16 to 1.55) | 14.0 | +2.0 ± 0.0 | 192 |" in page
    assert "| endpoints | 30.0 | 20.0 | 20.0 | 20.0 | 12.0 |" in page
    assert "| as it is, of x_t | 0.900 | 0.500 | 0.200 | 0.100 | 0.100 |" in page
    assert "Two heads" not in page
    with pytest.raises(ValueError, match="run the experiment first"):
        experts.report([], ACCURACY)
    ratio = experts.spread_ratio(np.array([0.0, 2.0, 4.0]), np.array([0.0, 1.0, 2.0]))
    assert ratio[0] == pytest.approx(2.0)
    assert ratio[1] * ratio[2] == pytest.approx(4.0)  # F of equal degrees of freedom is its own inverse


def test_the_committed_page_is_what_the_command_writes():
    accuracy = json.loads((RESULTS / "experts.json").read_text("utf-8"))
    found = experts.report(Cells(RESULTS / "experts.jsonl", experts.KEY).rows, accuracy)
    assert found == (RESULTS / "experts.md").read_text("utf-8"), "run make experts-evidence"
