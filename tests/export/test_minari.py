"""Searches over trajectories as Minari datasets."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import minari
import numpy as np
import pytest
import torch

import treesearch as ts
from tests.support.tracks import Tracks, first_position, rewarded
from treesearch.cli.main import main
from treesearch.export import write_minari
from treesearch.export.minari import Episodes, collect, layout, named, origin, write_episodes
from treesearch.rewards.channels import Channels

HERE = Path(__file__).parents[1]
TRACKS = f"{HERE / 'support' / 'tracks.py'}"


def search(kernel, method=None, n=40, prompts=None):
    return ts.search(kernel, first_position, method or ts.BestOfN(n=n), prompts=prompts)


@pytest.fixture(scope="module")
def found():
    return search(rewarded())


def load(folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
    return minari.load_dataset(folder.name)


def notes(data):
    return list(data.storage.get_episode_metadata(range(len(data))))


def test_every_leaf_is_an_episode(found, tmp_path, monkeypatch):
    data = load(write_minari(found, tmp_path / "data" / "plans-v0", rewarded()), monkeypatch)
    allowed = (found.rewards > -math.inf).numpy()
    assert 0 < allowed.sum() < 40  # some are forbidden, and no episodes
    samples = found.samples.numpy()[allowed]
    assert len(data) == allowed.sum()
    assert data.total_steps == 3 * len(data)
    for episode, sample in zip(data, samples, strict=True):
        np.testing.assert_array_equal(episode.observations, sample[:, :2])
        np.testing.assert_array_equal(episode.actions, sample[:-1, 2:3])
        np.testing.assert_array_equal(episode.rewards, sample[:-1, 3])
        assert episode.truncations.tolist() == [False, False, True]
        assert not episode.terminations.any()
    assert data.observation_space.contains(samples[0, 0, :2])
    assert data.action_space.shape == (1,)


def test_episodes_say_what_they_weigh(found, tmp_path, monkeypatch):
    data = load(write_minari(found, tmp_path / "plans-v0", rewarded()), monkeypatch)
    rows = np.flatnonzero(found.rewards.numpy() > -math.inf)
    told = notes(data)
    assert [n["node"] for n in told] == found.leaves[rows].tolist()
    np.testing.assert_array_equal([n["search_reward"] for n in told], found.rewards.numpy()[rows])
    np.testing.assert_array_equal([n["log_weight"] for n in told], found.log_weights.numpy()[rows])
    np.testing.assert_allclose([n["weight"] for n in told], torch.softmax(found.log_weights, 0).numpy()[rows])
    assert sum(n["weight"] for n in told) == pytest.approx(1)


def test_the_dataset_has_the_facts_of_the_card(found, tmp_path, monkeypatch):
    folder = write_minari(found, tmp_path / "plans-v0", rewarded(), best=5)
    metadata = load(folder, monkeypatch).storage.metadata
    facts = metadata["treesearch"]
    assert metadata["algorithm_name"] == "BestOfN"
    assert (facts["episodes"], facts["distinct"], facts["rewards"]) == ("best", 5, "reward channel")
    assert facts["cost"]["nfe"] == found.cost.nfe == 120
    assert facts["tasks"][0]["written"] == 5
    assert facts["tasks"][0]["log_z"] == pytest.approx(found.log_z)
    assert facts["tasks"][0]["certificate"]["hash"] == found.certificate().hash
    assert facts["channels"] == {"observation": 2, "action": 1, "reward": 1}


def test_without_a_reward_channel_the_return_is_the_search_s_reward(tmp_path, monkeypatch):
    data = load(write_minari(search(Tracks()), tmp_path / "plans-v0", Tracks()), monkeypatch)
    for episode, note in zip(data, notes(data), strict=True):
        assert episode.rewards.tolist() == [0, 0, note["search_reward"]]
        assert episode.actions.shape == (3, 1)


def test_the_best_come_best_first_and_forbidden_ones_never(found):
    best = collect(found, best=5)
    assert torch.equal(best.samples, found.best(5)[0])
    assert len(collect(found, best=1_000).notes) == (found.rewards > -math.inf).sum()


def test_draws_are_those_of_the_result(found):
    drawn = collect(found, draws=30, seed=3)
    assert torch.equal(drawn.samples, found.draw(30, seed=3))
    assert {n["weight"] for n in drawn.notes} == {1 / 30}
    assert not torch.equal(drawn.samples, collect(found, draws=30).samples)


def test_tasks_share_a_dataset_and_keep_their_prompts(tmp_path, monkeypatch):
    prompts = [{"goal": [1.0, 2.0]}, {"goal": [0.0, 0.0]}]
    result = search(rewarded(), prompts=prompts)
    data = load(write_minari(result, tmp_path / "plans-v0", rewarded(), draws=3), monkeypatch)
    told = notes(data)
    assert [n["task"] for n in told] == [0, 0, 0, 1, 1, 1]
    assert [json.loads(n["prompt"]) for n in told] == [prompts[0]] * 3 + [prompts[1]] * 3
    np.testing.assert_array_equal(data[3].observations, result.tasks[1].draw(3)[0, :, :2].numpy())
    one = collect(result, task=1)
    assert {n["task"] for n in one.notes} == {1}


def test_what_cannot_be_written_says_so(found, tmp_path):
    with pytest.raises(ValueError, match="two datasets"):
        collect(found, draws=1, best=1)
    with pytest.raises(ValueError, match="draws is 0"):
        collect(found, draws=0)
    kernel, three = rewarded(), Channels(2, 1, 1)
    with pytest.raises(ts.TreeSearchError, match="give its folder a name that ends in a version, such as my-plans-v0"):
        write_minari(found, tmp_path / "my plans", kernel)
    (tmp_path / "here-v0").mkdir()
    with pytest.raises(ts.TreeSearchError, match="exists: remove it"):
        write_minari(found, tmp_path / "here-v0", kernel)
    with pytest.raises(ValueError, match=r"expected trajectories \(n, H, 3\)"):
        write_minari(found, tmp_path / "plans-v0", Tracks())
    with pytest.raises(ts.TreeSearchError, match="has no actions"):
        write_minari(found, tmp_path / "plans-v0", None, observation=4, action=0)
    one_row = Episodes(samples=torch.zeros(1, 1, 4), notes=[{"search_reward": 0.0}], facts={})
    with pytest.raises(ValueError, match="2 or more rows"):
        write_episodes(one_row, tmp_path / "plans-v0", three)
    images = ts.search(Tracks(width=3), lambda x: x.sum((1, 2)), ts.BestOfN(n=2))
    images.tasks[0].samples = images.tasks[0].samples[:, None]
    with pytest.raises(ts.TreeSearchError, match=r"no trajectories: expected a float tensor \(n, H, C\), got"):
        collect(images)
    nothing = ts.search(Tracks(), lambda x: x.sum((1, 2)) - math.inf, ts.BestOfN(n=2))
    with pytest.raises(ts.TreeSearchError, match="scored none above -inf"):
        collect(nothing)
    assert [p.name for p in tmp_path.iterdir()] == ["here-v0"]  # nothing is left half written


def test_a_failed_write_leaves_nothing(found, tmp_path):
    broken = collect(found, best=2)
    broken.notes[1]["node"] = object()  # HDF5 cannot hold it
    with pytest.raises(TypeError):
        write_episodes(broken, tmp_path / "plans-v0", Channels(2, 1, 1))
    assert not list(tmp_path.iterdir())


def test_layout_is_the_kernel_s_or_told():
    assert layout(rewarded(), 4) == Channels(2, 1, 1)
    assert layout(object(), 4, 2, 1) == Channels(2, 1, 1)
    assert layout(object(), 4, 3, 1) == Channels(3, 1, 0)
    with pytest.raises(ts.TreeSearchError, match="leave 2 of 4 channels"):
        layout(object(), 4, 1, 1)
    with pytest.raises(ts.TreeSearchError, match="together"):
        layout(object(), 4, 1)
    with pytest.raises(ts.TreeSearchError, match="does not say how its rows of 4 channels split"):
        layout(object(), 4)


def test_the_model_s_card_says_what_a_row_spans(found, tmp_path, monkeypatch):
    class Carded:
        channels = Channels(2, 1, 1)
        card = SimpleNamespace(environment="Maze-v3", stride=3)

    facts = load(write_minari(found, tmp_path / "plans-v0", Carded()), monkeypatch).storage.metadata["treesearch"]
    assert (facts["environment"], facts["stride"]) == ("Maze-v3", 3)
    assert origin(rewarded()) == {}


def test_names():
    assert named("DTS 2024.01") == "DTS-2024-01-v0"
    assert named("…") == "plans-v0"


def test_without_minari_the_error_says_how_to_get_it(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"pip install 'treesearch\[rl\]'"):
        write_minari(found, tmp_path / "plans-v0", rewarded())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs") / "my.run"
    what = ["--kernel", f"{TRACKS}:unlabelled", "--reward", f"{TRACKS}:first_position", "--nfe", "120"]
    assert main(["run", "dts", *what, "--store", str(store), "--json"]) == 0
    return store


def test_export_of_a_run(run_folder, capsys, monkeypatch):
    assert main(["export", str(run_folder), "minari"]) == 1
    assert "--observation N --action M" in capsys.readouterr().err
    assert main(["export", str(run_folder), "minari", "--observation", "2", "--action", "1", "--draws", "10"]) == 0
    folder = run_folder / "minari" / "my-run-v0"
    assert capsys.readouterr().out.startswith(f"{folder}\n")
    data = load(folder, monkeypatch)
    assert len(data) == 10
    assert data[0].observations.shape == (4, 2)
    assert data.storage.metadata["treesearch"]["method"]["name"] == "DiffusionTreeSampling"
    assert main(["export", str(run_folder), "minari", "--observation", "2", "--action", "1"]) == 1
    assert "exists" in capsys.readouterr().err


def test_a_run_is_exported_by_its_relative_path(run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder.parent)
    what = ["--observation", "2", "--action", "1", "--best", "3"]
    assert main(["export", run_folder.name, "minari", *what, "--out", "folder/relative-v1"]) == 0
    assert len(load(run_folder.parent / "folder" / "relative-v1", monkeypatch)) == 3


def test_options_of_episodes_are_refused_elsewhere(run_folder, capsys):
    assert main(["export", str(run_folder), "csv", "--draws", "3"]) == 2
    assert "--draws: not with csv" in capsys.readouterr().err


def test_a_run_without_trajectories_is_refused(tmp_path, capsys):
    store = str(tmp_path / "run")
    toy = ["--kernel", "gaussian(dim=2)", "--reward", "linear(1.0)", "--nfe", "50"]
    assert main(["run", "best-of-n", *toy, "--store", store, "--json"]) == 0
    capsys.readouterr()
    assert main(["export", store, "minari"]) == 1
    assert "no trajectories: expected a float tensor (n, H, C), got torch.float64 (" in capsys.readouterr().err
