"""Trajectory diffusion: the clamped chain, its files and grids, training, and the shipped model."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import treesearch as ts
from experiments.planning import train_trajectory as train
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.models.card import Card, Normalisation, load_model, save_model
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.backends.models.trajectory import TrajectoryKernel, maze_kernel, trajectory_kernel
from treesearch.backends.models.unet1d import TrajectoryNetwork
from treesearch.backends.training import loop as training
from treesearch.offline.data import DataError
from treesearch.offline.readers import from_arrays
from treesearch.rewards.analytic import constant
from treesearch.rewards.base import as_reward
from treesearch.rewards.channels import Channels, known
from treesearch.rewards.trajectories.maze import wall_collision
from treesearch.testing import bare_chain, check_kernel

CHANNELS = Channels(3, 1, 1)
NORMALISATION = Normalisation((1.0, 0.0, -2.0, 0.5, 0.0), (2.0, 1.0, 0.5, 1.0, 3.0))
CARD = Card(channels=CHANNELS, normalisation=NORMALISATION, horizon=8, stride=2, widths=(8, 16), maze_map=((1, 0),))
PROMPTS = [known([1.0, 2.0, 3.0], [4.0, 5.0]), known([0.0, -1.0, 0.0]), known(goal=[2.0]), {}]
ATOL = 1e-4  # how far a row moves with its batch
WEIGHTS = Path(__file__).parents[2] / "backends" / "weights" / "maze_medium.safetensors"


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TrajectoryNetwork(CHANNELS.size, CARD.widths)


def kernel(num_steps=4, horizon=8, eta=1.0, seed=0):
    return TrajectoryKernel(
        network(seed),
        channels=CHANNELS,
        normalisation=NORMALISATION,
        horizon=horizon,
        schedule=Schedule.variance_preserving(cosine_alphas_cumprod(), num_steps, prediction="sample"),
        eta=eta,
        card=CARD,
    )


KERNEL = kernel()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The clamped chain.


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_conformance(prompts):
    check_kernel(KERNEL, prompts=prompts, atol=ATOL)


@pytest.mark.parametrize("method", [ts.BestOfN(), ts.FeynmanKac(num_particles=8), ts.DiffusionTreeSearch()])
def test_every_plan_has_what_is_known(method):
    reward = as_reward(lambda plans: -plans[:, 3, 0].square())
    result = ts.search(KERNEL, reward, method, prompts=PROMPTS, budget=ts.Budget(nfe=4 * 4 * 16))
    starts = [task.samples[:, 0, :3] for task in result.tasks]
    ends = [task.samples[:, -1, :2] for task in result.tasks]
    for i in (0, 1):
        torch.testing.assert_close(starts[i], torch.tensor(PROMPTS[i]["start"]).expand_as(starts[i]))
    torch.testing.assert_close(ends[0], torch.tensor([4.0, 5.0]).expand_as(ends[0]))
    torch.testing.assert_close(ends[2][:, 0], torch.full_like(ends[2][:, 0], 2.0))
    assert ends[2][:, 1].std() > 0.01
    assert starts[3].std(0).min() > 0.01


def test_known_entries_leave_log_prob():
    cond = KERNEL.encode([PROMPTS[0]] * 5)
    x, t = KERNEL.prior(normal(5, 8, 5), cond), torch.tensor([4, 3, 2, 4, 3])
    law = KERNEL.transition(x, t, cond)
    y = law.sample(normal(5, 8, 5, seed=1))
    free, std = ~cond["mask"], law.std.double()
    z = (y.double() - law.mean.double()) / std.where(std > 0, 1.0)
    each = -0.5 * z**2 - std.where(std > 0, 1.0).log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(law.log_prob(y), (each * free).flatten(1).sum(1))
    assert (law.log_prob(y + 0.1 * cond["mask"]) == -math.inf).all()
    assert (law.std[cond["mask"]] == 0).all()
    assert (law.std[free] > 0).all()
    assert torch.equal(law.endpoint[cond["mask"]], cond["known"][cond["mask"]])


def test_the_law_does_not_read_known_entries_of_the_state():
    cond = KERNEL.encode(PROMPTS)
    x, t = normal(4, 8, 5), torch.tensor([4, 3, 2, 1])
    one, other = (KERNEL.transition(x + move * cond["mask"], t, cond) for move in (0.0, 7.0))
    torch.testing.assert_close(one.mean, other.mean)
    plain = KERNEL.transition(x, t)
    assert (one.mean - plain.mean)[:3].abs().max() > 1e-3
    torch.testing.assert_close(one.mean[3], plain.mean[3])


def test_gradients_reach_free_entries_only():
    cond = KERNEL.encode([PROMPTS[0]])
    x = normal(1, 8, 5).requires_grad_()
    KERNEL.decode(KERNEL.transition(x, torch.tensor([3]), cond).endpoint).square().sum().backward()
    assert x.grad is not None
    assert (x.grad[cond["mask"]] == 0).all()
    assert (x.grad[~cond["mask"]] != 0).float().mean() > 0.5


def test_decode_undoes_encode_samples():
    plans = 3 * normal(6, 8, 5)
    torch.testing.assert_close(KERNEL.decode(KERNEL.encode_samples(plans)), plans)
    cond = KERNEL.encode([known([1.0, 2.0, 3.0])])
    torch.testing.assert_close(cond["known"][0, 0, :3], torch.tensor([0.0, 2.0, 10.0]))


def test_plans_of_another_length():
    longer = KERNEL.with_horizon(12)
    check_kernel(longer, prompts=PROMPTS, atol=ATOL)
    assert longer.network is KERNEL.network
    assert longer.fingerprint != KERNEL.fingerprint
    goal = ts.search(longer, constant(0.0), ts.BestOfN(n=2), prompts=PROMPTS[:1]).samples[:, 11, :2]
    torch.testing.assert_close(goal, torch.tensor([4.0, 5.0]).expand(2, 2))


def test_fingerprints_tell_kernels_apart():
    kernels = [KERNEL, kernel(num_steps=5), kernel(eta=0.5), kernel(seed=1), kernel(horizon=4)]
    assert len({k.fingerprint for k in kernels}) == len(kernels)
    assert kernel().fingerprint == KERNEL.fingerprint


# Moves up the chain.


def test_renoise_is_the_forward_process():
    alpha, sigma = KERNEL.chain.schedule.alpha, KERNEL.chain.schedule.sigma
    low, high = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([4, 1, 3, 2, 4])
    x, nothing = normal(5, 8, 5), torch.zeros(5, 8, 5)
    scale = KERNEL.renoise(x, low, high, nothing)[:, 0, 0] / x[:, 0, 0]
    std = KERNEL.renoise(nothing, low, high, nothing + 1)[:, 0, 0]
    torch.testing.assert_close(scale.double(), alpha[high] / alpha[low])
    torch.testing.assert_close(std.double() ** 2 + (scale.double() * sigma[low]) ** 2, sigma[high] ** 2)
    assert torch.equal(KERNEL.renoise(x, high, high, nothing + 1), x)
    with pytest.raises(ValueError, match="moves up"):
        KERNEL.renoise(x, high, high - 1, nothing)


# Grids.


def test_a_karras_grid_is_even_in_the_noise_level():
    bars = cosine_alphas_cumprod()
    grid = Schedule.karras(bars, 9, sigma_min=0.05, sigma_max=50.0, rho=5.0, prediction="sample")
    ratio = grid.sigma[1:] / grid.alpha[1:]
    torch.testing.assert_close(grid.alpha**2 + grid.sigma**2, torch.ones(10, dtype=torch.float64))
    assert ratio[[0, -1]].tolist() == pytest.approx([0.05, 50.0])
    gaps = (ratio ** (1 / 5.0)).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(8))
    taught = ((1 - bars) / bars).sqrt()
    below, above = taught[grid.timestep.floor().long()], taught[grid.timestep.ceil().long()]
    assert (below <= ratio + 1e-9).all()
    assert (ratio <= above + 1e-9).all()
    assert (grid.alpha[0], grid.sigma[0], grid.prediction) == (1, 0, "sample")


def test_a_karras_grid_ends_where_the_training_grid_does():
    bars = cosine_alphas_cumprod()
    grid = Schedule.karras(bars, 4, sigma_min=1e-9, sigma_max=1e9)
    assert grid.timestep[[0, -1]].tolist() == [0.0, 999.0]
    with pytest.raises(ValueError, match="two or more steps"):
        Schedule.karras(bars, 1)
    with pytest.raises(ValueError, match="low to high"):
        Schedule.karras(bars, 4, sigma_min=2.0, sigma_max=1.0)


# Files.


def test_a_saved_model_is_the_model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(KERNEL.network, CARD, path)
    loaded, card = load_model(path)
    assert card == CARD
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, KERNEL.network.state_dict()[name].half().float())
    for grid in ("uniform", "karras"):
        check_kernel(trajectory_kernel(path, num_steps=3, grid=grid), prompts=PROMPTS, atol=ATOL)
    assert trajectory_kernel(path, 3, horizon=4).horizon == 4


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no card"):
        load_model(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no trajectory model, or a damaged one"):
        load_model(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=r"'huge' are shipped, only medium"):
        maze_kernel("huge")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: KERNEL.encode([known([1.0, 2.0])]), "start has 2 numbers, expected 3"),
        (lambda: KERNEL.encode([known(goal=[1.0, 2.0, 3.0, 4.0])]), "goal has 4 numbers, expected up to 3"),
        (lambda: KERNEL.encode([{"end": [1.0]}]), "keys start and goal"),
        (lambda: KERNEL.with_horizon(7), "multiple of 2"),
        (lambda: Normalisation((0.0,), (0.0,)), "positive stds"),
        (
            lambda: TrajectoryKernel(
                network(),
                channels=Channels(3, 1),
                normalisation=NORMALISATION,
                horizon=8,
                schedule=KERNEL.chain.schedule,
            ),
            "5 channels, expected 4",
        ),
    ],
)
def test_bad_input(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()


# The shipped model.


def test_the_shipped_model_keeps_out_of_walls():
    assert WEIGHTS.stat().st_size <= 4_000_000
    model = maze_kernel("medium", num_steps=10)
    assert model.card is not None
    assert (model.card.environment, model.card.stride, len(model.card.maze_map)) == ("PointMaze_Medium-v3", 4, 8)
    prompts = [known([-2.5, 2.5, 0.0, 0.0], [2.5, -2.5]), known([2.5, 2.5, 0.0, 0.0], [-2.5, -2.5])]
    crashes = wall_collision("medium", model.channels)
    walls = ts.search(model, crashes, ts.BestOfN(n=8), prompts=prompts, batch_size=16)
    untaught = copy.copy(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untaught.network = TrajectoryNetwork(6)
    blind = ts.search(untaught, crashes, ts.BestOfN(n=8), prompts=prompts, batch_size=16)
    rows, unfit = (np.mean([-np.asarray(task.rewards) for task in run.tasks]) for run in (walls, blind))
    assert rows < 6
    assert unfit > 2 * rows


# Training.


def episodes(lengths=(40, 12, 30), seed=0):
    rng, count = np.random.default_rng(seed), sum(lengths)
    timeouts = np.zeros(count, bool)
    timeouts[np.cumsum(lengths) - 1] = True
    return {
        "observations": np.arange(count)[:, None] + np.array([0.0, 0.5]),
        "actions": rng.uniform(-1, 1, (count, 1)),
        "rewards": rng.uniform(0, 1, count),
        "terminals": np.zeros(count, bool),
        "timeouts": timeouts,
    }


def test_windows_stay_in_their_episode_and_hold_means_and_sums():
    data = episodes()
    windows = train.windows_of(from_arrays(data, "test"), stride=3, reward=True)
    starts = windows.starts(8)
    assert starts.tolist() == [*range(17), *range(52, 59)]
    taken = windows.take(starts, 8)
    for start, window in zip(starts, taken, strict=True):
        steps = start + 3 * np.arange(8)
        assert window[:, 0].tolist() == steps.tolist()
        spans = steps[:, None] + np.arange(3)
        np.testing.assert_allclose(window[:, 2], data["actions"][spans, 0].mean(1), atol=1e-6)
        np.testing.assert_allclose(window[:, 3], data["rewards"][spans].sum(1), atol=1e-6)
    with pytest.raises(DataError, match="the longest has 40"):
        windows.starts(16)


def test_an_episode_that_the_task_ended_goes_on_where_it_ended(tmp_path):
    data = episodes((12, 8))
    data |= {"terminals": np.arange(20) == 11, "next_observations": data["observations"] + 7}
    np.savez(tmp_path / "data.npz", **data)
    args = train.Args(data=(tmp_path / "data.npz",), out=tmp_path, horizons=(4,), stride=1, absorbing=3, maze="")
    task = train.task_of(args)
    found = task.card.normalisation.decode(task.train.rows)[9:15]
    ended = [[18.0, 18.5, 0.0]] * 3
    torch.testing.assert_close(found[3:], torch.tensor(ended), atol=1e-4, rtol=0)
    assert task.train.starts(4).tolist() == [*range(12)]


def test_held_out_episodes_are_not_trained_on():
    windows = train.windows_of(from_arrays(episodes(), "test"), stride=1, reward=False)
    kept, apart = windows.split(0.4)
    assert set(kept.starts(8)) | set(apart.starts(8)) == set(windows.starts(8))
    assert max(kept.starts(8)) < 52 <= min(apart.starts(8))


def test_known_entries_cost_nothing_and_free_ones_do():
    x0, rng = normal(64, 8, 5), torch.Generator().manual_seed(0)
    mask = train.draw_mask(x0.shape, 3, 2, rng)

    def knows_free_entries(x, index, mask):
        assert torch.equal(x[mask], x0[mask])
        return torch.where(mask, 99.0, x0)

    assert train.loss_of(knows_free_entries, x0, mask, rng) == 0
    assert train.loss_of(lambda x, index, mask: torch.where(mask, 99.0, x0 + 1), x0, mask, rng) > 1


def test_masks_come_in_the_promised_shares():
    mask = train.draw_mask(torch.Size([20_000, 8, 5]), 3, 2, torch.Generator().manual_seed(0))
    start, goal = mask[:, 0, :3].all(1), mask[:, -1, :2].all(1)
    assert mask.sum() == 3 * start.sum() + 2 * goal.sum()
    assert float((start & goal).double().mean()) == pytest.approx(0.7, abs=0.02)
    assert float((start & ~goal).double().mean()) == pytest.approx(0.2, abs=0.02)
    assert not (goal & ~start).any()


def arguments(folder, epochs=2):
    np.savez(folder / "data.npz", **episodes())
    return train.Args(
        data=(folder / "data.npz",),
        out=folder / "run",
        weights=folder / "model.safetensors",
        curve=folder / "curve.csv",
        horizons=(8, 12),
        stride=2,
        goal=1,
        environment="Line-v0",
        maze="",
        reward=True,
        widths=(8, 16),
        epochs=epochs,
        steps=3,
        batch_size=8,
        warmup=2,
    )


def test_training_ends_in_a_model_that_plans(tmp_path):
    train.main(arguments(tmp_path))
    model = trajectory_kernel(tmp_path / "model.safetensors", num_steps=3)
    assert (model.horizon, model.channels, model.card.stride) == (12, Channels(2, 1, 1), 2)
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 3
    plan = bare_chain(model, 2, prompts=[known([3.0, 3.5], [9.0])])[-1]
    torch.testing.assert_close(model.decode(plan)[:, [0, -1], 0], torch.tensor([[3.0, 9.0]] * 2))


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    args = arguments(tmp_path)
    args.out.mkdir()
    task, plan = train.task_of(args), train.plan_of(args)

    def create():
        return training.create(lambda: TrajectoryNetwork(4, args.widths), plan, args.seed, args.out)

    def one_epoch(state):
        training.run_epoch(state, train.losses(state.network, task, args, state.epoch), plan)

    whole, part = create(), create()
    for _ in range(2):
        one_epoch(whole)
    one_epoch(part)
    training.save(part, args.out)
    again = create()
    assert again.epoch == 1
    one_epoch(again)
    for net in ("network", "ema"):
        for name, weight in getattr(whole, net).state_dict().items():
            assert torch.equal(weight, getattr(again, net).state_dict()[name]), name


def test_data_of_unknown_format_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected a file"):
        train.task_of(replace(arguments(tmp_path), data=(tmp_path / "data.csv",)))
