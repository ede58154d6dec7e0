"""Settings of workers are checked before anything starts; they are the arguments of `RayWorkers`, one for one."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

import treesearch as ts
from treesearch.distributed.settings import Settings

NAN = float("nan")
BAD = [
    ({"num_workers": 0}, "num_workers is 0, expected a positive whole number"),
    ({"num_workers": 1.5}, "num_workers is 1.5"),
    ({"num_workers": True}, "num_workers is True"),
    ({"gpus_per_worker": 1.5}, "gpus_per_worker is 1.5, expected a fraction of a GPU or a whole number of them"),
    ({"gpus_per_worker": -1}, "gpus_per_worker is -1"),
    ({"gpus_per_worker": NAN}, "gpus_per_worker is nan"),
    ({"gpus_per_reward_worker": 2.5}, "gpus_per_reward_worker is 2.5"),
    ({"gpus_per_reward_worker": 1}, "gpus_per_reward_worker is for reward_workers, of which there are none"),
    ({"cpus_per_worker": -1}, "cpus_per_worker is -1, expected a number >= 0"),
    ({"cpus_per_worker": NAN}, "cpus_per_worker is nan"),
    ({"cpus_per_reward_worker": -0.5}, "cpus_per_reward_worker is -0.5"),
    ({"reward_workers": -1}, "reward_workers is -1, expected a whole number >= 0"),
    ({"reward_workers": False}, "reward_workers is False"),
    ({"reward_cache": -1}, "reward_cache is -1"),
    ({"reward_tries": 0}, "reward_tries is 0, expected a positive whole number"),
    ({"max_failures": 0}, "max_failures is 0"),
    ({"hang_seconds": 0}, "hang_seconds is 0, expected a positive number"),
    ({"hang_seconds": "5"}, "hang_seconds is '5', expected a positive number"),
    ({"start_seconds": NAN}, "start_seconds is nan"),
    ({"gpus_per_worker": float("inf")}, "gpus_per_worker is inf"),
    ({"reward_seconds": -1}, "reward_seconds is -1"),
    ({"reward_window": -1.0}, "reward_window is -1.0, expected seconds >= 0"),
    ({"reward_window": float("inf")}, "reward_window is inf"),
    ({"on_interrupt": "drian"}, "did you mean 'drain'"),
]


@pytest.mark.parametrize("kind", [Settings, ts.RayWorkers])
@pytest.mark.parametrize(("given", "text"), BAD)
def test_settings_out_of_range(given, text, kind):
    with pytest.raises(ValueError, match=text):
        kind(**{"num_workers": 1} | given)


def test_the_arguments_of_workers_are_the_settings():
    taken = list(inspect.signature(ts.RayWorkers).parameters.values())
    assert [(p.name, p.default) for p in taken[1:]] == [(f.name, f.default) for f in fields(Settings)[1:]]
    other = {"str": "drain", "bool": True, "str | None": "auto"}
    given = {f.name: other.get(str(f.type), 3) for f in fields(Settings)}
    settings = ts.RayWorkers(**given).settings
    assert {name: getattr(settings, name) for name in given} == given


def test_settings_stay_as_they_are():
    with pytest.raises(FrozenInstanceError):
        Settings(num_workers=1).max_failures = 2


def test_cpus_are_one_or_none_beside_a_gpu_unless_asked():
    settings = Settings(num_workers=3, gpus_per_worker=0.5, reward_workers=2)
    assert (settings.worker_cpus, settings.reward_worker_cpus, settings.cpus) == (0, 1, 2)
    settings = Settings(num_workers=3, cpus_per_worker=2, reward_workers=2, cpus_per_reward_worker=0.5)
    assert settings.cpus == 7
