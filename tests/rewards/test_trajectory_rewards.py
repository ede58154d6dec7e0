"""Rewards of trajectories: values by hand, the environment as the reference, gradients, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.base import RewardError, as_reward
from treesearch.rewards.channels import Channels, as_channels, entry, known
from treesearch.rewards.trajectories.critic import Critic
from treesearch.rewards.trajectories.dynamics import PointMass, dynamics_consistency
from treesearch.rewards.trajectories.execution import acted, followed, maze_execution
from treesearch.rewards.trajectories.maze import MAZES, Maze, Unreachable, check_reachable, maze_plan, wall_collision
from treesearch.rewards.trajectories.policy import PolicyLikelihood
from treesearch.rewards.trajectories.trajectory import (
    action_bounds,
    discounted_return,
    goal_reaching,
    novelty,
    smoothness,
)
from treesearch.rewards.trajectories.ways import way

C = Channels(4, 2)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(*waypoints, per_leg=10):
    """A trajectory (1, H, 6) through waypoints, at even pace; only its positions mean something."""
    points = torch.tensor(waypoints, dtype=torch.float64)
    share = torch.arange(per_leg, dtype=torch.float64)[:, None] / per_leg
    legs = [a + share * (b - a) for a, b in itertools.pairwise(points)]
    xy = torch.cat([*legs, points[-1:]])
    return torch.cat([xy, torch.zeros(len(xy), 4, dtype=torch.float64)], 1)[None]


# channels and prompts


def test_channels_split_the_last_axis():
    x = draw(3, 5, 7)
    c = Channels(4, 2, 1)
    assert c.size == 7
    assert torch.equal(torch.cat([c.observations(x), c.actions(x), c.rewards(x)[..., None]], -1), x)
    assert as_channels((4, 2)) == C
    assert as_channels((0, 2)).actions(x[..., :2]).shape == (3, 5, 2)
    with pytest.raises(ValueError, match="no reward channel"):
        C.rewards(x)
    for bad in ((0, 0), (-1, 2), (4, -1), (4, 2, 2), (4, 2.5), (4,)):
        with pytest.raises(ValueError, match="expected"):
            as_channels(bad)


def test_prompts_are_plain_data():
    prompt = known(start=torch.tensor([0.0, 1.0]), goal=[2, 3])
    assert prompt == {"start": [0.0, 1.0], "goal": [2.0, 3.0]}
    assert known(goal=(1, 2)) == {"goal": [1.0, 2.0]}
    assert known() == {}
    assert entry(prompt, "goal", 2) == entry('{"goal": [2, 3]}', "goal") == [2.0, 3.0]
    assert entry({}, "start") is entry(None, "goal") is None
    for bad in (
        {"gaol": [1, 2]},
        [1, 2],
        "{",
        {"goal": [1, 2, 3]},
        {"goal": [1, math.nan]},
        {"goal": "ab"},
        {"goal": []},
    ):
        with pytest.raises(ValueError, match=r"expected|keys|cannot read"):
            entry(bad, "goal", 2)


@pytest.mark.parametrize(
    "reward",
    [goal_reaching(C, [9, 0]), wall_collision("medium"), smoothness(C), dynamics_consistency(C), action_bounds(C)],
    ids=lambda r: r.name,
)
def test_bad_trajectories_are_refused_and_good_ones_have_gradients(reward):
    x = draw(4, 8, 6).requires_grad_()
    values = reward.attached(x)
    assert values.shape == (4,)
    assert (values <= 0).all()
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert slope.isfinite().all()
    assert (slope.flatten(1).abs().sum(1) > 0).all()
    with pytest.raises(RewardError, match=r"\(n, H, 6\)"):
        reward(draw(4, 8, 7))
    hole = x.detach().clone()
    hole[2, 3, 1] = math.nan
    with pytest.raises(RewardError, match="row 2, step 3, channel 1"):
        reward(hole)


# return, goal, smoothness, bounds, novelty


def test_discounted_return_by_hand():
    x = torch.zeros(1, 3, 4)
    x[0, :, 3] = torch.tensor([1.0, 10.0, 100.0])
    assert discounted_return((2, 1, 1), 0.5)(x).item() == 1 + 5 + 25
    with pytest.raises(ValueError, match="no rewards"):
        discounted_return(C)
    with pytest.raises(ValueError, match="discount"):
        discounted_return((2, 1, 1), 0)


def test_goal_reaching_measures_what_is_missing():
    x = along((0, 0), (1, 0), (1, 1))
    assert goal_reaching(C, [1, 0], radius=0.5)(x).item() == 0
    assert goal_reaching(C, [1, 0], radius=0.5, when="end")(x).item() == pytest.approx(-0.5)
    assert goal_reaching(C, [4, 1], radius=0.5)(x).item() == pytest.approx(-2.5)
    assert goal_reaching(C, [0.0, 0.0], radius=1, position=(2, 3))(x + 2).item() == pytest.approx(1 - 8**0.5)


def test_goals_come_from_prompts_one_per_sample():
    x = along((0, 0), (1, 0)).repeat(2, 1, 1)
    values = goal_reaching(C, radius=0)(x, [known(goal=[3, 0]), {"start": [0, 0], "goal": [1, 2]}])
    assert values.tolist() == [-2, -2]
    for prompts, message in ((None, "no goal"), ([known(goal=[3, 0])] * 3, "give one a sample"), ([{}, {}], "no goal")):
        with pytest.raises(RewardError, match=message):
            goal_reaching(C)(x, prompts)
    with pytest.raises(RewardError, match="goal has 3 numbers, expected 2"):
        goal_reaching(C)(x, [{"goal": [1, 2, 3]}] * 2)


def test_a_search_finds_the_goal_of_each_prompt():
    found = ts.search(
        LinearGaussian(num_steps=4, dim=2),
        as_reward(lambda x, prompts: goal_reaching((2, 0), radius=0)(x[:, None], prompts)),
        ts.BestOfN(n=64),
        prompts=[known(goal=[1, 1]), known(goal=[-1, -1])],
    )
    for task, sign in zip(found.tasks, (1, -1), strict=True):
        best, rewards = task.best(1)
        assert rewards[0] > -1
        assert (sign * best[0] > 0).all()


def test_smoothness_and_bounds_by_hand():
    x = torch.zeros(1, 4, 6)
    x[0, :, 0] = torch.tensor([0.0, 1.0, 3.0, 3.0])  # second differences 1, -2
    x[0, 1, 4:] = torch.tensor([1.5, -3.0])
    assert smoothness(C)(x).item() == -(1 + 4) / 2
    assert action_bounds(C)(x).item() == -(0.5 + 2) / 4
    assert action_bounds(C, -3, 2)(x).item() == 0
    with pytest.raises(RewardError, match="3 or more rows"):
        smoothness(C)(x[:, :2])


def test_novelty_is_the_distance_to_the_nearest_reference():
    reference = draw(5, 7, 6)
    x = torch.cat([reference[2:3], reference[3:4]])
    x[1, :, :4] += 2.0
    x[:, :, 4:] = 9.0  # actions do not count
    near = (reference[:, None, :, :4] - x[None, :, :, :4]).square().sum(3).mean(2).sqrt().amin(0)
    got = novelty(reference, C)(x)
    assert got[0].item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(got, near, atol=1e-6)
    with pytest.raises(RewardError, match="cut to one length"):
        novelty(reference, C)(x[:, :6])
    with pytest.raises(ValueError, match="position"):
        novelty(reference, C, position=(4,))


# dynamics and the maze, against the environment


@pytest.fixture(scope="module")
def medium():
    pytest.importorskip("mujoco")
    pointmaze = pytest.importorskip("gymnasium_robotics.envs.maze.point_maze")
    maps = pytest.importorskip("gymnasium_robotics.envs.maze.maps")
    env = pointmaze.PointMazeEnv(maze_map=maps.MEDIUM_MAZE, continuing_task=True)
    yield env
    env.close()


def roll(env, start, actions, repeat):
    """Observations (len(actions) + 1, 4): each action held for `repeat` steps."""
    env.reset(seed=0)
    env.point_env.set_state(start[:2].numpy(), start[2:].numpy())
    seen = [start]
    for action in actions:
        for _ in range(repeat):
            observation = env.step(action.numpy())[0]["observation"]
        seen.append(torch.as_tensor(observation))
    return torch.stack(seen)


@pytest.mark.parametrize("stride", [1, 3])
def test_point_mass_is_the_environment_in_the_open(medium, stride):
    start = torch.tensor([0.0, 0.4, 4.9, -0.2], dtype=torch.float64)  # the middle is free; it meets the speed limit
    actions = torch.tensor([[1.5, 0.2], [1.0, -0.5], [-1, 0.1], [-3, 0.7]], dtype=torch.float64)
    start[0] = -0.6
    seen = roll(medium, start, actions, stride)
    assert torch.allclose(PointMass(stride=stride).rollout(start[None], actions[None])[0], seen, atol=1e-12)
    x = torch.cat([seen[:-1], actions], 1)[None]
    assert dynamics_consistency(C, stride)(x).item() == pytest.approx(0, abs=1e-20)
    assert dynamics_consistency(C, stride + 1)(x).item() < -1e-4
    x[0, 2, 0] += 0.3  # wrong once as what follows, once as what is followed
    assert dynamics_consistency(C, stride, scale=(0.1, 1, 1, 1))(x).item() == pytest.approx(-2 * 9 / 3)


def test_dynamics_take_any_model_and_check_it():
    x = draw(2, 5, 6)
    still = dynamics_consistency(C, lambda s, a: s)
    assert torch.allclose(still(x), -x[..., :4].diff(dim=1).square().sum(2).mean(1))
    with pytest.raises(RewardError, match=r"returned shape \(2, 4, 3\)"):
        dynamics_consistency(C, lambda s, a: s[..., :3])(x)
    for bad in ({"scale": (1, 1)}, {"scale": 0}, {"channels": (4, 0)}, {"model": 0}):
        with pytest.raises(ValueError, match=r"scale|no actions|stride"):
            dynamics_consistency(**{"channels": C} | bad)


def test_maps_and_cells_are_those_of_the_environment(medium):
    maps = pytest.importorskip("gymnasium_robotics.envs.maze.maps")
    named = {"umaze": maps.U_MAZE, "medium": maps.MEDIUM_MAZE, "large": maps.LARGE_MAZE}
    assert {name: [list(row) for row in walls] for name, walls in MAZES.items()} == named
    assert Maze.of(maps.LARGE_MAZE_DIVERSE_GR) == Maze.of("large")
    ours, theirs = Maze.of("medium"), medium.maze
    for cell in ((0, 0), (1, 6), (6, 1), (3, 4)):
        assert ours.cell_to_xy(cell) == tuple(theirs.cell_rowcol_to_xy(cell))
    for xy in draw(50, 2, scale=2.0).tolist():
        assert ours.xy_to_cell(xy) == tuple(theirs.cell_xy_to_rowcol(xy))


def test_the_ball_stops_where_collision_begins(medium):
    maze = Maze.of("medium")
    x, y = maze.cell_to_xy((1, 1))
    seen = roll(medium, torch.tensor([x, y, 0, 0], dtype=torch.float64), torch.tensor([[-1.0, 0.3]]), 150)
    assert maze.clearance(seen[-1, :2]).item() == pytest.approx(0.1, abs=0.02)
    assert wall_collision(maze, C)(along((x, y), (x - 0.39, y))).item() == 0
    assert wall_collision(maze, C)(along((x, y), (x - 0.5, y))).item() < -0.5


def test_clearance_is_the_signed_distance_to_cells():
    for maze in map(Maze.of, ("umaze", "large")):
        rows, cols = maze.shape
        points = draw(200, 2, scale=3.0)
        spaced = [(r, c) for r in range(-3, rows + 3) for c in range(-3, cols + 3)]
        centres = torch.tensor([maze.cell_to_xy(cell) for cell in spaced], dtype=torch.float64)
        away = ((points[:, None] - centres).abs() - 0.5).clamp(min=0).norm(dim=2)
        free = torch.tensor([maze.is_free(cell) for cell in spaced])
        inside = (points.abs() < torch.tensor([cols / 2 + 2, rows / 2 + 2])).all(1)
        expected = away[:, ~free].amin(1) - away[:, free].amin(1)
        assert torch.allclose(maze.clearance(points)[inside], expected[inside])


def test_collision_sees_leaps_and_points_out_of_walls():
    maze = Maze.of("umaze")  # the bar between the corridors is at y = 0
    clear = along((-1, 1), (1, 1), (1, -1), (-1, -1))
    assert wall_collision(maze)(clear).item() == 0
    leap = along((-1, 1), (-1, -1), per_leg=1)
    assert -1 < wall_collision(maze)(leap).item() < -0.3
    assert wall_collision(maze, samples_per_row=1)(leap).item() == 0  # both ends are free: the way is what counts
    assert -11 < wall_collision(maze)(along((-1, 0.4), (-1, -0.4))).item() < -8
    inside = torch.zeros(1, 4, 6, dtype=torch.float64)
    inside[..., 0], inside[..., 1] = -0.7, 0.2
    inside.requires_grad_()
    (slope,) = torch.autograd.grad(wall_collision(maze).attached(inside).sum(), inside)
    assert (slope[..., 1] > 0).all()  # up, to the nearer corridor
    assert (slope[..., 0] == 0).all()
    far = torch.full((1, 4, 6), 50.0, requires_grad=True)
    (slope,) = torch.autograd.grad(wall_collision(maze).attached(far).sum(), far)
    assert (slope[..., :2] < 0).all()


def test_a_plan_that_has_left_the_world_is_bad_and_no_error():
    """What a guide that is too strong makes."""
    plan = torch.zeros(1, 4, 6)
    plan[..., 0] = 1e25
    assert -4 <= wall_collision("medium")(plan).item() < -3.9999


def test_routes_and_goals_that_cannot_be_reached():
    maze = Maze.of("umaze")
    route = maze.route((-1.2, 0.9), (-1, -1.1))
    assert route == [(-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    assert maze.route((-1, 1), (-0.6, 0.8)) == [(-1, 1)]
    with pytest.raises(Unreachable, match=r"goal \(0.00, 0.00\) lies in a wall: row 2, column 2"):
        maze.route((-1, 1), (0, 0))
    with pytest.raises(Unreachable, match=r"start \(9.00, 1.00\) lies outside the maze: expected x in -2.5..2.5"):
        maze.route((9, 1), (1, 1))
    split = Maze.of([[0, 1, 0]])
    with pytest.raises(Unreachable, match="cannot be reached"):
        check_reachable(split, known(start=[-1, 0], goal=[1, 0]))
    check_reachable(split, known(goal=[1, 0]))
    with pytest.raises(RewardError, match=r"Unreachable: goal \(0.00, 0.00\) lies in a wall"):
        maze_plan("umaze")(along((-1, 1), (1, 1)), [known(start=[-1, 1, 0, 0], goal=[0, 0])])
    for bad in ("tiny", [[0, 1], [0]], [[0, 2]], [[1, 1]]):
        with pytest.raises(ValueError, match=r"expected|unknown"):
            Maze.of(bad)


def steer(maze, goal, start, rows, stride):
    """A plan that works, rolled out without walls: the cells of the route, one after the other."""
    model, s, path, plan = PointMass(stride=stride), start, maze.route(start[:2], goal), []
    for _ in range(rows):
        here = maze.xy_to_cell(s[:2])
        cells = [maze.xy_to_cell(xy) for xy in path]
        target = path[min(cells.index(here) + 1, len(path) - 1)] if here in cells else path[-1]
        a = (8 * (torch.tensor(target, dtype=s.dtype) - s[:2]) - 3 * s[2:]).clamp(-1, 1)
        plan.append(torch.cat([s, a]))
        s = model(s[None], a[None])[0]
    return torch.stack(plan)[None]


def test_maze_plan_is_zero_for_a_plan_that_works_and_names_each_fault():
    maze, goal = Maze.of("medium"), (1.5, 1.5)
    start = torch.tensor([-2.5, 2.5, 0, 0], dtype=torch.float64)
    good = steer(maze, goal, start, 96, 4)
    reward, prompts = maze_plan("medium", stride=4), [known(start=start, goal=goal)]
    assert reward(good, prompts).item() == pytest.approx(0, abs=1e-9)
    short, off, through = good[:, :30], good.clone(), good.clone()
    off[0, 40:, 0] += 0.2
    through[..., :2] = along(start[:2].tolist(), goal, per_leg=95)[..., :2]
    assert reward(short, prompts).item() < -0.5
    assert reward(off, prompts).item() < -0.04
    assert maze_plan("medium", stride=4, dynamics=0)(through, prompts).item() < -5
    assert maze_plan("medium", stride=4, dynamics=0, collision=0)(through, prompts).item() == 0
    assert maze_plan("medium", stride=4, goal=goal)(good).item() == pytest.approx(0, abs=1e-9)


def track(env, plan, stride):
    """Positions of the environment's ball as it follows a plan (H, 4) by proportional-derivative control."""
    env.reset(seed=0)
    env.point_env.set_state(plan[0, :2].numpy(), plan[0, 2:].numpy())
    seen, path = plan[0], [plan[0, :2]]
    for before, after in itertools.pairwise(plan):
        for step in range(1, stride + 1):
            gap = before + step / stride * (after - before) - seen
            action = 10 * gap[:2] + gap[2:]
            seen = torch.as_tensor(env.step(action.numpy())[0]["observation"])
            path.append(seen[:2])
    return torch.stack(path)


