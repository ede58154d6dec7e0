"""Directions of h-space: what they move and leave, how they are found, and the file that says whose they are."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import treesearch as ts
from tests.support import tiny
from treesearch import rewards
from treesearch.backends import diffusers, gaussian, mnist
from treesearch.backends.base.capture import captured, changed
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.inversion import invert
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.interventions import Actions, Proposal
from treesearch.backends.interventions.directions import Directions, disentangled, given_rows, part_of
from treesearch.backends.interventions.hspace import hspace
from treesearch.backends.interventions.jacobian import Products, jacobian, products
from treesearch.backends.interventions.rollouts import extremes, inverted, pca, rollouts, supervised
from treesearch.backends.models.mnist import cosine_alphas_cumprod
from treesearch.testing import check_kernel

PART = "unet.mid_block"
KERNEL = mnist(num_steps=5)
X = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 4, 2, 1])
WALKS = rollouts(KERNEL, 12, 0)
TWO = pca(WALKS, 2)
MOVED = hspace(KERNEL, TWO, (-3.0, 3.0))


class Net(nn.Module):
    """Two parts of tanh around an attention of eight tokens, wide enough for directions to differ."""

    def __init__(self):
        super().__init__()
        self.down, self.mid, self.up = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 12)

    def forward(self, x, timestep):
        h = self.mid(torch.tanh(self.down(x))).unflatten(1, (8, 2))
        h = nn.functional.scaled_dot_product_attention(h, h, h).flatten(1)
        return self.up(torch.tanh(h)) + 0.1 * x


def small(prediction="epsilon", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net().double()
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(), 4, prediction=prediction)
    return DiffusionKernel(net, state_shape=(12,), schedule=schedule, clip_sample=1.0)


def explicit(kernel, x, t, mask=1.0):
    """J of a step's ε̂ by h, entry by entry."""

    def eps(h):
        with changed(kernel.network, {"mid": lambda out, *call: h}):
            out = kernel.network(x, kernel.chain.timestep[t])
        if kernel.chain.schedule.prediction == "v":
            alpha, sigma = (kernel.chain.at(name, torch.tensor([t]), x) for name in ("alpha", "sigma"))
            out = sigma * x + alpha * out
        return (mask * out)[0]

    with captured(kernel.network, ("mid",)) as seen:
        kernel.network(x, kernel.chain.timestep[t])
    return torch.autograd.functional.jacobian(eps, seen["mid"])[:, 0]


@pytest.mark.parametrize("kernel", [hspace(KERNEL, TWO, 2.0, "pc1"), Actions(MOVED, (4, 2))])
def test_they_are_kernels(kernel):
    check_kernel(kernel, rows=5)


def test_a_proposal_along_directions_has_weights():
    check_kernel(Actions(Proposal(MOVED), (3,)), proposal=True, rows=5)


def test_rows_that_are_off_or_of_strength_0_are_bit_identical():
    plain = KERNEL.transition(X, T).mean
    chosen = torch.tensor([[0], [1], [0], [4]])
    found = MOVED.transition(X, T, {"choices": chosen}).mean
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    assert not torch.equal(found[1], plain[1])
    assert not torch.equal(found[3], plain[3])
    assert torch.equal(hspace(KERNEL, TWO, 0.0, "pc1").transition(X, T).mean, plain)
    window = hspace(KERNEL, TWO, 2.0, "pc1", levels=(3, 4)).transition(X, T).mean
    assert (window != plain).flatten(1).any(1).tolist() == [False, True, False, False]


def test_a_setting_is_a_direction_of_the_rows_own_level_times_its_strength():
    assert MOVED.intervention.settings == ("pc1 -3", "pc1 3", "pc2 -3", "pc2 3")
    found = MOVED.transition(X, T, {"choices": torch.tensor([[1], [2], [3], [4]])}).mean
    for i, (which, alpha) in enumerate([(0, -3.0), (0, 3.0), (1, -3.0), (1, 3.0)]):
        delta = alpha * TWO.vectors[which, int(T[i]) - 1]
        with changed(KERNEL.network, {PART: lambda h, *call, delta=delta: h + delta}):
            alone = KERNEL.transition(X[i : i + 1], T[i : i + 1])
        assert torch.allclose(found[i], alone.mean[0], atol=1e-5)


