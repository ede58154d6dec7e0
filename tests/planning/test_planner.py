"""The planner on a bed in closed form: noisy straight lines from start to goal, and a world that obeys actions."""

import math

import numpy as np
import pytest
import torch

import treesearch as ts
from treesearch.backends.base import Gaussian, describe, expand
from treesearch.backends.exact.gaussian import cosine_bar
from treesearch.backends.guidance import Valued
from treesearch.planning.planner import Outlook, Planner, PlanningEnded
from treesearch.planning.warm_start import WARM, WarmStart, lowered, shifted
from treesearch.rewards.base import Reward, as_reward
from treesearch.rewards.channels import Channels
from treesearch.testing import check_kernel

H, T, SPREAD = 6, 10, 0.1
BAR = cosine_bar(T).float()


class Lines:
    """The exact reverse chain of τ ~ N(line from start to goal, s²), known entries clamped."""

    num_steps, state_shape, dtype, fingerprint = T, (H, 4), torch.float32, "lines"
    channels = Channels(observation=2, action=2)
    var = BAR * SPREAD**2 + 1 - BAR

    def encode(self, prompts):
        start = torch.tensor([p["start"] for p in prompts])
        goal = torch.tensor([p.get("goal", p["start"]) for p in prompts])
        share = torch.linspace(0, 1, H)[:, None]
        line = start[:, None] + share * (goal - start)[:, None]
        step = ((goal - start) / (H - 1))[:, None].expand(-1, H, -1)
        mask = torch.zeros(len(prompts), H, 4, dtype=torch.bool)
        mask[:, 0, :2] = True
        mask[:, -1, :2] = torch.tensor(["goal" in p for p in prompts])[:, None]
        return {"known": torch.cat([line, step], 2), "mask": mask}

    def clamp(self, x, cond):
        return x if cond is None or "mask" not in cond else torch.where(cond["mask"], cond["known"], x)

    def prior(self, noise, cond=None):
        return self.clamp(noise, cond)

    def transition(self, x, t, cond=None):
        m = 0.0 if cond is None or "known" not in cond else cond["known"]
        of, below = (lambda table: expand(table[t], x)), (lambda table: expand(table[t - 1], x))
        cov = (of(BAR) / below(BAR)).sqrt() * below(self.var)
        mean = below(BAR).sqrt() * m + cov / of(self.var) * (x - of(BAR).sqrt() * m)
        std = (below(self.var) - cov**2 / of(self.var)).clamp_min(0).sqrt().expand(x.shape)
        endpoint = m + of(BAR).sqrt() * SPREAD**2 / of(self.var) * (x - of(BAR).sqrt() * m)
        if cond is not None and "mask" in cond:
            mean, std = self.clamp(mean, cond), std.masked_fill(cond["mask"], 0.0)
        return Gaussian(mean, std, self.clamp(endpoint, cond))

    def decode(self, x0):
        return 2.0 * x0

    def encode_samples(self, samples):
        return samples / 2.0

    def renoise(self, x, t_from, t_to, noise):
        ratio = expand(BAR[t_to] / BAR[t_from], x)
        return ratio.sqrt() * x + (1 - ratio).sqrt() * noise


def reach(samples, prompts):
    """Minus the squared distance between where the actions lead and the goal, in the bed's own units."""
    ends = torch.tensor([p["start"] for p in prompts]) + samples[:, : H - 1, 2:].sum(1) / 2.0
    return -(ends - torch.tensor([p["goal"] for p in prompts])).square().sum(1)


REACH = as_reward(reach, "reach")
START, GOAL = [0.0, 0.0], [1.0, -1.0]


def planner(method=None, *, nfe=20 * T, **how):
    return Planner(Lines(), REACH, method or ts.BestOfN(), budget=ts.Budget(nfe=nfe), **how)


def test_the_bed_obeys_the_laws_of_kernels():
    check_kernel(Lines(), [{"start": START, "goal": GOAL}, {"start": GOAL}])


