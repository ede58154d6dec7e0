"""A budget in seconds ends a search in time, whatever its waves and its reward take; on a clock that the fakes move."""

import pytest

import treesearch as ts
from tests.engine.test_drafting import Bed
from treesearch.api import make_session
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.budget import Pace, Share
from treesearch.cli import probe
from treesearch.methods.base import Status
from treesearch.report.tables import notes
from treesearch.rewards.base import Reward
from treesearch.session.interfaces import Options

STEP, CALL = 1e-3, 5e-3  # seconds of an evaluation and of a reward: five steps and a sample take the same


@pytest.fixture
def now(monkeypatch):
    """What the clock shows; fakes move it."""
    time = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: time[0])
    return time


def slow(kind, now, each=STEP, once=0.0, passes=0.0):
    """A kernel whose rows take `each`, whose passes take `passes`, and whose first pass takes `once` more."""

    class Slow(kind):
        begun = False

        def transition(self, x, t, cond=None):
            now[0] += passes + each * len(x) + once * (not self.begun)
            self.begun = True
            return super().transition(x, t, cond)

    return Slow()


def rewarded(now, each=CALL):
    def total(x, prompts=None):
        now[0] += each * len(x)
        return x.double().flatten(1).sum(1)

    return Reward(total, "total", "state")