def test_between_levels_directions_are_linear_and_beyond_them_constant():
    levels = (2, 4)
    card = replace(TWO.card, levels=levels, sizes=tuple((1.0, 1.0) for _ in range(2)))
    few = Directions(card, TWO.vectors[:, [t - 1 for t in levels]])
    found = few.at(torch.zeros(5, dtype=torch.long), torch.arange(1, 6), torch.zeros(5, 96, 4, 4))
    low, high = few.vectors[0]
    expected = torch.stack([low, low, (low + high) / 2, high, high])
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    assert torch.allclose(found[2], expected[2], atol=1e-6)


def test_principal_components_are_those_of_each_level_with_signs_of_the_step_before():
    walks = replace(WALKS, h=torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(1)) + 3.0)
    found = pca(walks, 2)
    for h, v in zip(walks.h.double(), found.vectors.double().transpose(0, 1), strict=True):
        values, basis = torch.linalg.eigh(torch.cov(h.T))
        assert torch.allclose(v.norm(dim=1), values[-2:].flip(0).sqrt(), rtol=1e-5)
        assert torch.allclose((v @ basis[:, -2:].flip(1)).abs(), values[-2:].flip(0).sqrt().diag(), atol=1e-5)
    assert ((found.vectors[:, 1:] * found.vectors[:, :-1]).sum(2) >= 0).all()
    h = torch.tensor(found.card.sizes)
    assert torch.allclose(h, found.vectors.norm(dim=2), rtol=1e-5)


def test_supervised_directions_are_differences_of_means_in_standard_deviations():
    low, high = extremes(WALKS.x0.mean((1, 2, 3)))
    found = supervised(WALKS, {"ink": (low, high)}).vectors[0].flatten(1).double()
    h = WALKS.h.flatten(2).double()
    n = h[:, high].mean(1) - h[:, low].mean(1)
    along = torch.einsum("lnd,ld->ln", h, n / n.norm(dim=1, keepdim=True)).std(1)
    assert torch.allclose(found, along[:, None] * n / n.norm(dim=1, keepdim=True), atol=1e-5)
    assert (low.sum(), high.sum(), (low & high).sum()) == (3, 3, 0)
    assert WALKS.x0.mean((1, 2, 3))[low].max() < WALKS.x0.mean((1, 2, 3))[high].min()


def test_disentangled_directions_share_nothing_with_the_others():
    scores = {name: WALKS.x0.flatten(1) @ w for name, w in zip("abc", torch.eye(784)[[300, 406, 500]], strict=True)}
    groups = {name: extremes(s) for name, s in scores.items()}
    mixed, apart = (supervised(WALKS, groups, apart=on).vectors.flatten(2).double() for on in (False, True))
    units = mixed / mixed.norm(dim=2, keepdim=True)
    for i, own in enumerate(apart):
        others = units[[j for j in range(3) if j != i]]
        cosines = (own * others).sum(2) / own.norm(dim=1)
        assert cosines.abs().max() < 1e-6  # of float32 vectors
        assert (units[i] * others).sum(2).abs().max() > 1e-2
    n, rows = torch.randn(2, 40, dtype=torch.float64), torch.randn(2, 3, 40, dtype=torch.float64)
    left = disentangled(n, rows)
    assert torch.einsum("ld,lmd->lm", left, rows).abs().max() < 1e-6
    pinv = torch.linalg.pinv(rows) @ rows
    assert torch.allclose(left, n - (pinv @ n[..., None])[..., 0], atol=1e-10)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("masked", [False, True])
