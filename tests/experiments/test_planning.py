"""The evaluation of planners and the demo: tiny random models through the whole script, figures from rows by hand."""

import json

import numpy as np
import pytest
import torch

import treesearch as ts
from experiments.planning import demo_plan, episodes, evaluate_trajectory, methods, plan_critic
from experiments.planning import evidence as planning
from experiments.planning import report as planning_report
from treesearch.backends.models.card import Card, Normalisation, save_model
from treesearch.backends.models.unet1d import TrajectoryNetwork
from treesearch.rewards.channels import Channels
from treesearch.rewards.trajectories.maze import MAZES

pytest.importorskip("gymnasium_robotics")
CHANNELS, STRIDE, H = Channels(4, 2), 4, 16
TASK = planning.Task("umaze", None, "plan")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of UMaze that has learnt nothing."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "umaze.safetensors"
    card = Card(
        channels=CHANNELS,
        normalisation=Normalisation((0.0,) * 6, (1.0, 1.0, 1.0, 1.0, 0.5, 0.5)),
        horizon=H,
        stride=STRIDE,
        widths=(8, 16),
        environment="tiny",
        maze_map=MAZES["umaze"],
    )
    save_model(TrajectoryNetwork(6, card.widths), card, file)
    return file


@pytest.fixture(scope="module")
def bed(weights):
    return planning.bed_of(TASK, 6, weights)


