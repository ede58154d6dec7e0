"""Scenes with shadows: the program that checks atoms, what training leaves out, the page of their strengths."""

from pathlib import Path

import torch

from experiments.interventions.lina import name_of, page, rows_of
from experiments.interventions.scenes import atoms, drawn, elsewhere, parsed, scenes
from experiments.shared.cells import read

RESULTS = Path(__file__).parents[2] / "experiments/results/interventions"


def test_a_drawn_scene_has_every_atom_and_that_under_another_light_lacks_its_place():
    some = scenes(held_out=True)[::12]
    prompts = [scene.prompt for scene in some]
    assert atoms(torch.stack([drawn(scene) for scene in some]), prompts).all()
    other = atoms(torch.stack([drawn(scene._replace(light=(scene.light + 1) % 3)) for scene in some]), prompts)
    assert other.mean(0).tolist() == [1.0] * 6 + [0.0]


def test_nothing_held_out_is_trained_on():
    shown = {(*s[:4], s.shadow) for s in elsewhere()} | {(*s[:4], s.place) for s in scenes(held_out=False)}
    assert not shown & {(*s[:4], s.place) for s in scenes(held_out=True)}


def test_prompts_are_read_as_they_are_written():
    assert all(parsed(scene.expanded) == scene._replace(shadow=scene.place) for scene in scenes(held_out=True))


def test_the_page_says_what_a_picture_costs_and_how_many_seeds_there_are():
    assert [rows_of(name_of(arm)) for arm in range(6)] == [12, 12, 12, 18, 18, 18]
    said = (RESULTS / "lina.md").read_text("utf-8")
    assert "18 rows of the network without strengths, 12 under the best fixed ones, and 12 to 18 under adaptive" in said
    assert "| adaptive less fixed | 2.9 | 2.4 to 3.3 | 6 |" in said  # Student's t
    assert "| tree over strengths, early levels | 91.32 ± 0.69 | 3 |" in said


def test_the_page_is_that_of_its_rows():
    assert page(read(RESULTS / "lina.jsonl")) == (RESULTS / "lina.md").read_text("utf-8")
