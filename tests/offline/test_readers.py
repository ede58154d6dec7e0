"""Reading offline data: D4RL's HDF5, Minari, OGBench, npz; what is refused; windows."""

from __future__ import annotations

from types import SimpleNamespace

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from treesearch.offline.data import DataError, OfflineData, absorbing, joined, windows
from treesearch.offline.readers import from_arrays, read, read_d4rl, read_minari, read_npz, read_ogbench
from treesearch.rewards.channels import Channels

N = 12
ENDS = (3, 5, 12)  # the file's end closes the last episode


def arrays(**changes):
    """Episodes of 3, 2 and 7 steps: ended by the task, by time, by the file."""
    rng = np.random.default_rng(0)
    found = {
        "observations": rng.standard_normal((N, 4)),
        "actions": rng.uniform(-1, 1, (N, 2)),
        "rewards": np.arange(N, dtype=float),
        "terminals": np.arange(N) == 2,
        "timeouts": np.arange(N) == 4,
    }
    return {k: v for k, v in (found | changes).items() if v is not None}


def spoilt(name, row, value):
    """The arrays with one wrong number."""
    found = arrays()
    found[name][row] = value
    return found


def hdf5(path, found):
    with h5py.File(path, "w") as file:
        for name, value in found.items():
            file[name] = value
        file["infos/goal"] = np.zeros((N, 2))
    return path


def check(data, want=None):
    want = want or arrays()
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(data, name), want[name].astype(np.float32))
    assert data.ends.tolist() == list(ENDS)
    assert data.terminated.tolist() == [True, False, False]
    assert data.lengths.tolist() == [3, 2, 7]
    assert data.returns.tolist() == [0 + 1 + 2, 3 + 4, sum(range(5, 12))]


def test_d4rl_and_npz_are_read_alike(tmp_path):
    check(read_d4rl(hdf5(tmp_path / "d.hdf5", arrays())))
    np.savez(tmp_path / "d.npz", **arrays())
    check(read_npz(tmp_path / "d.npz"))
    renamed = {name.removesuffix("s"): value for name, value in arrays().items()}
    np.savez(tmp_path / "r.npz", maze_map=np.zeros((3, 3)), **renamed)
    check(read_npz(tmp_path / "r.npz"))
    column = arrays(
        rewards=np.arange(N, dtype=float)[:, None], terminals=arrays()["terminals"][:, None].astype(np.uint8)
    )
    check(from_arrays(column, "data"))


def test_a_limit_of_time_cuts_episodes():
    cut = from_arrays(arrays(timeouts=None), "data", episode_length=4)
    assert cut.ends.tolist() == [3, 7, 11, 12]  # a terminal starts the count again
    assert cut.terminated.tolist() == [True, False, False, False]
    assert from_arrays(arrays(terminals=None, timeouts=None), "data", episode_length=10**9).ends.tolist() == [N]
    both = from_arrays(arrays(), "data", episode_length=4)
    assert both.ends.tolist() == [3, 5, 9, 12]
    exact = from_arrays(arrays(terminals=None, timeouts=None), "data", episode_length=4)
    assert exact.ends.tolist() == [4, 8, 12]


