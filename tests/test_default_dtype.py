"""What a program takes for its default dtype changes nothing of what is shipped."""

import pytest
import torch

import treesearch as ts
from treesearch import specs

KNOWN = {"start": [0.5, 0.0, 0.0, 0.0], "goal": [1.0, 1.0]}
CASES = {
    "mnist": ("mnist(num_steps=2)", "digit(8)", None),
    "guided": ("tds(mnist(num_steps=2), digit(8))", "digit(8)", None),
    "pixels": ("mnist(num_steps=2)", "brightness", None),
    "maze": ("maze('medium', num_steps=2)", "wall_collision('medium')", [KNOWN]),
    "plan": ("maze('medium', num_steps=2)", "smoothness((4, 2))", [KNOWN]),
    "gaussian": ("gaussian", "linear(1.0)", None),
    "mixture": ("ring", "quadratic(1.0, 0.5)", None),
}  # fmt: skip


def found(kernel, reward, prompts):
    result = ts.search(specs.kernel(kernel), specs.reward(reward), ts.BestOfN(n=3), prompts=prompts, seed=1)
    return result.tasks[0]


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_under_another_default_dtype(name):
    want = found(*CASES[name])
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        got = found(*CASES[name])
    finally:
        torch.set_default_dtype(before)
    assert got.samples.dtype == want.samples.dtype
    assert torch.equal(got.samples, want.samples)
    assert torch.equal(torch.as_tensor(got.rewards), torch.as_tensor(want.rewards))
