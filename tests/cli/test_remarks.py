"""What a reward does not read of a prompt is said in its task's warnings: by every combination, stored or not."""

from __future__ import annotations

import pytest

import treesearch as ts
from tests.support import kernels
from treesearch.cli.main import main
from treesearch.cli.show import read_result_of
from treesearch.registry import expressions
from treesearch.registry import registry as specs
from treesearch.rewards import as_reward, cached, frames, normalise
from treesearch.rewards.base import Reward, RewardError

TWO = ["short", "a long one"]
SAID = ["cutting reads 5 letters of a prompt, this one has 10"]
plain = as_reward(kernels.total)
COMBINED = {
    "itself": kernels.cutting(),
    "scaled": 2.0 * kernels.cutting() - 1.0,
    "clipped": kernels.cutting().clip(-3, 3),
    "left": kernels.cutting() + plain,
    "right": plain.min(kernels.cutting()),
    "twice": kernels.cutting() + kernels.cutting(),
    "gate": plain.gate(kernels.cutting(), -1e9),
    "cached": cached(kernels.cutting()),
    "normalised": normalise(plain + cached(kernels.cutting()), 0.0, 2.0),
    "frames": frames(kernels.cutting()),
}


@pytest.mark.parametrize("how", COMBINED)
def test_combinations_hand_on_what_their_parts_say(how):
    assert COMBINED[how].remarks_on(TWO) == [[], SAID]
    assert plain.remarks_on(TWO) == [[], []]


def said(result):
    return [[w for w in task.diagnostics["warnings"] if w in SAID] for task in result.tasks]


def test_a_result_says_it_of_the_task_alone_stored_and_resumed_too(gaussian, tmp_path):
    reward, method = kernels.cutting(), ts.BestOfN(n=4)
    assert said(ts.search(gaussian, reward, method, prompts=TWO)) == [[], SAID]
    assert said(ts.search(gaussian, reward, method)) == [[]]
    assert said(ts.search(gaussian, reward, method, prompts=TWO, store=tmp_path / "run")) == [[], SAID]
    assert said(read_result_of(tmp_path / "run")[1]) == [[], SAID]
    assert said(ts.resume(tmp_path / "run", gaussian, reward)) == [[], SAID]


def test_a_reward_that_cannot_read_prompts_leaves_no_folder(gaussian, tmp_path):
    def remarks(prompts):
        raise OSError("no tokenizer here")

    reward = Reward(lambda x, _: kernels.total(x), "cutting", remarks=remarks)
    with pytest.raises(RewardError, match="'cutting' raised OSError: no tokenizer here"):
        ts.search(gaussian, reward, ts.BestOfN(n=4), prompts=TWO, store=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_reward_of_the_list_states_its_limits(capsys):
    assert main(["list", "rewards"]) == 0
    out = capsys.readouterr().out
    loaded = {name: expressions.load(path) for name, path in specs.REWARDS.items()}
    known = [found.facts for found in loaded.values() if hasattr(found, "facts")]
    assert all(facts.limits and facts.limits in out for facts in known)
    for name, limit in (("clip_score", 77), ("pickscore", 77), ("hps", 77), ("image_reward", 35)):
        assert f"cut after {limit} tokens ({limit - 2} and two marks)" in loaded[name].facts.limits
