"""Direct inversion: pivots beside rows, to the bit; what is counted; corrections; searches of several pictures."""

import numpy as np
import pytest
import torch
from torch import nn

import treesearch as ts
from tests.support import kernels, tiny
from tests.support.attending import SMALL
from tests.support.tolerance import float32_tolerance
from treesearch.backends import mnist
from treesearch.backends.base import Wrapper, describe
from treesearch.backends.chains.inversion import invert
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS
from treesearch.backends.interventions import Actions, Intervened, Proposal
from treesearch.backends.interventions.cfg import cfg
from treesearch.backends.interventions.mutual import Mutual
from treesearch.backends.interventions.prompt_to_prompt import PromptToPrompt
from treesearch.backends.interventions.softpag import softpag
from treesearch.backends.roots import Direct, Rooted, direct
from treesearch.backends.roots.absent import Absent
from treesearch.rewards.base import Reward
from treesearch.testing import check_kernel
from treesearch.testing.chains import conditioning

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SOURCE, TARGETS = "a cat", ("a dog", "a fox")
T = SMALL["num_steps"]


@pytest.fixture(scope="module")
def load(tiny_root):
    kept = {}

    def model(name, eta=0.0):
        if (name, eta) not in kept:
            folder = str(tiny.checkpoint(name, tiny_root))
            kept[name, eta] = ts.backends.diffusers(folder, **SMALL, guidance_scale=7.5, eta=eta)
        return kept[name, eta]

    return model


def path_of(kernel, n=2):
    """Paths of n pictures under the source prompt without guidance."""
    x0 = torch.randn(n, *kernel.state_shape, generator=torch.Generator().manual_seed(1))
    found = kernel.encode([SOURCE] * n)
    return invert(cfg(kernel, 1.0), x0, cond={k: getattr(v, "value", v) for k, v in found.items()})


def told(kernel, task=(0, 1)):
    return conditioning(kernel, list(TARGETS), np.array(task))


