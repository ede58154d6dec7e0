"""What a program takes for its default dtype or its default device changes nothing of what is shipped."""

import contextlib
import functools

import pytest
import torch

import treesearch as ts
from tests.support import tiny
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.registry import registry as specs
from treesearch.rewards.images import classifier
from treesearch.rewards.images.image import brightness
from treesearch.rewards.trajectories import ways

KNOWN = {"start": [0.5, 1.5, 0.0, 0.0], "goal": [0.5, 0.5]}
CASES = {
    "mnist": ("mnist(num_steps=2)", "digit(8)", None),
    "guided": ("tds(mnist(num_steps=2), digit(8))", "digit(8)", None),
    "experts": ("valued(mnist(num_steps=2), digit(8), 'ppap.safetensors')", "digit(8)", None),
    "moved": (
        "actions(hspace(mnist(num_steps=25), 'hspace.safetensors', 3.0, 'slant', (25, 25)), (25,))",
        "digit(8)",
        None,
    ),
    "annealed": ("das(mnist(num_steps=2), digit(8))", "digit(8) - 0.5", None),
    "multistep": ("mnist(num_steps=3, solver='2m')", "brightness", None),
    "third": ("second_order(mnist(num_steps=4, eta=0.0), order=3)", "brightness", None),
    "heun": ("mnist(num_steps=2, solver='heun')", "brightness", None),
    "teleported": ("teleport(mnist(num_steps=3))", "brightness", None),
    "student": ("student(num_steps=2)", "digit(8)", None),
    "completed": ("completed(mnist(num_steps=3), student(num_steps=3), levels=(2,))", "brightness", None),
    "spliced": ("spliced(mnist(num_steps=3), student(num_steps=3), at=2)", "brightness", None),
    "pixels": ("mnist(num_steps=2)", "brightness + compressibility", None),
    "maze": ("maze('medium', num_steps=2)", "wall_collision('medium')", [KNOWN]),
    "plan": ("maze('medium', num_steps=2, grid='karras')", "smoothness((4, 2))", [KNOWN]),
    "published": ("diffuser(maze('medium', num_steps=2), maze_plan('medium'))", "maze_plan('medium')", [KNOWN]),
    "perturbed": ("softpag(mnist(num_steps=2), {'mid_block': [0]}, 0.5)", "digit(8)", None),
    "smoothed": ("seg(mnist(num_steps=2), 'mid_block', 1.0)", "digit(8)", None),
    "restored": ("restoration(num_steps=2, order=2)", "digit(8)", ["1"]),
    "residual": ("restoration(num_steps=2, process='residual')", "digit(8)", None),
    "gaussian": ("gaussian", "linear(1.0)", None),
    "constant": ("trust_region(gaussian, quadratic(1.0, 0.5))", "constant(2.0)", None),
    "mixture": ("ring", "quadratic(1.0, 0.5)", None),
    "discrete": ("discrete", "linear(1.0)", None),
    "masked": ("masked_chain", "linear(1.0)", None),
}
PIPELINES = {"sd": {}, "lcm": {}, "flux": {"height": 16, "width": 16}}


@contextlib.contextmanager
def meanwhile(default):
    """A default dtype or device that the program has set."""
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def same(got, want):
    assert got.samples.dtype == want.samples.dtype
    assert torch.equal(got.samples, want.samples)
    assert torch.equal(got.rewards, want.rewards)


def found(name):
    kernel, reward, prompts = CASES[name]
    for kept in (classifier.load_classifier, ways._table):
        kept.cache_clear()
    result = ts.search(specs.kernel(kernel), specs.reward(reward), ts.BestOfN(n=3), prompts=prompts, seed=1)
    return result.tasks[0]


wanted = functools.cache(found)


@pytest.mark.parametrize("default", [torch.float64, "meta"])
@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_under_another_default(name, default):
    want = wanted(name)
    with meanwhile(default):
        got = found(name)
    same(got, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("default", [torch.float64, "meta"])
@pytest.mark.parametrize("name", PIPELINES)
def test_searches_over_pipelines_are_the_same_under_another_default(name, default, tiny_root):
    """Their checkpoints are loaded before, by a library that takes the program's default for its own."""
    kernel = DiffusersKernel.from_pretrained(
        tiny.checkpoint(name, tiny_root), num_steps=2, device="cpu", **PIPELINES[name]
    )

    def search():
        return ts.search(kernel, brightness(), ts.BestOfN(n=2), prompts=["a cat"], seed=1).tasks[0]

    want = search()
    with meanwhile(default):
        got = search()
    same(got, want)
