"""The kernel of masked text beside exact enumeration of a tiny network, and how a chain is set."""

import contextlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

import treesearch as ts
from tests.support import text
from tests.support.laws import WIDE, populations, unbiased
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance.drawn import Drawn
from treesearch.backends.text.asked import Asked
from treesearch.backends.text.kernel import MaskedTextKernel
from treesearch.backends.text.rescored import Rescored
from treesearch.rewards.analytic import constant
from treesearch.rewards.base import Reward
from treesearch.testing import bare_chain, check_kernel

F64 = torch.float64


@contextlib.contextmanager
def meanwhile(default):
    """A default dtype or device that the program has set."""
    dtype = isinstance(default, torch.dtype)
    (torch.set_default_dtype if dtype else torch.set_default_device)(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


V, L, T = 3, 3, 3
NET = text.Net(V, L)
TABLE = text.Table(L, V)
EVERY = text.states(V, L)
VALUES = torch.linspace(-1, 1.5, len(EVERY), dtype=F64).sin() * 2


def kernel(network=NET, **settings):
    return MaskedTextKernel(network, **({"length": L, "num_steps": T, "mask": V} | settings))


def score(x, prompts):
    return VALUES[text.index(x, V)]


REWARD = Reward(score, "table")


def law_matrix(made, t):
    n = len(EVERY)
    law = made.transition(EVERY, torch.full((n,), t)).take(torch.arange(n).repeat_interleave(n))
    return law.log_prob(EVERY.repeat(n, 1)).exp().reshape(n, n)


def exact(made, start=None):
    """Exact laws of a kernel under exp(r), from the formula."""
    return text.tilted(
        made.model, made.corruption.alpha, VALUES, vocabulary=V, length=L, temperature=made.temperature, start=start
    )


def distance(weights, x, law):
    """Total variation between weighted sequences and a law over states."""
    found = torch.zeros(len(law), dtype=F64).index_add(0, text.index(x, V), weights)
    return float((found - law).abs().sum() / 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"schedule": "cosine", "temperature": 0.6}, {"schedule": (1.0, 0.9, 0.2, 0.0)}],
    ids=["log-linear", "cosine", "given"],
)
def test_every_step_is_the_formula(settings):
    made = kernel(**settings)
    want = text.matrices(NET, made.corruption.alpha, V, L, made.temperature)
    for t in range(1, T + 1):
        torch.testing.assert_close(law_matrix(made, t), want[t - 1], atol=1e-12, rtol=0)
    assert made.corruption.alpha[0] == 1
    assert made.corruption.alpha[-1] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reveal": "confidence", "endpoint": "draw"},
        {"reveal": "left"},
        {"mask": None, "noise": "uniform", "vocabulary": V + 1},
        {"top_p": 0.9, "schedule": "cosine", "endpoint": "draw"},
    ],
    ids=["masked", "confidence", "left", "uniform", "nucleus"],
)
def test_it_is_a_kernel(settings):
    check_kernel(kernel(**settings))


def test_populations_are_unbiased_and_their_samples_those_of_the_target():
    made, found = kernel(), exact(kernel())
    unbiased(populations(made, REWARD, ts.FeynmanKac(num_particles=8, ess_threshold=0.8), found.log_z, 1000))
    method = ts.FeynmanKac(num_particles=4096, ess_threshold=0.8)
    result = ts.search(made, REWARD, method, budget=ts.Budget(iterations=1), batch_size=WIDE)
    weights = result.log_weights.softmax(0)
    assert distance(weights, result.samples, found.posterior) < 0.05
    plain = torch.full_like(weights, 1 / len(weights))
    assert distance(plain, bare_chain(made, len(weights))[-1], found.posterior) > 0.2


def test_trees_are_unbiased():
    made, found = kernel(), exact(kernel())
    method = ts.DiffusionTreeSampling(selection="round_robin", wave=8, widening_c=1, widening_alpha=0.7)
    budget = ts.Budget(iterations=120 * 48)
    result = ts.search(made, REWARD, method, prompts=[[]] * 120, budget=budget, batch_size=WIDE)
    unbiased(np.exp([task.log_z - found.log_z for task in result.tasks]))