METHODS = {
    "best-of-n": ts.BestOfN(),
    "dts": ts.DiffusionTreeSampling(),
    "lag": ts.DiffusionTreeSampling(lag=1),
    "async": ts.DiffusionTreeSearch(mode="async"),
    "fk": ts.FeynmanKac(),
    "fk of 8": ts.FeynmanKac(num_particles=8),
    "tree sampling": ts.TreeSampling(),
    "tree search": ts.TreeSearch(),
    "looks": ts.TreeSearch(looks="endpoints"),
    "drafts": ts.TreeSearch(draft=3),
    "racing": ts.BestOfN(draft=3),
    "two phases": ts.BestOfN(draft=3, floor=0.1),
    "climb": ts.NoiseSearch(),
    "rollover": ts.RolloverBudget(),
    "lookahead": ts.LookaheadBeam(),
    "depth first": ts.DepthFirst(),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_last_wave_fits(name, now):
    """The reward takes as long as the kernel: by NFE alone the last wave would end at up to twice what was left."""
    method, drafting = METHODS[name], getattr(METHODS[name], "draft", None)
    kernel = slow(Bed if drafting else LinearGaussian, now)
    result = ts.search(kernel, rewarded(now), method, budget=ts.Budget(seconds=1.0))
    cost, unit = result.cost, method.unit(ts.backends.base.describe(kernel))
    assert cost.seconds == now[0]
    assert 1.0 - 2 * (unit.nfe * STEP + unit.reward_calls * CALL) <= cost.seconds <= 1.0 + 1e-9
    assert cost.model_seconds + cost.reward_seconds == pytest.approx(cost.seconds)
    assert cost.reward_seconds == pytest.approx(CALL * cost.reward_calls)
    assert result.tasks[0].status == Status.BUDGET
    assert "out_of_time" in {str(flag.name) for flag in result.certificate().flags}


def test_history_and_notes_say_where_the_seconds_went(now, tmp_path):
    store = tmp_path / "run"
    result = ts.search(slow(LinearGaussian, now), rewarded(now), ts.BestOfN(n=300), batch_size=100, store=store)
    spent = [(h["model_seconds"], h["reward_seconds"]) for h in result.history]
    assert spent == [(pytest.approx(0.5 * k), pytest.approx(0.5 * k)) for k in (1, 2, 3)]
    assert notes([], result.cost) == [
        "the kernel took 1.5 s and the reward, with decoding, 1.5 s: compare searches by seconds, NFE alone mislead"
    ]
    assert ts.resume(store, slow(LinearGaussian, now), rewarded(now)).history == result.history
    cheap = ts.search(slow(LinearGaussian, now), rewarded(now, 1e-4), ts.BestOfN(n=300))
    assert notes([], cheap.cost) == []


def test_a_dry_run_measures_both_and_counts_no_loading(now):
    loads, score = [100.0], rewarded(now)

    def once(x, prompts=None):
        now[0] += loads.pop() if loads else 0.0
        return score.fn(x, prompts)

    options = (None, ts.Budget(seconds=2.0), 0, Options(), None)
    session = make_session(slow(LinearGaussian, now, once=50.0), Reward(once, "once", "state"), ts.BestOfN(), *options)
    found = probe.estimate(session)
    assert (found["ms_per_nfe"], found["ms_per_reward"]) == (1.0, 5.0)
    assert (found["nfe"], found["reward_calls"]) == (1000, 200)
    assert (found["seconds"], found["seconds_of_it_rewards"]) == (2.0, 1.0)


def test_the_certificate_says_what_the_seconds_were(now):
    result = ts.search(slow(LinearGaussian, now), rewarded(now), ts.BestOfN(), budget=ts.Budget(seconds=1.0))
    assert any("of this one's 1.0 s the kernel took 0.5 and the reward 0.5" in c for c in result.certificate().caveats)


def test_what_happens_once_does_not_end_a_search(now):
    """A first pass that compiles for as long as a fifth of the budget."""
    result = ts.search(slow(LinearGaussian, now, once=0.4), rewarded(now), ts.BestOfN(), budget=ts.Budget(seconds=2.0))
    assert 1.98 < result.cost.seconds <= 2.0 + 1e-9
    assert len(result.samples) == 160


def test_no_small_wave_begins_where_a_pass_takes_as_long_for_one_row_as_for_many(now):
    """Passes of .05 s, whatever is in them: a rollout takes .25 s, and so does a batch. Of .1 s left none is begun."""
    kernel = slow(LinearGaussian, now, each=0.0, passes=0.05)
    result = ts.search(kernel, rewarded(now, 0.0), ts.BestOfN(), budget=ts.Budget(seconds=1.1), batch_size=16)
    assert result.cost.seconds == pytest.approx(1.0)
    rows = [h["nfe"] // 5 for h in result.history]
    assert rows[0] == 1 < rows[1] - rows[0] < rows[2] - rows[1] <= 16


def test_tasks_share_the_time_and_a_resumed_run_measures_again(now, tmp_path):
    kernel, prompts = slow(LinearGaussian, now), ["a", "b", "c"]
    options = {"prompts": prompts, "store": tmp_path / "run", "seed": 3}
    result = ts.search(kernel, rewarded(now), ts.DiffusionTreeSearch(), budget=ts.Budget(seconds=1.0), **options)
    assert 0.94 < result.cost.seconds <= 1.0 + 1e-9
    counts = [len(task.samples) for task in result.tasks]
    assert max(counts) - min(counts) <= 6
    slower = slow(LinearGaussian, now, each=5e-3)
    more = ts.resume(tmp_path / "run", slower, rewarded(now), budget=ts.Budget(seconds=3.0))
    assert 2.8 < more.cost.seconds <= 3.0 + 1e-9


def test_other_limits_still_hold(now):
    budget = ts.Budget(seconds=1.0, nfe=73)
    result = ts.search(slow(LinearGaussian, now), rewarded(now), ts.DiffusionTreeSearch(), budget=budget)
    assert 68 < result.cost.nfe <= 73
    assert "out_of_time" not in {str(flag.name) for flag in result.certificate().flags}


def test_units_in_time():
    share = Share(nfe=1000, pace=Pace(0.1, 0.5), seconds=3.0)
    assert share.units(5, 1) == 3
    assert share.less(10, 1, 0).units(5, 1) == 1
    assert share.less(35, 1, 0).units(5, 1) == 0
    assert Share(nfe=1000, pace=Pace(0.0, 0.0), seconds=3.0).units(5, 1) == 200