class Straight:
    """Plans that go straight to the goal, pushing all the way; the noise moves nothing."""

    num_steps, state_shape, dtype = 1, (H, 6), torch.float32
    channels, horizon = CHANNELS, H

    def encode(self, prompts):
        start, goal = (torch.tensor([p[name][:2] for p in prompts]) for name in ("start", "goal"))
        share = (torch.linspace(0, 2, H)[:, None]).clamp_max(1.0)
        plan = torch.zeros(len(prompts), H, 6)
        plan[..., :2] = start[:, None] + share * (goal - start)[:, None]
        plan[:, : H // 2, 2:4] = ((goal - start) * 2 / ((H - 1) * STRIDE * 0.01))[:, None]
        plan[..., 4:] = 0.3 * (goal - start)[:, None]
        return {"plan": plan}

    def prior(self, noise, cond=None):
        return noise

    def transition(self, x, t, cond=None):
        from treesearch.backends.base import Gaussian

        return Gaussian(cond["plan"], torch.zeros(len(x), 1, 1), cond["plan"])

    def decode(self, x0):
        return x0


def straight(bed):
    return methods.Setup(Straight(), bed.reward, ts.BestOfN(n=1))


def test_plans_are_executed_and_arrive_unless_a_wall_is_in_the_way(bed):
    pairs = [((-1.0, 1.0), (1.0, 1.0)), ((-1.0, 1.0), (-1.0, -1.0))]  # along a corridor of the maze, and through a wall
    own = bed._replace(kernel=Straight())
    done = episodes.play(own, straight(bed), pairs, rollouts=1, seed=0)
    assert done.field.reached.tolist() == [True, False]
    assert done.rewards[0] > done.rewards[1]
    assert len(done.planner.decisions) == 1


def test_replanning_stops_at_the_goal_or_after_so_many_decisions(bed):
    pairs = [((-1.0, 1.0), (1.0, 1.0)), ((-1.0, 1.0), (-1.0, -1.0))]
    seen = []
    done = episodes.play(
        bed._replace(kernel=Straight()), straight(bed), pairs, rollouts=1, seed=0, steps=8, decisions=5,
        watch=lambda field, planner: seen.append(planner.decision.planned),
    )  # fmt: skip
    assert len(done.planner.decisions) == 5
    assert seen[0] == (True, True)
    assert seen[-1] == (False, True)
    assert sum(d.nfe for d in done.planner.decisions) == sum(map(sum, seen))


def test_rates_belong_to_their_pairs(bed):
    pairs = [((-1.0, 1.0), (-1.0, -1.0)), ((-1.0, 1.0), (1.0, 1.0))]
    pairs = [planning.Pair(*pair, cells=2) for pair in pairs]
    assert episodes.base_rates(bed._replace(kernel=Straight()), pairs, 0, 64) == [0.0, 1.0]


@pytest.mark.parametrize(("rate", "advice"), [(0.1, "lower --min-cells"), (0.7, "raise --min-cells")])
def test_pairs_on_which_nothing_can_be_compared_are_refused(bed, monkeypatch, rate, advice):
    monkeypatch.setattr(planning, "base_rates", lambda *_: [rate] * 6)
    with pytest.raises(ValueError, match=advice):
        planning.choose_pairs(TASK, bed, planning.Run(pairs=6, min_cells=2))


def test_pairs_of_the_same_cells_stay_in_one_split(bed, monkeypatch):
    monkeypatch.setattr(planning, "base_rates", lambda *_: [0.3] * 18)
    row = planning.choose_pairs(TASK, bed, planning.Run(pairs=18, min_cells=3))
    pool = planning.held_out_pairs("umaze", 18, planning.CHOICE_SEED, min_cells=3)
    assert sorted(row["test"] + row["tune"]) == sorted(pool)
    cells = {name: {planning.route_of("umaze", pair) for pair in row[name]} for name in ("test", "tune")}
    assert not cells["test"] & cells["tune"]
    assert row["routes"] == [planning.route_of("umaze", pair) for pair in row["test"]]
    assert 0 < len(row["tune"]) < len(row["test"])


def test_the_script_fills_its_rows_and_goes_on(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(planning, "base_rates", lambda *_: [0.3] * 4)
    monkeypatch.setattr(planning, "TUNED_AT", 2)
    out, to = tmp_path / "rows.jsonl", tmp_path / "report.md"
    words = [
        "run",
        "--maze",
        "umaze",
        "--horizon",
        "8",
        "--reward",
        "execution",
        "--weights",
        str(weights),
        "--num-steps",
        "4",
        "--out",
        str(out),
    ]
    words += ["--pairs", "4", "--min-cells", "2", "--seeds", "0", "--tuning-seeds", "9", "--rollouts", "1", "3"]
    words += ["--methods", "base", "best_of_n", "guidance_scales"]
    words += ["--receding", "dts_star", "--receding-rollouts", "1", "2", "--decisions", "2", "--steps", "4"]
    assert planning.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    failed = [row["error"] for row in rows if "error" in row]
    assert all("nan" in error for error in failed), failed  # a guide too strong for a model that knows nothing
    whole = [row for row in rows if row["kind"] == "whole" and row["split"] == "test" and "error" not in row]
    assert {row["method"] for row in whole} >= {"base", "best_of_n"}
    assert all(row["nfe"] <= 4 * row["rollouts"] for row in whole)
    warm = {(row["warm"], row["rollouts"]) for row in rows if row["kind"] == "receding"}
    assert warm == {(False, 1), (True, 1), (False, 2), (True, 2)}
    before = out.read_bytes()
    assert planning.main(words) == 0
    assert out.read_bytes() == before
    assert planning.main([*words, "--num-steps", "5"]) == 1  # other rows than those that are there
    assert "name another file" in capsys.readouterr().err
    assert planning.main(["report", "--out", str(out), "--to", str(to)]) == 0
    assert "dts_star, warm" in to.read_text()
    assert to.with_suffix(".png").exists()


def test_another_reward_plans_for_the_same_pairs(tmp_path, weights, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "base_rates", lambda *_: asked.append(1) or [0.3] * 4)
    out = tmp_path / "rows.jsonl"
    words = [
        "run",
        "--maze",
        "umaze",
        "--horizon",
        "8",
        "--weights",
        str(weights),
        "--num-steps",
        "2",
        "--out",
        str(out),
    ]
    words += ["--pairs", "4", "--min-cells", "2", "--seeds", "0", "--methods", "base", "--receding"]
    for reward in ("plan", "execution"):
        assert planning.main([*words, "--reward", reward]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    pairs = [row for row in rows if row["kind"] == "pairs"]
    assert len(asked) == 1
    assert [row["by"] for row in pairs] == ["plan", "execution"]
    assert pairs[0]["test"] == pairs[1]["test"]
    assert [row["by"] for row in rows if row["kind"] == "whole"] == ["plan", "execution"]


def test_settings_are_chosen_by_success_then_reward(tmp_path):
    cells = planning.Cells(tmp_path / "rows.jsonl", planning.KEY)
    grid = planning.METHODS["fk"].grid
    scores = [([1, 0], [-1.0, -1.0]), ([1, 1], [-3.0, -3.0]), ([1, 1], [-2.0, -2.0])]
    for how, (success, reward) in zip(grid, scores, strict=False):
        job = planning.Job("whole", TASK, "tune", "fk", how, 16, False, 100)
        cells.add(job.row | {"success": success, "reward": reward})
    job = planning.Job("whole", TASK, "tune", "fk", grid[3], 16, False, 100)
    cells.add(job.row | {"error": "failed"})
    run = planning.Run(tuning_seeds=(100,))
    row = planning.chosen(TASK, "fk", cells, run)
    assert row["picked"] == grid[2]
    assert [each["score"] for each in row["grid"]] == [[0.5, -1.0], [1.0, -3.0], [1.0, -2.0], None]


def test_intervals_are_over_pairs_with_seeds_pooled():
    success = np.repeat(np.array([[1.0, 0.0]] * 50).reshape(1, 100), 5, 0)  # five seeds that agree: no more evidence
    found = planning_report.bootstrap(success)
    assert found.mean == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.05, abs=0.02)
    assert planning_report.bootstrap(np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)).text() == "50 (50 to 50)"


def test_pairs_of_the_same_cells_are_drawn_together():
    """Ten pairs of each of twenty routes that agree: no more evidence than twenty."""
    success = np.repeat([1.0, 0.0] * 10, 10)[None]
    groups = planning_report.grouped([str(i // 10) for i in range(200)])
    wide, narrow = planning_report.bootstrap(success, groups), planning_report.bootstrap(success)
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, abs=0.07)
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)


def synthetic(method, rollouts, success, kind="whole", warm=False, seed=0):
    row = {
        "kind": kind,
        "maze": "medium",
        "horizon": 48,
        "by": "plan",
        "split": "test",
        "method": method,
        "settings": {},
        "rollouts": rollouts,
    }
    cost = {"nfe": 20.0 * rollouts, "planning_seconds": 0.1, "decisions": 1.0}
    return row | {"warm": warm, "seed": seed, "success": success} | cost


def test_the_report_says_what_is_saved():
    """DTS* has at 16 rollouts what best-of-N has at 64; a warm start has at 4 what a cold one has at 8."""
    rows = [synthetic("best_of_n", n, [1] * k + [0] * (10 - k)) for n, k in ((4, 3), (16, 5), (64, 7))]
    rows += [synthetic("dts_star", n, [1] * k + [0] * (10 - k)) for n, k in ((4, 5), (16, 7), (64, 9))]
    for warm, hits in ((False, (3, 5)), (True, (5, 8))):
        rows += [
            synthetic("dts_star", n, [1] * k + [0] * (10 - k), "receding", warm)
            for n, k in zip((4, 8), hits, strict=True)
        ]
    found = planning_report.Found(("medium", 48, "plan"), rows)
    name, gap, matched, saved = planning_report.ratio_row(
        found, "dts_star", found.curve("dts_star"), found.curve("best_of_n")
    )
    assert (name, gap.split()[0]) == ("dts_star", "20")
    assert saved.startswith("4.00")
    assert matched.startswith("> 1")
    few = planning_report.Found(found.task, [r for r in rows if (r["method"], r["rollouts"]) != ("dts_star", 64)])
    row = planning_report.ratio_row(few, "dts_star", few.curve("dts_star"), few.curve("best_of_n"))
    assert row[1].split()[0] == "20", "at its own largest budget: .7 against .5"
    line = next(text for text in planning_report.receding_table(found).splitlines() if "warm |" in text)
    assert "2.00" in line
    assert "30 (0 to 60)" in planning_report.success_table(found, ["best_of_n"])


def test_hindsight_looks_ahead_within_a_segment():
    rows = torch.arange(20.0)[:, None].expand(20, 6)
    last = torch.tensor([9] * 10 + [19] * 10)
    known, value = plan_critic.hindsight(rows, last, 4_000, torch.Generator().manual_seed(0))
    apart = (known[:, 0] < 10) != (known[:, 6] < 10)
    assert not value[apart].any()
    assert apart.float().mean() == pytest.approx(plan_critic.ELSEWHERE / 2, abs=0.03)
    ahead = (known[:, 6] - known[:, 0])[~apart]
    assert (ahead >= 0).all()
    assert torch.allclose(value[~apart], plan_critic.DISCOUNT**ahead)
    assert set(ahead.long().tolist()) == set(range(10))


def test_a_critic_knows_how_far_the_goal_is():
    """A point that moves by its action along a line: plans that stay near the goal are worth more."""
    draw = torch.Generator().manual_seed(0)
    action = torch.randint(0, 2, (200,), generator=draw) * 2.0 - 1
    paths = torch.cumsum(0.1 * action[:, None].expand(200, 20), 1)
    rows = torch.zeros(200, 20, 6)
    rows[..., 0], rows[..., 4] = paths, action[:, None]
    last = (torch.arange(200) * 20 + 19)[:, None].expand(200, 20).reshape(-1)
    member = plan_critic.train(rows.flatten(0, 1), last, 4, 150, 0)
    reward = plan_critic.with_goal([member, member], CHANNELS, row=0)
    plans = torch.zeros(2, H, 6)
    plans[0, :, 4], plans[1, :, 4] = 1.0, -1.0
    towards, away = reward(plans, [{"start": [0.0] * 4, "goal": [0.5, 0.0]}] * 2)
    assert towards > away + 0.1


def test_the_demo_leaves_its_table_and_pictures(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(demo_plan, "EVERY", 80)
    args = demo_plan.Args(
        maze="umaze", horizon=None, pairs=2, min_cells=2, rollouts=6, num_steps=6, weights=weights, out=tmp_path
    )
    demo_plan.main(args)
    printed = capsys.readouterr().out
    for label in demo_plan.SHOWN.values():
        assert label in printed
    from PIL import Image

    assert {file.name for file in tmp_path.iterdir()} == {"table.md", "plans.png", "tree.png", "plan.gif"}
    with Image.open(tmp_path / "plan.gif") as picture:
        assert picture.n_frames > 1


def test_a_model_is_graded_beside_those_of_other_mazes(tmp_path, weights):
    out = tmp_path / "figures.json"
    out.write_text(json.dumps([{"maze": "large", "num_steps": 2, "horizon": 8}]))
    args = evaluate_trajectory.Args(maze="umaze", weights=weights, out=out, pairs=3, plans=2, num_steps=2)
    for _ in range(2):
        evaluate_trajectory.main(args)
    rows = json.loads(out.read_text())
    assert [row["maze"] for row in rows] == ["large", "umaze"]
    assert rows[1]["horizon"] == H
    assert sum(band["pairs"] for band in rows[1]["success_by_cells"].values()) == 3
    assert rows[1]["success"][0] <= rows[1]["pairs_solved_by_some_plan"]