def test_tree_sampling_is_unbiased():
    made, found = kernel(), exact(kernel())
    budget = ts.Budget(nfe=160 * 40 * T)
    result = ts.search(made, REWARD, ts.TreeSampling(), prompts=[[]] * 160, budget=budget, batch_size=WIDE)
    unbiased(np.exp([task.log_z - found.log_z for task in result.tasks]))


def test_best_of_n_over_a_prompt_samples_the_conditional_chain():
    made, start = kernel(TABLE), torch.tensor([1, V, V])
    found = exact(made, start)
    joint = torch.zeros(len(EVERY), dtype=F64)
    joint[text.index(TABLE.every, V)] = TABLE.data
    given = torch.where(EVERY[:, 0] == 1, joint, 0.0)
    one_by_one = kernel(TABLE, reveal="left", num_steps=2)
    samples = bare_chain(one_by_one, 20_000, prompts=[[1]])[-1]
    counts = text.index(samples, V).bincount(minlength=len(given))
    seen = given > 0
    assert not counts[~seen].any()
    assert stats.chisquare(counts[seen], 20_000 * (given / given.sum())[seen]).pvalue > 1e-3
    result = ts.search(made, REWARD, ts.BestOfN(), prompts=[[1]], budget=ts.Budget(nfe=3 * 20_000), batch_size=WIDE)
    assert (result.samples[:, 0] == 1).all()
    assert abs(result.log_z - found.log_z) < 4 * result.log_z_se


@pytest.mark.parametrize("reveal", ["left", "confidence"])
def test_one_reveal_a_step_is_the_joint_law_whatever_the_order(reveal):
    samples = bare_chain(kernel(TABLE, reveal=reveal, num_steps=L), 20_000)[-1]
    joint = torch.zeros(len(EVERY), dtype=F64)
    joint[text.index(TABLE.every, V)] = TABLE.data
    counts = text.index(samples, V).bincount(minlength=len(joint))
    seen = joint > 0
    assert stats.chisquare(counts[seen], 20_000 * joint[seen]).pvalue > 1e-3
    at_once = bare_chain(kernel(TABLE, reveal=reveal, num_steps=1), 20_000)[-1]
    counts = text.index(at_once, V).bincount(minlength=len(joint))
    assert stats.chisquare(counts[seen], 20_000 * joint[seen]).pvalue < 1e-9  # not at once


@pytest.mark.parametrize(("reveal", "steps"), [("left", 1), ("confidence", 2)])
def test_parallel_reveals_are_corrected_by_their_weights(reveal, steps):
    made = Rescored(kernel(TABLE, reveal=reveal, num_steps=steps))
    assert made.departs is None
    joint = torch.zeros(len(EVERY), dtype=F64)
    joint[text.index(TABLE.every, V)] = TABLE.data
    log_z = float((joint * VALUES.exp()).sum().log())
    unbiased(populations(made, REWARD, ts.FeynmanKac(num_particles=16, ess_threshold=0.8), log_z, 1200))
    budget = ts.Budget(iterations=8192)
    result = ts.search(made, constant(0.0), ts.BestOfN(), budget=budget, batch_size=WIDE)
    weights = result.log_weights.softmax(0)
    assert distance(weights, result.samples, joint) < 0.04
    assert distance(torch.full_like(weights, 1 / 8192), result.samples, joint) > 0.06


def test_reveals_are_rescored_under_the_prompt_of_their_row():
    made = Rescored(kernel(TABLE, reveal="left", num_steps=1))
    cond = made.encode([[0], []])
    law = made.transition(made.prior(torch.zeros(2, L, dtype=F64), cond), torch.ones(2, dtype=torch.int64), cond)
    x = torch.tensor([[0, 1, 2], [2, 0, 1]])
    joint = TABLE.data[[int((TABLE.every == row).all(1).nonzero()) for row in x]]
    given = torch.stack([TABLE.data[TABLE.every[:, 0] == 0].sum(), torch.tensor(1.0).double()])
    torch.testing.assert_close(law.log_prob(x) + law.log_weight(x), (joint / given).log())


