"""PointMaze: data from a scripted behaviour, held-out start-goal pairs, and plans executed in the environment.

The point is a ball pushed by a force: observation (x, y, v_x, v_y), action (f_x, f_y) in [-1, 1], 100 steps a second.
The behaviour walks from cell to cell along a route that is shortest under random cell costs, by proportional-derivative
control with random gains and correlated noise, then hovers about its goal. A segment is one trip with its hovering;
the next one starts where it ended. Trips between held-out (start cell, goal cell) pairs never occur.

    python -m experiments.planning.pointmaze --maze medium --out runs/pointmaze/medium.npz

Environments: gymnasium-robotics, PointMaze_{UMaze,Medium,Large}-v3, after D4RL: Datasets for Deep Data-Driven
Reinforcement Learning (Fu et al., 2020), section 5, whose data are made by a planner and such a controller as well.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treesearch.rewards.trajectories.maze import Maze
from treesearch.rewards.trajectories.trajectory import RADIUS

Array = NDArray[Any]
Cell = tuple[int, int]
MAZES = {"umaze": "PointMaze_UMaze-v3", "medium": "PointMaze_Medium-v3", "large": "PointMaze_Large-v3"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the data script."""

    maze: str = "medium"
    steps: int = 2_000_000
    out: Path = Path("runs/pointmaze/medium.npz")
    segment: int = 260
    """Shortest segment in steps; the longest is half as long again."""
    seed: int = 0


def free_cells(maze: Maze) -> list[Cell]:
    """Cells (row, col) without a wall, row by row."""
    rows, cols = maze.shape
    return [(r, c) for r in range(rows) for c in range(cols) if maze.is_free((r, c))]


def neighbours(maze: Maze, cell: Cell) -> list[Cell]:
    """Free cells that share a side with this one."""
    r, c = cell
    return [near for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)) if maze.is_free(near)]


def costs_to(maze: Maze, goal: Cell, cost: Array | None = None) -> dict[Cell, float]:
    """Least cost of a route from every cell that can reach the goal; leaving for a cell costs `cost[cell]`, or 1."""
    best: dict[Cell, float] = {}
    queue = [(0.0, goal)]
    while queue:
        total, cell = heapq.heappop(queue)
        if cell not in best:
            best[cell] = total
            step = 1.0 if cost is None else float(cost[cell])
            for near in neighbours(maze, cell):
                heapq.heappush(queue, (total + step, near))
    return best


@functools.lru_cache(maxsize=8)
def distances(maze: Maze) -> dict[tuple[Cell, Cell], int]:
    """Cells to walk for every ordered pair (start, goal) that a way joins."""
    return {(a, b): int(d) for b in free_cells(maze) for a, d in costs_to(maze, b).items()}


