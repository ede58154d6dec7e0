"""The benchmark of imports: each kind runs in turn, ratios are those of a turn."""

from experiments.bench import imports


def test_ratios_are_those_of_a_turn():
    found = {name: [2.0, 40.0, 6.0] for name in imports.WHAT} | {"import torch": [1.0, 10.0, 2.0]}
    told = imports.report(found)
    assert told["of import torch"]["import treesearch"] == 3.0
    assert told["of import torch"]["import torch"] == 1.0
    assert told["seconds"]["import treesearch"] == 6.0
    assert told["rounds"] == 3


def test_each_kind_runs_in_turn_and_the_first_turn_is_not_counted(monkeypatch):
    ran = []
    monkeypatch.setattr(imports.subprocess, "run", lambda command, **how: ran.append(command[1:]))
    found = imports.measure(2)
    assert ran == [list(words) for words in imports.WHAT.values()] * 3
    assert {len(seconds) for seconds in found.values()} == {2}
