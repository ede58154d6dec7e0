"""Rewards: the algebra, the contract at the boundary, caching, normalisation, images, digits."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import treesearch as ts
from treesearch.backends.exact.enumerable import DiscreteChain
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards import analytic
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.compose import Normalisation, cached, normalise
from treesearch.rewards.facts import facts
from treesearch.rewards.images import classifier, image

INF = math.inf
X = torch.tensor([[0.0], [1.0], [2.0]])
VALUE = Reward(lambda x, _: x[:, 0], "x")
SQUARE = Reward(lambda x, _: x[:, 0] ** 2, "square")
FORBID = Reward(lambda x, _: torch.where(x[:, 0] > 1, -INF, x[:, 0]), "forbid")


def clip01(reward: Reward) -> Reward:
    return reward.clip(0.5, 1.5)


@pytest.mark.parametrize(
    ("reward", "values", "name"),
    [
        (VALUE + SQUARE, [0, 2, 6], "(x + square)"),
        (VALUE - SQUARE, [0, 0, -2], "(x - square)"),
        (VALUE * SQUARE, [0, 1, 8], "(x * square)"),
        (2 * VALUE + 1, [1, 3, 5], "((x * 2) + 1)"),
        (1 - VALUE, [1, 0, -1], "((x * -1) + 1)"),
        (VALUE - 0.5, [-0.5, 0.5, 1.5], "(x - 0.5)"),
        (-VALUE, [0, -1, -2], "(x * -1)"),
        (VALUE.min(1.5), [0, 1, 1.5], "(x min 1.5)"),
        (VALUE.min(SQUARE * 0.5), [0, 0.5, 2], "(x min (square * 0.5))"),
        (clip01(VALUE), [0.5, 1, 1.5], "clip(x, 0.5, 1.5)"),
        (SQUARE.gate(VALUE, above=1), [-INF, 1, 4], "(square gate[>=1] x)"),
        (SQUARE.gate(VALUE, above=2, otherwise=-9), [-9, -9, 4], "(square gate[>=2] x)"),
        (FORBID + 1, [1, 2, -INF], "(forbid + 1)"),
        (FORBID + FORBID, [0, 2, -INF], "(forbid + forbid)"),
        (FORBID.min(VALUE), [0, 1, -INF], "(forbid min x)"),
        (FORBID.clip(low=-3), [0, 1, -3], "clip(forbid, -3, inf)"),
        (SQUARE.gate(FORBID, above=0), [0, 1, -INF], "(square gate[>=0] forbid)"),
    ],
)
def test_algebra(reward: Reward, values: list[float], name: str) -> None:
    torch.testing.assert_close(reward(X), torch.tensor(values, dtype=torch.float64))
    assert reward.name == name


def test_algebra_refuses_what_it_cannot_combine() -> None:
    with pytest.raises(TypeError, match="cannot combine a reward with str: wrap it with as_reward"):
        VALUE + "one"
    with pytest.raises(ValueError, match="clip needs low < high, got 2 and 1"):
        VALUE.clip(2, 1)
    with pytest.raises(ValueError, match="x reads the sample, square the state: give both one input"):
        VALUE + dataclasses.replace(SQUARE, input="state")
    with pytest.raises(RewardError, match=r"\(forbid \* 0\) is nan where forbid = -inf .* row 2"):
        (FORBID * 0)(X)  # -inf · 0 is not quietly 0


def test_prompts_reach_the_functions_that_take_them() -> None:
    def length(samples, prompts=None):
        return [len(p) for p in prompts]

    both = as_reward(length) + as_reward(lambda samples: samples[:, 0])
    assert both(X, ["a", "bb", "ccc"]).tolist() == [1, 3, 5]
    assert both.name == "(length + <lambda>)"
    assert as_reward(VALUE) is VALUE
    with pytest.raises(TypeError, match="expected a reward or a function of samples, got float"):
        as_reward(3.0)


@pytest.mark.parametrize("method", [ts.DiffusionTreeSampling(), ts.FeynmanKac(num_particles=5)])
@pytest.mark.parametrize("wrap", [lambda reward: reward, lambda reward: cached(as_reward(reward))])
def test_prompts_belong_to_their_samples(method: object, wrap: object) -> None:
    """Tasks share batches of seven rows; each sample meets the prompt of its task."""

    def named(samples, prompts=None):
        return [float(p) for p in prompts]

    budget, prompts = ts.Budget(nfe=330), ["1", "2", "3"]
    result = ts.search(LinearGaussian(), wrap(named), method, prompts=prompts, budget=budget, batch_size=7)
    for task in result.tasks:
        assert set(task.rewards.tolist()) == {float(task.prompt)}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.tensor([0.0, math.nan, 1.0]), r"returned nan \(1 of 3 rows, first row 1\): .* -inf to forbid"),
        (torch.tensor([0.0, 1.0, INF]), r"returned \+inf \(1 of 3 rows, first row 2\)"),
        (torch.zeros(3, 1), r"returned shape \(3, 1\), expected \(3,\): squeeze the last axis"),
        (torch.zeros(2), r"returned shape \(2,\), expected \(3,\): return one number per sample"),
        (1.0, r"returned shape \(\), expected \(3,\): return one number"),
        (torch.zeros(3, dtype=torch.complex64), r"returned complex values \(torch.complex64\), expected real ones"),
        (["a", "b", "c"], "returned list, expected a tensor or a list of 3 numbers"),
        (None, "returned NoneType, expected a tensor or a list of 3 numbers"),
        ((i for i in range(3)), "returned generator, expected a tensor or a list of 3 numbers"),
        ([1.0, 10**400, 2.0], "returned list, expected a tensor or a list of 3 numbers"),
        (np.array([1, None, 2]), "returned ndarray, .*an array of object"),
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), "a masked array has entries that are no numbers"),
        (np.float64(2), r"returned shape \(\), expected \(3,\)"),
        (torch.tensor([1.0, 7e4, 1.0]).half(), r"returned \+inf \(1 of 3 rows, first row 1\)"),
    ],
)
def test_a_reward_that_breaks_its_contract_is_an_error(returned: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Reward(lambda x, _: returned, "bad")(X)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        np.array([1.0, 2.0, 3.0]),
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3]).to_sparse(),
        torch.tensor([1.0, 2, 3]).bfloat16(),
        torch.tensor([1.0, 2, 3]).half(),
        np.array([3, 2, 1])[::-1],  # torch takes no negative strides,
        np.array([1, 2, 3], ">f4"),  # no foreign order of bytes,
        np.array([1, 2, 3], np.longdouble),  # no 80 bits
        [np.float32(1), np.int64(2), 3.0],
        [torch.tensor(1.0), torch.tensor([2.0]), torch.tensor(3)],
    ],
)
def test_numbers_of_any_kind_are_taken(returned: object) -> None:
    values = as_reward(lambda x: returned)(X)
    assert values.dtype == torch.float64
    assert values.tolist() == [1, 2, 3]


class Column:
    """A column of a table: iterated in its order, indexed by label."""

    def __init__(self, values: list[object]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[object]:
        return iter(self.values)

    def __getitem__(self, label: int) -> object:
        return self.values[label - 1]

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.array(self.values)


def test_columns_of_a_table_are_read_by_position() -> None:
    assert as_reward(lambda x: Column([1.0, 2.0, 3.0]))(X).tolist() == [1, 2, 3]
    words = Column(["a", "bb", "ccc"])
    by_index = as_reward(lambda x, prompts: [len(prompts[i]) for i in range(len(x))])
    assert by_index(X, words).tolist() == [1, 2, 3]
    assert cached(by_index)(X, words).tolist() == [1, 2, 3]


def test_results_share_no_memory_with_samples_or_between_calls() -> None:
    x, buffer = torch.arange(3.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    values = as_reward(lambda x: x)(x)
    values -= values.mean()
    assert x.tolist() == [0, 1, 2]
    reused = as_reward(lambda x: buffer.copy_(x))
    first, _ = reused(x), reused(x + 1)
    assert first.tolist() == [0, 1, 2]


def test_a_list_of_tensors_keeps_its_graph() -> None:
    x = torch.arange(3.0, requires_grad=True)
    as_reward(lambda x: [v**2 for v in x]).attached(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 4]


HUGE = as_reward(lambda x: x[:, 0].double() * 1.7e308, "huge")  # 0 and 1 in X[:2]


@pytest.mark.parametrize(
    ("reward", "terms"),
    [
        (HUGE + HUGE, "(huge + huge) is inf where huge = 1.7e+308 and huge = 1.7e+308"),
        (-HUGE - HUGE, "((huge * -1) - huge) is -inf where (huge * -1) = -1.7e+308 and huge = 1.7e+308"),
        (HUGE * -10, "(huge * -10) is -inf where huge = 1.7e+308"),
        (HUGE * HUGE, "(huge * huge) is inf where"),
        (normalise(HUGE, 0, 1e-3), "normalise(huge, 0, 0.001) is inf where huge = 1.7e+308"),
        (1 + 2 * (HUGE + HUGE).clip(-1, 1), "(huge + huge) is inf where"),
        (0 * HUGE.gate(HUGE, above=INF), "((huge gate[>=inf] huge) * 0) is nan where (huge gate[>=inf] huge) = -inf"),
        (FORBID.gate(FORBID, above=9) - FORBID.gate(FORBID, above=9), "is nan where"),
    ],
)
def test_arithmetic_beyond_floats_names_its_terms(reward: Reward, terms: str) -> None:
    with pytest.raises(RewardError, match=re.escape(terms)) as caught:
        reward(X[:2])
    assert caught.value.rows[-1] == 1


@pytest.mark.parametrize("number", [math.nan, INF, -INF])
def test_constants_are_finite(number: float) -> None:
    for attempt in (lambda: VALUE + number, lambda: number * VALUE, lambda: VALUE.min(number)):
        with pytest.raises(ValueError, match="expected a finite number or a reward"):
            attempt()
    with pytest.raises(ValueError, match="gate needs numbers"):
        VALUE.gate(SQUARE, above=math.nan)


@pytest.mark.parametrize("two", [2, np.float32(2), np.float64(2), np.int64(2)])
def test_numbers_of_numpy_combine_from_either_side(two: object) -> None:
    assert [(two * VALUE)(X).tolist(), (VALUE * two)(X).tolist()] == [[0, 2, 4]] * 2


def test_an_exception_keeps_its_cause() -> None:
    def broken(samples):
        raise KeyError("weights")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError: 'weights'") as caught:
        as_reward(broken)(X)
    assert isinstance(caught.value.__cause__, KeyError)


class Counting:
    """A reward that counts the rows it scores."""

    def __init__(self, function=lambda x: x.double().flatten(1).sum(1)) -> None:
        self.rows, self.function = 0, function
        self.reward = Reward(self.score, "counting")

    def score(self, samples, prompts):
        self.rows += len(samples)
        return self.function(samples)


def test_cache_scores_equal_samples_once() -> None:
    counting = Counting()
    memo = cached(counting.reward)
    twice = torch.tensor([[1.0], [2.0], [1.0]])
    assert memo(twice).tolist() == [1, 2, 1]
    assert memo(torch.tensor([[2.0], [3.0]])).tolist() == [2, 3]
    assert counting.rows == memo.calls() == 3
    assert memo.name == "counting"  # the same reward: runs may be resumed with or without the cache


def test_cache_tells_prompts_shapes_and_types_apart() -> None:
    counting = Counting(lambda x: torch.zeros(len(x)))
    memo = cached(counting.reward)
    row = torch.ones(1, 4)
    for samples in (row, row.double(), row.reshape(1, 2, 2), row.long()):
        memo(samples)
    memo(row.expand(4, 4), ["a", "b", "a", None])
    memo(row, [["a"]])
    assert counting.rows == 4 + 2 + 1  # a prompt of None is no prompt


def test_cache_takes_sequences_and_refuses_unknown_objects() -> None:
    text = cached(as_reward(lambda texts: [len(t) for t in texts]))
    assert text(["ab", "c", "ab"]).tolist() == [2, 1, 2]
    assert text.calls() == 2
    arrays = cached(as_reward(lambda batch: [float(a.sum()) for a in batch]))
    assert arrays([np.ones(2), np.ones((1, 2)), np.ones(2)]).tolist() == [2, 2, 2]
    assert arrays.calls() == 2
    things = [Counting(), Counting()]
    with pytest.raises(RewardError, match=r"cannot tell Counting samples .*key="):
        cached(as_reward(lambda batch: [0.0] * len(batch)))(things)
    keyed = cached(as_reward(lambda batch: [0.0] * len(batch)), key=lambda thing: b"same")
    keyed(things)
    assert keyed.calls() == 1


def test_cache_forgets_the_least_recently_used() -> None:
    counting = Counting()
    memo = cached(counting.reward, size=2)
    for value in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # 3 pushes out 2, so 2 is scored again
        memo(torch.tensor([[value]]))
    assert counting.rows == 4
    memo(torch.arange(5.0)[:, None])  # a batch larger than the cache
    with pytest.raises(ValueError, match="size is 0, expected at least 1"):
        cached(counting.reward, size=0)


def test_cache_names_the_rows_of_the_batch_it_was_given() -> None:
    memo = cached(Reward(lambda x, _: torch.where(x[:, 0] > 1, math.nan, 0.0), "bad"))
    memo(X[:1])
    with pytest.raises(RewardError) as caught:
        memo(X)
    assert caught.value.rows == (2,)
    assert memo.calls() == 1


def test_calls_of_a_pair_are_those_of_the_part_that_made_more() -> None:
    left, right = cached(VALUE), cached(SQUARE)
    left(torch.arange(100.0)[:, None])
    pair = left + right
    pair(X)  # all hits on the left, three misses on the right
    assert pair.calls() == 3
    right(X + 10)  # elsewhere
    pair(X)
    assert pair.calls() == 3
    both = cached(VALUE) + cached(SQUARE)
    both(X)
    assert both.calls() == 3  # not 6: one call scores one sample
    assert (pair + VALUE).calls is None  # one part scores everything
    assert (2 * pair).clip(0, 1).calls() == 3


@pytest.mark.parametrize("method", [ts.DiffusionTreeSampling(), ts.FeynmanKac(num_particles=16), ts.BestOfN()])
def test_search_counts_no_cache_hits(method: object) -> None:
    kernel = DiscreteChain.random(num_steps=3, states=4)
    table = [0.0, 1.0, -1.0, 0.5]
    plain = ts.search(kernel, analytic.table(table), method, budget=ts.Budget(nfe=300))
    counting = Counting(lambda x: torch.tensor(table)[x[:, 0]])
    result = ts.search(kernel, cached(counting.reward), method, budget=ts.Budget(nfe=300))
    assert result.cost.reward_calls == counting.rows == 4  # states there are
    assert plain.cost.reward_calls >= 100
    assert torch.equal(result.rewards, plain.rewards)
    assert torch.equal(result.samples, plain.samples)


def test_normalise_round_trip(tmp_path: Path) -> None:
    kernel, reward = LinearGaussian(dim=2), analytic.linear(3.0)
    draw = ts.search(kernel, analytic.constant(), ts.BestOfN(n=200), seed=5).samples
    fitted = Normalisation.fit(reward, draw, seed=5)
    fitted.save(tmp_path / "r.json")
    assert Normalisation.load(tmp_path / "r.json") == fitted
    assert (fitted.n, fitted.seed, fitted.reward_calls, fitted.reward) == (200, 5, 200, reward.name)
    scaled = fitted.apply(reward)
    assert float(scaled(draw).mean()) == pytest.approx(0, abs=1e-12)
    assert float(scaled(draw).std()) == pytest.approx(1)
    assert scaled.name.startswith("normalise(linear(3.0), ")
    assert normalise(FORBID, 1.0, 2.0)(X).tolist() == [-0.5, 0.0, -INF]
    memo = cached(reward)
    assert Normalisation.fit(memo, torch.ones(5, 2).index_fill_(0, torch.tensor([0]), 2.0)).reward_calls == 2
    assert fitted.apply(memo).calls() == 2


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda _: Normalisation.fit(VALUE, X[:1]), "1 calibration sample, expected at least 2"),
        (lambda _: Normalisation.fit(VALUE, X[:0]), "0 calibration samples"),
        (lambda _: Normalisation.fit(FORBID, X), "'forbid' is -inf on 1 of 3 calibration samples.* before gating"),
        (lambda _: Normalisation.fit(VALUE * 0, X), r"is 0 on all 3 calibration samples"),
        (lambda _: Normalisation.fit(VALUE, X).apply(SQUARE), "fitted on reward 'x', got 'square': fit it again"),
        (lambda _: normalise(VALUE, math.nan, 1.0), "mean is nan, expected a finite number"),
        (lambda _: normalise(VALUE, 0.0, 0.0), "std is 0.0, expected a positive finite number"),
        (lambda path: Normalisation.load(path), "holds no normalisation: .*unexpected keyword argument 'median'"),
    ],
)
def test_normalisation_refuses(attempt: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"median": 3}))
    with pytest.raises(ValueError, match=message):
        attempt(file)


def pictures() -> torch.Tensor:
    """Blank, a half-filled square, noise: (3, 1, 28, 28)."""
    blank, square = torch.zeros(2, 1, 28, 28)
    square[:, :14] = 1.0
    return torch.stack([blank, square, torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))])


def test_jpeg_prefers_the_blank() -> None:
    sizes = image.incompressibility()(pictures())
    assert sizes[0] < sizes[1] < sizes[2]
    assert 0.2 < float(sizes[0]) < 0.5  # kilobytes: mostly the header
    assert torch.equal(image.compressibility()(pictures()), -sizes)
    assert (image.incompressibility(quality=20)(pictures())[2] < sizes[2]).all()
    colour = pictures().expand(-1, 3, -1, -1)
    assert image.compressibility()(colour).shape == (3,)


def test_brightness_contrast_ink() -> None:
    assert image.brightness()(pictures())[:2].tolist() == [0.0, 0.5]
    assert image.brightness(target=0.4)(pictures())[:2].tolist() == pytest.approx([-0.4, -0.1])
    assert image.contrast()(pictures())[:2].tolist() == pytest.approx([0.0, 0.5])
    assert image.ink()(pictures())[:2].tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: image.brightness()(torch.zeros(3, 28, 28)),
            r"expected images \(n, c, h, w\), got shape \(3, 28, 28\)",
        ),
        (lambda: image.brightness()([0.0]), r"expected images \(n, c, h, w\), got list"),
        (
            lambda: image.compressibility()(2 * pictures() - 1),
            r"in \[0, 1\], got values from -1 to 1: map them in kernel",
        ),
        (lambda: image.ink()(torch.full((1, 1, 2, 2), math.nan)), "got values from nan to nan"),
        (lambda: image.compressibility()(torch.zeros(1, 4, 8, 8)), "one or three channels, got images of 4"),
        (lambda: image.compressibility(quality=0), r"quality is 0, expected a whole number in 1\.\.100"),
        (lambda: image.brightness(target=255), r"target is 255, expected a brightness in \[0, 1\]"),
        (lambda: image.ink(threshold=-1), "threshold is -1"),
    ],
)
def test_image_rewards_refuse(attempt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt()


def test_digit_rewards() -> None:
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    each = torch.stack([classifier.digit(d)(images) for d in range(10)])
    assert (each <= 0).all()
    torch.testing.assert_close(each.exp().sum(0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(classifier.even()(images), each[0::2].amax(0))
    assert torch.equal(classifier.odd()(images), each[1::2].amax(0))
    assert torch.equal(classifier.digits([3, 7])(images), each[[3, 7]].amax(0))
    for digits in ([10], [-1], []):
        with pytest.raises(ValueError, match="expected digits from 0 to 9"):
            classifier.digits(digits)
    with pytest.raises(RewardError, match=r"expected images \(n, 1, 28, 28\) in \[0, 1\], got \(4, 784\): decode"):
        classifier.even()(images.flatten(1))


def test_settings_tell_rewards_of_one_name_apart(tmp_path) -> None:
    """A resumed search must find the reward that it began with, not only its name."""
    kernel, budget = LinearGaussian(), ts.Budget(nfe=50)

    @facts(range="any", differentiable=True)
    def Scaled(by: float = 1.0, *, device: str | None = None) -> Reward:
        return Reward(lambda x, _: by * x[:, 0], "Scaled")

    assert Scaled().settings == Scaled(1.0, device="cpu").settings == ("Scaled()",)
    both = cached(normalise(Scaled(by=2.0), 0.0, 1.0) + 0.5 * Scaled().clip(0, 1))
    assert both.settings == ("Scaled(by=2.0)", "Scaled()")
    ts.search(kernel, Scaled(2.0), ts.BestOfN(), budget=budget, store=tmp_path / "run")
    ts.resume(tmp_path / "run", kernel, Scaled(by=2.0, device="cpu"), budget=ts.Budget(nfe=100))
    with pytest.raises(ts.StoreError, match=r"reward_settings differs.*by=2\.0"):
        ts.resume(tmp_path / "run", kernel, Scaled(3.0))
    assert Scaled.facts.differentiable
