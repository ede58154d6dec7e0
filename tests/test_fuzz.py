"""A slice of `make fuzz`: damaged and forged run folders are resumed to the right result, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import fuzz
from treesearch import states


def test_damaged_and_forged_folders_end_well(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "METHODS", {name: fuzz.METHODS[name] for name in ("best_of_n", "dts", "tasks")})
    assert fuzz.main(fuzz.Fuzz(n=60, seed=1)) == 0, capsys.readouterr().out


def test_states_without_checksums_are_caught(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "METHODS", {"best_of_n": fuzz.METHODS["best_of_n"]})
    monkeypatch.setattr(fuzz, "NATURAL", (fuzz.foreign, fuzz.zeros))
    monkeypatch.setattr(fuzz, "some_file", lambda rng, path: path / "states-00000.safetensors")
    monkeypatch.setattr(states, "_checksums", lambda rows: np.zeros(len(rows), np.uint32))
    assert fuzz.main(fuzz.Fuzz(n=20)) == 1
    assert "samples without their rewards" in capsys.readouterr().out


@pytest.mark.parametrize("deep", [100, 100_000])
def test_deep_documents_are_refused(deep):
    from treesearch import schema

    with pytest.raises(schema.Invalid, match="nested"):
        schema.plain()(schema.parse(b"[" * deep + b"]" * deep, "it"), "it")