def test_a_warm_start_is_a_kernel():
    known = Lines().encode([{"start": START, "goal": GOAL}])["known"]
    check_kernel(WarmStart(Lines(), known[:, None], 4), [{"start": START, "goal": GOAL}])


def test_a_warm_start_draws_plans_evenly_and_denoises_them_by_the_kernel_s_own_steps():
    """The plans kept are 0 and 6 above the line: all free entries of x_0 have a Gaussian law around each of them."""
    level, n, prompt = 4, 4_000, {"start": START, "goal": GOAL}
    line = Lines().encode([prompt])["known"][0]
    kernel = WarmStart(Lines(), torch.stack([line, line + 6.0])[None], level)
    found = ts.search(kernel, REACH, ts.BestOfN(n=n), prompts=[prompt], batch_size=n)
    assert found.cost.nfe == n * level
    free = found.samples[:, 1:-1] / 2.0 - line[1:-1]
    bar, v = BAR[level], Lines.var[level]
    slope = bar.sqrt() * SPREAD**2 / v
    middle = 3.0 * bar.sqrt() * slope
    upper = free.mean((1, 2)) > middle
    assert abs(upper.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    var = slope**2 * (1 - bar) + SPREAD**2 - slope * bar.sqrt() * SPREAD**2
    for which, mean in ((upper, 6.0 * bar.sqrt() * slope), (~upper, 0.0)):
        rows = free[which].flatten(1)
        assert (rows.mean(0) - mean).abs().max() < 4.5 * (var / len(rows)).sqrt()
        assert (rows.var(0) / var - 1).abs().max() < 4.5 * math.sqrt(2 / len(rows))
    assert torch.equal(found.samples[:, 0, :2], torch.zeros(n, 2))


@pytest.mark.parametrize(
    "method",
    [
        ts.BestOfN(),
        ts.FeynmanKac(num_particles=10, lam=3.0),
        ts.DiffusionTreeSearch(widening_c=1.0, widening_alpha=0.5, branch_at=(10, 5, 3)),
        ts.TreeSearch(),
        ts.BeamSearch(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_receding_horizon_reaches_the_goal_within_its_budget(method):
    agent, position = planner(method, steps=2), np.zeros(2)
    for _ in range(6):
        actions = agent.act(position, GOAL)
        assert actions.shape == (2, 2)
        position = position + actions[0].numpy() / 2.0
        assert 0.8 * 20 * T <= agent.decision.nfe <= 20 * T
    assert np.linalg.norm(position - GOAL) < 0.6
    assert [d.warm[0] for d in agent.decisions] == [False] + [True] * 5


def test_the_actions_are_the_first_rows_of_the_best_plan():
    agent = planner(steps=3)
    actions = agent.act(START, GOAL)
    best, reward = agent.result.best()
    assert torch.equal(actions, best[0, :3, 2:])
    assert torch.equal(agent.decision.plans[0], best[0])
    assert agent.decision.rewards[0] == reward[0]


def test_a_plan_is_kept_until_a_better_one_is_found():
    """In a world that does what the plan says, one rollout a decision never loses what was found before."""
    gaps = {}
    for warm in (False, True):
        runs = [planner(nfe=T, steps=2, warm_start=warm, seed=seed) for seed in range(8)]
        for agent in runs:
            position = np.zeros(2)
            for _ in range(2):
                position = position + agent.act(position, GOAL).sum(0).numpy() / 2.0
        made = [agent.decisions[1] for agent in runs]
        gaps[warm] = np.mean([d.rewards.item() for d in made])
        kept = [d.kept[0] for d in made]
        assert any(kept) == warm
    assert not all(kept)
    assert gaps[True] > gaps[False]


@pytest.mark.parametrize("what", ["sample", "state"])
def test_each_environment_keeps_its_own_best_plan_and_remembers_it(what):
    """A reward that nothing later beats: how near the seventh number of a plan is to its best value so far."""
    scale = 1.0 if what == "state" else 2.0
    best = {}

    def spy(samples, prompts):
        values = -(samples[:, 2, 2] / scale - torch.tensor([p["goal"][0] for p in prompts])).abs()
        for value, prompt in zip(values.tolist(), prompts, strict=True):
            key = prompt["goal"][0]
            best[key] = max(best.get(key, -math.inf), value)
        return values

    reward = Reward(spy, "spy", input=what)
    agent = Planner(Lines(), reward, ts.BestOfN(), budget=ts.Budget(nfe=3 * T), steps=1, keep=3, batch_size=1)
    goals, starts = [[0.3, 0.0], [-0.3, 0.0]], [START, START]
    agent.act_many(starts, goals)
    for track in agent.tracks:  # what is executed leaves the plans as they are
        track.plans = track.plans[:1].repeat(3, 1, 1)
        track.plans[0, 2, 2] = 2.0 * track.goal[0]
        track.plans[1:] += 50.0
    agent.act_many(starts, goals)
    assert agent.decision.kept == (True, True)
    assert agent.decision.rewards.abs().max() < 1e-6
    for i, goal in enumerate(goals):
        assert agent.decision.plans[i, 2, 2].item() == pytest.approx(2.0 * goal[0])
        assert agent.tracks[i].plans.shape == (3, H, 4)
        assert torch.equal(agent.tracks[i].plans[0], shifted(agent.decision.plans[i], 1))
        assert not torch.equal(agent.tracks[i].plans[0], agent.tracks[i].plans[1])


def test_a_plan_that_cannot_be_better_costs_no_search():
    """Of two environments one has what is to be had; it goes on without an evaluation, until it loses it."""
    reward = as_reward(lambda samples, prompts: torch.tensor([p["goal"][0] for p in prompts]), "goal")
    agent = Planner(Lines(), reward, ts.BestOfN(), budget=ts.Budget(nfe=4 * T), steps=2, done=0.5)
    starts, goals = [START, START], [[1.0, 0.0], [0.0, 0.0]]
    agent.act_many(starts, goals)
    first = agent.decision
    assert (first.nfe, first.searched, first.kept) == (8 * T, (True, True), (False, False))
    agent.act_many(starts, goals)
    second = agent.decision
    assert (second.nfe, second.searched, second.kept[0]) == (4 * T, (False, True), True)
    assert (second.planned, second.warm, len(agent.result.tasks)) == ((True, True), (True, True), 1)
    assert torch.equal(second.actions[0, 1], first.plans[0, 3, 2:])
    agent.act_many(starts, goals, active=[True, False])  # nobody is searched for
    assert (agent.decision.nfe, agent.decision.searched) == (0, (False, False))
    assert agent.decision.rewards[0].item() == 1.0
    agent.act_many(starts, [[0.1, 0.0], [0.0, 0.0]])  # another goal
    assert agent.decision.searched == (True, True)
    with pytest.raises(ValueError, match="rewards of plans"):
        planner(done=math.nan)


def test_rewards_of_kept_plans_are_within_the_budget():
    for calls in (1, 5):
        agent = Planner(Lines(), REACH, ts.BestOfN(), budget=ts.Budget(reward_calls=calls), steps=2)
        for _ in range(3):
            agent.act(START, GOAL)
            assert agent.result.cost.reward_calls == calls


def test_a_kept_plan_starts_where_the_environment_is():
    never = as_reward(lambda samples, prompts: -samples[:, 0, 0].abs(), "first")
    agent = Planner(Lines(), never, ts.BestOfN(), budget=ts.Budget(nfe=T), steps=2)
    agent.act(START, GOAL)
    shown = agent.decision.plans[0].clone()
    agent.act([3.0, 4.0], GOAL)  # any two plans that start there are equally good: the last one is kept
    assert agent.decision.kept == (True,)
    assert agent.decision.plans[0, 0, :2].tolist() == pytest.approx([6.0, 8.0], rel=0.05)
    assert torch.allclose(agent.decision.plans[0, 1:-1, 2:], shifted(shown, 2)[1:-1, 2:])
    assert agent.result.cost.reward_calls == 3  # two searched at half the cost each, one kept


def test_a_warm_start_says_that_it_draws_from_another_law_and_has_no_log_z():
    agent = planner()
    agent.act(START, GOAL)
    assert agent.result.log_z is not None
    assert WARM not in agent.result.diagnostics["warnings"]
    agent.act(START, GOAL)
    assert agent.result.log_z is None
    assert agent.result.certificate().log_z.value is None
    assert WARM in agent.result.diagnostics["warnings"]


def test_what_is_remembered_is_shifted_by_the_rows_that_were_executed():
    plan = torch.arange(H)[:, None].expand(H, 4)
    assert shifted(plan, 2)[:, 0].tolist() == [2, 3, 4, 5, 5, 5]
    agent = planner(steps=2, keep=3)
    agent.act(START, GOAL)
    assert torch.equal(agent.tracks[0].plans, shifted(agent.result.best(3)[0], 2))


def test_many_environments_share_one_search_and_plan_as_alone():
    many, goals = planner(steps=2), [GOAL, [0.5, 0.5], [-1.0, 0.0]]
    for _ in range(2):
        actions = many.act_many([START] * 3, goals)
    assert actions.shape == (3, 2, 2)
    assert len(many.result.tasks) == 3
    assert many.decision.nfe == 3 * 20 * T
    assert many.decision.nfe_each == 20 * T
    alone = planner(steps=2)
    for _ in range(2):
        first = alone.act(START, GOAL)
    assert torch.equal(first, actions[0])


def test_a_new_goal_starts_afresh_beside_rows_that_go_on():
    agent = planner()
    agent.act_many([START, START], [GOAL, GOAL])
    agent.act_many([START, START], [GOAL, [0.5, 0.5]])
    assert agent.decision.warm == (True, False)
    assert [WARM in task.diagnostics["warnings"] for task in agent.result.tasks] == [True, False]
    assert agent.decision.nfe == 2 * 20 * T


def test_rows_that_are_not_active_cost_nothing_and_do_nothing():
    agent = planner()
    actions = agent.act_many([START, START], [GOAL, GOAL], active=[False, True])
    assert agent.decision.nfe == 20 * T
    assert agent.decision.planned == (False, True)
    assert not actions[0].any()
    assert actions[1].any()
    assert math.isnan(agent.decision.rewards[0])


def test_noise_differs_from_decision_to_decision_and_not_from_run_to_run():
    one, two = planner(warm_start=False), planner(warm_start=False)
    first, second = one.act(START, GOAL), one.act(START, GOAL)
    assert not torch.equal(first, second)
    assert torch.equal(two.act(START, GOAL), first)
    assert not torch.equal(planner(warm_start=False, seed=1).act(START, GOAL), first)


def test_an_unreachable_goal_is_reported_and_ends_the_planning():
    agent = planner(enough=-1e-9, patience=3)
    for _ in range(3):
        agent.act(START, GOAL)
    assert agent.decision.outlooks == (Outlook.UNREACHABLE,)
    assert not any(d.warm[0] for d in agent.decisions), "a failed plan is nothing to start from"
    with pytest.raises(PlanningEnded, match="unreachable"):
        agent.act(START, GOAL)
    assert len(agent.decisions) == 3
    agent.act(START, [0.5, 0.5])  # another goal may be reached


def test_a_goal_that_a_check_refuses_costs_nothing_and_the_others_go_on():
    def check(prompt):
        if prompt["goal"][0] > 1:
            raise ValueError("a wall is in the way")

    agent = planner(check=check)
    agent.act_many([START, START], [GOAL, [2.0, 0.0]])
    assert agent.decision.planned == (True, False)
    assert agent.decision.outlooks == (Outlook.PLANNING, Outlook.REFUSED)
    assert agent.decision.nfe == 20 * T
    with pytest.raises(PlanningEnded, match="a wall is in the way"):
        planner(check=check).act(START, [2.0, 0.0])
    with pytest.raises(ValueError, match=r"check asked for 'goal' of a prompt that has .'start'.: pass goal= to act"):
        planner(check=check).act(START)


def test_forbidden_plans_count_as_failures():
    agent = Planner(
        Lines(),
        as_reward(lambda x: torch.full((len(x),), -math.inf)),
        ts.BestOfN(),
        budget=ts.Budget(nfe=20),
        patience=1,
    )
    agent.act(START, GOAL)
    with pytest.raises(PlanningEnded, match="unreachable"):
        agent.act(START, GOAL)


def test_failures_must_follow_one_another():
    agent = planner(enough=-1e-9, patience=2)
    agent.act(START, GOAL)
    agent.enough = -math.inf
    agent.act(START, GOAL)
    agent.enough = -1e-9
    agent.act(START, GOAL)
    assert agent.decision.outlooks == (Outlook.PLANNING,)


def test_decisions_are_bounded_and_the_others_go_on():
    agent = planner(max_decisions=2)
    agent.act_many([START, START], [GOAL, GOAL], active=[True, False])
    agent.act_many([START, START], [GOAL, GOAL])
    assert agent.decision.outlooks == (Outlook.OUT_OF_DECISIONS, Outlook.PLANNING)
    agent.act_many([START, START], [GOAL, GOAL])
    assert agent.decision.planned == (False, True)
    with pytest.raises(PlanningEnded, match="max_decisions"):
        agent.act_many([START, START], [GOAL, GOAL])
    agent.reset()
    agent.act(START, GOAL)


@pytest.mark.parametrize("method", [ts.BestOfN(), ts.FeynmanKac(), ts.DiffusionTreeSearch()])
def test_a_deadline_becomes_nfe_at_the_pace_seen(method, monkeypatch):
    """On a clock that a step of one row moves by a millisecond."""
    step, now = Lines.transition, [0.0]

    def timed(self, x, t, cond=None):
        now[0] += 1e-3 * len(x)
        return step(self, x, t, cond)

    monkeypatch.setattr(Lines, "transition", timed)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    agent = Planner(Lines(), REACH, method, budget=ts.Budget(seconds=0.1), batch_size=16)
    for _ in range(3):
        agent.act(START, GOAL)
    last = agent.decision
    assert 0.02 < last.seconds < 0.3
    pace = agent.decisions[1].nfe / agent.decisions[1].seconds
    assert last.nfe <= 0.1 * pace


@pytest.mark.parametrize(
    ("observation", "goal", "words"),
    [
        ([0.0, math.nan], GOAL, "observation not finite"),
        ([0.0, 0.0], [math.inf, 0.0], "goal not finite"),
        ([0.0, 0.0, 0.0], GOAL, "expected \\(n, 2\\)"),
        (["a", 0.0], GOAL, "expected numbers"),
    ],
)
def test_observations_and_goals_that_are_none_are_refused(observation, goal, words):
    agent = planner()
    with pytest.raises(ValueError, match=words):
        agent.act(observation, goal)
    assert not agent.decisions


def test_observations_of_gymnasium_robotics_bring_their_goal():
    one, other = planner(), planner()
    assert torch.equal(one.act({"observation": START, "desired_goal": GOAL}), other.act(START, GOAL))


def test_another_number_of_environments_is_refused():
    agent = planner()
    agent.act(START, GOAL)
    with pytest.raises(ValueError, match="got 2 environments, expected 1"):
        agent.act_many([START, START], [GOAL, GOAL])


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"level": T + 1}, ValueError, f"expected 1..T = {T}"),
        ({"enough": math.nan}, ValueError, "enough and done are nan"),
        ({"budget": 100}, TypeError, "expected ts.Budget"),
    ],
)
def test_settings_are_checked(how, error, words):
    with pytest.raises(error, match=words):
        Planner(Lines(), REACH, ts.BestOfN(), **{"budget": ts.Budget(nfe=100)} | how)