def test_without_terminals_timeouts_are_enough():
    data = from_arrays(arrays(terminals=None), "data")
    assert data.ends.tolist() == [5, 12]
    assert not data.terminated.any()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (arrays(timeouts=None), "has terminals but no timeouts.*give episode_length"),
        (arrays(terminals=None, timeouts=None), "neither terminals nor timeouts.*more than 12 for one"),
        (arrays(actions=None, rewards=None), "has no actions, rewards: got observations, terminals, timeouts"),
        (arrays(actions=np.zeros((11, 2))), r"actions have shape \(11, 2\), expected \(12, number"),
        (arrays(rewards=np.zeros((12, 2))), r"rewards have shape \(12, 2\), expected \(12,\)"),
        (arrays(terminals=np.zeros(11, bool)), r"terminals have shape \(11,\), expected \(12,\)"),
        (arrays(terminals=np.full(12, 2)), "terminals hold 2, expected 0 and 1"),
        (
            spoilt("observations", 7, np.nan),
            "observations have NaN or infinite numbers in 1 of 12 steps, first in step 7",
        ),
        (spoilt("rewards", 3, np.inf), "rewards have NaN or infinite .* first in step 3"),
        (spoilt("actions", 5, [0.5, 1.01]), "actions of 1 of 12 steps lie out of bounds, first in step 5"),
        (spoilt("actions", 5, [-1.01, 0.0]), "expected -1 to 1: give the environment's bounds"),
        ({}, "has no observations, actions, rewards: got nothing"),
    ],
)
def test_bad_files_are_refused(tmp_path, found, message):
    with pytest.raises(DataError, match=message):
        read_d4rl(hdf5(tmp_path / "bad.hdf5", found))
    np.savez(tmp_path / "bad.npz", **found)
    with pytest.raises(DataError, match=message):
        read_npz(tmp_path / "bad.npz")


def test_bounds_are_the_caller_s():
    found = spoilt("actions", 5, [0.5, 1.5])
    assert len(from_arrays(found, "data", bounds=None)) == 3
    assert len(from_arrays(found, "data", bounds=(np.array([-1, -1]), np.array([1, 2])))) == 3
    with pytest.raises(DataError, match="step 5"):
        from_arrays(found, "data", bounds=(np.array([-1, -1]), np.array([2, 1])))
    assert len(from_arrays(spoilt("actions", 5, [0.5, 1 + 1e-6]), "data")) == 3  # float32 rounding


def test_unreadable_files_say_so(tmp_path):
    (tmp_path / "no").write_text("hello")
    for reader in (read_d4rl, read_npz, read_ogbench):
        with pytest.raises(DataError, match="no readable"):
            reader(tmp_path / "no")
        with pytest.raises(DataError, match="no readable"):
            reader(tmp_path / "missing")
    ragged = np.empty(2, object)
    ragged[:] = [np.zeros((3, 4)), np.zeros((2, 4))]
    np.savez(tmp_path / "ragged.npz", **arrays(observations=ragged))
    with pytest.raises(DataError, match="different lengths belong one after the other"):
        read_npz(tmp_path / "ragged.npz")
    with pytest.raises(DataError, match="holds no Minari dataset"):
        read_minari(tmp_path)


def minari_data(folder, found, box=None, keyed=False):
    """The arrays as a Minari dataset, each episode closed by one more observation."""
    seen = spaces.Box(-np.inf, np.inf, (4,), np.float64)
    if keyed:
        seen = spaces.Dict({"observation": seen, "achieved_goal": spaces.Box(-np.inf, np.inf, (2,), np.float64)})
    (folder / "data").mkdir(parents=True)
    storage = MinariStorage.new(folder / "data", seen, box or spaces.Box(-1, 1, (2,)))
    storage.update_metadata({"dataset_id": "made-v0", "minari_version": minari.__version__})
    for first, end in zip((0, *ENDS), ENDS, strict=False):
        rows = slice(first, end)
        states = np.concatenate([found["observations"][rows], np.full((1, 4), 9.0)])
        episode = EpisodeBuffer(
            observations={"observation": states, "achieved_goal": states[:, :2]} if keyed else states,
            actions=found["actions"][rows],
            rewards=found["rewards"][rows],
            terminations=found["terminals"][rows],
            truncations=found["timeouts"][rows],
        )
        storage.update_episodes([episode])
    return folder


@pytest.mark.parametrize("keyed", [False, True])
def test_minari_is_read_like_the_rest(tmp_path, keyed):
    data = read_minari(minari_data(tmp_path / "made-v0", arrays(), keyed=keyed))
    check(data)
    assert data.closing.tolist() == [[9.0] * 4] * 3


def test_minari_s_own_bounds_hold(tmp_path):
    wide = spaces.Box(-2, 2, (2,))
    found = spoilt("actions", 5, [0.5, 1.5])
    assert len(read_minari(minari_data(tmp_path / "wide-v0", found, wide))) == 3
    with pytest.raises(DataError, match="first in step 5"):
        read_minari(minari_data(tmp_path / "tight-v0", found))


