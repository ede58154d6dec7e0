"""Loggers: what they are told and when, that no search is lost with its log, and each library in offline mode."""

import io
import json
import logging
import math
import re
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

import treesearch as ts
from tests.support.pages import HOSTILE, Pixels, brightness, growing
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.main import main
from treesearch.loggers.base import flat
from treesearch.rewards.analytic import linear

TREE = ts.DiffusionTreeSampling(wave=4)


class Notes(ts.loggers.Logger):
    """Writes down what it is told."""

    def __init__(self, images=8, fails=""):
        super().__init__(images)
        self.told, self.fails = [], fails

    def _note(self, what, *told):
        self.told.append((what, *told))
        if what == self.fails:
            raise OSError("disk full")

    def begin(self, settings):
        self._note("begin", settings)

    def figures(self, found, nfe):
        self._note("figures", found, nfe)

    def outcome(self, found, certificate, nfe):
        self._note("outcome", found, certificate, nfe)

    def pictures(self, name, images, captions, nfe):
        self._note("pictures", name, images, captions, nfe)

    def close(self):
        self._note("close")

    @property
    def order(self):
        return [told[0] for told in self.told]


def search(*callbacks, prompts=HOSTILE, **changes):
    settings = {"prompts": prompts, "budget": ts.Budget(nfe=90), "callbacks": callbacks} | changes
    return ts.search(
        Pixels(), changes.pop("reward", brightness), TREE, **{k: v for k, v in settings.items() if k != "reward"}
    )


def test_a_logger_is_told_settings_waves_and_what_came_out():
    notes = Notes(images=3)
    result = search(notes)
    waves = len(result.history)
    assert notes.order == ["begin", *["figures"] * waves, "outcome", *["pictures"] * 3, "close"]
    settings = notes.told[0][1]
    assert (settings["method.name"], settings["method.wave"], settings["reward"]) == (
        "DiffusionTreeSampling",
        4,
        "brightness",
    )
    assert (settings["budget.nfe"], settings["tasks"]) == (90, 3)
    assert [told[2] for told in notes.told[1 : waves + 1]] == [record["nfe"] for record in result.history]
    assert notes.told[waves][1]["best_reward"] == result.history[-1]["best_reward"]
    _, outcome, certificate, nfe = notes.told[waves + 1]
    assert (outcome["task2/log_z"], nfe) == (result.tasks[2].log_z, result.cost.nfe)
    assert result.tasks[0].certificate().hash in certificate
    _, name, images, captions, _ = notes.told[waves + 3]
    assert (name, len(images)) == ("task1/best", 3)
    assert captions[0] == f"{float(result.tasks[1].rewards.max()):.4g} {HOSTILE[1]}"


def test_each_search_is_a_run_of_its_own_and_vectors_have_no_pictures():
    notes = Notes()
    for _ in range(2):
        ts.search(LinearGaussian(num_steps=2), linear(1.0), ts.BestOfN(n=4), callbacks=[notes])
    assert notes.order == ["begin", "figures", "outcome", "close"] * 2
    assert "best" in notes.told[2][1]


def test_without_images_nothing_is_decoded():
    notes = Notes(images=0)
    kernel = Pixels()
    seen = []
    kernel.decode = lambda x: seen.append(len(x)) or x
    ts.search(kernel, brightness, ts.BestOfN(n=4), callbacks=[notes])
    assert sum(seen) == 4  # for the reward
    assert "pictures" not in notes.order


def test_a_search_that_raises_closes_its_loggers_without_an_outcome():
    notes, calls = Notes(), []

    def fails(x):
        calls.append(len(x))
        return 1 / 0 if len(calls) > 2 else brightness(x)

    with pytest.raises(ts.rewards.base.RewardError):
        search(notes, prompts=None, reward=fails)
    assert notes.order[0] == "begin"
    assert notes.order[-1] == "close"
    assert "outcome" not in notes.order


def test_a_stream_that_is_left_has_an_outcome():
    notes = Notes()
    for snapshot in ts.stream(Pixels(), brightness, TREE, budget=ts.Budget(nfe=90), callbacks=[notes]):
        if snapshot.wave == 1:
            break
    assert [what for what in notes.order if what != "pictures"] == ["begin", "figures", "figures", "outcome", "close"]


@pytest.mark.parametrize("fails", ["figures", "outcome", "pictures", "close"])
def test_a_search_goes_on_without_a_log_that_fails(fails, caplog):
    notes, other = Notes(fails=fails), Notes()
    with caplog.at_level(logging.WARNING, "treesearch"):
        result = search(notes, other)
    assert result.cost.nfe == search().cost.nfe
    assert [record.message for record in caplog.records] == ["Notes: OSError: disk full; the search goes on without it"]
    assert notes.order.count(fails) == 1
    assert notes.order[-1] == "close"
    assert other.order[-1] == "close"


def test_a_log_that_cannot_begin_says_so_at_once():
    with pytest.raises(OSError, match="disk full"):
        search(Notes(fails="begin"))

    class Absent(Notes):
        needs = "no_such_library"

    with pytest.raises(ImportError, match=r"this needs no_such_library: pip install 'treesearch\[no_such_library\]'"):
        Absent()


def test_a_search_ends_as_before_with_a_logger_beside_it():
    notes = Notes()
    result = search(notes, lambda snapshot: snapshot.wave < 1)
    assert len(result.history) == 2
    assert notes.order.count("figures") == 2


@pytest.mark.parametrize("images", [-1, True, 1.5, "8"])
def test_images_are_a_whole_number(images):
    with pytest.raises(ValueError, match=r"images is .*, expected a whole number, at least 0"):
        Notes(images)