def test_kernels_that_cannot_be_planned_with_are_refused(gaussian):
    with pytest.raises(TypeError, match="no channels with actions"):
        Planner(gaussian, REACH, ts.BestOfN(), budget=ts.Budget(nfe=100))

    class NoNoise(Lines):
        renoise = None

    with pytest.raises(ValueError, match="no renoise: use warm_start=False"):
        Planner(NoNoise(), REACH, ts.BestOfN(), budget=ts.Budget(nfe=100))
    Planner(NoNoise(), REACH, ts.BestOfN(), budget=ts.Budget(nfe=100), warm_start=False).act(START, GOAL)


def test_more_steps_than_a_plan_has_are_refused():
    planner(steps=H, warm_start=False).act(START, GOAL)
    for how in ({"steps": H}, {"steps": H + 1, "warm_start": False}):
        with pytest.raises(ValueError, match="a plan has 6 rows"):
            planner(**how)


def test_levels_above_a_warm_start_leave_the_method():
    assert lowered(ts.DiffusionTreeSearch(branch_at=(10, 5, 2)), 5).branch_at == (5, 2)
    assert lowered(ts.DiffusionTreeSearch(branch_at=(10, 8)), 5).branch_at is None
    assert lowered(ts.BestOfN(), 5) == ts.BestOfN()