def test_following_a_plan_is_what_the_environment_does(medium):
    maze, goal = Maze.of("medium"), (1.5, 1.5)
    start = torch.tensor([-2.5, 2.5, 0, 0], dtype=torch.float64)
    plan = steer(maze, goal, start, 64, 4)[..., :4]
    assert torch.allclose(followed(maze, plan, 4)[0], track(medium, plan[0], 4), atol=1e-9)
    across = along((-2.5, 2.5), (-1.4, 1.6), (0.5, 0.5), per_leg=30)[..., :4]  # slides along walls and round a corner
    ours, theirs = followed(maze, across, 4)[0], track(medium, across[0], 4)
    assert maze.clearance(theirs).min() < 0.12
    assert maze.clearance(ours).min() > 0.1 - 1e-9
    assert (ours - theirs).norm(dim=1).max() < 0.1


def test_acting_is_what_the_environment_does(medium):
    env, goal = medium.point_env, (1.5, 1.5)
    start = torch.tensor([-2.5, 2.5, 0, 0], dtype=torch.float64)
    actions = steer(Maze.of("medium"), goal, start, 64, 4)[:, :40, 4:]
    env.set_state(start[:2].numpy(), start[2:].numpy())
    seen = [start[:2].numpy()]
    for action in actions[0, :-1].clamp(-1, 1).repeat_interleave(4, 0).numpy():
        seen.append(env.step(action)[0][:2])
    ours = acted(Maze.of("medium"), start[None], actions, 4)[0]
    assert Maze.of("medium").clearance(torch.tensor(np.array(seen))).min() > 0.1  # it touches no wall
    assert torch.allclose(ours, torch.tensor(np.array(seen)), atol=1e-9)
    into = torch.tensor([[1.0, 0.3]], dtype=torch.float64).expand(1, 40, 2)  # a wall, and along it
    env.set_state(start[:2].numpy(), start[2:].numpy())
    walls = np.array([env.step(into[0, 0].numpy())[0][:2] for _ in range(4 * 39)])
    pushed = acted(Maze.of("medium"), start[None], into, 4)[0, 1:]
    assert Maze.of("medium").clearance(pushed).min() > 0.095  # in the corner one wall acts at a time
    assert (pushed - torch.tensor(walls)).norm(dim=1).max() < 0.15


