"""What there is can be found: `list NAME`, one spelling of each name, accepted arguments, `run` without a method."""

from __future__ import annotations

import inspect
import json
import pydoc

import pytest

import treesearch as ts
from treesearch import backends, rewards
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.cli.choices import CHOICES
from treesearch.cli.main import main
from treesearch.cli.names import described, named
from treesearch.errors import UsageError, unknown
from treesearch.methods.advice import advise
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.rewards.analytic import linear

KNOWN = [*specs.KERNELS, *specs.REWARDS, *specs.OPERATORS, *specs.METHOD_NAMES]


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_tells_what_it_takes(capsys, name):
    assert main(["list", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}(")
    assert "\nexample    treesearch run" in out
    for parameter in inspect.signature(named(name).factory).parameters:
        assert f"\n  {parameter}" in out.replace("**", "")


def test_examples_are_calls_that_their_factories_take():
    tables = (
        (rewards.REWARDS, specs.REWARDS),
        (rewards.OPERATORS, specs.OPERATORS),
        (backends.KERNELS, specs.KERNELS),
    )
    for table, what in tables:
        for name, (_, example) in table.items():
            tree, _ = expressions.parse(example, "example")
            assert tree.func.id == name
            expressions.bound(expressions.load(what[name]), tree)


def test_descriptions_follow_references():
    found = described(ts.DiffusionTreeSearch)
    assert found["widening_c"].startswith("a node expands while")
    assert described(expressions.load(specs.REWARDS["http"]))["retries"] == "attempts after the first."


def test_a_name_has_one_meaning_however_it_is_spelt():
    assert named("dts-star") == named("dts_star") == named("DiffusionTreeSearch")
    assert named("CLIPScore") == named("clip-score") == named("clip_score")
    for name, path in (specs.REWARDS | specs.OPERATORS).items():
        assert getattr(rewards, name) is expressions.load(path)
    for name, path in specs.KERNELS.items():
        assert getattr(backends, name) == expressions.load(path)
    with pytest.raises(UsageError, match="did you mean 'digit'"):
        named("digt")


@pytest.mark.parametrize("method", ["dts-star", "dts_star", "DiffusionTreeSearch"])
def test_a_method_runs_however_it_is_spelt(tmp_path, capsys, method):
    words = ["--kernel", "gaussian(num_steps=20)", "--reward", "linear", "--nfe", "400", "--store", str(tmp_path / "r")]
    assert main(["run", method, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "DiffusionTreeSearch"
    assert "second child" in " ".join(found["tasks"][0]["warnings"])


@pytest.mark.parametrize(
    ("make", "spec", "said"),
    [
        (specs.reward, "linear(z=1)", "unknown argument 'z'"),
        (specs.reward, "digit()", "it takes number"),
        (specs.reward, "even(1)", "it takes none"),
        (specs.method, "fk(particles=3)", "did you mean 'num_particles'"),
        (specs.kernel, "gaussian(steps=3)", "did you mean 'num_steps'"),
    ],
)
def test_arguments_that_a_call_does_not_take_are_answered_with_those_that_it_does(make, spec, said):
    with pytest.raises(UsageError, match=said):
        make(spec)


def test_what_there_is_shows():
    assert {"digit", "ImageReward", "as_reward"} <= set(dir(rewards))
    assert {"mnist", "tds"} <= set(dir(backends))
    assert {"search", "compare", "TreeSearch", "RayWorkers", "rewards"} <= set(dir(ts))
    page = pydoc.render_doc(ts.SearchResult, renderer=pydoc.plaintext)
    for name in ("samples", "rewards", "log_z", "draw(n: 'int', seed: 'int' = 0)", "best(k: 'int' = 1)", "certificate"):
        assert name in page


def test_run_without_a_method_says_what_it_takes(tmp_path, capsys):
    words = ["--kernel", "gaussian", "--reward", "linear"]
    assert main(["run", *words, "--nfe", "200", "--store", str(tmp_path / "a")]) == 0
    assert "--goal draws: TreeSampling, 200 NFE" in capsys.readouterr().out
    assert main(["run", *words, "--goal", "best", "--dry-run"]) == 0
    assert "--goal best: TreeSearch, 10,000 NFE" in capsys.readouterr().out
    assert main(["run", "fk", *words, "--goal", "best", "--nfe", "200"]) == 2
    assert main(["run", *words, "--goal", "worst"]) == 2


def test_the_method_suits_the_kernel():
    noisy = describe(LinearGaussian())
    fixed = noisy._replace(stochastic=(True, *[False] * noisy.num_steps))
    assert [type(advise(noisy, goal).method) for goal in ("draws", "best")] == [ts.TreeSampling, ts.TreeSearch]
    assert [type(advise(fixed, goal).method) for goal in ("draws", "best")] == [ts.BestOfN, ts.NoiseSearch]


def test_a_tree_that_hardly_branched_says_so():
    kernel, few = LinearGaussian(num_steps=25), ts.Budget(nfe=1_000)
    told = ts.search(kernel, linear(1.0), ts.DiffusionTreeSearch(), budget=few).diagnostics["warnings"]
    assert any("hardly branched" in text and "widening_c" in text for text in told)
    wide = ts.DiffusionTreeSearch(widening_c=1, widening_alpha=0.5)
    assert not any(
        "hardly" in text for text in ts.search(kernel, linear(1.0), wide, budget=few).diagnostics["warnings"]
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mnst()", "unknown kernel 'mnst'; did you mean 'mnist'"),
        ("tds(mnist(), digt(8))", "unknown name 'digt'; did you mean 'digit'"),
        (
            "steered(mnist(), measurement(poold(4), 'a.png', tolerance=1))",
            "unknown name 'poold'; did you mean 'pooled'",
        ),
    ],
)
def test_a_typo_is_looked_up_where_it_stands(spec, told):
    with pytest.raises(UsageError, match=told):
        specs.kernel(spec)


def test_examples_of_guides_search_for_the_reward_that_they_are_of(capsys):
    main(["list", "steered"])
    assert capsys.readouterr().out.count("--reward kernel") == 1
    main(["list", "mnist"])
    assert "--reward kernel" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", CHOICES)
def test_a_choice_tells_what_it_is_and_who_takes_it(capsys, kind):
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(CHOICES[kind].names))
    for name, line in zip(CHOICES[kind].names, lines, strict=True):
        assert main(["list", name]) == 0
        shown = capsys.readouterr().out
        assert f"{name}   {CHOICES[kind].argument}" in shown
        told = line.removeprefix(name).strip()
        assert len(told) > 5
        assert f"\n{told}\n  " in shown, "a method takes it"


def test_a_message_lists_few_names():
    few, many = unknown("name", "ab", ["abc", "x"]), unknown("name", "n7x", [f"n{i}" for i in range(100)])
    assert few == "unknown name 'ab'; did you mean 'abc'? (known: abc, x)"
    assert many.endswith("and 76 more)")
    assert "'n7'?" in many