def test_each_task_starts_from_its_own_plans():
    kernel = WarmStart(Lines(), torch.stack([torch.zeros(2, H, 4), torch.full((2, H, 4), 100.0)]), 1)
    x = kernel.prior(
        torch.randn(3, H, 4, generator=torch.Generator().manual_seed(0)), {"task": torch.tensor([1, 0, 1])}
    )
    assert ((x > 50).all((1, 2))).tolist() == [True, False, True]


def test_a_warm_start_passes_on_the_contract_but_its_own():
    class Weighted(Lines):
        backward_per_nfe = tuple(range(T + 1))
        extra = "beyond the contract"

        def prior_log_weight(self, x, cond=None):
            return torch.ones(len(x))

    kernel = WarmStart(Weighted(), torch.zeros(1, 1, H, 4), 3)
    assert describe(kernel).backward_per_nfe == (0, 1, 2, 3)
    assert not hasattr(kernel, "extra")
    assert kernel.kernel.extra == "beyond the contract"
    assert not hasattr(kernel, "prior_log_weight")
    other = WarmStart(Weighted(), torch.ones(1, 1, H, 4), 3)
    assert kernel.fingerprint != other.fingerprint


def test_declared_values_steer_plans_from_the_prior_and_from_the_plans_before():
    def value(x, t, law, cond):
        goal = torch.tensor([p["goal"] for p in cond["guide_prompts"]])
        return -(x.double()[:, -1, :2] - goal).square().sum(1) - t

    kernel, method = Valued(Lines(), REACH, value), ts.FeynmanKac(num_particles=10)
    agent = Planner(kernel, REACH, method, budget=ts.Budget(nfe=20 * T), steps=2)
    for position in (np.zeros(2), np.full(2, 0.1)):
        agent.act(position, GOAL)
        tree = agent.result.tree
        held = (tree.t > 0) & ~np.isnan(tree.reward)
        assert held.sum() >= 20
        x = agent.result.tasks[0].fetch._stored(np.flatnonzero(held))
        want = value(
            x, torch.from_numpy(tree.t[held].astype(np.int64)), None, {"guide_prompts": [{"goal": GOAL}] * len(x)}
        )
        np.testing.assert_allclose(tree.reward[held], want)