class Rows:
    """What the network of a kernel is called on, while it stands."""

    def __init__(self, network):
        self.seen, self.hook = [], network.register_forward_pre_hook(lambda part, given: self.seen.append(given[0]))

    def __enter__(self):
        return self.seen

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("control", ["replace", "kv"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_source_branch_is_the_path_to_the_bit_and_the_count_is_that_of_the_paper(load, name, control):
    kernel = load(name)
    path = path_of(kernel)
    settings = {"cross": 1.0} if control == "replace" else {"after": 0.0}
    wrapped = Rooted(direct(kernel, path, SOURCE, control, **settings), path)
    with Rows(kernel.network) as seen:
        cond = told(wrapped)
        x = wrapped.prior(torch.zeros(2, *kernel.state_shape), cond)
        for t in range(T, 0, -1):
            x = wrapped.transition(x, torch.full((2,), t), cond).mean
    assert len(seen) == T
    for t, rows in zip(range(T, 0, -1), seen, strict=True):
        absent, given = rows.chunk(2)
        assert torch.equal(absent, given)
        assert torch.equal(given[:2], path[t])
    assert sum(map(len, seen)) == 2 * T * (1 + 1) * 2  # of two pictures
    assert sum(describe(wrapped).rows_per_nfe[1:]) * 2 == sum(map(len, seen))


def test_rows_of_one_picture_share_its_pivot(load):
    kernel = load("sd")
    wrapped = direct(kernel, path_of(kernel), SOURCE)
    k, x = 3, torch.randn(6, *kernel.state_shape)
    with Rows(kernel.network) as seen:
        wrapped.transition(x, torch.full((6,), T), told(wrapped, (0, 1, 0, 1, 0, 1)))
    assert len(seen[0]) == 2 * 2 * (1 + k)  # 2(1 + k) of each picture
    assert describe(wrapped).rows_per_nfe == (2, 2, 4, 4, 4, 4)  # 4 = int(.8 T) steps
    with Rows(kernel.network) as seen:
        wrapped.transition(x[:2], torch.tensor([T, 1]), told(wrapped, (0, 0)))
        wrapped.transition(x[:2], torch.tensor([1, 1]), told(wrapped, (0, 0)))
    assert [len(rows) for rows in seen] == [2 * (1 + 2), 2 * 2]


@pytest.mark.parametrize("control", ["refine", "kv"])
def test_pictures_with_prompts_of_their_own_in_a_batch_are_as_alone(load, control):
    kernel = load("sd")
    path, sources = path_of(kernel), ("a cat", "one black cat on a mat")
    both = direct(kernel, path, sources, control)
    task, t = (1, 0, 1), torch.tensor([T, T, T - 1])
    x = torch.randn(3, *kernel.state_shape, generator=torch.Generator().manual_seed(2))
    found = both.transition(x, t, told(both, task)).mean
    for i, j in enumerate(task):
        alone = direct(kernel, path[:, j : j + 1], sources[j], control)
        cond = conditioning(alone, [TARGETS[j]], np.array([0]))
        want = alone.transition(x[i : i + 1], t[i : i + 1], cond).mean
        assert (found[i] - want[0]).abs().max() < 1e-4  # of a row alone and in a batch, under w = 7.5
        other = direct(kernel, path[:, j : j + 1], sources[1 - j], control)
        cond = conditioning(other, [TARGETS[j]], np.array([0]))
        assert (found[i] - other.transition(x[i : i + 1], t[i : i + 1], cond).mean[0]).abs().max() > 1e-3


def test_without_control_it_is_the_kernel_to_the_bit(load):
    kernel = load("sd")
    for source in (SOURCE, None):
        wrapped = direct(kernel, path_of(kernel), source, None)
        x, t, cond = torch.randn(2, *kernel.state_shape), torch.tensor([5, 2]), told(wrapped)
        plain = told(kernel)
        with Rows(kernel.network) as seen:
            law = wrapped.transition(x, t, cond)
        assert [len(rows) for rows in seen] == [4]
        assert torch.equal(law.mean, kernel.transition(x, t, plain).mean)
        assert describe(wrapped).rows_per_nfe == (2,) * (T + 1)
        assert describe(wrapped).base_law is None


def test_a_correction_is_that_of_the_source(load):
    kernel = load("sd")
    path = path_of(kernel)
    x, t = torch.randn(2, *kernel.state_shape), torch.tensor([4, 2])
    half, full = (direct(kernel, path, SOURCE, None, correction=s) for s in (0.5, 1.0))
    cond = told(half)
    source = conditioning(kernel, [SOURCE], np.array([0, 0]))
    pivots, below = (path[at, torch.arange(2)] for at in (t, t - 1))
    missed = below - kernel.transition(pivots, t, source).mean
    plain = kernel.transition(x, t, told(kernel)).mean
    found = half.transition(x, t, cond).mean
    room = float32_tolerance(max(plain.abs().max().item(), missed.abs().max().item(), 300.0), 64, 30)
    assert (found - (plain + 0.5 * missed)).abs().max() < room
    assert missed.abs().max() > 100 * room
    own = conditioning(full, [SOURCE] * 2, np.array([0, 1]))
    assert (full.transition(pivots, t, own).mean - below).abs().max() < room  # the source corrected is the path


@pytest.mark.parametrize("control", ["replace", "refine", "kv"])
def test_the_source_prompt_walks_the_sources_own_walk(load, control):
    """A path that the guided kernel walked itself is walked again, attention taken from the pivots throughout."""
    kernel = load("sd")
    cond, x = conditioning(kernel, [SOURCE], np.array([0])), torch.randn(1, *kernel.state_shape)
    path = [x]
    for t in range(T, 0, -1):
        path.append(kernel.transition(path[-1], torch.tensor([t]), cond).mean)
    path = torch.stack(path[::-1])
    whole = {"after": 0.0} if control == "kv" else {"cross": 1.0, "own": 1.0}
    wrapped = direct(kernel, path, SOURCE, control, **whole)
    own, other = (conditioning(wrapped, [prompt], np.array([0])) for prompt in (SOURCE, "a dog"))
    for t in range(T, 0, -1):  # each step from the path: what rounding adds, later steps multiply
        law = wrapped.transition(path[t], torch.tensor([t]), own)
        room = float32_tolerance(path.abs().max().item() * 7.5, 64, 30)
        assert (law.mean - path[t - 1]).abs().max() < room
        assert (wrapped.transition(path[t], torch.tensor([t]), other).mean - path[t - 1]).abs().max() > room


@pytest.mark.parametrize(("name", "control"), [("sd", "replace"), ("sd", "refine"), ("sdxl", "refine"), ("sd", "kv")])
def test_it_is_a_kernel_that_every_method_searches(load, name, control):
    kernel = load(name, eta=1.0)
    path = path_of(kernel)
    wrapped = Rooted(direct(kernel, path, SOURCE, control), path, level=3)
    result = ts.search(
        wrapped, kernels.total, ts.BestOfN(n=2), prompts=list(TARGETS), budget=ts.Budget(nfe=12), batch_size=4
    )
    assert result.cost.nfe == 12
    assert result.cost.rows == 4 * sum(describe(wrapped).rows_per_nfe[1:])
    assert [len(task.samples) for task in result.tasks] == [2, 2]


@pytest.mark.parametrize("control", ["replace", "kv"])
def test_the_laws_of_a_kernel_hold(load, control):
    if control == "kv":
        kernel = mnist(num_steps=3)
        path = torch.randn(4, 1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        check_kernel(direct(kernel, path, control="kv", after=0.0), rows=4)
    else:
        kernel = load("sd", eta=1.0)
        path = path_of(kernel, 1)
        check_kernel(Rooted(direct(kernel, path, SOURCE, cross=1.0), path, level=1), ["a dog"], rows=4)


@pytest.mark.parametrize("default", [torch.float64, torch.device("meta")], ids=str)
@pytest.mark.parametrize("control", ["replace", "refine", "kv"])
def test_what_a_program_takes_for_its_default_changes_nothing(load, control, default):
    kernel = load("sd")
    path, t = path_of(kernel), torch.tensor([5, 2])

    def mean():
        wrapped = direct(kernel, path, SOURCE, control, correction=0.5)
        return wrapped.transition(path[4], t, told(wrapped)).mean

    expected = mean()
    is_dtype = isinstance(default, torch.dtype)
    put, usual = (torch.set_default_dtype, torch.float32) if is_dtype else (torch.set_default_device, None)
    put(default)
    try:
        found = mean()
    finally:
        put(usual)
    assert torch.equal(found, expected)


def test_a_batch_is_its_rows(load):
    kernel = load("sd", eta=1.0)
    wrapped = direct(kernel, path_of(kernel), SOURCE)
    x = torch.randn(4, *kernel.state_shape)
    t, task = torch.tensor([5, 4, 5, 1]), (0, 1, 1, 0)
    together = wrapped.transition(x, t, told(wrapped, task)).mean
    room = float32_tolerance(together.abs().max().item() * 7.5, 64, 30)
    for i in range(4):
        alone = wrapped.transition(x[[i]], t[[i]], told(wrapped, task[i : i + 1])).mean
        assert (together[[i]] - alone).abs().max() < room


def test_interventions_go_within_and_a_proposal_has_exact_weights(load):
    kernel = load("sd", eta=1.0)
    path = path_of(kernel)
    heads = ({"mid_block": [0]}, {"mid_block": [1]})
    inner = softpag(kernel, heads, 1.0, 2.0)
    wrapped = direct(inner, path, SOURCE)
    x, t = torch.randn(2, *kernel.state_shape), torch.tensor([5, 5])
    cond = told(wrapped, (0, 0))
    laws = [wrapped.transition(x, t, cond | {"choices": torch.tensor([[a], [b]])}).mean for a, b in ((0, 1), (0, 2))]
    room = float32_tolerance(laws[0].abs().max().item() * 7.5, 64, 30)
    assert (laws[0][0] - laws[1][0]).abs().max() < room
    assert (laws[0][1] - laws[1][1]).abs().max() > room
    plain = direct(kernel, path, SOURCE).transition(x, t, cond).mean
    assert (laws[0][0] - plain[0]).abs().max() < room  # setting 0 is off, for its pivot too
    assert Actions(wrapped, (4,)).num_steps == T
    with pytest.raises(TypeError, match="names no network"):
        Intervened(direct(kernel, path, SOURCE), inner.weak.intervention)
    law = Proposal(direct(kernel, path, SOURCE)).transition(x, t, cond)
    assert torch.equal(law.base_mean, kernel.transition(x, t, told(kernel, (0, 0))).mean)
    assert torch.equal(law.mean, plain)


def test_an_absent_prompt_by_level_goes_within_or_around(load):
    """Of pivots too: null-text inversion with attention of its source."""
    kernel = load("sd")
    path, x = path_of(kernel), torch.randn(3, *kernel.state_shape)
    table = {"prompt_embeds": torch.randn(T, 2, 77, 32, generator=torch.Generator().manual_seed(3))}
    t, task = torch.tensor([5, 4, 4]), (0, 1, 0)
    within, around = direct(Absent(kernel, table), path, SOURCE), Absent(direct(kernel, path, SOURCE), table)
    found = [wrapped.transition(x, t, told(wrapped, task)).mean for wrapped in (within, around)]
    room = float32_tolerance(found[0].abs().max().item() * 7.5, 64, 30)
    assert (found[0] - found[1]).abs().max() < room
    plain = direct(kernel, path, SOURCE)
    assert (found[0] - plain.transition(x, t, told(plain, task)).mean).abs().max() > room


def test_it_serves_kernels_without_prompts_and_gradients_pass():
    kernel = mnist(num_steps=3)
    path = torch.randn(4, 1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    wrapped = direct(kernel, path, control="kv", after=0.0)
    x = torch.randn(2, 1, 28, 28, requires_grad=True)
    law = wrapped.transition(x, torch.tensor([3, 2]), {"task": torch.zeros(2, dtype=torch.long)})
    law.endpoint.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0
    assert (law.mean - kernel.transition(x, torch.tensor([3, 2])).mean).abs().max() > 1e-3
    twin = direct(kernel, path, control="kv", after=0.4)
    assert wrapped.fingerprint != twin.fingerprint
    assert wrapped.base_law.endswith("with Mutual of the picture")


def score(samples, prompts):
    return samples.double().flatten(1).sum(1)


class Attends(LinearGaussian):
    network = nn.Identity()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda k, p: direct(k, p[:-1], SOURCE), r"path has shape \(5, .*expected \(6, 'n'"),
        (lambda k, p: direct(k, p * torch.nan, SOURCE), "not finite"),
        (lambda k, p: direct(k, p, SOURCE, "replase"), "control is 'replase'"),
        (lambda k, p: direct(k, p, SOURCE, None, cross=0.1), "settings are of a control"),
        (lambda k, p: direct(k, p, SOURCE, "kv", cross=0.1), "cross"),
        (lambda k, p: direct(k, p, SOURCE, correction=torch.nan), "correction is"),
        (lambda k, p: direct(k, p), "give source="),
        (lambda k, p: Direct(k, p, SOURCE, control="replace"), "expected such as PromptToPrompt"),
        (lambda k, p: direct(TDS(k, Reward(score, "sum")), p, SOURCE), "guide around it"),
        (lambda k, p: direct(k, p, (SOURCE,) * 3).encode(["a dog"]), "3 source prompts for 1 prompts"),
        (lambda k, p: direct(k, p, SOURCE).transition(p[5], torch.tensor([5, 5]), told(k)), "make it with `encode`"),
        (
            lambda k, p: direct(mnist(num_steps=5), torch.zeros(6, 1, 1, 28, 28), "3", None).encode(["8"]),
            "takes no prompts",
        ),
        (lambda k, p: direct(mnist(num_steps=5), torch.zeros(6, 1, 1, 28, 28)), "has no cross-attention"),
        (lambda k, p: direct(LinearGaussian(dim=2), torch.zeros(6, 1, 2), None, "kv"), "names no network"),
        (lambda k, p: direct(Attends(dim=2), torch.zeros(6, 1, 2), None, "kv"), "has no self-attention"),
    ],
)
def test_mistakes_are_named(load, make, words):
    kernel = load("sd")
    with pytest.raises((ValueError, TypeError), match=words):
        make(kernel, torch.zeros(T + 1, 2, *kernel.state_shape))


def test_settings_are_the_papers():
    assert PromptToPrompt() == PromptToPrompt("either", cross=0.8, own=0.5, tokens=256)
    assert Mutual().after == 0.08
    assert issubclass(Direct, Wrapper)