def test_within_reach_is_zero_and_nothing_is_asked_of_no_plan():
    goal = (1.5, 1.5)
    near = torch.zeros(1, 8, 6, dtype=torch.float64)
    near[..., :2] = torch.tensor(goal) + 0.31  # .438 away, more on the grid
    assert maze_execution("medium", goal=goal, by="actions")(near).item() == 0
    assert maze_execution("medium", goal=goal, by="actions")(near + 0.02).item() < 0
    assert maze_execution("medium", goal=goal)(near[:0]).shape == (0,)


def test_execution_by_actions_does_not_look_at_the_planned_states():
    maze, goal = Maze.of("medium"), (1.5, 1.5)
    start = torch.tensor([-2.5, 2.5, 0, 0], dtype=torch.float64)
    good, prompts = steer(maze, goal, start, 96, 4), [known(start=start, goal=goal)]
    reward = maze_execution(maze, stride=1, by="actions")
    stayed = good.clone()
    stayed[:, 1:, :4] = start
    short = maze_execution(maze, stride=4, by="actions")(good, prompts)
    assert torch.equal(maze_execution(maze, stride=4, by="actions")(stayed, prompts), short)
    idle = stayed.clone()
    idle[..., 4:] = 0
    assert reward(idle, prompts).item() == pytest.approx(0.45 - way(maze, start[:2], goal).item())
    stayed.requires_grad_()
    loss = maze_execution(maze, goal=goal, stride=4, by="actions").attached(idle.requires_grad_()).sum()
    (slope,) = torch.autograd.grad(loss, idle)
    assert slope.isfinite().all()
    assert slope[..., 4:].abs().sum() > 0