def test_rescored_is_for_reveals_in_an_order():
    with pytest.raises(ValueError, match="use top_p=1"):
        Rescored(kernel(reveal="left", top_p=0.9))
    with pytest.raises(ValueError, match="needs reveal='left' or 'confidence'"):
        Rescored(kernel())
    with pytest.raises(TypeError, match="is for a MaskedTextKernel"):
        Rescored(LinearGaussian())
    assert Rescored(kernel(reveal="left", num_steps=2)).rows_per_nfe == (1, 3, 2)
    check_kernel(Rescored(kernel(reveal="left")), proposal=True, prompts=[[0], []])


@pytest.mark.parametrize("default", [torch.float64, "meta"])
def test_torch_s_defaults_change_nothing(default):
    def found():
        made = Drawn(kernel(endpoint="draw", top_p=0.9), REWARD, draws=2)
        return ts.search(made, REWARD, ts.FeynmanKac(num_particles=4), prompts=[[1]], budget=ts.Budget(iterations=4))

    want = found()
    with meanwhile(default):
        got = found()
    assert torch.equal(got.samples, want.samples)
    assert torch.equal(got.log_weights, want.log_weights)


def test_known_tokens_leave_the_density():
    made = kernel()
    x = bare_chain(made, 50, prompts=[[2, 0]])[0]
    assert (x[:, :2] == torch.tensor([2, 0])).all()
    law = made.transition(x, torch.full((50,), T))
    alone = made.corruption.reveal(torch.tensor([T])) * NET(x[:1]).double()[0, 2, :V].softmax(0)
    y = x.clone()
    y[:, 2] = torch.arange(50) % V
    torch.testing.assert_close(law.log_prob(y).exp(), alone[y[:, 2]])


def test_guidance_masks_the_prompt_and_takes_two_rows():
    made = kernel(guidance_scale=2.5)
    assert made.rows_per_nfe == 2
    cond = made.encode([[1], [2]])
    x = made.prior(torch.zeros(2, L, dtype=F64), cond)
    law = made.transition(x, torch.full((2,), T), cond)
    absent, given = NET(torch.full_like(x, V)), NET(x)
    want = (absent + 2.5 * (given - absent))[..., :V][x == V]
    torch.testing.assert_close(law.logits[:, :V], want)
    assert (law.logits[:, V] == -math.inf).all()
    with pytest.raises(ValueError, match="guides by prompts"):
        made.transition(x, torch.full((2,), T))


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_step_of_uniform_noise_is_that_of_diffusers(temperature):
    from diffusers import DiscreteDDIMScheduler

    steps, size, n = 4, V + 1, 40_000
    scheduler = DiscreteDDIMScheduler(steps)
    settings = {"mask": None, "noise": "uniform", "vocabulary": size, "temperature": temperature}
    made = kernel(**settings, schedule=scheduler, num_steps=steps)
    assert made.stochastic[0]
    x = torch.tensor([[0, 3, 2]])
    logits = NET(x).float()
    for t in (1, 2, 4):
        law = made.transition(x, torch.tensor([t]))
        drawn = scheduler.step(
            logits.expand(n, -1, -1),
            steps - t,
            x.expand(n, -1),
            temperature=temperature,
            generator=torch.Generator().manual_seed(t),
        ).prev_sample
        for i in range(L):
            every = x.repeat(size, 1)
            every[:, i] = torch.arange(size)
            others = law.log_prob(x) - one_position(law, x, i)
            want = (law.take(torch.zeros(size, dtype=torch.int64)).log_prob(every) - others).exp()
            assert float(want.sum()) == pytest.approx(1, abs=1e-12)
            assert stats.chisquare(drawn[:, i].bincount(minlength=size), n * want).pvalue > 1e-3


def one_position(law, x, i):
    """log P of position i of a law alone."""
    rest = law.at.clone()
    rest[:, [j for j in range(x.shape[1]) if j != i]] = -1
    return type(law)(law.x, rest, law.logits, law.jump, law.endpoint, law.spread, law.temperature).log_prob(x)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("BlockRefinementScheduler", "remembers which, so that there is no law"),
        ("AmusedScheduler", "without a closed form"),
        ("EntropyBoundScheduler", "no posterior of a corruption"),
        ("DDIMScheduler", "none of discrete diffusion"),
    ],
)
def test_schedulers_without_such_a_step_are_refused_by_name(name, why):
    import diffusers
    from diffusers.schedulers import scheduling_entropy_bound

    made = getattr(diffusers, name, None) or getattr(scheduling_entropy_bound, name)
    scheduler = made(mask_token_id=3) if name == "AmusedScheduler" else made()
    with pytest.raises(ValueError, match=f"{name} cannot be searched.*{why}"):
        kernel(schedule=scheduler)


