"""Every Python block of README.md and docs/*.md runs, by the rules of `tests.support.examples`, or says why not."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

import treesearch as ts
from tests.rewards.test_image_reward import WORDS as SEEN
from tests.rewards.test_image_reward import published_state
from tests.support import examples, text, tiny, tiny_clip
from treesearch.backends import mnist, student  # noqa: F401 - loads the true network, whatever a page has
from treesearch.rewards import digit
from treesearch.testing import check_kernel

BLOCKS = examples.blocks()
NOT_RUN = {
    "docs/loggers.md": 1,
    "docs/pipelines.md": 1,
    "docs/planning.md": 1,
    "docs/policies.md": 2,
    "docs/text.md": 2,
    "docs/values.md": 1,
    "docs/workers.md": 1,
}  # blocks of a page that say why they are not run


WITH_MNIST = {"docs/edits.md", "docs/interventions.md", "docs/students.md", "docs/values.md"}  # look into its network


def search(**more):
    """What a page calls kernel, reward, method, budget and result without making them."""
    kernel, reward = mnist(num_steps=10), digit(8)
    method, budget = ts.TreeSampling(), ts.Budget(nfe=200)
    result = ts.search(kernel, reward, method, budget=budget)
    return {"ts": ts, "kernel": kernel, "reward": reward, "method": method, "budget": budget, "result": result} | more


GIVEN = {
    "docs/certificate.md": lambda: search(
        held_out=digit(3),
        leaves=torch.arange(8).numpy(),
        log_weights=torch.zeros(8).numpy(),
        log_z=0.0,
        se=0.1,
        trees=8,
    ),
    "docs/command_line.md": search,
    "docs/diagnose.md": search,
    "docs/drafts.md": search,
    "docs/extending.md": lambda: {
        "my_model": lambda x, t, cond: (0.9 * x, torch.full((len(x), 1, 1, 1), 0.4), x),
        "my_encoder": lambda prompts: torch.zeros(len(prompts), 2),
        "my_decoder": lambda x0: x0,
    },
    "docs/results.md": search,
    "docs/students.md": lambda: {"teacher": mnist(num_steps=10), "folder": Path("student")},
    "docs/text.md": lambda: {"my_reward": lambda texts: [float(len(t)) for t in texts]},
    "docs/tree_search.md": search,
    "docs/workers.md": search,
}


@pytest.fixture(scope="module")
def swaps(tmp_path_factory, tiny_root):
    """What stands for checkpoints and pictures of a page, by page."""
    folder = tmp_path_factory.mktemp("examples")
    sd, clip, bert = str(tiny.checkpoint("sd", tiny_root)), folder / "clip", folder / "bert"
    clip.mkdir()
    bert.mkdir()
    tiny_clip.clip(clip)
    text.with_own_code(bert, "llada", text.tokenizer(marks=False, words=(*text.WORDS, "The")), mask_token_id=4)
    save_file(published_state(), folder / "seen.safetensors")
    (folder / "vocab.txt").write_text("\n".join(SEEN) + "\n")
    return {
        "docs/drafts.md": {"DIR": sd, "num_steps=50": "num_steps=4"},
        "docs/pipelines.md": {
            "stable-diffusion-v1-5/stable-diffusion-v1-5": sd,
            "float16": "float32",
            "num_steps=50": "num_steps=4",
            "ImageReward()": f"ImageReward({str(folder / 'seen.safetensors')!r}, tokenizer={str(folder)!r})",
            "CLIPScore(": f"CLIPScore({str(clip)!r}, ",
        },
        "docs/students.md": {"6000": "16"},
        "docs/text.md": {"GSAI-ML/LLaDA-8B-Instruct": str(bert), "length=64": "length=8"},
    }


FOUND = {  # what a page has made at its end
    "README.md": (
        lambda it: (it["best"].shape, it["draws"].shape, it["result"].cost.nfe),
        ((8, 1, 28, 28), (16, 1, 28, 28), 800),
    ),
    "docs/planning.md": (lambda it: (it["actions"].shape, it["planner"].decision.nfe), ((8, 2), 160)),
    "docs/extending.md": (lambda it: check_kernel(it["MyKernel"](), prompts=["a red cube"]), None),
}


@pytest.mark.parametrize("page", BLOCKS)
def test_the_blocks_of_a_page_run(page, swaps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page not in WITH_MNIST:
        monkeypatch.setattr("treesearch.backends.models.mnist.load_network", examples.small_mnist)
    module, ran = ModuleType("page"), ""
    monkeypatch.setitem(sys.modules, "page", module)
    scope = module.__dict__
    scope.update(GIVEN.get(page, dict)())
    for block in BLOCKS[page]:
        if not block.why:
            examples.run(block, scope, swaps.get(page, {}))
            ran += block.code
    assert all(old in ran for old in swaps.get(page, {}))
    look, expected = FOUND.get(page, (lambda it: None, None))
    assert look(scope) == expected


def test_what_is_not_run_is_counted():
    counted = {page: sum(block.why is not None for block in found) for page, found in BLOCKS.items()}
    assert {page: n for page, n in counted.items() if n} == NOT_RUN
    pages = [path for pattern in examples.PAGES for path in examples.ROOT.glob(pattern)]
    assert sum(map(len, BLOCKS.values())) == sum(path.read_text("utf-8").count("```python") for path in pages)
