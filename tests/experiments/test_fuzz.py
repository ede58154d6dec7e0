"""A slice of `make fuzz`, bugs that it must find, and what it found."""

from __future__ import annotations

import json
import os
import signal
import struct

import numpy as np
import pytest

import treesearch as ts
from experiments.robustness import fuzz, fuzz_judge, fuzz_mutations
from treesearch import text
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli import main as cli
from treesearch.cli import saved
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.rewards.analytic import linear
from treesearch.rewards.base import Reward
from treesearch.runs import checks, log, schema, shards
from treesearch.runs import config as configs
from treesearch.runs import folder as runs
from treesearch.runs.config import read_config
from treesearch.runs.files import write_json
from treesearch.runs.reading import status
from treesearch.session import verify

SLICE = ("best_of_n", "tasks")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Recorded runs of two methods, looked at without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_judge, "METHODS", {name: fuzz_judge.METHODS[name] for name in SLICE})
        patch.setattr(fuzz_judge, "LOOKS", (("export", "csv"), ("export", "npz"), ("cite",)))
        yield fuzz_judge.make_bases(tmp_path_factory.mktemp("bases"))


def tried(tmp_path, bases, **how):
    """What cases come to."""
    args = fuzz.Fuzz(**how)
    tally = fuzz.Tally(args)
    fuzz.run(tmp_path, bases, args, tally)
    return tally


def test_damaged_and_forged_folders_end_well_and_the_same_in_any_process(tmp_path, bases, capsys):
    tallies = [tried(tmp_path, bases, n=12, seed=1, processes=processes) for processes in (1, 2)]
    assert not tallies[0].faults, capsys.readouterr().out
    assert tallies[0].counts == tallies[1].counts
    assert tallies[0].counts.total() == 12


def test_bases_are_the_same_bytes_each_time(tmp_path, bases, monkeypatch):
    monkeypatch.setattr(fuzz_judge, "METHODS", {"best_of_n": fuzz_judge.METHODS["best_of_n"]})
    again = fuzz_judge.make_bases(tmp_path)["best_of_n"]
    for name in ("run.json", "tree.bin", "states-00000.safetensors", "command.json"):
        assert (again.path / name).read_bytes() == (bases["best_of_n"].path / name).read_bytes()
    clocks = {key: value for key, value in again.wholes[1].cost.as_dict().items() if "seconds" in key}
    assert clocks == dict.fromkeys(clocks, 0.0)


