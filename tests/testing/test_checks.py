"""The checks that plug-ins run: kept under `python -O`, with room that comes from rounding, in few words."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import tiny
from treesearch.backends.base import Gaussian
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.pipelines import DiffusersKernel
from treesearch.testing import CheckFailed, check_kernel, check_reward, rounding

ROOT = Path(__file__).parents[2]
UNCHECKED = """
import sys, torch
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch import testing

class Leaky(LinearGaussian):
    def transition(self, x, t, cond=None):
        law = super().transition(x, t, cond)
        return Gaussian(law.mean + x.mean(), law.std, law.endpoint)

class Short(LinearGaussian):
    def decode(self, x0):
        return x0[:3]

x = torch.arange(8.0)[:, None]
planted = {
    "rows": lambda: testing.check_kernel(Leaky()),
    "decode": lambda: testing.check_kernel(Short()),
    "batches": lambda: testing.check_kernel(Leaky(), atol=0.0, proposal=True),
    "reward": lambda: testing.check_reward(lambda x: x[:, 0] - x[:, 0].mean(), x),
}
for name, check in planted.items():
    try:
        check()
        print("missed", name)
    except AssertionError as error:
        print("caught", name)
print("optimised", sys.flags.optimize)
"""


def test_laws_are_checked_without_asserts_too():
    run = [sys.executable, "-O", "-c", UNCHECKED]
    told = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "missed" not in told
    assert told.count("caught") == 4
    assert "optimised 1" in told


def narrows(test: ast.expr) -> bool:
    """`x is not None` and its like tell a type checker what is known; they check no input."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and isinstance(test.comparators[0], ast.Constant)
    return isinstance(test, ast.Call) and ast.unparse(test.func) in ("isinstance", "callable")


@pytest.mark.parametrize("package", ["backends", "rewards", "treesearch"])
def test_no_assert_checks_anything(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assert):
                assert narrows(node.test), f"{path}:{node.lineno}: gone under python -O, raise an error instead"
                assert node.msg is None, f"{path}:{node.lineno}: a message is for users, raise an error instead"


SCHEDULE = Schedule.variance_preserving(torch.linspace(0.999, 0.01, 50, dtype=torch.float64), 3)


class Mean(nn.Module):
    """A network whose rows know of each other, by so much."""

    def __init__(self, leak):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.leak = nn.Linear(600, 600), leak

    def forward(self, x, timestep):
        return self.line(x) + self.leak * x.mean()


@pytest.fixture(scope="module")
def tiny_kernel(tmp_path_factory):
    return DiffusersKernel.from_pretrained(
        str(tiny.checkpoint("sd", tmp_path_factory.mktemp("tiny"))), num_steps=3, device="cpu"
    )


@pytest.mark.filterwarnings("ignore")
def test_the_rounding_of_a_pipeline_is_no_fault(tiny_kernel):
    check_kernel(tiny_kernel, ["a cat", "two red dogs", "a third"], rows=6)


def kernel_of(network, dtype=torch.float32):
    kernel = DiffusionKernel(network.to(dtype), state_shape=(600,), schedule=SCHEDULE)
    kernel.dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return kernel


def test_room_grows_with_the_sums_and_the_dtype():
    with torch.random.fork_rng():
        few, more = nn.Linear(600, 600), nn.Sequential(*(nn.Linear(600, 600) for _ in range(20)))
        shares = [rounding(kernel_of(*args)).share for args in ((few,), (more,), (more, torch.bfloat16))]
        assert shares == sorted(shares)
        assert len(set(shares)) == 3
        assert rounding(kernel_of(few, torch.float64)).share < 1e-12


def test_a_leak_between_rows_is_told_in_few_words():
    with torch.random.fork_rng():
        kernel = DiffusionKernel(Mean(0.5), state_shape=(600,), schedule=SCHEDULE)
        with pytest.raises(CheckFailed, match=r"take with repeats at t = 3: .* of 4 rows differ .* is allowed") as told:
            check_kernel(kernel)
    assert len(str(told.value)) < 400


def test_samples_lie_where_the_kernel_says():
    kernel = DiffusionKernel(
        Mean(0.0), state_shape=(600,), schedule=SCHEDULE, decode=torch.sigmoid, sample_range=(0, 1)
    )
    check_kernel(kernel)
    kernel.sample_range = (0.5, 1.0)
    with pytest.raises(CheckFailed, match=r"sample_range: expected entries of samples in 0\.5\.\.1"):
        check_kernel(kernel)


def test_long_lists_are_cut_short():
    with pytest.raises(CheckFailed) as told:
        check_reward(
            lambda x: x[:, 0] - x[:, 0].mean(), torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        )
    assert len(str(told.value)) < 400


def test_log_prob_in_single_precision_is_no_fault():
    """A sum of many terms in float32 misses by their rounding, and a wrong one by more."""

    class Wide:
        num_steps, state_shape = 2, (4096,)

        def __init__(self, off):
            self.off = off

        def prior(self, noise, cond=None):
            return noise

        def transition(self, x, t, cond=None):
            law = Gaussian(0.9 * x + 3, torch.full((len(x), 1), 0.1), x)
            return Single(**vars(law), off=self.off)

        def decode(self, x0):
            return x0

    class Single(Gaussian):
        def __init__(self, off=0.0, **parts):
            super().__init__(**parts)
            object.__setattr__(self, "off", off)

        def log_prob(self, x):
            std = self.std.expand(x.shape)
            terms = -0.5 * ((x - self.mean) / std) ** 2 - std.log() - 0.9189385332046727
            return terms.sum(1) + self.off

        def take(self, rows):
            law = Gaussian.take(self, rows)
            return Single(**vars(law), off=self.off)

    check_kernel(Wide(0.0))
    with pytest.raises(CheckFailed, match="beside N"):
        check_kernel(Wide(1.0))
