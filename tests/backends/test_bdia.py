"""BDIA: its formula, both round trips, leaves that find their ancestors, laws under noise, what rounding does."""

import warnings
from dataclasses import replace

import pytest
import torch

import treesearch as ts
from tests.support.conditional import cond_of, conditional
from tests.support.conditional import draws as drawn
from tests.support.flows import THREE, Around, GaussianFlow, between, draws, law_of, log_snr
from treesearch.backends.base import Guided, shift_mean
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.roots import Regional, Rooted
from treesearch.backends.roots.bdia import Bdia, inverted, undo
from treesearch.testing import check_kernel

F64 = torch.float64
N, T = 4, 50
Z = draws(N, 1, 3)


def flow(eta=0.0, steps=T, grid=between):
    return GaussianFlow(grid(steps), THREE, eta=eta)


def noises(steps=T, seed=7):
    chance = torch.Generator().manual_seed(seed)
    return {t: torch.randn(N, 3, generator=chance, dtype=F64) for t in range(1, steps + 1)}


def walk(kernel, x, cond=None, noise=None, since=None, down_to=0):
    """States at a level below, by the kernel's steps."""
    for t in range(since or kernel.num_steps, down_to, -1):
        law = kernel.transition(x, torch.full((len(x),), t), cond)
        x = law.mean if noise is None else law.sample(noise[t][:, None])
    return x


