"""Episodes by chunks, and environments that are models of themselves."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.utils import EzPickle

from treesearch.policies.environments import environment, told
from treesearch.policies.episodes import flat, play
from treesearch.policies.rehearsal import Rehearsed, rehearsal


class Line(gymnasium.Env):
    """A point on a line: an action moves it, it is worth where it stands, and there is an end at `end`."""

    action_space = Box(-1.0, 1.0, (1,), np.float32)
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, end=3.0, noise=0.0, held=None, lost=False):
        self.end, self.noise, self.held, self.lost = end, noise, held, lost

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0.5 * float(self.np_random.random()) if not self.lost else float(np.random.default_rng().random())
        return np.array([self.at], np.float32), {}

    def step(self, action):
        self.at += float(action[0]) + self.noise * float(self.np_random.normal())
        done = self.at >= self.end
        return np.array([self.at], np.float32), self.at, done, False, {"is_success": done} if done else {}


def onwards(seen):
    def act(history):
        seen.append(history)
        return torch.full((2, 1), 0.8)

    return act


def test_the_last_observations_are_told_and_an_episode_ends_within_a_chunk():
    seen, world = [], Line(end=2.2)
    found = play(world, onwards(seen), flat, history=2, seed=5)
    assert seen[0][0].tolist() == Line().reset(seed=5)[0].tolist()
    assert [history.shape for history in seen] == [(2, 1)] * 2
    begun = seen[0][0].item()
    torch.testing.assert_close(seen[0][:, 0], torch.tensor([begun, begun]))
    torch.testing.assert_close(seen[1][:, 0], torch.tensor([begun + 0.8, begun + 1.6]))
    assert (found.actions, found.success, found.ended, found.seed) == (3, True, True, 5)
    assert found.returns == pytest.approx(sum(begun + 0.8 * (i + 1) for i in range(found.actions)))


class Passing(Line):
    """Reached where its second action leads, and nowhere after."""

    def step(self, action):
        shown, reward, *_ = super().step(action)
        return shown, reward, False, False, {"is_success": 1.6 <= self.at < 2.2}


def test_what_was_reached_once_is_a_success():
    assert play(Passing(), onwards([]), flat, limit=4).success


def test_what_has_no_end_is_cut_and_says_no_success():
    found = play(Line(end=1e9), onwards([]), flat, limit=5)
    assert (found.actions, found.success, found.ended) == (5, None, False)


@pytest.mark.parametrize(
    ("world", "act", "words"),
    [
        (Line(), lambda history: torch.full((2, 1), 40.0), "are they normalised"),
        (Line(), lambda history: torch.full((2, 1), torch.nan), "are they normalised"),
        (Line(end=1e9, noise=float("nan")), lambda history: torch.zeros(2, 1), "reward is nan"),
        (Line(), lambda history: torch.zeros(2, 2), r"actions have shape \(2, 2\), expected"),
        (Line(), lambda history: torch.zeros(0, 1), "expected one or more"),
        (gymnasium.make("CartPole-v1"), lambda history: torch.zeros(2, 1), "Discrete"),
    ],
)
def test_what_cannot_be_right_is_named(world, act, words):
    with pytest.raises(ValueError, match=words):
        play(world, act, flat)


def test_named_observations_need_one_that_is_all():
    assert flat({"observation": [1, 2], "goal": [3]}).tolist() == [1, 2]
    for shown in ({"pixels": 1}, (np.zeros(2), np.zeros(3)), "text"):
        with pytest.raises(ValueError, match="FlattenObservation"):
            flat(shown)


CHUNKS = torch.tensor([[[0.5], [0.5]], [[-0.5], [0.25]]])


class Anew(EzPickle, Line):
    """One whose copies are new, as those of MuJoCo and Box2D are."""

    def __init__(self):
        EzPickle.__init__(self)
        Line.__init__(self)


@pytest.mark.parametrize(
    "make", [Line, lambda: Line(held=(i for i in ())), Anew], ids=["copied", "brought there", "copies are new"]
)
def test_a_chunk_is_worth_what_it_earns_and_the_environment_stays_where_it_is(make):
    world = Rehearsed(make)
    world.reset(seed=4)
    world.step(np.array([0.5]))
    world.reset(seed=3)
    world.step(np.array([0.25]))
    at = world.env.at
    found = rehearsal(world)(CHUNKS)
    assert found.tolist() == pytest.approx([2 * at + 1.5, 2 * at - 0.75])
    assert world.env.at == at
    assert world.step(np.array([0.5]))[1] == pytest.approx(at + 0.5)


def test_nothing_is_earned_after_the_end():
    world = Rehearsed(lambda: Line(end=0.6))
    world.reset(seed=3)
    found = rehearsal(world)(torch.full((1, 3, 1), 0.75))
    assert found.item() == pytest.approx(world.env.at + 0.75)


def test_chance_is_not_told():
    world = Rehearsed(lambda: Line(noise=0.3))
    world.reset(seed=3)
    expected = rehearsal(world)(CHUNKS[:1])[0].item()
    one, other = (world.step(np.array([0.5]))[1] for _ in range(2))
    assert abs(one + other - expected) > 1e-3


def test_one_that_comes_elsewhere_is_no_model():
    world = Rehearsed(lambda: Line(held=(i for i in ()), lost=True))
    world.reset(seed=3)
    with pytest.raises(ValueError, match=r"cannot be copied \(TypeError.*name a reward"):
        rehearsal(world)(CHUNKS)


def test_environments_by_name():
    assert environment("Pendulum-v1", {"g": 9.0}).unwrapped.g == 9.0
    with pytest.raises(ValueError, match="did you mean 'Pendulum-v1'"):
        environment("Pendulun-v1", {})
    with pytest.raises(ValueError, match="unexpected keyword"):
        environment("Pendulum-v1", {"gravity": 9.0})
    with pytest.raises(ImportError, match="pip install gym_aloha"):
        environment("AlohaInsertion-v0", {})
    assert told("PushT-v0", {"observation.image": (3, 8, 8)}) == {"obs_type": "pixels_agent_pos"}
    assert told("PushT-v0", {"observation.state": (2,)}) == {"obs_type": "environment_state_agent_pos"}
    assert told("Pendulum-v1", {}) == {}
