"""One list of what decides a run: run.json holds it, `resume` compares it, the hash of a certificate digests it."""

import json

import pytest

import treesearch as ts
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.rewards.analytic import linear
from treesearch.runs import identity
from treesearch.runs.config import read_config, stamped

KERNEL = LinearGaussian(num_steps=3)
OTHER = {
    "method": {"name": "another"},
    "seed": 1,
    "prompts": ["another"],
    "num_steps": 4,
    "state_shape": [7],
    "dtype": "float16",
    "fingerprint": "another",
    "reward": "another",
    "reward_settings": ["another"],
    "kernel": "Another",
    "budget": {"nfe": 9},
}


def test_these_are_all():
    assert {*OTHER} == {*identity.DECIDES}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "r"
    ts.search(KERNEL, linear(1.0), ts.BestOfN(n=4), store=folder)
    return folder


@pytest.mark.parametrize("name", [*identity.DECIDES, "options", "versions"])
def test_what_is_not_there_is_a_sentence(tmp_path, run, name):
    config = {key: value for key, value in read_config(run).items() if key != name}
    (tmp_path / "run.json").write_text(json.dumps(stamped(config)))
    for read in (
        lambda: read_config(tmp_path),
        lambda: ts.resume(tmp_path, KERNEL, linear(1.0)),
        lambda: identity.settings_hash(config, 0),
        lambda: identity.check_same(config, config),
    ):
        with pytest.raises(ts.StoreError, match=f"run.json lacks '{name}'.*put back the file as it was written"):
            read()


@pytest.mark.parametrize("name", OTHER)
def test_resume_compares_what_is_fixed_and_the_hash_all_of_it(run, name):
    saved = read_config(run)
    changed = saved | {name: OTHER[name]}
    assert identity.settings_hash(saved, 0) != identity.settings_hash(changed, 0)
    if name in identity.FIXED:
        with pytest.raises(ts.StoreError, match=f"^{name} differs: the run has") as error:
            identity.check_same(saved, changed)
        assert ("files that hold what they held" in str(error.value)) == (name in ("fingerprint", "reward_settings"))
    else:
        identity.check_same(saved, changed)


def test_the_hash_knows_task_batches_and_version(run):
    saved = read_config(run)
    others = [
        saved | {"options": saved["options"] | {"batch_size": 7}},
        saved | {"versions": saved["versions"] | {"treesearch": "9"}},
    ]
    assert len({identity.settings_hash(c, t) for c in (saved, *others) for t in (0, 1)}) == 6
    assert identity.settings_hash(saved | {"memory": 1, "status": "running"}, 0) == identity.settings_hash(saved, 0)