def test_numbers_are_flat_and_finite():
    found = {"a": 1, "b": math.inf, "c": None, "d": {"e": 0.5, "f": {"g": np.float64(2)}}, "h": "x", "i": math.nan}
    assert flat(found) == {"a": 1.0, "d/e": 0.5, "d/f/g": 2.0}


def test_loggers_load_no_library_before_a_search():
    code = "import sys, treesearch.loggers; print([m for m in ('tensorboard', 'wandb', 'mlflow') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_bar_of_tqdm_counts_evaluations():
    out = io.StringIO()
    bar = ts.loggers.Tqdm(desc="digits", file=out, ncols=100, mininterval=0)
    for snapshot in ts.stream(Pixels(), brightness, TREE, budget=ts.Budget(nfe=90), callbacks=[bar]):
        if snapshot.wave == 0:
            assert bar._bar.n == snapshot.record["nfe"]
    assert re.search(r"digits: 100%.*90\.0/90\.0.*best=", out.getvalue())
    assert bar._bar is None


def tensorboard_of(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_has_curves_against_nfe_pictures_and_the_certificate(tmp_path):
    pytest.importorskip("tensorboard")
    result = search(ts.loggers.TensorBoard(tmp_path / "tb"))
    events = tensorboard_of(tmp_path / "tb")
    curve = events.Scalars("search/best_reward")
    assert [point.step for point in curve] == [record["nfe"] for record in result.history]
    np.testing.assert_allclose(
        [point.value for point in curve], [record["best_reward"] for record in result.history], rtol=1e-6
    )
    assert events.Scalars("result/task1/log_z")[0].value == pytest.approx(result.tasks[1].log_z, rel=1e-6)
    assert events.Images("samples/task0/best")
    text = events.Tensors("certificate/text_summary")[0].tensor_proto.string_val[0].decode()
    assert result.tasks[0].certificate().hash in text
    assert all(line.startswith("    ") for line in text.splitlines())  # as code: no markup of others


def test_the_command_line_logs_into_the_run_folder(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    store = str(tmp_path / "r")
    run = [
        "run",
        "best-of-n",
        "--kernel",
        "gaussian",
        "--reward",
        "linear(1.0)",
        "--store",
        store,
        "--log",
        "tensorboard",
    ]
    assert main([*run, "--nfe", "200"]) == 0
    assert main(["resume", store, "--nfe", "400", "--log", "tensorboard"]) == 0
    assert tensorboard_of(tmp_path / "r" / "tensorboard").Scalars("result/samples")[-1].step <= 400
    assert main([*run[:-3], str(tmp_path / "other"), "--log", "tensorbord", "--nfe", "200"]) == 2
    assert "did you mean 'tensorboard'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_wandb_in_offline_mode(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = {}
    log = ts.loggers.WandB(images=2, project="p", mode="offline", dir=str(tmp_path))
    close = log.close
    log.close = lambda: (seen.update(summary=dict(wandb.run.summary), config=dict(wandb.config)), close())
    result = search(log)
    assert wandb.run is None
    assert seen["summary"]["result/task0/log_z"] == result.tasks[0].log_z
    assert seen["summary"]["nfe"] == result.cost.nfe
    assert seen["config"]["method.name"] == "DiffusionTreeSampling"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2 * len(HOSTILE)


def test_a_run_of_wandb_that_is_open_is_used_and_left_open(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="p", mode="offline", dir=str(tmp_path), config={"mine": 1})
    search(ts.loggers.WandB(images=0))
    assert wandb.run is run
    assert (run.config["mine"], run.config["reward"]) == (1, "brightness")
    run.finish()


@pytest.mark.filterwarnings("ignore")  # of what it stands on
def test_mlflow_in_a_database_of_its_own(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    result = search(ts.loggers.MLflow(images=2, run_name="mine"))
    assert mlflow.active_run() is None
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.metrics["result/task1/log_z"] == result.tasks[1].log_z
    assert run.data.params["budget.nfe"] == "90"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "best_reward")
    assert [point.step for point in history] == [record["nfe"] for record in result.history]
    assert mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path="samples")


def test_trackio_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    code = (
        "import treesearch as ts; from tests.support.pages import *; "
        "ts.search(Pixels(), brightness, ts.BestOfN(n=8), callbacks=[ts.loggers.Trackio('p', name='r', images=2)])"
    )
    import os

    env = os.environ | {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, timeout=300)
    (file,) = tmp_path.glob("p.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    database.close()
    told = {name for row in rows for name in row}
    assert {"best_reward", "result/log_z", "certificate", "samples/best_0"} <= told


def test_the_snapshots_of_a_run_folder_can_be_logged(tmp_path):
    assert [snapshot.wave for snapshot in growing(tmp_path / "r", iterations=8)] == [0, 1]


def test_a_bar_of_tqdm_takes_what_tqdm_takes_and_times_from_the_beginning():
    with pytest.raises(TypeError, match="unknown setting of Tqdm 'decs'; did you mean 'desc'"):
        ts.loggers.Tqdm(decs="digits")
    search(ts.loggers.Tqdm(disable=True))
    bar = ts.loggers.Tqdm(file=io.StringIO())
    for snapshot in ts.stream(Pixels(), brightness, TREE, budget=ts.Budget(nfe=90), callbacks=[bar]):
        if snapshot.wave == 0:
            assert bar._bar.format_dict["elapsed"] >= snapshot.record["seconds"]


def test_tensorboard_needs_a_folder(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "ex.py").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        ts.loggers.TensorBoard(tmp_path / "ex.py")