def test_bad_minari_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"made-v0: observations have NaN .* first in step 7"):
        read_minari(minari_data(tmp_path / "made-v0", spoilt("observations", 7, np.nan)))
    keyed = minari_data(tmp_path / "keyed-v0", arrays(), keyed=True)
    with pytest.raises(DataError, match="no part 'state', got achieved_goal, observation"):
        read_minari(keyed, observation="state")


def test_a_minari_episode_of_no_step_is_refused(tmp_path, monkeypatch):
    folder = minari_data(tmp_path / "made-v0", arrays())
    empty = SimpleNamespace(
        id=7, observations=np.zeros((1, 4)), actions=np.zeros((0, 2)), rewards=np.zeros(0), terminations=np.zeros(0)
    )
    monkeypatch.setattr("minari.MinariDataset.__iter__", lambda self: iter([empty]))
    with pytest.raises(DataError, match="made-v0: episode 7 has no step"):
        read_minari(folder)


def ogbench(path, found=None, **changes):
    """The arrays as OGBench writes them: after each episode a row of its closing observation and any action."""
    found = found or arrays()
    rows = {"observations": [], "actions": [], "terminals": []}
    for first, end in zip((0, *ENDS), ENDS, strict=False):
        rows["observations"] += [*found["observations"][first:end], np.full(4, 9.0)]
        rows["actions"] += [*found["actions"][first:end], np.full(2, 7.0)]
        rows["terminals"] += [0] * (end - first) + [1]
    whole = {name: np.array(value, np.float32) for name, value in rows.items()} | changes
    np.savez(path, **{name: value for name, value in whole.items() if value is not None}, qpos=np.zeros((N + 3, 2)))
    return path


