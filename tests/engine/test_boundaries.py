"""What callers bring along: modes, labels, types and interrupts; and results that they send on."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import pickle
import signal
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import treesearch as ts
from tests.support.kernels import Nameless, Plain, Wrapped, total
from treesearch import interrupts
from treesearch.backends.base import Gaussian
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS, TrustRegion
from treesearch.rewards.analytic import linear, quadratic
from treesearch.rewards.base import Reward, RewardError, as_reward
from treesearch.rewards.compose import cached
from treesearch.rewards.values import as_prompts
from treesearch.runs.config import read_config
from treesearch.runs.log import read_blocks
from treesearch.session.rebuild import read_result

KERNEL = LinearGaussian(num_steps=5)
TREE = ts.DiffusionTreeSampling(wave=4)
BUDGET = ts.Budget(nfe=120)
METHODS = [ts.BestOfN(), ts.FeynmanKac(num_particles=8), TREE]


def search(kernel: Any = KERNEL, reward: Any = total, method: Any = TREE, **options: Any) -> ts.SearchResult:
    return ts.search(kernel, reward, method, **{"budget": BUDGET} | options)


def same_tree(a: ts.Tree, b: ts.Tree) -> bool:
    names = ("parent", "t", "key", "reward", "log_w", "visits")
    return all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "reward") for name in names)


# Modes of torch


MODES = {
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize(
    ("method", "start", "steps"),
    [(TREE, a, b) for a in MODES for b in MODES] + [(m, "grad", "inference") for m in METHODS[:2]],
    ids=str,
)
def test_a_search_keeps_no_graph_whatever_the_mode_around_its_start_and_its_steps(method, start, steps) -> None:
    kernel = Plain()
    with MODES[start]():
        stream = ts.stream(kernel, lambda x: (kernel.f(x)).sum(1), method, budget=BUDGET, prompts=["a", "b"])
    with MODES[steps]():
        first = next(stream)
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert mode == (steps == "grad", steps == "inference")
    last = deque(stream, 1).pop() if method is not METHODS[0] else first
    assert torch.is_grad_enabled()
    result = last.result()
    with MODES[steps]():
        result.tasks[0].best()  # samples are decoded when they are asked for
    assert not any(kernel.graphs)
    for task in result.tasks:
        assert not task.samples.requires_grad
        assert not task.samples.is_inference()
        task.samples.numpy()
        task.best()[0].add_(1)  # neither an inference tensor nor part of a graph


def test_guides_have_their_gradients_under_every_mode() -> None:
    reward = as_reward(lambda x: -(x - 1.0).square().sum(1))
    found = []
    for mode in MODES.values():
        with mode():
            found.append(search(TDS(KERNEL, reward), reward))
    assert all(same_tree(found[0].tree, other.tree) for other in found[1:])
    assert found[0].cost.backward_nfe == found[0].cost.nfe


def test_a_kernel_that_needs_a_graph_of_its_own_is_told_how() -> None:
    class Differentiates(Wrapped):
        def transition(self, x, t, cond=None):
            x = x.clone().requires_grad_()
            return torch.autograd.grad((x**2).sum(), x)

    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        search(Differentiates(KERNEL))
    assert "torch.enable_grad" in "".join(caught.value.__notes__)


def test_the_defaults_of_torch_change_nothing() -> None:
    want = search(prompts=["a", "b"], reward=as_reward(lambda x: x[:, 0].tolist()))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = search(prompts=["a", "b"], reward=as_reward(lambda x: x[:, 0].tolist()))
            drawn = got.tasks[0].draw(5), got.tasks[0].best(2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_tree(a.tree, b.tree) for a, b in zip(want.tasks, got.tasks, strict=True))
    assert torch.equal(drawn[0], want.tasks[0].draw(5))


# States without an axis


class Scalar:
    num_steps, state_shape = 4, ()

    def prior(self, noise, cond=None):
        return noise

    def transition(self, x, t, cond=None):
        return Gaussian(0.9 * x, torch.full((len(x),), 0.3), 0.8 * x, 0.9 * x - 0.01)

    def decode(self, x0):
        return x0


@pytest.mark.parametrize(
    ("method", "keep"),
    [(TREE, "none"), (METHODS[1], "frontier"), (ts.TreeSampling(), "none"), (ts.BeamSearch(), "frontier")],
    ids=lambda v: type(v).__name__,
)
def test_a_state_may_be_a_single_number(tmp_path, method, keep) -> None:
    found = search(Scalar(), linear(1.0), method, keep_states=keep)
    assert found.samples.shape == (len(found.leaves),)
    assert found.best(2)[0].shape == (2,)
    cut = search(
        Scalar(), linear(1.0), method, keep_states=keep, store=tmp_path / "r", callbacks=[lambda s: s.wave < 1]
    )
    assert len(cut.history) <= 2
    assert same_tree(ts.resume(tmp_path / "r", Scalar(), linear(1.0)).tree, found.tree)


# Prompts


class Column:
    """A column of a shuffled table: iteration is in order, [k] is the row of label k."""

    def __init__(self, values, labels):
        self.values, self.labels = values, labels

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, label):
        return self.values[self.labels.index(label)]


WORDS = ["10", "20", "30"]


@pytest.mark.parametrize(
    "prompts",
    [
        Column(WORDS, [2, 0, 1]),
        tuple(WORDS),
        np.array(WORDS),
        dict.fromkeys(WORDS).keys(),
        dict.fromkeys("abc", "10").values(),
    ],
    ids=lambda p: type(p).__name__,
)
def test_prompts_are_those_of_their_positions(tmp_path, prompts) -> None:
    class Asked(Wrapped):
        def encode(self, prompts):
            return {"target": torch.tensor([float(p) for p in prompts], dtype=torch.float64)}

        def transition(self, x, t, cond=None):
            mean = cond["target"][:, None]
            return Gaussian(mean, torch.zeros_like(mean), mean)

    def miss(x, prompts):
        return -(x[:, 0] - torch.tensor([float(p) for p in prompts])).abs()

    found = search(Asked(KERNEL), miss, ts.BestOfN(n=3), prompts=prompts, budget=None, store=tmp_path / "r")
    assert [task.prompt for task in found.tasks] == list(prompts)
    assert all(float(task.rewards.min()) == 0 for task in found.tasks)
    assert as_reward(miss)(torch.tensor([[10.0], [20.0], [30.0]]), Column(WORDS, [2, 0, 1])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "prompts",
    ["a cat", b"a cat", {"a", "b"}, {"a": 1}, iter("ab"), (p for p in "ab"), np.array("a"), 3, torch.tensor(1.0)],
    ids=lambda p: type(p).__name__,
)
def test_prompts_without_positions_are_refused(prompts) -> None:
    for ask in (
        lambda: search(prompts=prompts),
        lambda: as_prompts(prompts),
        lambda: linear(1.0)(torch.ones(2), prompts),
    ):
        with pytest.raises(TypeError, match=r"prompts is (a|the) .*list of prompts"):
            ask()


def test_a_reward_gets_a_prompt_for_each_sample() -> None:
    with pytest.raises(RewardError, match="got 2 prompts for 3 samples: give one a sample"):
        linear(1.0)(torch.ones(3), ["a", "b"])


def test_prompts_that_nothing_takes_are_warned_of(tmp_path) -> None:
    said = "they change nothing but the noise"
    for reward, warned in (
        (total, True),
        (2 * as_reward(total) + linear(1.0), True),
        (lambda x, prompts: total(x), False),
    ):
        tasks = search(reward=reward, prompts=["a", "b"]).tasks
        assert [any(said in w for w in task.diagnostics["warnings"]) for task in tasks] == [warned] * 2
    assert said not in str(search().diagnostics["warnings"])
    search(prompts=["a"], store=tmp_path / "r")
    config, blocks = read_config(tmp_path / "r"), [block for block, _ in read_blocks(tmp_path / "r")]
    assert said in str(read_result(config, blocks).diagnostics["warnings"])


def test_the_encoder_s_own_error_names_the_prompts() -> None:
    class Fails(Wrapped):
        def encode(self, prompts):
            raise OverflowError("77 tokens")

    with pytest.raises(OverflowError, match="77 tokens") as caught:
        search(Fails(KERNEL), prompts=["a cat", "b", "c", "d"])
    assert caught.value.__notes__ == ["in kernel.encode of 4 prompts, ['a cat', 'b', 'c', ...]"]


# Resuming


def weighted(x, weight):
    return weight * total(x)


def one():
    def score(x):
        return total(x)

    return score


def clipped():
    def score(x):
        return total(x).clamp(max=1.0)

    return score


CHANGED = {
    "lambda": (lambda x: total(x), lambda x: -3 * total(x)),
    "partial": (functools.partial(weighted, weight=1.0), functools.partial(weighted, weight=1.5)),
    "edited": (one(), clipped()),
    "composite": (2 * as_reward(one()) + linear(1.0), 2 * as_reward(clipped()) + linear(1.0)),
    "cached": (cached(as_reward(one())), cached(as_reward(clipped()))),
    "state": (as_reward(one(), input="state"), as_reward(clipped(), input="state")),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_another_reward_of_the_same_name_is_refused(tmp_path, kind) -> None:
    first, then = CHANGED[kind]
    search(reward=first, store=tmp_path / "r")
    before = (tmp_path / "r" / "tree.bin").read_bytes()
    with pytest.raises(ts.StoreError, match=r"reward: .* where the run has .*: it is not the one"):
        ts.resume(tmp_path / "r", KERNEL, then, budget=ts.Budget(nfe=150))
    assert (tmp_path / "r" / "tree.bin").read_bytes() == before
    more = ts.resume(tmp_path / "r", KERNEL, first, budget=ts.Budget(nfe=150))
    assert more.diagnostics["warnings"] == search(reward=first, budget=ts.Budget(nfe=150)).diagnostics["warnings"]


@pytest.mark.parametrize(
    "kept", [lambda r: r, cached, lambda r: 2 * cached(r) + cached(as_reward(total))], ids=range(3)
)
def test_a_reward_that_is_never_the_same_is_warned_of(tmp_path, kept) -> None:
    """In a cache too, which another process does not have."""
    draws = itertools.count()

    def noisy(x):
        return total(x) + next(draws)

    search(reward=kept(as_reward(noisy)), store=tmp_path / "r")
    more = ts.resume(tmp_path / "r", KERNEL, kept(as_reward(noisy)), budget=ts.Budget(nfe=150))
    assert any("another value each time" in w for w in more.diagnostics["warnings"])


def test_code_that_changed_without_a_difference_in_what_was_scored_is_warned_of(tmp_path) -> None:
    def score(x):
        return total(x)

    search(reward=score, store=tmp_path / "r")

    def score(x):
        return total(x) + 0.0 * x[:, 0]

    more = ts.resume(tmp_path / "r", KERNEL, score, budget=ts.Budget(nfe=150))
    assert any("code of the reward is another" in w for w in more.diagnostics["warnings"])


@pytest.mark.parametrize(
    "method", [TREE, ts.FeynmanKac(num_particles=8), ts.DiffusionTreeSearch(wave=4, lag=1)], ids=repr
)
def test_a_tree_does_not_depend_on_how_often_its_run_was_resumed(tmp_path, method) -> None:
    kernel, budget = Nameless(KERNEL), ts.Budget(nfe=103)
    kernel.unread = iter(())  # has no content to compare, so that an edge is walked again
    calls = 0

    def reward(x):
        nonlocal calls
        calls += len(x)
        return total(x)

    straight = search(kernel, reward, method, budget=budget)
    straight_calls, calls = calls, 0
    found = search(kernel, reward, method, budget=budget, store=tmp_path / "r", callbacks=[lambda s: False])
    times = 0
    while found.diagnostics["status"] == "stopped":
        found = ts.resume(tmp_path / "r", kernel, reward, callbacks=[lambda s: False])
        times += 1
    assert times >= 2
    assert same_tree(found.tree, straight.tree)
    assert (found.cost.nfe, found.cost.reward_calls) == (straight.cost.nfe, straight.cost.reward_calls)
    assert found.cost.repeated_nfe >= times - 1
    assert straight_calls < calls <= straight_calls + 3 * times + (8 * times if method is not TREE else 0)


def test_a_kernel_of_the_same_content_is_not_checked_and_one_of_another_is(tmp_path) -> None:
    kernel = Nameless(KERNEL)
    search(kernel, total, store=tmp_path / "r")
    more = ts.resume(tmp_path / "r", Nameless(KERNEL), total, budget=ts.Budget(nfe=150))
    assert more.cost.repeated_nfe == 0
    marked = Nameless(KERNEL)
    marked.mark = 1
    assert ts.resume(tmp_path / "r", marked, total, budget=ts.Budget(nfe=200)).cost.repeated_nfe > 0


# Callbacks


def stops(snapshot):
    snapshot.stop()


def raises(snapshot):
    raise StopIteration


@pytest.mark.parametrize("callback", [lambda s: False, lambda s: np.bool_(False), stops, raises], ids=range(4))
@pytest.mark.parametrize("lag", [0, 1])
def test_a_callback_ends_the_search_after_its_wave(tmp_path, callback, lag) -> None:
    method, seen = ts.DiffusionTreeSampling(wave=4, lag=lag), []

    def third(snapshot):
        seen.append(snapshot.wave)
        return callback(snapshot) if snapshot.wave == 2 else None

    also = [seen.append, third]
    found = search(method=method, callbacks=also, store=tmp_path / "r")
    assert seen[1::2] == [0, 1, 2]
    assert len(seen) == 6
    assert len(found.history) == 3 + lag  # what is under way already arrives
    assert found.diagnostics["status"] == read_config(tmp_path / "r")["status"] == "stopped"
    assert len(found.samples) == 4 * (3 + lag)
    assert same_tree(ts.resume(tmp_path / "r", KERNEL, total).tree, search(method=method).tree)
    assert read_config(tmp_path / "r")["status"] == "finished"


@pytest.mark.parametrize("answer", [None, True, 0, 0.0, "", [], 7])
def test_other_answers_of_a_callback_mean_nothing(answer) -> None:
    assert same_tree(search(callbacks=[lambda s: answer]).tree, search().tree)


def test_a_stream_and_a_search_without_waves_are_stopped_too() -> None:
    seen = []
    for snapshot in ts.stream(KERNEL, total, TREE, budget=BUDGET):
        seen.append(snapshot.wave)
        if snapshot.wave == 1:
            snapshot.stop()
    assert seen == [0, 1]
    asynchronous = search(method=ts.DiffusionTreeSampling(wave=4, mode="async"), callbacks=[lambda s: False])
    assert asynchronous.diagnostics["status"] == "stopped"
    assert 0 < len(asynchronous.samples) < 24


# Exceptions and signals


@pytest.mark.parametrize("where", ["transition", "reward", "callback"])
@pytest.mark.parametrize(
    "error", [StopIteration("x"), GeneratorExit("x"), SystemExit(3), KeyboardInterrupt()], ids=repr
)
def test_what_ends_loops_elsewhere_ends_a_search_cleanly(tmp_path, where, error) -> None:
    calls = itertools.count()

    def raise_late(place):
        if place == where and next(calls) == 4:
            raise error

    class Raises(Wrapped):
        def before(self, x, t, task):
            raise_late("transition")

    def reward(x):
        raise_late("reward")
        return total(x)

    want = type(error)
    if isinstance(error, (StopIteration, GeneratorExit)):
        want = {"transition": ts.KernelError, "reward": RewardError, "callback": RuntimeError}[where]
    options = {"store": tmp_path / "r", "callbacks": [lambda s: raise_late("callback")]}
    if where == "callback" and isinstance(error, StopIteration):
        assert search(Raises(KERNEL), reward, **options).diagnostics["status"] == "stopped"
        return
    with pytest.raises(want) as caught:
        search(Raises(KERNEL), reward, **options)
    if want is not type(error):
        assert type(error).__name__ in str(caught.value)
    assert read_config(tmp_path / "r")["status"] == "interrupted"
    assert same_tree(ts.resume(tmp_path / "r", KERNEL, reward).tree, search().tree)


def test_an_interrupt_inside_compiled_code_is_an_interrupt(tmp_path, monkeypatch) -> None:
    """Compiled code returns its result all the same, which Python reports as a SystemError."""

    def breaks(*args: Any) -> Any:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error

    def interrupted(snapshot):
        if snapshot.wave == 2:
            monkeypatch.setattr("treesearch.engine.model.normals", breaks)

    for run in (
        lambda **options: search(**options),
        lambda **options: deque(ts.stream(KERNEL, total, TREE, budget=BUDGET, **options), 0),
    ):
        store = tmp_path / str(id(run))
        with pytest.raises(KeyboardInterrupt):
            run(store=store, callbacks=[interrupted])
        monkeypatch.undo()
        assert read_config(store)["status"] == "interrupted"
        assert same_tree(ts.resume(store, KERNEL, total).tree, search().tree)


def test_no_interrupt_comes_between_a_tree_and_what_is_told_of_it() -> None:
    seen = []

    def handler(number, frame):
        seen.append("handled")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)

    @interrupts.interrupts_deferred()
    def work():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("went on")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["went on", "handled"]


# Results that travel


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("decoded", ["tensor", "list"])
def test_a_result_travels_as_data(tmp_path, stored, copied, decoded) -> None:
    kernel = Wrapped(KERNEL)
    if decoded == "list":
        kernel.decode = list  # rows are views of a whole batch
    store = tmp_path / "r" if stored else None
    found = search(kernel, lambda x: [float(row) for row in x], prompts=["a", "b"], store=store)
    there = copied(found)
    for a, b in zip(found.tasks, there.tasks, strict=True):
        assert same_tree(a.tree, b.tree)
        for mine, other in ((a.samples, b.samples), (a.best(3)[0], b.best(3)[0]), (a.draw(9), b.draw(9))):
            assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
        assert a.certificate() == b.certificate()
        assert a.diagnostics == b.diagnostics
        with pytest.raises(ts.StoreError, match="stayed where the search ran"):
            b.fetch(np.array([1]))
    assert there.cost == found.cost
    rows = sum(len(task.tree) for task in found.tasks)
    assert (
        len(pickle.dumps(found))
        < 100 * rows + 700 * sum(len(task.leaves) for task in found.tasks) * (decoded == "list") + 20_000
    )


def test_a_snapshot_travels_with_the_result_so_far() -> None:
    stream = ts.stream(KERNEL, total, TREE, budget=BUDGET)
    snapshot = next(stream)
    there, now = pickle.loads(pickle.dumps(snapshot)), snapshot.result()
    deque(stream, 0)
    assert torch.equal(there.result().samples, now.samples)
    assert len(snapshot.result().samples) > len(there.result().samples)
    with pytest.raises(ts.TreeSearchError, match="its search is elsewhere"):
        there.stop()


# Numbers at the edge


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e301, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("method", [*METHODS, ts.TreeSampling()], ids=lambda m: type(m).__name__)
def test_rewards_whose_sums_are_not_finite_are_refused_by_name(method, value) -> None:
    def reward(x):
        return torch.where(torch.arange(len(x)) == 1, value, total(x))

    with pytest.raises(RewardError, match=r"'reward' is .*not finite; scale it, .* \[node \d+ \(t = \d\) of task 0\]"):
        search(reward=reward, method=method)
    if value > 0:
        with pytest.raises(RewardError, match="lam 1e"):
            search(reward=lambda x: 1e200 * total(x), method=ts.BestOfN(lam=1e120))


@pytest.mark.parametrize("method", [METHODS[1], ts.BeamSearch(), TREE], ids=lambda m: type(m).__name__)
def test_what_is_looked_at_to_drop_states_does_not_grow_with_the_tree(method, monkeypatch) -> None:
    looked: list[int] = []
    isin, budget = np.isin, ts.Budget(nfe=1000 if method is TREE else 6000)
    monkeypatch.setattr("treesearch.session.frontier.np.isin", lambda a, b: looked.append(len(a)) or isin(a, b))
    found = search(method=method, budget=budget, keep_states="frontier", batch_size=16)
    few = len(looked) // 4
    assert max(looked, default=0) == max(looked[:few], default=0)
    if method is not TREE:
        assert (found.tree.slot[found.tree.t > 0] == -1).all()


# λ from a pilot, through a guide


@pytest.mark.parametrize("reward", [linear(0.3), linear(10.0), quadratic(50.0, 1.0)], ids=lambda r: r.name)
def test_an_automatic_lambda_is_that_of_the_kernel_which_a_guide_proposes_for(reward) -> None:
    kernel, budget = LinearGaussian(num_steps=5, dim=4), ts.Budget(nfe=2000)
    want = search(kernel, reward, ts.BestOfN(lam="auto"), budget=budget)
    for guide in (TrustRegion(kernel, reward), TDS(kernel, reward)):
        assert (
            search(guide, reward, ts.TreeSampling(lam="auto"), budget=budget).diagnostics["lam"]
            == want.diagnostics["lam"]
        )


# Types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": LinearGaussian}, r"kernel is the class LinearGaussian, expected an object of it"),
        ({"kernel": "gaussian"}, "str is not a kernel: it has no `num_steps`"),
        ({"kernel": None}, "NoneType is not a kernel"),
        ({"reward": "linear"}, "expected a reward or a function of samples, got str"),
        ({"reward": nn.Linear}, r"reward is the class Linear, expected an object of it: Linear\(...\)"),
        ({"method": ts.BestOfN}, r"method is <class .*>, expected an object: ts.BestOfN\(\)"),
        ({"method": "fk"}, "method is 'fk', expected an object"),
        ({"method": None}, "method is None, expected an object"),
        ({"budget": 1000}, r"budget is 1000, expected ts.Budget\(nfe=...\)"),
        ({"budget": {"nfe": 1000}}, r"budget is \{'nfe': 1000\}, expected ts.Budget"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"seed": "7"}, "seed is '7', expected a whole number"),
        ({"seed": torch.tensor(1.5)}, r"seed is tensor\(1.5000\), expected a whole number"),
        ({"seed": None}, "seed is None, expected a whole number"),
        ({"batch_size": True}, "batch_size is True, expected a whole number"),
        ({"batch_size": 2.0}, "batch_size is 2.0, expected a whole number"),
        ({"batch_size": None}, "batch_size is None, expected a whole number"),
        ({"batch_invariant": 1}, "batch_invariant is 1, expected True or False"),
        ({"callbacks": len}, "callbacks is <built-in function len>, expected a list of functions"),
        ({"callbacks": None}, "callbacks is None, expected a list of functions"),
        ({"callbacks": [1]}, r"callbacks is \[1\], expected a list of functions"),
        ({"store": 3}, "store is 3, expected the path of a folder"),
        ({"store": b"run"}, "store is b'run', expected the path of a folder"),
        ({"workers": 4}, r"workers is 4, expected ts.RayWorkers\(num_workers, ...\) or None"),
        ({"prompts": "text"}, r"prompts is the string 'text', expected a list of prompts: \['text'\]"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_arguments_of_another_type(options, message) -> None:
    with pytest.raises(TypeError, match=message):
        search(**options)
    with pytest.raises(TypeError, match=message):
        next(ts.stream(**{"kernel": KERNEL, "reward": total, "method": TREE, "budget": BUDGET} | options))


@pytest.mark.parametrize("keep", [True, None, 3, "al"])
def test_an_unknown_choice_of_any_type_lists_the_known_ones(keep) -> None:
    with pytest.raises(ValueError, match=r"unknown keep_states .*known: all, frontier, none"):
        search(keep_states=keep)


@pytest.mark.parametrize("seed", [np.int64(7), np.uint8(7), torch.tensor(7)])
def test_whole_numbers_of_other_libraries_are_whole_numbers(tmp_path, seed) -> None:
    found = search(seed=seed, budget=ts.Budget(nfe=np.int64(120)), store=tmp_path / "r")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["seed"] == 7
    assert same_tree(found.tree, search(seed=7).tree)


def test_resuming_checks_its_callbacks_too(tmp_path) -> None:
    search(store=tmp_path / "r")
    with pytest.raises(TypeError, match="callbacks is <built-in function len>"):
        ts.resume(tmp_path / "r", KERNEL, total, callbacks=len)


def test_a_reward_object_may_always_look_at_prompts() -> None:
    assert Reward(lambda samples, prompts: total(samples)).prompted
    assert not as_reward(total).prompted