def test_execution_is_zero_where_the_plan_arrives():
    maze, goal = Maze.of("medium"), (1.5, 1.5)
    start = torch.tensor([-2.5, 2.5, 0, 0], dtype=torch.float64)
    good = steer(maze, goal, start, 96, 4)
    stuck = along(start[:2].tolist(), (1.5, 2.5), goal, per_leg=48)  # into the wall between the upper rooms
    reward, prompts = maze_execution("medium", stride=4), [known(start=start, goal=goal)]
    assert reward(good, prompts).item() == 0
    assert -2.5 < reward(good[:, :40], prompts).item() < -0.3
    assert -3 < reward(stuck, prompts).item() < -2.8  # 2.6 straight, more round the walls
    assert goal_reaching(C)(stuck, prompts).item() == 0  # its own rows do arrive
    stuck.requires_grad_()
    (slope,) = torch.autograd.grad(maze_execution(maze, goal=goal, stride=4).attached(stuck).sum(), stuck)
    assert slope.isfinite().all()
    assert slope.abs().sum() > 0
    with pytest.raises(RewardError, match="Unreachable"):
        reward(good, [known(start=start, goal=[-0.5, 2.5])])
    for bad in ({"channels": (2, 2)}, {"stride": 0}, {"goal": [1, 2, 3]}, {"by": "hand"}):
        with pytest.raises(ValueError, match="expected"):
            maze_execution("medium", **bad)