def test_drawn_endpoints_are_of_the_network_and_the_same_for_equal_states():
    made = kernel(endpoint="draw")
    x = torch.full((6, L), V)
    law = made.transition(x, torch.tensor([1, 1, 2, 2, 3, 3]))
    assert torch.equal(law.endpoint[::2], law.endpoint[1::2])
    assert (law.endpoint < V).all()


def test_a_value_of_several_draws_leaves_every_estimate_exact():
    made = Drawn(kernel(), REWARD, draws=3)
    assert made.rewards_per_nfe == (0, 3, 3, 3)
    law = made.transition(EVERY, torch.full((len(EVERY),), 2))
    assert float(law.rewards[0]) == pytest.approx(float(VALUES[0]))  # nothing is masked
    many = Drawn(kernel(), REWARD, draws=3_000).transition(EVERY[-1:], torch.tensor([2])).rewards
    p = NET(EVERY[-1:])[0, :, :V].softmax(-1)
    mean = sum(float(VALUES[text.index(x[None], V)]) * float(p[range(L), x].prod()) for x in TABLE.every)
    assert abs(float(many) - mean) < 4 * float(VALUES.std()) / 3_000**0.5
    found = exact(kernel())
    unbiased(populations(made, REWARD, ts.FeynmanKac(num_particles=8, ess_threshold=0.8), found.log_z, 800))
    soft = Drawn(kernel(), REWARD, draws=3, lam=2.0).transition(EVERY, torch.full((len(EVERY),), 2)).rewards
    assert (soft >= law.rewards - 1e-12).all()
    wrong = Drawn(LinearGaussian(), REWARD)
    with pytest.raises(TypeError, match="draws no endpoints"):
        wrong.transition(torch.zeros(1, 1), torch.tensor([1]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_p_draws_from_the_fewest_tokens_that_have_it_together(temperature):
    made = kernel(top_p=0.7, temperature=temperature)
    assert "top_p" in made.departs
    x = torch.full((1, L), V)
    law, p = made.transition(x, torch.tensor([1])), (NET(x)[0, :, :V] / temperature).softmax(-1)
    for i in range(L):
        kept = law.logits[law.at[0, i]] > -math.inf
        order = p[i].argsort(descending=True)
        count = int((p[i][order].cumsum(0) < 0.7).sum()) + 1
        assert set(kept.nonzero().flatten().tolist()) == set(order[:count].tolist())


def test_confidence_is_the_network_s_whatever_is_drawn_from():
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [0.5, 0.3, 0.2]]).log()
    made = kernel(lambda x: logits.expand(len(x), -1, -1).clone(), reveal="confidence", top_p=0.3)
    law = made.transition(torch.full((1, L), V), torch.tensor([L]))
    assert law.jump[law.at[0]].tolist() == [0, 1, 0]


def test_other_settings_make_another_kernel_of_the_same_network():
    made = kernel().with_settings(num_steps=5, temperature=0.5)
    assert made.model is NET
    assert made.fingerprint == kernel(num_steps=5, temperature=0.5).fingerprint
    check_kernel(made, rows=4)
    assert kernel(schedule="cosine").with_settings(num_steps=2).corruption.alpha.tolist() == pytest.approx(
        [1, 0.5**0.5, 0]
    )
    with pytest.raises(ValueError, match="unknown settings steps: choose length, num_steps"):
        kernel().with_settings(steps=5)


@pytest.mark.parametrize("vocabulary", [None, V + 1])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forbid": [9]}, "forbid names token 9, the network knows 4"),
        ({"forbid": range(V)}, "none of 4 tokens is left to draw"),
    ],
)
def test_tokens_that_are_never_drawn_are_some_of_the_network_s(vocabulary, settings, said):
    with pytest.raises(ValueError, match=said):
        kernel(vocabulary=vocabulary, **settings).transition(EVERY[-1:], torch.tensor([1]))