def test_directions_of_a_jacobian_are_its_singular_vectors(prediction, masked):
    kernel = small(prediction)
    x = torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.linspace(-0.2, 1, 12).clamp(min=0).double() if masked else None
    j = explicit(kernel, x, 3, 1.0 if mask is None else mask)
    _, sizes, v = torch.linalg.svd(j)
    found = jacobian(kernel, x, 3, 3, mask, part="mid", tolerance=1e-6)
    own = found.vectors[:, 0].double()
    assert torch.allclose(torch.tensor(found.card.sizes)[:, 0].double(), sizes[:3], rtol=1e-4)
    assert torch.linalg.matrix_norm(own - own @ v[:3].T @ v[:3], 2) < 1e-4
    assert torch.allclose((own * v[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert found.card.levels == (3,)


def linear(sizes, rows):
    """Products of a map with singular values."""
    rng = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(30, 30, generator=rng).double()).Q for _ in range(2))
    j = left @ torch.diag(sizes) @ right
    h = torch.zeros(rows, 30).double().requires_grad_()
    y, u = h @ j.T, torch.zeros(rows, 30).double().requires_grad_()
    (pulled,) = torch.autograd.grad(y, h, u, create_graph=True)
    return j, Products(y, h, u, pulled)


def test_directions_have_settled_when_they_turn_by_no_more_than_the_tolerance():
    j, made = linear(0.8 ** torch.arange(30).double(), 6)
    v, _ = made.settled(2, 0.1, 200, 0)
    new = torch.linalg.qr((v @ j.T @ j).T).Q.T
    assert torch.linalg.matrix_norm(v - v @ new.T @ new, 2) < 0.1


class Experts:
    """Two networks, the second for levels 3 and 4."""

    def __init__(self):
        self.each = small(seed=0), small(seed=1)
        self.network = tuple(kernel.network for kernel in self.each)
        self.num_steps, self.state_shape, self.dtype = 4, (12,), torch.float64
        self.chain, self.decode = self.each[0].chain, self.each[0].decode

    def prior(self, noise, cond=None):
        return noise.double()

    def transition(self, x, t, cond=None):
        return self.each[int(t[0]) > 2].transition(x, t, cond)


def test_of_experts_a_part_is_of_its_own_levels():
    kernel, x = Experts(), torch.randn(1, 12, generator=torch.Generator().manual_seed(2)).double()
    few = rollouts(kernel, 3, part="1.mid", levels=(3, 4))
    assert few.h.shape == (2, 3, 16)
    found, alone = jacobian(kernel, x, 3, 2, part="1.mid"), jacobian(kernel.each[1], x, 3, 2, part="mid")
    assert torch.equal(found.vectors, alone.vectors)
    with pytest.raises(ValueError, match=r"not called at t = 2, where another expert is"):
        rollouts(kernel, 3, part="1.mid")
    with pytest.raises(ValueError, match=r"not called at t = 3, where another expert is"):
        jacobian(kernel, x, 3, 2, part="0.mid")


def test_products_of_a_jacobian_are_those_of_differences_and_of_each_other():
    x, t = X[:1].clone(), 3
    rng = torch.Generator().manual_seed(3)
    made = products(KERNEL, x, t, part="mid_block", rows=2)
    w, u = torch.randn(2, 1536, generator=rng), torch.randn(made.y.shape, generator=rng)
    jw = made.jw(w)
    assert torch.allclose((jw * u).sum(1), (w * made.jtu(u)).sum(1), rtol=1e-3, atol=1e-4)
    step = 1e-2
    for row, along in zip(w.reshape(2, 96, 4, 4), jw, strict=True):
        ends = []
        for sign in (1, -1):
            with changed(KERNEL.network, {PART: lambda h, *call, s=sign, row=row: h + s * step * row}):
                ends.append(KERNEL.network(x, KERNEL.chain.timestep[torch.tensor([t])]))
        slope = float(KERNEL.chain.alpha[t]) * (ends[0] - ends[1]).flatten() / (2 * step)  # ε̂ = σ x + α v
        assert float((slope - along).norm() / along.norm()) < 1e-2


def test_rollouts_see_the_calls_of_the_chain_and_inversion_leads_to_what_was_given():
    kernel = mnist(num_steps=5, eta=0.0)
    few = rollouts(kernel, 3, 1, levels=(4, 2))
    assert few.levels == (2, 4)
    again = rollouts(kernel, 3, 1)
    assert torch.equal(few.h, again.h[[1, 3]])
    assert (again.h.shape, again.part) == ((5, 3, 96, 4, 4), PART)
    back = inverted(kernel, few.x0)
    assert torch.equal(back.x0, few.x0)
    path = invert(kernel, few.x0)
    for t in range(1, 6):
        with captured(kernel.network, (PART,)) as seen:
            kernel.transition(path[t], torch.full((3,), t))
        assert torch.equal(back.h[t - 1], seen[PART])
    assert not KERNEL.network.get_submodule(PART)._forward_hooks


def test_a_file_holds_them_and_says_whose_they_are(tmp_path):
    TWO.save(tmp_path / "two.safetensors")
    kernel = hspace(KERNEL, str(tmp_path / "two.safetensors"))
    again = kernel.intervention.directions
    assert again.card == TWO.card
    assert torch.equal(again.vectors, TWO.vectors.half().float())
    assert json.loads(json.dumps(again.card.sizes)) == [list(s) for s in TWO.card.sizes]
    sent = pickle.loads(pickle.dumps(kernel))
    kernel.transition(X, T, {"choices": torch.ones(4, 1, dtype=torch.long)})
    assert sent.fingerprint == kernel.fingerprint is not None
    assert len({hspace(KERNEL, d, a).fingerprint for d in (TWO, again) for a in ((1.0,), (2.0,), (2.0, 1.0))}) == 6


def test_under_guidance_both_blocks_move_and_rows_off_do_not(tmp_path_factory):
    folder = str(tiny.checkpoint("sd", tmp_path_factory.mktemp("tiny")))
    kernel = diffusers(folder, num_steps=3, guidance_scale=3.0)
    cond = kernel.encode(["a"] * 3)
    cond = {k: v[:1].repeat(3, *[1] * (v.ndim - 1)) if torch.is_tensor(v) else v.value for k, v in cond.items()}
    walks = rollouts(kernel, 3, 0, cond=cond)
    found = hspace(kernel, pca(walks, 1), (4.0,))
    x, t = torch.randn(3, *kernel.state_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 2, 1])
    plain = kernel.transition(x, t, cond).mean
    mixed = found.transition(x, t, cond | {"choices": torch.tensor([[1], [0], [1]])}).mean
    delta = 4.0 * found.intervention.directions.vectors[0, [2, 0]]
    with changed(kernel.network, {"mid_block": lambda h, *call: h + delta.repeat(2, 1, 1, 1)}):
        rows = {k: v[[0, 2]] if torch.is_tensor(v) and len(v) == 3 else v for k, v in cond.items()}
        alone = kernel.transition(x[[0, 2]], t[[0, 2]], rows).mean
    assert torch.equal(mixed[1], plain[1])
    assert torch.allclose(mixed[[0, 2]], alone, atol=1e-4)
    assert not torch.allclose(mixed[[0, 2]], plain[[0, 2]], atol=1e-4)
    found = jacobian(kernel, x[:1], 2, 1, cond={k: v[:1] if torch.is_tensor(v) else v for k, v in cond.items()})
    assert found.vectors.shape[0] == 1
    assert found.card.sizes[0][0] > 1e-3  # ε̂ of the prompt moves with rows of the prompt alone