# policies and critics


class Sure(nn.Module):
    """A Gaussian policy with a density of its own."""

    def __init__(self, width=0.5):
        super().__init__()
        self.mean, self.width = nn.Linear(4, 2).double(), width

    def forward(self, observation):
        return self.mean(observation)

    def log_prob(self, action, observation):
        return torch.distributions.Normal(self.mean(observation), self.width).log_prob(action).sum(-1)


def test_policy_likelihood_sums_over_the_rows():
    torch.manual_seed(0)
    policy, x = Sure(), draw(3, 5, 6)
    by_hand = sum(policy.log_prob(x[:, h, 4:], x[:, h, :4]) for h in range(5))
    assert torch.allclose(PolicyLikelihood(policy, C)(x), by_hand)
    unit = -0.5 * (x[..., 4:] - policy.mean(x[..., :4])).square().sum((1, 2)) - 5 * math.log(2 * math.pi)
    assert torch.allclose(PolicyLikelihood(policy.mean, C)(x), unit)
    assert torch.allclose(PolicyLikelihood(lambda s: policy.mean(s), C)(x), unit)
    clipped = torch.cat([x[..., :4], x[..., 4:].clamp(-0.1, 0.2)], -1)
    assert torch.allclose(PolicyLikelihood(policy, C, bounds=(-0.1, 0.2))(x), PolicyLikelihood(policy, C)(clipped))