def test_tokens_that_the_network_does_not_know_are_refused():
    with pytest.raises(ValueError, match="a prompt has token 99, the network knows 4"):
        kernel(vocabulary=V + 1).encode([[99]])
    made = kernel()
    cond = made.encode([[99]])
    with pytest.raises(ValueError, match="the network stopped at tokens up to 99"):
        made.transition(made.prior(torch.zeros(1, L), cond), torch.tensor([1]), cond)


def test_what_is_changed_is_said():
    assert kernel().departs is None
    assert kernel().base_law is None
    assert (
        kernel(temperature=0.5, forbid=(0,)).base_law
        == "the network at temperature 0.5, without 1 tokens that are never drawn"
    )
    assert "confidence" in kernel(reveal="confidence").departs
    assert not (bare_chain(kernel(forbid=(0,)), 200)[-1] == 0).any()


def test_the_time_is_told_where_it_is_read():
    told = []

    def network(x, *time):
        told.append(time)
        return NET(x)

    for how in ("nothing", "time", "sigma"):
        kernel(network, asked=Asked(told=how)).transition(EVERY[:2], torch.tensor([1, 3]))
    assert told[0] == ()
    torch.testing.assert_close(told[1][0], torch.tensor([1 / 3, 1.0]))
    torch.testing.assert_close(told[2][0], torch.tensor([-math.log(2 / 3), -math.log(1e-3)]))


def test_settings_and_weights_tell_kernels_apart():
    settings = [{}, {"temperature": 0.5}, {"schedule": "cosine"}, {"reveal": "left"}, {"top_p": 0.5}, {"forbid": (1,)}]
    settings += [{"guidance_scale": 2.0}, {"endpoint": "draw"}, {"num_steps": 2}, {"network": text.Net(V, L, seed=1)}]
    found = [kernel(**one).fingerprint for one in settings]
    assert len(set(found)) == len(settings)
    assert kernel().fingerprint == found[0]
    assert kernel(lambda x: NET(x)).fingerprint is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 0}, "length is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"mask": None}, "needs the number of its mask token"),
        ({"noise": "uniform", "vocabulary": 4}, "uniform noise has no mask"),
        ({"noise": "uniform", "mask": None}, "needs its vocabulary"),
        ({"noise": "uniform", "mask": None, "vocabulary": 4, "reveal": "left"}, "is of masks"),
        ({"noise": "uniform", "mask": None, "vocabulary": 4, "guidance_scale": 2}, "guidance masks the prompt"),
        ({"noise": "grey"}, "noise is 'grey'"),
        ({"schedule": "linear"}, "unknown schedule 'linear': choose log-linear"),
        ({"schedule": (1.0, 0.5)}, r"shape \(2,\), expected 4 numbers"),
        ({"schedule": (1.0, 0.5, 0.7, 0.0)}, "fall from 1 to 0"),
        ({"reveal": "best"}, "reveal is 'best'"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": 1e-310}, "temperature is 1e-310"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"guidance_scale": "a"}, "guidance_scale is 'a'"),
        ({"forbid": ["a"]}, r"forbid is \('a',\), expected numbers of tokens"),
        ({"forbid": 7}, "forbid is 7, expected numbers of tokens"),
        ({"mask": 500, "vocabulary": 4}, "mask is 500, the network knows 4 tokens"),
        ({"device": "tpu9"}, "unknown device 'tpu9': choose cpu"),
        ({"top_p": 0}, "top_p is 0"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"endpoint": "mean"}, "endpoint is 'mean'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        kernel(**settings)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([0, 1, 2], "leaves no room"), ("the film", "sequence of tokens"), ([V], "mask not among them")],
)
def test_prompts_that_do_not_fit_are_refused(prompt, said):
    with pytest.raises((TypeError, ValueError), match=said):
        kernel().encode([prompt])


def test_a_network_of_another_form_is_refused():
    with pytest.raises(ValueError, match=r"returned shape \(2, 3\) for tokens \(2, 3\)"):
        kernel(lambda x: x.double()).transition(EVERY[:2], torch.tensor([1, 1]))
    uniform = kernel(mask=None, noise="uniform", vocabulary=9)
    with pytest.raises(ValueError, match=r"logits of 4 tokens, the vocabulary of the noise is 9"):
        uniform.transition(EVERY[:2], torch.tensor([1, 1]))