def test_the_steps_are_the_published_ones():
    schedule = log_snr(6)
    kernel, x = Bdia(flow(steps=6, grid=log_snr), gamma=0.7), [draws(N, 3)]

    def to(x_t, t, u):
        alpha, sigma = schedule.alpha, schedule.sigma
        end = THREE.endpoint(x_t, alpha[t], sigma[t])
        return alpha[u] * end + sigma[u] * (x_t - alpha[t] * end) / sigma[t]

    x.append(to(x[0], 6, 5))
    for t in range(5, 0, -1):
        x.append(to(x[-1], t, t - 1) + 0.7 * (x[-2] - to(x[-1], t, t + 1)))
    pair = kernel.prior(x[0][:, None])
    for s, want in zip(range(6, 0, -1), x[1:], strict=True):
        pair = kernel.transition(pair, torch.full((N,), s)).mean
        torch.testing.assert_close(pair[:, 0], want, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(pair[:, 1], x[6 - s], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("grid", [between, log_snr], ids=["training steps", "log SNR"])
def test_both_round_trips_are_exact(gamma, grid):
    """50 steps in float64: 3.6e-15 at γ = 1 and 1.4e-13 at .9, on one machine."""
    kernel = Bdia(flow(grid=grid), gamma)
    begun = kernel.prior(Z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf = walk(kernel, begun)
        assert (undo(kernel, leaf, to=T) - begun).abs().max() < 2e-13
        path = inverted(kernel, draws(N, 3, seed=3))
    assert path.shape == (T + 1, N, 2, 3)
    assert (walk(kernel, path[-1]) - path[0]).abs().max() < 1e-13
    assert torch.equal(path[0, :, 0], draws(N, 3, seed=3))
    assert torch.equal(path[:-2, :, 1], path[1:-1, :, 0])


def test_from_pure_noise_too():
    """Of a flow, whose α_T is 0."""
    schedule = replace(Schedule.flow(torch.linspace(0, 1, T + 1)), prediction="sample")
    kernel = Bdia(GaussianFlow(schedule, THREE))
    begun = kernel.prior(Z)
    assert (undo(kernel, walk(kernel, begun), to=T) - begun).abs().max() < 1e-13


def test_a_leaf_of_a_branched_walk_finds_every_ancestor():
    """Two children of one state, which nobody kept: from either leaf back to it, and on to where its chain began."""
    kernel, noise, others = Bdia(flow(eta=1.0), 1.0), noises(), noises(seed=8)
    begun = kernel.prior(Z)
    parent = walk(kernel, begun, noise=noise, down_to=20)
    for below in (noise, others):
        leaf = walk(kernel, parent, noise=below, since=20)
        found = undo(kernel, leaf, to=20, noise=below)
        assert (found - parent).abs().max() < 1e-11
        assert (undo(kernel, found, at=20, to=T, noise=noise) - begun).abs().max() < 1e-11
    assert (
        walk(kernel, parent, noise=noise, since=20) - walk(kernel, parent, noise=others, since=20)
    ).abs().max() > 0.1


def test_children_under_other_prompts_find_their_parent():
    """Without noise a tree branches by what it is told."""
    kernel = Bdia(conditional(steps=20, scale=3.0), double=True)
    left, right = (cond_of(kernel, [p] * N) for p in ("left", "right"))
    parent = walk(kernel, kernel.prior(torch.randn(N, 1, 2)), left, down_to=8)
    leaves = [walk(kernel, parent, cond, since=8) for cond in (left, right)]
    assert (leaves[0] - leaves[1]).abs().max() > 0.1
    for leaf, cond in zip(leaves, (left, right), strict=True):
        assert (undo(kernel, leaf, to=8, cond=cond) - parent).abs().max() < 1e-11


def test_noise_inside_a_mask_changes_no_bit_outside():
    mask = torch.tensor([True, False, False])
    still, kernel = Bdia(flow()), Bdia(Regional(flow(), mask, eta=0.4, levels=(1, 30)))
    path, noise = inverted(still, draws(N, 3, seed=3)), noises()
    leaf = walk(kernel, path[30], noise=noise, since=30)
    assert torch.equal(leaf[:, :, 1:], walk(still, path[30], since=30)[:, :, 1:])
    assert (leaf[:, 0, 0] - path[0, :, 0, 0]).abs().min() > 1e-3
    assert (undo(kernel, leaf, to=30, noise=noise) - path[30]).abs().max() < 1e-12


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_under_noise_the_law_is_nearer_than_ddim_s(gamma):
    """Of Gaussian data the chain's own, in closed form; both converge, as the steps shrink."""
    want, miss = THREE.eigenvalues, {}
    for steps in (25, 100):
        for kernel in (flow(1.0, steps), Bdia(flow(1.0, steps), gamma)):
            size, around = torch.Size(kernel.state_shape).numel(), torch.full((1, *kernel.state_shape), 0.3, dtype=F64)
            cov = torch.zeros(size, size, dtype=F64)
            cov[:3, :3] = torch.diag(kernel.chain.schedule.alpha[-1] ** 2 * want + kernel.chain.schedule.sigma[-1] ** 2)
            found = law_of(kernel, torch.zeros(size, dtype=F64), cov, at=lambda t, around=around: around)[1]
            own = kernel.chain.schedule.alpha[0] ** 2 * want + kernel.chain.schedule.sigma[0] ** 2
            miss[type(kernel).__name__, steps] = (found.diagonal()[:2] / own[:2] - 1).abs().max()
    assert miss["Bdia", 25] < miss["GaussianFlow", 25]
    assert miss["Bdia", 100] < 0.5 * miss["Bdia", 25]


def test_at_a_small_gamma_rounding_drowns_the_state_and_it_says_so():
    kernel = Bdia(flow(), 0.5)
    begun = kernel.prior(Z)
    leaf = walk(kernel, begun)
    assert leaf.abs().max() < 10
    with pytest.warns(
        UserWarning, match=r"undoing 50 steps at gamma=0.5 multiplies rounding by e\^35, of which float64"
    ):
        found = undo(kernel, leaf, to=T)
    assert (found - begun).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="use a larger gamma"):
        inverted(kernel, leaf[:, 0])


@pytest.mark.parametrize(("gamma", "double", "said"), [(0.7, False, True), (0.9, False, False), (0.7, True, False)])
def test_the_warning_is_of_the_precision_of_pairs(gamma, double, said):
    kernel = Bdia(conditional(), gamma, double)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        inverted(kernel, drawn(["left"]), cond=cond_of(kernel, ["left"]))
    assert bool(found) == said
    assert all("float32 bears e^14" in str(w.message) for w in found)


def test_pairs_in_float64_around_a_network_in_float32():
    prompts = ["left", "right", "left", "right"]
    errors = []
    for double in (False, True):
        kernel = Bdia(conditional(), double=double)
        cond = cond_of(kernel, prompts)
        begun = kernel.prior(torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(2)))
        errors.append(float((undo(kernel, walk(kernel, begun, cond), to=T, cond=cond) - begun).abs().max()))
    assert errors[1] < 1e-12 < errors[0]


def test_a_picture_s_pairs_are_a_root():
    kernel, prompts = Bdia(conditional(), double=True), ["left", "right"]
    x0, cond = drawn(prompts), cond_of(kernel, prompts)
    path = inverted(kernel, x0, cond=cond)
    for level in (None, 20):
        rooted = Rooted(kernel, path, level=level)
        x = walk(rooted, rooted.prior(torch.zeros(2, 1, 2), cond | {"pictures": torch.tensor(2)}), cond)
        assert (kernel.decode(x) - x0).abs().max() < 1e-6
        assert (x[:, 0] - path[0, :, 0]).abs().max() < 1e-11


def test_it_keeps_the_laws():
    check_kernel(Bdia(flow(eta=1.0, steps=4)))
    check_kernel(Bdia(conditional(steps=4), 0.9, double=True), ["left", "right"])
    moved = Guided(flow(eta=1.0, steps=4), shift_mean(lambda x, t, law, cond: 0.1 * law.std), "moved")
    check_kernel(Bdia(moved), proposal=True)


def test_a_search_takes_it():
    kernel = Bdia(conditional(steps=3), double=True)
    result = ts.search(kernel, lambda x: -x.norm(dim=1), ts.BestOfN(n=4), prompts=["left"])
    assert (result.samples.shape, result.samples.dtype) == ((4, 2), torch.float32)


KERNEL = Bdia(flow(steps=6))
NOISY = Bdia(flow(eta=1.0, steps=6))
PURE = Bdia(GaussianFlow(replace(Schedule.flow(torch.linspace(0, 1, 7)), prediction="sample"), THREE, eta=1.0))
PAIRS = torch.zeros(N, 2, 3, dtype=F64)
WRONG = {
    "gamma": (lambda: Bdia(flow(), 0.0), ValueError, "gamma is 0.0, expected 0..1 and above 0"),
    "large": (lambda: Bdia(flow(), 1.5), ValueError, "gamma is 1.5"),
    "NaN": (lambda: Bdia(flow(), float("nan")), ValueError, "gamma is nan"),
    "text": (lambda: Bdia(flow(), "1"), ValueError, "gamma is '1'"),
    "no chain": (lambda: Bdia(LinearGaussian()), TypeError, "is no kernel on a backends.chains.diffusion.Chain"),
    "offset": (lambda: Bdia(Around(flow())), TypeError, "chain around an offset"),
    "twice": (lambda: Bdia(KERNEL), TypeError, "is no kernel on a"),
    "renoised": (lambda: Bdia(GaussianFlow(log_snr(4), THREE, eta=1.0, step="renoise")), ValueError, "renoise in full"),
    "other kernel": (lambda: undo(flow(), PAIRS, to=1), TypeError, "GaussianFlow is no Bdia"),
    "other root": (lambda: inverted(Rooted(flow(), draws(51, 1, 3)), PAIRS), TypeError, "Rooted is no Bdia"),
    "points": (lambda: undo(KERNEL, PAIRS[:, 0], to=1), ValueError, r"expected \(n, \*\(2, 3\)\)"),
    "pairs": (lambda: inverted(KERNEL, PAIRS), ValueError, r"expected \(n, \*\(3,\)\)"),
    "up": (lambda: undo(KERNEL, PAIRS, to=7), ValueError, "expected 0 <= at <= to <= T = 6"),
    "down": (lambda: undo(KERNEL, PAIRS, at=3, to=2), ValueError, "levels are at=3, to=2"),
    "no noise": (lambda: undo(NOISY, PAIRS, to=2), ValueError, r"steps from levels \[1\] drew noise: give it"),
    "its shape": (lambda: undo(NOISY, PAIRS, to=2, noise={1: Z}), ValueError, "noise of level 1 has another shape"),
    "noisy": (lambda: inverted(NOISY, PAIRS[:, 0]), ValueError, "invert the kernel at eta=0.0"),
    "fresh": (
        lambda: undo(PURE, PAIRS, to=6, noise=noises(6)),
        ValueError,
        r"before levels \[5\]: all noise was fresh",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
