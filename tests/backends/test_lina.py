"""LINA-style strengths: off to the bit, each row its own, formulas by hand, grids, the predictor, what is refused."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import treesearch as ts
from tests.support.attending import bed
from treesearch import rewards
from treesearch.backends.base import Wrapper, describe
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.schedules import Schedule, respace
from treesearch.backends.interventions import Actions, Proposal
from treesearch.backends.interventions.lina import STATED, WITHOUT, Ridge, early, early_steps, lina
from treesearch.backends.models.mnist import cosine_alphas_cumprod, to_images
from treesearch.testing import check_kernel

WORDS = ("cat", "shadow", "none")
BARS = cosine_alphas_cumprod()
EXPANDED = {"cat": "cat shadow", "shadow": "shadow none"}
X = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([4, 4, 2, 1])


def told(prompts):
    return torch.tensor([[float(word in prompt) for word in WORDS] for prompt in prompts], device="cpu")


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 48, device="cpu").reshape(3, 16))

    def forward(self, x, timestep, condition):
        return torch.tanh(0.3 * x + (condition @ self.weight).reshape(-1, 1, 4, 4)) * (
            timestep[:, None, None, None] / 1000
        )


def scenes(**more):
    schedule = Schedule.variance_preserving(BARS, 4, prediction="v")
    return DiffusionKernel(
        Told(), state_shape=(1, 4, 4), schedule=schedule, condition=told, decode=to_images, name="told", **more
    )


KERNEL = scenes()
SEVERAL = lina(
    KERNEL, EXPANDED, ((1.0, 0.0), (0.5, 2.0), (0.0, 1.0)), negative="none", box=(0.5, 0, 1, 1), levels=(3, 4)
)


def conditioning(kernel, prompts=("cat", "shadow", "cat", "cat"), chosen=None):
    cond = kernel.encode(prompts)
    return cond if chosen is None else cond | {"choices": torch.tensor(chosen)[:, None]}


def law(kernel, x=X, t=T, **more):
    return kernel.transition(x, t, conditioning(kernel, **more))


def test_a_model_may_be_told_of_prompts():
    check_kernel(KERNEL, ["cat", "shadow"])
    means = law(KERNEL).mean
    assert torch.equal(means[0], KERNEL.transition(X[:1], T[:1], {"condition": told(["cat"])}).mean[0])
    assert not torch.equal(means[1], KERNEL.transition(X[1:2], T[1:2], {"condition": told(["cat"])}).mean[0])
    assert scenes().fingerprint == KERNEL.fingerprint
    with pytest.raises(ValueError, match="give it prompts"):
        KERNEL.transition(X, T)


@pytest.mark.parametrize("kernel", [SEVERAL.kernel, Actions(SEVERAL, (3, 2)), lina(KERNEL, EXPANDED, (0.5, 1.0))])
def test_they_are_kernels(kernel):
    check_kernel(kernel, ["cat", "shadow"])


def test_a_proposal_has_weights():
    check_kernel(Proposal(lina(KERNEL, EXPANDED, (0.5, 1.0))), ["cat", "shadow"], proposal=True)


def test_no_strength_moves_no_bit():
    plain = law(KERNEL)
    for strengths in ((0.0, 0.0), ((0.0, 0.0), (1.0, 1.0))):
        found = law(lina(KERNEL, EXPANDED, strengths), chosen=[1, 1, 1, 1])
        assert torch.equal(found.mean, plain.mean)
        assert torch.equal(found.endpoint, plain.endpoint)
    assert torch.equal(law(SEVERAL, chosen=[0, 0, 0, 0]).mean, plain.mean)


def test_strengths_are_of_rows_and_of_levels():
    plain = law(KERNEL).mean
    found = law(SEVERAL, chosen=[1, 2, 1, 2]).mean
    assert (found != plain).flatten(1).any(1).tolist() == [True, True, False, False]
    for i, pair in ((0, (1.0, 0.0)), (1, (0.5, 2.0))):
        alone = lina(KERNEL, EXPANDED, pair, negative="none", box=(0.5, 0, 1, 1), levels=(3, 4))
        assert torch.equal(found[i], law(alone).mean[i])


def test_a_prompt_is_moved_towards_its_expansion():
    found = law(lina(KERNEL, EXPANDED, (1.0, 0.0))).mean
    assert torch.equal(found, law(KERNEL, prompts=["cat shadow", "shadow none", "cat shadow", "cat shadow"]).mean)
    half = told(["cat"]) + 0.25 * (told(["cat shadow"]) - told(["cat"]))
    quarter = law(lina(KERNEL, EXPANDED, (0.25, 0.0))).mean
    assert torch.allclose(quarter[0], KERNEL.transition(X[:1], T[:1], {"condition": half}).mean[0])


def test_a_picture_is_pushed_away_from_its_negative_within_the_box():
    one, pushed = law(KERNEL), law(lina(KERNEL, EXPANDED, (0.0, 2.0), negative="none", box=(0.5, 0, 1, 0.5)))
    other = law(KERNEL, prompts=["none"] * 4)
    for ours, theirs, found in ((one.mean, other.mean, pushed.mean), (one.endpoint, other.endpoint, pushed.endpoint)):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[2:, :2] = True
        assert torch.allclose(found[..., inside], (3 * ours - 2 * theirs)[..., inside], atol=1e-5)
        assert torch.equal(found[..., ~inside], ours[..., ~inside])
    by_prompt = lina(KERNEL, EXPANDED, (0.0, 2.0), negative={"cat": "none", "shadow": "none"}, box=(0.5, 0, 1, 0.5))
    assert torch.equal(law(by_prompt).mean, pushed.mean)


def test_a_push_leads_from_the_moved_prompt_away_from_the_negative_one():
    found = law(lina(KERNEL, EXPANDED, (1.0, 2.0), negative="none")).mean
    moved = law(KERNEL, prompts=["cat shadow", "shadow none", "cat shadow", "cat shadow"]).mean
    assert torch.allclose(found, 3 * moved - 2 * law(KERNEL, prompts=["none"] * 4).mean, atol=1e-5)


@dataclass(frozen=True)
class Heard(Wrapper):
    """Keeps what its kernel is told."""

    told: list = field(default_factory=list)

    def transition(self, x, t, cond=None):
        self.told.append(cond)
        return self.kernel.transition(x, t, cond)


def test_all_that_is_told_of_a_prompt_goes_with_it():
    mask = torch.tensor([[1, 0, 0]] * 4)
    cond = conditioning(lina(KERNEL, EXPANDED, negative="none")) | {"mask": mask}
    cond |= {STATED + "mask": mask.flip(1), WITHOUT + "mask": 1 - mask}
    heard = Heard(KERNEL)
    lina(heard, EXPANDED, (0.5, 1.0), negative="none").transition(X, T, cond)
    moved, without = heard.told
    assert torch.equal(moved["mask"], mask | mask.flip(1))  # tokens of both prompts
    assert torch.equal(moved["condition"], torch.lerp(cond["condition"], cond[STATED + "condition"], 0.5))
    for name in ("mask", "condition"):
        assert torch.equal(without[name], cond[WITHOUT + name])


def test_a_push_is_paid_for_where_it_acts():
    assert describe(SEVERAL).rows_per_nfe == (1, 1, 1, 2, 2)
    assert describe(lina(KERNEL, EXPANDED, (1.0, 0.0))).rows_per_nfe == (1,) * 5
    assert describe(lina(KERNEL, EXPANDED, (1.0, 0.5))).rows_per_nfe[1:] == (2,) * 4


def test_their_fingerprint_is_of_all_that_decides_the_law():
    others = [
        SEVERAL,
        lina(KERNEL, EXPANDED),
        lina(KERNEL, EXPANDED, (2.0, 0.0)),
        lina(KERNEL, EXPANDED | {"none": "cat"}),
        lina(KERNEL, EXPANDED, negative="none"),
        lina(KERNEL, EXPANDED, negative={"cat": "none"}),
        lina(KERNEL, EXPANDED, box=(0, 0, 0.5, 1)),
        lina(KERNEL, EXPANDED, levels=(2, 3)),
    ]
    found = [kernel.fingerprint for kernel in others]
    assert None not in found
    assert len(set(found)) == len(found)


def test_a_search_chooses_strengths_at_early_levels():
    kernel = Actions(SEVERAL, (4, 3))
    result = ts.search(
        kernel,
        rewards.brightness(),
        ts.DiffusionTreeSearch(branch_at=(4, 3)),
        budget=ts.Budget(nfe=60),
        prompts=["cat"],
        batch_size=8,
    )
    assert "under Lina" in result.certificate().base_law
    assert len(kernel.rows) == 4


def test_a_grid_with_even_shares_is_the_trailing_one():
    assert torch.equal(early(BARS, 20, tau=0.3, share=0.3).timestep, respace(1000, 20))


def test_a_grid_has_its_share_of_steps_early():
    grid = early(BARS, 20, tau=0.2, share=0.5, prediction="v")
    assert int((grid.timestep >= 800).sum()) == early_steps(20, 0.5) == 10
    assert grid.timestep[-1] == 999
    assert torch.allclose(grid.alpha[1:] ** 2, BARS[grid.timestep])


def test_the_predictor_finds_strengths_that_are_linear():
    draw = torch.Generator().manual_seed(0)
    c, weights = (
        torch.randn(40, 3, generator=draw).double(),
        torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.5, 0.0]]).double(),
    )
    ridge = Ridge.fit(c, c @ weights + 3.0, penalty=1e-9)
    assert torch.allclose(ridge.predict(c), c @ weights + 3.0, atol=1e-6)
    ridge = Ridge.fit(c, c @ weights, penalty=2.0)  # as of least squares with a row of √2 for each weight
    more = torch.cat([c - c.mean(0), 2**0.5 * torch.eye(3).double()])
    targets = torch.cat([(c - c.mean(0)) @ weights, torch.zeros(3, 2).double()])
    assert torch.allclose(ridge.weights, torch.linalg.lstsq(more, targets).solution, atol=1e-10)
    flat = Ridge.fit(c, c @ weights + 3.0, penalty=1e9).predict(c)
    assert torch.allclose(flat, (c @ weights + 3.0).mean(0).expand_as(flat), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lina(ts.backends.gaussian(dim=2), EXPANDED), "no network"),
        (lambda: lina(ts.backends.mnist(num_steps=2), EXPANDED).encode(["cat"]), "takes no prompts"),
        (lambda: lina(KERNEL, {"cat": 3}), "prompts are"),
        (lambda: lina(KERNEL, "cat"), "prompts are"),
        (lambda: lina(KERNEL, EXPANDED, negative={"cat": None}), "prompts are"),
        (lambda: lina(KERNEL, EXPANDED, ()), "strengths are"),
        (lambda: lina(KERNEL, EXPANDED, (1.0, -1.0)), "strengths are"),
        (lambda: lina(KERNEL, EXPANDED, ((1.0, 0.0), (float("nan"), 0.0))), "strengths are"),
        (lambda: lina(KERNEL, EXPANDED, ((1.0, 0.0, 2.0),)), "strengths are"),
        (lambda: lina(KERNEL, EXPANDED, box=(0.5, 0, 0.5, 1)), "box is"),
        (lambda: lina(KERNEL, EXPANDED, box=(0, 0, 2, 1)), "box is"),
        (lambda: lina(KERNEL, EXPANDED, box=(0.5, 0, 0.6, 1)), "holds no entry of states of 4 by 4"),
        (lambda: lina(KERNEL, EXPANDED, levels=(0, 2)), "levels are"),
        (lambda: lina(KERNEL, EXPANDED, ((1.0, 0.0), (1.0, 0.0))), "each once"),
        (lambda: SEVERAL.encode(["dog"]), "no expanded prompt of 'dog'"),
        (lambda: SEVERAL.transition(X, T, None), "prompts="),
        (lambda: law(SEVERAL), "3 settings"),
        (lambda: early(BARS, 1, tau=0.2, share=0.5), "num_steps is 1"),
        (lambda: early(BARS, 10, tau=1.0, share=0.5), "tau 1.0"),
        (lambda: early(BARS, 900, tau=0.1, share=0.5), "more than levels"),
        (lambda: Ridge.fit(torch.ones(3, 2), torch.ones(2, 1)), "expected .n, D. and .n, S."),
        (lambda: Ridge.fit(torch.ones(3, 2), torch.ones(3, 1), 0.0), "penalty"),
        (lambda: Ridge.fit(torch.ones(3, 2) / 0, torch.ones(3, 1)), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()


@pytest.mark.parametrize(("family", "push"), [("sd", (0.0, 1.0)), ("sd3", (0.5, 1.0))])
def test_it_is_of_pipelines_row_by_row(family, push, tiny_root):
    kernel = bed(family, tiny_root).kernel
    wrapped = lina(kernel, {"a": "a and its shadow", "b": "b on the floor"}, ((1.0, 0.0), push), box=(0.5, 0, 1, 1))
    cond = {
        k: v.value if isinstance(v, ts.backends.base.Shared) else v for k, v in wrapped.encode(["a", "b", "a"]).items()
    }
    plain = {k: v for k, v in cond.items() if not k.startswith((STATED, WITHOUT))}
    x, t = torch.randn(3, *kernel.state_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 2, 1])
    mean = kernel.transition(x, t, plain).mean
    off = wrapped.transition(x, t, cond | {"choices": torch.zeros(3, 1, dtype=torch.long)}).mean
    assert torch.equal(off, mean)
    some = wrapped.transition(x, t, cond | {"choices": torch.tensor([[1], [0], [2]])}).mean
    assert (some != mean).flatten(1).any(1).tolist() == [True, False, True]