def test_rows_of_the_prompt_are_the_second_block():
    h = torch.arange(6.0)[:, None]
    assert torch.equal(given_rows(h, 3), h[3:])
    assert torch.equal(given_rows(h, 6), h)
    with pytest.raises(ValueError, match="6 rows for 4"):
        given_rows(h, 4)


def test_a_search_over_directions_branches_a_chain_without_noise():
    kernel = Actions(hspace(mnist(num_steps=5, eta=0.0), TWO, (-3.0, 3.0)), (3,))
    result = ts.search(
        kernel,
        rewards.digit(8),
        ts.DiffusionTreeSearch(branch_at=(5, 3), widening_c=1.0, widening_alpha=0.3),
        budget=ts.Budget(nfe=100),
        batch_size=4,
    )
    assert len({round(r, 6) for r in result.rewards.tolist()}) > len(set(result.tree.roots(result.leaves).tolist()))


def wrong_shape():
    card = replace(TWO.card, levels=(3,), sizes=((1.0,), (1.0,)))
    return hspace(KERNEL, Directions(card, TWO.vectors[:, :1, :, :2]), 1.0, "pc1").transition(X, T)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: hspace(gaussian(dim=2), TWO), TypeError, "no network"),
        (lambda: hspace(mnist(num_steps=4), TWO), ValueError, "T = 5, the kernel has T = 4"),
        (lambda: hspace(small(), TWO), ValueError, "has no part 'unet.mid_block'"),
        (lambda: hspace(KERNEL, replace_network("0" * 24)), ValueError, "network with fingerprint 000"),
        (wrong_shape, ValueError, "another size"),
        (lambda: hspace(KERNEL, TWO, (1.0, float("nan"))), ValueError, "finite"),
        (lambda: hspace(KERNEL, TWO, (1.0, 1.0)), ValueError, "twice"),
        (lambda: hspace(KERNEL, TWO, ()), ValueError, "alphas"),
        (lambda: hspace(KERNEL, TWO, "3"), ValueError, "alphas"),
        (lambda: hspace(KERNEL, TWO, only="pc9"), ValueError, "pc1, pc2"),
        (lambda: hspace(KERNEL, TWO, levels=(3, 9)), ValueError, "levels"),
        (lambda: hspace(KERNEL, "nowhere.safetensors"), FileNotFoundError, "nowhere"),
        (lambda: hspace(KERNEL, "ppap.safetensors"), ValueError, "holds no directions"),
        (lambda: hspace(KERNEL, 3), TypeError, "no name of a file"),
        (lambda: rollouts(KERNEL, 1), ValueError, "2 rollouts"),
        (lambda: rollouts(KERNEL, 3, levels=(0,)), ValueError, "1..T = 5"),
        (lambda: rollouts(KERNEL, 3, part="mid_blok"), ValueError, "unet.mid_block"),
        (lambda: part_of(KERNEL, "conv1"), ValueError, "say more of it"),
        (lambda: pca(WALKS, 12), ValueError, r"expected 1\.\.11"),
        (lambda: supervised(WALKS, {"a": (torch.zeros(12, dtype=torch.bool),) * 2}), ValueError, "groups of 'a'"),
        (lambda: extremes(torch.tensor([1.0, float("nan")])), ValueError, "finite numbers"),
        (lambda: extremes(torch.arange(3.0), 0.2), ValueError, "one of 3 rollouts"),
        (lambda: disentangled(torch.ones(4), torch.ones(2, 4)), ValueError, "depend on each other"),
        (lambda: jacobian(KERNEL, X[:2], 3), ValueError, "one state"),
        (lambda: jacobian(KERNEL, X[:1], 9), ValueError, r"1\.\.T = 5"),
        (lambda: jacobian(KERNEL, X[:1] / 0, 3), ValueError, "not finite"),
        (lambda: Directions(replace(TWO.card, levels=()), TWO.vectors[:, :0]), ValueError, "expected ascending"),
        (lambda: jacobian(small(), torch.zeros(1, 12).double(), 3, 9, part="mid"), ValueError, "at most 8"),
        (lambda: jacobian(KERNEL, X[:1], 3, 3, iterations=1), RuntimeError, "not settled in 1"),
        (lambda: Directions(TWO.card, TWO.vectors * float("nan")), ValueError, "not finite"),
        (lambda: Directions(TWO.card, TWO.vectors[:1]), ValueError, "expected .2 directions"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, error, says):
    with pytest.raises(error, match=says):
        make()


def replace_network(name):
    return Directions(replace(TWO.card, network=name), TWO.vectors)


def test_states_that_hold_more_are_refused():
    packed = Actions(MOVED, (3,))
    with pytest.raises(TypeError, match="kernel inside"):
        rollouts(packed, 2)