@functools.lru_cache(maxsize=8)
def held_out(maze: Maze) -> frozenset[tuple[Cell, Cell]]:
    """One in five of the ordered pairs of cells that are two or more apart: never a trip of the data."""
    pairs = sorted(pair for pair, d in distances(maze).items() if d >= 2)
    pick = np.random.default_rng(len(pairs)).permutation(len(pairs))[: len(pairs) // 5]
    return frozenset(pairs[i] for i in pick)


def make(maze: str) -> Any:
    """The environment, its goal left where it is set.

    Raises:
        ValueError: an unknown maze.
        ImportError: gymnasium-robotics is missing.
    """
    if maze not in MAZES:
        raise ValueError(f"unknown maze {maze!r}: choose {', '.join(MAZES)}")
    try:
        import gymnasium

        with contextlib.redirect_stderr(io.StringIO()):  # on import it tells of its other environments
            import gymnasium_robotics
    except ImportError as error:
        raise ImportError("mazes need gymnasium-robotics: pip install 'treesearch[rl]'") from error
    gymnasium.register_envs(gymnasium_robotics)
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    return gymnasium.make(MAZES[maze], continuing_task=True, reset_target=False, max_episode_steps=10**9).unwrapped


def layout(env: Any) -> Maze:
    """The walls of an environment."""
    return Maze.of(env.maze.maze_map)


class Pair(NamedTuple):
    """Where a task starts, at rest, and where it must end; `cells` is the length of the shortest route."""

    start: tuple[float, float]
    goal: tuple[float, float]
    cells: int


def held_out_pairs(maze: str, n: int, seed: int, min_cells: int = 2, max_cells: int = 10**6) -> list[Pair]:
    """n tasks between held-out pairs of cells, up to a quarter of a cell off their centres.

    Args:
        min_cells, max_cells: bounds on the length of the shortest route.

    Raises:
        ValueError: an unknown maze, or no held-out pair is that far apart.
    """
    walls, rng = Maze.of(maze), np.random.default_rng(seed)
    apart = distances(walls)
    usable = [pair for pair in sorted(held_out(walls)) if min_cells <= apart[pair] <= max_cells]
    if not usable:
        longest = max(apart[pair] for pair in held_out(walls))
        raise ValueError(f"no held-out pair is {min_cells} to {max_cells} cells apart: they are 2 to {longest}")
    order = np.concatenate([rng.permutation(len(usable)) for _ in range(-(-n // len(usable)))])[:n]
    return [Pair(spot(walls, a, rng), spot(walls, b, rng), apart[a, b]) for a, b in (usable[i] for i in order)]


def spot(maze: Maze, cell: Cell, rng: np.random.Generator) -> tuple[float, float]:
    """A position up to a quarter of a cell off a cell's centre."""
    x, y = maze.cell_to_xy(cell) + rng.uniform(-0.25, 0.25, 2)
    return float(x), float(y)


@dataclass(frozen=True)
class Controller:
    """Proportional-derivative control along the cheapest route to a goal.

    Args:
        maze: its walls.
        goal: a position.
        costs: of a route from each cell to the goal's, see `costs_to`.
        gain, damping: of the control.
    """

    maze: Maze
    goal: Array
    costs: dict[Cell, float]
    gain: float = 8.0
    damping: float = 1.1

    def target(self, position: Array) -> Array:
        """The centre of the next cell of the route, or the goal."""
        here, cell = (self.maze.xy_to_cell(xy.tolist()) for xy in (position, self.goal))
        if here == cell or here not in self.costs:
            return self.goal
        ahead = min(neighbours(self.maze, here), key=self.costs.__getitem__)
        return self.goal if ahead == cell else np.array(self.maze.cell_to_xy(ahead))

    def push(self, observation: Array) -> Array:
        """The force, not yet clipped."""
        position, velocity = observation[:2], observation[2:]
        return self.gain * (self.target(position) - position) - self.damping * velocity


class Trip:
    """One walk to a goal: its route and its controller, both drawn at random."""

    def __init__(self, maze: Maze, start: Array, rng: np.random.Generator) -> None:
        here = maze.xy_to_cell(start.tolist())
        allowed = [c for c in free_cells(maze) if c != here and (here, c) not in held_out(maze)]
        cell = allowed[rng.integers(len(allowed))]
        goal = np.array(spot(maze, cell, rng))
        costs = costs_to(maze, cell, rng.uniform(0.5, 2.0, maze.shape))
        self.controller = Controller(maze, goal, costs, rng.uniform(5, 12), rng.uniform(0.8, 1.4))
        self.scale, self.noise, self.rng = rng.choice([0.05, 0.2, 0.4]), np.zeros(2), rng
        self.arrived = False

    @property
    def goal(self) -> Array:
        return self.controller.goal

    def act(self, observation: Array) -> Array:
        self.arrived = self.arrived or float(np.hypot(*(self.goal - observation[:2]))) <= RADIUS
        self.noise = 0.9 * self.noise + 0.44 * self.scale * self.rng.standard_normal(2)
        return np.clip(self.controller.push(observation) + self.noise, -1, 1).astype(np.float32)


class Data(NamedTuple):
    """Steps in order; `timeouts` marks the last step of each segment, `trips` holds steps to the goal by segment."""

    observations: Array  # (n, 4) float32
    actions: Array  # (n, 2) float32
    rewards: Array  # (n,) float32, 1 within RADIUS of the goal
    terminals: Array  # (n,) bool, never: the task goes on
    timeouts: Array  # (n,) bool
    goals: Array  # (n, 2) float32
    trips: Array  # (segments,) int


def generate(maze: str, steps: int, segment: int, seed: int) -> tuple[Data, Maze]:
    """At least `steps` steps of the behaviour: whole segments of `segment` to 1.5 times as many steps."""
    env = make(maze)
    walls, rng = layout(env), np.random.default_rng(seed)
    observation = env.reset(seed=seed)[0]["observation"]
    rows: list[tuple[Array, Array, bool, Array]] = []
    ends, trips = [], []
    while len(rows) < steps:
        trip, begin = Trip(walls, observation[:2], rng), len(rows)
        length, walked = int(rng.integers(segment, segment * 3 // 2)), None
        env.goal = trip.goal
        while len(rows) < begin + length or walked is None:
            action = trip.act(observation)
            if walked is None and trip.arrived:
                walked = len(rows) - begin
            state, _, _, _, _ = env.step(action)
            rows.append((observation, action, trip.arrived, trip.goal))
            observation = state["observation"]
        ends.append(len(rows) - 1)
        trips.append(walked)
    seen, actions, reached, goals = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    timeouts = np.zeros(len(rows), bool)
    timeouts[ends] = True
    return Data(seen, actions, reached, np.zeros(len(rows), bool), timeouts, goals, np.array(trips)), walls


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Proportional-derivative control towards the planned positions and velocities; a row lasts `stride` steps."""

    stride: int
    gain: float = 10.0
    damping: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Acting:
    """The planned actions, open loop; each is held for `stride` steps."""

    stride: int


Control = Tracking | Acting


class Outcome(NamedTuple):
    """What became of n executed plans."""

    success: Array  # (n,) bool: within RADIUS of the goal at some step
    distance: Array  # (n,) to the goal at the end
    steps: Array  # (n,) environment steps until success, or all that were made


class Field:
    """n points in one maze, each with its own goal; what is planned for them is carried out, some rows at a time.

    Args:
        maze: a name in MAZES.
        starts: (n, 2) positions at rest or (n, 4) observations.
        goals: (n, 2).
        control: how plans are carried out.
    """

    def __init__(self, maze: str, starts: Array, goals: Array, control: Control) -> None:
        self.env, self.goals, self.control = make(maze), np.asarray(goals, float), control
        self.env.reset(seed=0)
        self.reset(starts)

    def reset(self, starts: Array) -> Array:
        """Put the points at their starts; returns observations (n, 4)."""
        starts = np.asarray(starts, float)
        self.observations = np.zeros((len(starts), 4))
        self.observations[:, : starts.shape[1]] = starts
        self.paths: list[list[Array]] = [[o.copy()] for o in self.observations]
        self.reached = np.linalg.norm(self.observations[:, :2] - self.goals, axis=1) <= RADIUS
        self.steps = np.zeros(len(starts), int)
        return self.observations.copy()

    def run(self, plans: Array, rows: int | None = None) -> Array:
        """Carry out rows 0..rows of plans (n, H, C), row 0 being now; points at their goal stay as they are.

        C is 4 or more; for actions, which come last, 6.

        Returns:
            Observations (n, 4) afterwards.
        """
        plans = np.asarray(plans, float)
        count = plans.shape[1] - 1 if rows is None else min(rows, plans.shape[1] - 1)
        for i in range(len(plans)):
            if not self.reached[i]:
                self._follow(i, plans[i, : count + 1])
        return self.observations.copy()

    def _follow(self, i: int, plan: Array) -> None:
        point, stride = self.env.point_env, self.control.stride
        point.set_state(self.observations[i, :2], self.observations[i, 2:])
        seen = self.observations[i]
        for step in range((len(plan) - 1) * stride):
            seen = point.step(np.clip(self._push(plan, seen, step), -1, 1))[0]
            self.paths[i].append(seen)
            self.steps[i] += 1
            if np.hypot(*(seen[:2] - self.goals[i])) <= RADIUS:
                self.reached[i] = True
                break
        self.observations[i] = seen

    def _push(self, plan: Array, seen: Array, step: int) -> Array:
        """The force at a step of a plan (rows, C)."""
        if isinstance(self.control, Acting):
            return plan[step // self.control.stride, 4:6]
        row, part = divmod(step + 1, self.control.stride)
        after = plan[min(row + 1, len(plan) - 1), :4]
        wanted = plan[row, :4] + part / self.control.stride * (after - plan[row, :4])
        return self.control.gain * (wanted[:2] - seen[:2]) + self.control.damping * (wanted[2:] - seen[2:])

    def outcome(self) -> Outcome:
        gaps = np.linalg.norm(self.observations[:, :2] - self.goals, axis=1)
        return Outcome(self.reached.copy(), gaps, self.steps.copy())


def execute(maze: str, starts: Array, goals: Array, plans: Array, control: Control) -> Outcome:
    """Carry out whole plans (n, H, 4 or more) without replanning."""
    field = Field(maze, starts, goals, control)
    field.run(plans)
    return field.outcome()


def main(args: Args) -> None:
    """Write the data set and say what is in it."""
    start = time.monotonic()
    data, maze = generate(args.maze, args.steps, args.segment, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **data._asdict(), maze_map=np.array(maze.walls, np.uint8), env_id=MAZES[args.maze])
    quantiles = np.quantile(data.trips, [0.1, 0.5, 0.9, 0.99, 1.0]).astype(int)
    print(
        f"{args.maze}: {len(data.rewards)} steps, {len(data.trips)} trips, {time.monotonic() - start:.0f} s; "
        f"steps to the goal at 10, 50, 90, 99, 100 %: {', '.join(map(str, quantiles))}"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