def test_policy_gradients_reach_the_samples_alone_when_asked():
    policy, x = Sure(), draw(3, 5, 6).requires_grad_()
    (slope,) = torch.autograd.grad(PolicyLikelihood(policy, C).attached(x).sum(), x)
    gap = (x[..., 4:] - policy.mean(x[..., :4])).detach() / 0.25
    assert torch.allclose(slope[..., 4:], -gap)
    assert torch.allclose(slope[..., :4], gap @ policy.mean.weight.detach())
    assert not PolicyLikelihood(policy, C).attached(x.detach()).requires_grad


class Elsewhere(nn.Module):
    """A policy that refuses rows of another precision or device than its own weights."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 2, dtype=torch.float16))

    def forward(self, observation):
        return observation @ self.gain


def test_a_policy_elsewhere_works_or_is_refused_clearly():
    x = draw(2, 3, 6).float()
    assert PolicyLikelihood(Elsewhere(), C)(x).isfinite().all()  # float32 rows, float16 weights
    with pytest.raises(RewardError, match="meta, expected one device with storage"):
        PolicyLikelihood(Elsewhere().to("meta"), C)(x)
    with pytest.raises(RewardError, match="cpu and meta"):
        Critic(nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1, device="meta")]), C)(x)


@pytest.mark.parametrize("returned", [lambda s: s, lambda s: s[:, :1], lambda s: s[:1, :2]])
def test_policies_of_another_shape_are_refused(returned):
    with pytest.raises(RewardError, match="expected actions"):
        PolicyLikelihood(returned, C)(draw(2, 3, 6))


def q(sign):
    return lambda s, a: sign * s[:, :1] + a[:, :1]


def test_critic_is_the_pessimistic_minimum():
    x = draw(4, 5, 6)
    s, a = x[..., 0], x[..., 4]
    pair = (q(1.0), q(-1.0))
    assert torch.allclose(Critic(q(1.0), C)(x), (s + a)[:, 0])
    assert torch.allclose(Critic(pair, C)(x), (a - s.abs())[:, 0])
    assert torch.allclose(Critic(pair, C, row=-1)(x), (a - s.abs())[:, -1])
    assert torch.allclose(Critic(pair, C, row=None)(x), (a - s.abs()).mean(1))
    for bad, match in ((lambda s, a: s, "one number per row"), (lambda s, a: s[:1, 0], "1 values for 4 rows")):
        with pytest.raises(RewardError, match=match):
            Critic(bad, C)(x)
    with pytest.raises(RewardError, match="have 5 rows"):
        Critic(pair, C, row=5)(x)
    with pytest.raises(ValueError, match="none"):
        Critic([], C)


def test_rewards_are_named_on_the_command_line():
    from treesearch.registry import registry as specs

    x = along((-1, 1), (1, 1))
    reward = specs.reward("wall_collision('umaze') + 2*goal_reaching((4, 2), goal=[1, 0]).clip(-3, 0)")
    assert reward(x).item() == pytest.approx(2 * (0.45 - 1))
    assert specs.reward("maze_plan('medium', stride=4, goal=[1.5, 1.5])").name == "maze_plan"
    told = (wall_collision("umaze").settings, wall_collision("medium").settings)
    assert told[0] != told[1]
