"""The command line as its user types it."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from treesearch.cli import commands
from treesearch.cli import main as cli
from treesearch.cli.arguments import What, count, seconds
from treesearch.cli.compare import Compare
from treesearch.cli.front import COMMANDS
from treesearch.cli.main import main
from treesearch.cli.searches import METHODS
from treesearch.cli.show import read_result_of
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.report import plots
from treesearch.runs.config import read_config

TOY = ["--kernel", "gaussian(dim=2)", "--reward", "0.5*linear(1.0) + linear((0.1, 0.2))"]


def run(*words):
    return main(["run", *words])


@pytest.mark.parametrize("method", ["best-of-n", "fk", "dts", "dts-star", "beam"])
def test_run_show_export_resume(tmp_path, capsys, method):
    store = str(tmp_path / "run")
    assert run(method, *TOY, "--nfe", "2k", "--store", store, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"]["nfe"] <= 2_000
    assert main(["resume", store, "--nfe", "3k", "--json"]) == 0
    assert 2_000 < json.loads(capsys.readouterr().out)["cost"]["nfe"] <= 3_000
    assert main(["show", store]) == 0
    assert "finished" in capsys.readouterr().out
    for what in ("graphml", "csv", "npz"):
        assert main(["export", store, what]) == 0
    assert main(["plot", store]) == 0
    assert main(["plot", store, "--what", "tree"]) == 0
    assert main(["ls", str(tmp_path), "--json"]) == 0
    assert main(["cite", store]) == 0
    assert (tmp_path / "run" / "README.md").read_text().startswith("# ")
    assert read_config(store)["status"] == "finished"


def test_prompts_are_tasks(tmp_path, capsys):
    assert run("fk", *TOY, "--prompts", "a", "b", "--nfe", "400", "--store", str(tmp_path / "r"), "--json") == 0
    assert [t["prompt"] for t in json.loads(capsys.readouterr().out)["tasks"]] == ["a", "b"]


def test_a_file_of_prompts_is_its_lines(tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffan eight\r\n\n  é, bold \n".encode())
    asked = What(prompts_file=str(file)).asked()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8"))
    assert asked == What(prompts_file="-").asked() == ["an eight", "é, bold"]
    words = ["fk", *TOY, "--nfe", "200", "--prompts-file", str(file), "--json", "--store", str(tmp_path / "r")]
    assert run(*words) == 0
    assert [t["prompt"] for t in json.loads(capsys.readouterr().out)["tasks"]] == asked


@pytest.mark.parametrize("command", ["run", "compare", "diagnose"])
@pytest.mark.parametrize(
    ("data", "said"),
    [(None, "No such file"), (b" \n\n", "holds no prompt"), (b"a\n\xff", "byte 2 is no UTF-8")],
)
def test_a_file_of_prompts_that_is_none_is_wrong_usage(tmp_path, capsys, command, data, said):
    file = tmp_path / "prompts.txt"
    if data is not None:
        file.write_bytes(data)
    words = [command, *TOY, "--prompts-file", str(file), "--store", str(tmp_path / "r")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert main([*words, "--prompts", "b"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_compare_writes_a_card_and_pictures(tmp_path, capsys):
    folder = tmp_path / "c"
    words = ["--methods", "best_of_n", "fk(num_particles=8)", "dts(wave=4)", "--nfe", "400", "--store", str(folder)]
    assert main(["compare", *TOY, *words]) == 0
    printed = capsys.readouterr().out
    assert "best_of_n's best of 400 NFE is" in printed
    assert "for the best sample:" in printed
    assert "biased low" in printed
    assert (folder / "reward.png").exists()
    assert "| best_of_n |" in (folder / "README.md").read_text()
    assert main(["compare", *TOY, *words]) == 1


def test_compare_logs_each_method_apart(tmp_path, capsys, monkeypatch):
    told, made = [], []

    def named(to, path, called):
        made.append((to, path.name, called))
        return lambda snapshot: told.append((called, snapshot.record["nfe"]))

    monkeypatch.setattr("treesearch.cli.compare.named", named)
    words = ["--methods", "best_of_n", "fk", "--nfe", "200", "--store", str(tmp_path / "c"), "--log", "wandb", "--json"]
    assert main(["compare", *TOY, *words]) == 0
    assert made == [("wandb", "best_of_n", "c-best_of_n"), ("wandb", "fk", "c-fk")]
    assert {name for name, _ in told} == {"c-best_of_n", "c-fk"}
    assert max(nfe for _, nfe in told) == 200
    monkeypatch.undo()
    assert main(["compare", *TOY, "--store", str(tmp_path / "d"), "--log", "wandbb"]) == 2
    assert "did you mean 'wandb'?" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("command", ["run", "compare", "diagnose"])
def test_texts_are_scored_by_no_default(tmp_path, capsys, command):
    words = [command, "--kernel", "rescored(masked_text('none/none', length=4, num_steps=4))", "--nfe", "200"]
    assert main([*words, "--store", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "--reward: name one of texts" in said
    assert "none/none" not in said


def test_compare_every_method_beside_a_reward_that_is_not_optimised(tmp_path, capsys):
    folder = tmp_path / "c"
    words = ["--methods", "all", "--also", "quadratic(1,0)", "--nfe", "600", "--store", str(folder)]
    assert main(["compare", *TOY, *words]) == 0
    records = [json.loads(line) for line in (folder / "comparison.jsonl").read_text().splitlines()]
    card = (folder / "README.md").read_text()
    ran = {record["method"] for record in records}
    for name in specs.METHOD_NAMES:
        assert f"| {name} |" in card
        assert name in ran or f"- {name}: not run: " in card
    assert "rejection" not in ran  # the reward exceeds its bound
    for record in records:
        assert record["nfe"] <= 600
        assert record["also_best"] < 0
    assert "| quadratic(1, 0), best | draws |" in card
    printed = capsys.readouterr().out
    assert "not optimised" in printed
    assert "rejection: not run" in printed


def test_dry_run_predicts_and_leaves_nothing(tmp_path, capsys):
    assert run("dts", *TOY, "--nfe", "10k", "--dry-run", "--json", "--store", str(tmp_path / "r")) == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 10_000
    assert not (tmp_path / "r").exists()
    words = [*TOY, "--dry-run", "--json"]
    for method, limits, nfe, calls in (
        (["best-of-n", "--n", "1000"], [], 5_000, 1_000),
        (["best-of-n"], ["--reward-calls", "1k"], 5_000, 1_000),
        (["fk", "--num-particles", "100"], ["--iterations", "10"], 5_000, 5_000),
    ):
        assert run(*method, *words, *limits) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["nfe"], found["reward_calls"]) == (nfe, calls)
        assert "ends_by" not in found
    for given, ends in (("900h", "another limit than seconds"), ("0.001", "seconds")):
        assert run("dts", *words, "--nfe", "10k", "--seconds", given) == 0
        assert json.loads(capsys.readouterr().out)["ends_by"] == ends


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["rnu"], 2, "did you mean 'run'"),
        (["run", "dst"], 2, "did you mean 'dts'"),
        (["run", "dts", "--nffe", "3"], 2, "--nfe"),
        (["run", "dts", "--kernel", "gausian", "--nfe", "1k"], 2, "did you mean 'gaussian'"),
        (["run", "dts", "--reward", "digi(3)", "--nfe", "1k"], 2, "did you mean 'digit'"),
        (["run", "dts", "--reward", "brightness(target=nan)", "--nfe", "1k"], 2, "nan in a reward is no number"),
        (["run", "dts", "--kernel", "gaussian", "--reward", "linear", "--nfe", "3"], 1, "minimum is 5"),
        (["run", "dts", "--kernel", "gaussian", "--reward", "linear", "--nfe", "ten"], 2, "10k"),
        (["run", "fk", "--kernel", "gaussian", "--reward", "linear"], 1, "no budget"),
        (["run", "fk", "--potential", "differense", "--nfe", "1k"], 2, "did you mean 'difference'"),
        (["run", "dts", "--reward", "__import__('os')", "--nfe", "1k"], 2, "unknown reward"),
        (["run", "dts", "--reward", "linear().__class__", "--nfe", "1k"], 2, "cannot read"),
        (["run", "dts", "--kernel", "./none.py:make", "--nfe", "1k"], 2, "no such file"),
        (["show", "nowhere"], 1, "holds no run"),
        (["resume", "nowhere"], 1, "holds no run"),
    ],
)
def test_mistakes_get_an_exit_code_and_a_hint(capsys, words, code, said):
    assert main(words) == code
    printed = capsys.readouterr()
    assert said in " ".join((printed.out + printed.err).replace("│", " ").split())


def test_a_plugin_file_is_a_kernel_and_a_reward(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from treesearch.backends.exact.gaussian import LinearGaussian\n"
        "def make(dim=1): return LinearGaussian(dim=dim)\n"
        "def score(samples): return samples.sum(1)\n"
    )
    words = ["--kernel", f"{file}:make(dim=3)", "--reward", f"{file}:score", "--nfe", "200"]
    assert run("best-of-n", *words, "--store", str(tmp_path / "r"), "--json") == 0
    assert main(["resume", str(tmp_path / "r"), "--nfe", "300", "--json"]) == 0
    del capsys


def test_ctrl_c_saves_and_prints_the_resume_command(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text("import time\ndef score(samples):\n    time.sleep(0.02)\n    return samples.sum(1)\n")
    store = tmp_path / "a run"
    words = [sys.executable, "-m", "treesearch", "run", "dts", "--kernel", "gaussian", "--reward", f"{file}:score"]
    job = subprocess.Popen(
        [*words, "--nfe", "50k", "--store", str(store)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not (
        (store / "tree.bin").exists() and (store / "tree.bin").stat().st_size > 3000
    ):
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=600)
    assert job.returncode == 130
    assert f"treesearch resume '{store}'" in printed
    assert read_config(store)["status"] == "interrupted"


def test_every_command_has_help(capsys):
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert len(capsys.readouterr().out) > 80


def test_help_needs_no_torch_and_says_what_the_commands_say(capsys):
    code = (
        "import sys; from treesearch.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'numba') if m in sys.modules], file=sys.stderr)"
    )
    for words, said in ((["--help"], "Versions and devices"), (["--version"], "treesearch ")):
        told = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=600
        )
        assert (said in told.stdout, told.stderr) == (True, "[]\n")
    assert main(["--help"]) == 0
    light = capsys.readouterr().out
    assert "treesearch --version" in light
    assert commands.parse(["--help"], cli.__doc__) == 0
    assert light == capsys.readouterr().out


def test_commands_that_compute_nothing_need_no_torch(tmp_path):
    store = str(tmp_path / "run")
    assert run("fk", *TOY, "--nfe", "200", "--store", store) == 0
    words = [["ls", str(tmp_path)], ["ls", "--help"], ["cite"], ["cite", store], ["env"], ["list"], ["list", "fk"]]
    code = (
        "import json, sys; from treesearch.cli.main import main\n"
        "for words in json.loads(sys.argv[1]): print(main(words), 'torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, json.dumps(words)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert told.stderr == "0 False\n" * len(words)
    assert "FeynmanKac" in told.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_s_completion_knows_the_commands(capsys, shell):
    assert main(["--tyro-print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in script] == []


def test_names_load(capsys):
    def needs(name):
        taken = inspect.signature(expressions.load(specs.KERNELS[name])).parameters.values()
        return any(p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in taken)

    told = {name for name in specs.KERNELS if needs(name)}
    assert {"diffusers", "tds", "clamp"} < told
    for name in set(specs.KERNELS) - told:  # those need to be told of what
        specs.kernel(name if name != "mnist" else "mnist(num_steps=4)")
    guided = specs.kernel("tds(mnist(num_steps=4), 2*digit(8) + brightness(), lam=0.5)")
    assert guided.num_steps == 4
    scaled = specs.kernel('guidance_scales(diffuser(maze(num_steps=4), maze_plan("medium")), (0.0, 1.0), (2,))')
    assert scaled.num_steps == 4
    assert specs.kernel("heun(mnist(num_steps=4, eta=0.0))").num_steps == 7
    assert specs.kernel("teleport(mnist(num_steps=10), skip=0.3)").num_steps == 7
    for words in (["list"], ["list", "rewards"], ["list", "methods"], ["env"], ["cite"]):
        assert main(words) == 0
    out = capsys.readouterr().out
    assert "resampling" in out
    assert all(name in out for name in specs.REWARDS)
    assert "zai-org/ImageReward/ImageReward.pt (Apache-2.0)" in out
    assert main(["list", "reward"]) == 2


def test_amounts():
    assert [count(t) for t in ("10k", "2M", "1_500", "1.5k", "1e3")] == [10_000, 2_000_000, 1_500, 1_500, 1_000]
    assert [seconds(t) for t in ("90", "90s", "10m", "1.5h", "0.5")] == [90, 90, 600, 5400, 0.5]


FEW = ["--kernel", "gaussian", "--reward", "linear", "--dry-run"]


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["--nfe", text]
            for text in ("1,000", "1.5", "-5", "0", "nan", "inf", "1e99", "ten", "10 k", "5x", "", "0x10")
        ),
        *(["--seconds", text] for text in ("abc", "-1", "nan", "inf", "0", "10 minutes", "1:30")),
        ["--reward-calls", "1,000"],
        ["--iterations", "some"],
        ["--nfe", "100", "--seed", "-1"],
        ["--nfe", "100", "--seed", "one"],
        ["--nfe", "100", "--batch-size", "0"],
        ["--nfe", "100", "--keep-states", "al"],
        ["--nfe", "100", "--gpus-per-worker", "1"],
        ["--nfe", "100", "--workers", "2"],  # a dry run predicts one process
        *(
            ["--nfe", "100", "--reward", text]
            for text in (
                "linear(**{'c': 2})",
                "linear(*[1])",
                "linear(c=",
                "linear() + 'a'",
                "linear(z=1)",
                "linear().clip(2, 1)",
            )
        ),
        ["--nfe", "100", "--reward", "kernel"],
        ["--nfe", "100", "--reward", "(" * 300 + "1" + ")" * 300],
    ],
)
def test_what_cannot_be_read_is_wrong_usage(words, capsys):
    assert run("best-of-n", *FEW, *words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_options_that_would_be_ignored_are_refused(tmp_path):
    store = str(tmp_path / "r")
    assert run("fk", *TOY, "--nfe", "400", "--store", store) == 0
    for words in (
        ["plot", store, store + "x", "--what", "tree"],
        ["plot", store, "--task", "0"],
        ["plot", store, "--what", "tree", "--task", "1"],
        ["export", store, "csv", "--draws", "0"],
        ["export", store, "npz", "--best", "3"],
        ["export", store, "csv", "--kernel", "gaussian"],
        ["export", store, "minari", "--draws", "3", "--best", "3"],
        ["export", store, "npz", "--task", "1"],
        ["export", "csv", store],
        ["run", "fk", *TOY, "--nfe", "400", "--on-interrupt", "drain"],
        ["bench", "--kernel", "gaussian", "--batch-sizes", "0"],
    ):
        assert main(words) == 2, words


def test_one_bad_run_hides_no_other(tmp_path, capsys):
    for name in ("a", "b"):
        assert run("best-of-n", *TOY, "--nfe", "100", "--store", str(tmp_path / name)) == 0
    bad = {"c": "[[", "d": "{}", "e": "[" * 10**5, "f": "null"}
    for name, text in bad.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "g" / "run.json").mkdir(parents=True)
    capsys.readouterr()
    assert main(["ls", str(tmp_path), "--json"]) == 0
    listed = {os.path.basename(line["run"]): line for line in json.loads(capsys.readouterr().out)}
    assert [listed[name]["nfe"] for name in ("a", "b", *bad, "g")] == [100, 100, None, None, None, None, None]
    assert all(len(listed[name]["status"]) > 10 for name in (*bad, "g"))
    paths = [str(tmp_path / name) for name in ("c", "a", "b")]
    assert main(["plot", *paths, "--out", str(tmp_path / "p.png")]) == 1
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert str(tmp_path / "c") in capsys.readouterr().err


def test_a_comparison_goes_on_without_a_method_that_cannot_run(tmp_path, capsys):
    folder = tmp_path / "c"
    words = [
        "--methods",
        "fk(num_particles=500)",
        "best_of_n",
        "fk(num_particles=8)",
        "--nfe",
        "400",
        "--store",
        str(folder),
    ]
    assert main(["compare", *TOY, *words]) == 1
    out = capsys.readouterr().out
    assert "fk_num_particles_500: not run: Budget(nfe=400) is below one population of 500" in out
    assert set(json.loads((folder / "summary.json").read_text())) == {"best_of_n", "fk_num_particles_8"}


def test_a_method_has_one_set_of_defaults():
    assert {spec: specs.method(spec) for spec in Compare().methods} == {
        spec: METHODS[spec.replace("_", "-")]() for spec in Compare().methods
    }


def test_different_searches_stand_in_panels_of_their_own(tmp_path):
    stores = {}
    for name, words in {
        "a": ["--reward", "linear(1.0)"],
        "b": ["--reward", "linear(1.0)", "--seed", "1"],
        "c": ["--reward", "linear(2.0)"],
        "d": ["--reward", "linear(1.0)", "--prompts", "x"],
        "e/a": ["--reward", "linear(1.0)", "--kernel", "gaussian(num_steps=6)"],
    }.items():
        stores[str(tmp_path / name)] = name
        assert run("best-of-n", "--kernel", "gaussian", *words, "--nfe", "120", "--store", str(tmp_path / name)) == 0
    read = {path: read_result_of(path) for path in stores}
    found = plots.panels({path: (config, result.history) for path, (config, result) in read.items()})
    assert [list(panel.curves) for panel in found] == [
        ["BestOfN"],
        [str(tmp_path / "c")],
        [str(tmp_path / "d")],
        [str(tmp_path / "e/a")],
    ]
    assert [len(curves) for panel in found for curves in panel.curves.values()] == [2, 1, 1, 1]


def test_the_output_s_reader_is_gone():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(["cite"]) == 141


def test_limits_of_a_run_are_of_both_kinds(capsys):
    assert run("best-of-n", *FEW, "--nfe", "1M", "--seconds", "0.001", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] < 10**6