def test_ogbench_s_closing_rows_are_no_steps(tmp_path):
    data = read_ogbench(ogbench(tmp_path / "o.npz"), reward=lambda s, a, after: after[:, 0] - s[:, 0])
    seen = arrays()["observations"].astype(np.float32)
    np.testing.assert_array_equal(data.observations, seen)
    np.testing.assert_array_equal(data.actions, arrays()["actions"].astype(np.float32))
    assert data.ends.tolist() == list(ENDS)
    assert not data.terminated.any()  # by time
    assert data.closing.tolist() == [[9.0] * 4] * 3
    after = np.append(seen[1:, 0], np.float32(9))
    after[[2, 4]] = 9.0
    np.testing.assert_array_equal(data.rewards, after - seen[:, 0])
    cut = read_ogbench(ogbench(tmp_path / "cut.npz", terminals=np.arange(N + 3) == 3), bounds=None)
    assert cut.ends.tolist() == [3, 13]  # the file's end closes the last one
    assert not cut.rewards.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"found": spoilt("observations", 7, np.nan)}, "observations have NaN .* first in step 9"),
        ({"found": spoilt("actions", 5, [0.5, 1.5])}, "actions of 1 of 15 steps lie out of bounds, first in step 7"),
        ({"terminals": None}, "has no terminals: it is no file of OGBench"),
        ({"terminals": np.isin(np.arange(N + 3), (3, 4))}, "the episode that ends in row 4 has no step"),
        ({"terminals": np.full(N + 3, 2)}, "terminals hold 2, expected 0 and 1"),
        ({"observations": np.zeros((N + 3, 8, 8, 3), np.uint8)}, r"shapes \(15, 8, 8, 3\) and \(15, 2\)"),
        ({"actions": np.zeros((N, 2))}, r"shapes \(15, 4\) and \(12, 2\)"),
    ],
)
def test_bad_ogbench_files_are_refused_by_rows_of_the_file(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_ogbench(ogbench(tmp_path / "bad.npz", **changes))


def test_a_path_s_ending_chooses_the_reader(tmp_path):
    check(read(hdf5(tmp_path / "d.h5", arrays())))
    check(read(minari_data(tmp_path / "made-v0", arrays())))
    with pytest.raises(DataError, match=r"d\.csv: expected a file"):
        read(tmp_path / "d.csv")


def test_what_the_task_ended_stays_where_it_ended():
    after = np.roll(arrays()["observations"], -1, 0) + 1
    data = absorbing(from_arrays(arrays(next_observations=after), "data"), 2)
    assert data.lengths.tolist() == [5, 2, 7]
    rows = data.rows()
    assert rows[3:5].tolist() == [[*after[2].astype(np.float32).tolist(), 0, 0, 0]] * 2
    assert torch.equal(rows[[0, 1, 2, *range(5, 14)]], from_arrays(arrays(), "data").rows())
    np.testing.assert_array_equal(data.closing, after[[2, 4, 11]].astype(np.float32))
    with pytest.raises(DataError, match="no closing observations"):
        absorbing(from_arrays(arrays(), "data"), 2)


def test_next_observations_close_episodes():
    after = np.roll(arrays()["observations"], -1, 0) + 1
    data = from_arrays(arrays(next_observations=after), "data")
    np.testing.assert_array_equal(data.closing, after[[2, 4, 11]].astype(np.float32))
    assert joined([data, data]).closing.shape == (6, 4)
    assert joined([data, from_arrays(arrays(), "other")]).closing is None
    with pytest.raises(DataError, match="next_observations have shape"):
        from_arrays(arrays(next_observations=after[1:]), "data")
    after[4] = np.inf
    with pytest.raises(DataError, match=r"closing observations have NaN .* first in episode 1"):
        from_arrays(arrays(next_observations=after), "data")


@pytest.mark.parametrize(
    ("horizon", "stride", "starts"), [(3, 1, [0, 5, 6, 7, 8, 9]), (3, 2, [0, 5, 7, 9]), (7, 1, [5])]
)
def test_windows_stay_within_episodes(horizon, stride, starts):
    data = from_arrays(arrays(), "data")
    found = windows(data, horizon, stride)
    assert found.starts.tolist() == starts
    assert found[:].shape == (len(starts), horizon, 7)
    assert found[:][:, :, 6].long().tolist() == [list(range(s, s + horizon)) for s in starts]  # rewards count rows
    assert torch.equal(found[0], data.rows()[starts[0] : starts[0] + horizon])
    assert torch.equal(found[torch.tensor([0, 0])], found[0].expand(2, -1, -1))
    assert found.short == (1 if horizon == 3 else 2)


def test_windows_without_rewards():
    data = from_arrays(arrays(), "data")
    assert data.channels == Channels(4, 2, 1)
    assert torch.equal(windows(data, 3, reward=False)[:], windows(data, 3)[:][..., :6])


def test_a_horizon_that_no_episode_has_is_refused():
    data = from_arrays(arrays(), "data")
    with pytest.raises(DataError, match="no episode has 8 steps, the longest has 7: lower the horizon"):
        windows(data, 8)
    with pytest.raises(ValueError, match="expected at least 1"):
        windows(data, 0)


def test_data_checks_its_ends():
    data = from_arrays(arrays(), "data")
    plain = {name: getattr(data, name) for name in ("observations", "actions", "rewards")}
    for ends in ([3, 5, 11], [5, 3, 12], [3, 3, 12], []):
        with pytest.raises(DataError, match="ends must increase"):
            OfflineData(**plain, ends=np.array(ends, np.int64), terminated=np.zeros(len(ends), bool))
    assert "12 steps, 3 episodes of 2 to 7 steps, 1 terminated" in data.describe()


def test_joined_data_keep_their_episodes():
    one, other = from_arrays(arrays(), "one"), from_arrays(arrays(timeouts=np.arange(N) == 6), "other")
    both = joined([one, other])
    assert both.ends.tolist() == [3, 5, 12, 15, 19, 24]
    assert both.terminated.tolist() == [True, False, False, True, False, False]
    assert both.returns.tolist() == [*one.returns, *other.returns]
    np.testing.assert_array_equal(both.actions[N:], other.actions)
    narrow = from_arrays(arrays(observations=np.zeros((N, 3))), "narrow")
    with pytest.raises(DataError, match="the same channels"):
        joined([one, narrow])