def other_number(rng, path, other):
    """Another number in a state."""
    file = path / "states-00000.safetensors"
    data = bytearray(file.read_bytes())
    struct.pack_into("<d", data, 520 + 8 * rng.randrange((len(data) - 520) // 8), rng.gauss(0, 1))
    file.write_bytes(data)


PLANTED = {
    "states without checksums": (
        [
            (shards, "_checksums", lambda rows: np.zeros(len(rows), np.uint32)),
            (shards.ShardStates, "recall", lambda *_: None),
        ],
        (other_number, ""),
    ),
    "run.json without a checksum": ([(configs, "stamped", lambda found: found)], (fuzz_mutations.digit, "run.json")),
    "cut wherever damage begins": ([(log, "_check_last", lambda *_: None)], (fuzz_mutations.flip, "tree.bin")),
    "records followed unchecked": ([(checks, "_check_nodes", lambda *_: None)], (fuzz_mutations.record, "tree.bin")),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(tmp_path, bases, monkeypatch, bug):
    changes, (mutation, file) = PLANTED[bug]
    for change in changes:
        monkeypatch.setattr(*change)
    monkeypatch.setattr(fuzz_mutations, "NATURAL", (mutation,))
    monkeypatch.setattr(fuzz_mutations, "FORGED", (mutation,))
    monkeypatch.setattr(fuzz_mutations, "some_file", lambda rng, path: path / file)
    assert tried(tmp_path, bases, n=8, processes=1).faults


def test_a_case_that_ends_its_process_is_a_fault_and_the_others_are_tried(tmp_path, monkeypatch):
    def case(room, bases, seed, number):
        if number in (2, 5):
            os.kill(os.getpid(), signal.SIGKILL if number == 2 else signal.SIGALRM)
        return "refused", ""

    monkeypatch.setattr(fuzz, "case", case)
    assert dict(tried(tmp_path, {}, n=6, processes=1).counts) == {
        "refused": 4,
        "FAULT: died of SIGKILL": 1,
        "FAULT: hung": 1,
    }


# What it found.


@pytest.mark.parametrize("deep", [100, 100_000])
def test_deep_documents_are_refused(deep):
    with pytest.raises(schema.Invalid, match="nested"):
        schema.plain()(schema.parse(b"[" * deep + b"]" * deep, "it"), "it")


@pytest.mark.parametrize("value", [10**30, -(10**30), 2**63, float("nan"), "1", True])
def test_numbers_that_no_array_can_hold_are_refused(value):
    with pytest.raises(schema.Invalid, match="expected a number"):
        schema.number()(value, "it")


@pytest.fixture
def store(tmp_path):
    ts.search(LinearGaussian(dim=2), linear(0.7), ts.BestOfN(n=8), store=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 7), ("budget", {"nfe": 70}), ("memory", 2**20), ("closed", "x"), ("waves", 0)]
)
def test_a_digit_of_run_json_does_not_change_unseen(store, key, value):
    config = json.loads((store / "run.json").read_text())
    changed = config | {key: config["budget"] | value if key == "budget" else value}
    (store / "run.json").write_text(json.dumps(changed))
    with pytest.raises(ts.StoreError, match="does not match its checksum: it is damaged, edited"):
        read_config(store)
    (store / "run.json").write_text(json.dumps(config | {"status": "running"}))  # as a kill leaves it
    assert status(store, read_config(store)) == "killed"


def test_what_could_not_be_read_again_is_not_written(store):
    run, blocks = runs.Run.open(store)
    try:
        blocks[-1].meta["cost"]["reward_calls"] = schema.LARGE + 1
        with pytest.raises(ts.StoreError, match=r"the next wave cannot be recorded: its cost\.reward_calls is"):
            run.write(blocks[-1])
    finally:
        run.close("finished")


def test_a_whole_wave_behind_a_foreign_block_is_not_cut_off(tmp_path):
    kernel, path = LinearGaussian(dim=2), tmp_path / "run"
    ts.search(kernel, linear(0.7), ts.BestOfN(n=150), store=path)
    blocks = [block.sealed() for block in fuzz_mutations.blocks(path)]
    assert len(blocks) > 1
    fuzz_mutations.write(path, [*blocks[:-1], blocks[0], blocks[-1]])
    with pytest.raises(ts.StoreError, match="further blocks follow"):
        ts.resume(path, kernel, linear(0.7))


def test_forbidden_samples_are_scored_again_without_a_warning():
    a, b = np.array([-np.inf, -np.inf, 1.0]), np.array([-np.inf, 0.0, 1.0005])
    assert verify._alike(a, b, 0.0).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("what", "expression", "message"),
    [
        ("kernel", "linear(0.7)", "makes a Reward, expected a kernel"),
        ("kernel", "'x'", "makes a str, expected a kernel"),
        ("reward", "0.7", "makes a float, expected a reward"),
        ("reward", "'x' * 9999999999", "for rewards and numbers, not for a str"),
        ("reward", "[0] * 9999999999", "for rewards and numbers, not for a list"),
    ],
)
def test_expressions_that_make_something_else_are_refused(what, expression, message):
    with pytest.raises(expressions.SpecError, match=message):
        getattr(specs, what)(expression)


def test_a_kernel_has_as_many_steps_as_a_record_can_tell_apart():
    with pytest.raises(ValueError, match="num_steps is 999999999, expected at least 1 and at most 32766"):
        ts.search(LinearGaussian(num_steps=999_999_999), linear(), ts.BestOfN(n=1))


def test_errors_are_as_long_as_a_person_reads(store):
    named = Reward(lambda x, _: x.sum(1), "linear + " * 5_000)
    with pytest.raises(ts.StoreError, match="reward differs") as caught:
        ts.resume(store, LinearGaussian(dim=2), named)
    assert len(str(caught.value)) < 1_000
    with pytest.raises(expressions.SpecError) as refused:
        specs.reward("linear(0.7)" + " + digit(x)" * 500)
    assert len(str(refused.value)) < 1_000
    assert text.brief("ab" * 300) == "ab" * 300
    assert text.brief("a" * 999).count("a") < 700


def test_a_folder_that_asks_for_a_guide_it_has_not_is_no_wrong_usage(store, capsys):
    write_json(store / "command.json", saved.kept({"kernel": "gaussian(dim=2)", "reward": "kernel"}))
    assert cli.main(["resume", str(store), "--nfe", "40"]) == 1
    assert "command.json: --reward kernel: " in capsys.readouterr().err


def test_outputs_that_lead_elsewhere_are_told_as_a_folder_is(store, tmp_path, capsys):
    write_json(store / "command.json", saved.kept({"kernel": "gaussian(dim=2)", "reward": "linear(0.7)"}))
    (store / "outputs").symlink_to(tmp_path)
    assert cli.main(["resume", str(store), "--nfe", "45", "--json"]) == 1
    assert "cannot write to" in capsys.readouterr().err
