"""Noise inside a mask: DDIM's step outside bit for bit, η √variance inside, and what it goes around and into."""

import math

import pytest
import torch

import treesearch as ts
from tests.support import tiny
from treesearch.backends.base import Guided, describe, shift_mean
from treesearch.backends.chains.diffusion import Chain
from treesearch.backends.chains.inversion import invert
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.exact.gaussian_states import GaussianStates
from treesearch.backends.guidance import TDS
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.backends.roots import Rooted
from treesearch.backends.roots.regional import Regional, regional
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.base import Reward
from treesearch.testing import check_kernel

F64 = torch.float64
SHAPE, T = (1, 2, 3), 4
MASK = torch.tensor([[True, False, True], [False, False, True]]).expand(SHAPE)
TOTAL = Reward(lambda x, _: x.double().flatten(1).sum(1), "total", "state")


def states(eta=0.0):
    spread = torch.eye(6, dtype=F64) * 0.3 + 0.1
    return GaussianStates(torch.full(SHAPE, 0.2, dtype=F64), spread, num_steps=T, eta=eta)


def rows(shape=SHAPE, dtype=F64, steps=T):
    x = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return x, torch.arange(1, steps + 1)


def table(mask, eta, levels, steps):
    """η by level and entry, as a chain takes it."""
    t = torch.arange(steps + 1).view(-1, *(1,) * mask.ndim)
    return eta * mask[None].double() * ((t >= levels[0]) & (t <= levels[1]))


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_step_is_that_of_a_chain_whose_eta_says_so_by_entry(eta):
    x, t = rows()
    law = Regional(states(), MASK, eta=eta, levels=(2, 3)).transition(x, t)
    plain = states().transition(x, t)
    want = Chain(states().chain.schedule, eta=table(MASK, eta, (2, 3), T)).law(x, t, plain.endpoint)
    inside = MASK & ((t >= 2) & (t <= 3)).view(-1, 1, 1, 1)
    assert torch.equal(law.std.expand_as(x), want.std.expand_as(x))
    assert torch.equal(law.std > 0, inside)
    assert torch.equal(law.mean[~inside], plain.mean[~inside])  # DDIM's, bit for bit
    assert (law.mean - want.mean).abs().max() < 8 * torch.finfo(F64).eps
    assert (law.mean - plain.mean)[inside].abs().min() > 1e-4  # less of ε̂


def test_the_noise_inside_is_eta_times_that_of_ancestral_sampling():
    x, t = rows()
    law, ancestral = Regional(states(), MASK, eta=0.4).transition(x, t), states(1.0).transition(x, t)
    assert (law.std - 0.4 * ancestral.std * MASK).abs().max() < 4 * torch.finfo(F64).eps
    kernel = Regional(states(), MASK, eta=0.4, levels=(2, 3))
    assert describe(kernel).stochastic == (True, False, True, True, False)
    assert describe(Regional(states(), MASK, eta=0.0)).stochastic == (True,) + (False,) * T


@pytest.mark.parametrize("name", ["mnist", "sd"])
def test_networks_of_the_house_and_of_pipelines_alike(name, tiny_root):
    """No η anywhere is the kernel bit for bit; inside, the numbers of the chain with a tensor in float32."""
    if name == "mnist":
        plain = mnist_kernel(num_steps=3, eta=0.0)
    else:
        folder = str(tiny.checkpoint("sd", tiny_root))
        plain = ts.backends.diffusers(folder, num_steps=3, eta=0.0, guidance_scale=3.0, device="cpu")
    mask = torch.zeros(plain.state_shape, dtype=torch.bool)
    mask[..., 2:5, 1:4] = True
    x, t = rows(plain.state_shape, torch.float32, 3)
    cond = None if name == "mnist" else {k: getattr(v, "value", v) for k, v in plain.encode(["a cat"] * 3).items()}
    base = plain.transition(x, t, cond)
    off = Regional(plain, mask, eta=0.0).transition(x, t, cond)
    law = Regional(plain, mask, eta=0.4).transition(x, t, cond)
    own, told = plain.chain, plain.chain.timestep[t]
    output = plain.model(x, told) if name == "mnist" else plain.family.predict(x, told, cond)
    tabled = Chain(own.schedule, eta=table(mask, 0.4, (1, 3), 3), clip_sample=own.clip_sample)
    want = tabled.law(x, t, output.detach())
    assert torch.equal(off.mean, base.mean)
    assert not off.std.any()
    assert torch.equal(law.mean[:, ~mask], base.mean[:, ~mask])
    assert torch.equal(law.std.expand_as(x), want.std.expand_as(x))
    assert (law.mean - want.mean).abs().max() <= 16 * torch.finfo(torch.float32).eps * law.mean.abs().max()


def test_it_obeys_the_laws_of_kernels_alone_rooted_clamped_guided_and_in_cycles():
    path = invert(states(), torch.full((1, *SHAPE), 0.5, dtype=F64), iterations=50)
    kernel = Regional(states(), MASK, eta=0.6, levels=(1, 4))
    for one in (kernel, Rooted(kernel, path, level=3), Clamp(kernel, ~MASK, path[:, 0]), Cycle(kernel, low=1, high=3)):
        check_kernel(one, rows=4)
    check_kernel(TDS(kernel, TOTAL), rows=4, proposal=True)


def test_siblings_of_a_rooted_chain_differ_inside_the_mask_alone():
    """One level of noise, at the last step that has any: what was drawn there stays where the mask is."""
    image = torch.full((1, *SHAPE), 0.5, dtype=F64)
    law = Regional(states(), MASK, eta=0.6).transition(image.expand(4, *SHAPE), torch.full((4,), 2))
    drawn = law.sample(torch.randn(4, *SHAPE, dtype=F64))
    differ = (drawn != drawn[:1]).any(0)
    assert torch.equal(differ, MASK)


def test_log_z_under_a_guide_is_that_of_the_chain():
    """E exp(Σ x_0) in closed form, and by FK whose guide has weights inside the mask alone."""
    path = invert(states(), torch.full((1, *SHAPE), 0.5, dtype=F64), iterations=50)
    base = Rooted(Regional(states(), MASK, eta=1.0), path)
    mean, cov = path[-1].flatten(), torch.zeros(6, 6, dtype=F64)
    for t in range(T, 0, -1):
        probe = torch.cat([torch.zeros(1, 6), torch.eye(6)]).to(F64).reshape(7, *SHAPE)
        law = base.transition(probe, torch.full((7,), t))
        steps = law.mean.flatten(1)
        linear = (steps[1:] - steps[0]).T
        mean = linear @ mean + steps[0]
        cov = linear @ cov @ linear.T + torch.diag(law.std[0].flatten() ** 2)
    exact = float(mean.sum() + cov.sum() / 2)
    found = ts.search(TDS(base, TOTAL), TOTAL, ts.FeynmanKac(num_particles=400, lam=1.0), budget=ts.Budget(nfe=1600))
    assert abs(found.tasks[0].log_z - exact) < 4 * math.sqrt(math.expm1(float(cov.sum())) / 400)


def test_masks_from_files_cover_every_entry_that_they_touch(tmp_path):
    from PIL import Image

    picture = Image.new("L", (6, 4))
    picture.putpixel((5, 3), 255)
    picture.save(tmp_path / "mask.png")
    kernel = regional(states(), tmp_path / "mask.png", eta=0.5)
    assert kernel.mask.nonzero().tolist() == [[0, 1, 2]]


class Holding(type(states())):
    def held(self, x, cond):
        return torch.zeros_like(x, dtype=torch.bool)


def image(tmp_path, size, white):
    from PIL import Image

    file = tmp_path / "mask.png"
    Image.new("L", size, 255 if white else 0).save(file)
    return file


WRONG = [
    (lambda p: Regional(LinearGaussian(dim=2, num_steps=3), MASK), TypeError, "no kernel on a .*Chain around 0"),
    (lambda p: Regional(mnist_kernel(2, solver="heun"), MASK), TypeError, "no kernel on"),
    (lambda p: Regional(Holding(torch.zeros(SHAPE, dtype=F64), torch.eye(6, dtype=F64), num_steps=T, eta=0.0), MASK),
     TypeError, "put what holds them around"),
    (lambda p: Regional(states(0.5), MASK), ValueError, "noise of its own.*give it eta=0.0"),
    (lambda p: Regional(states(), MASK[0]), ValueError, r"mask has shape \(2, 3\), expected that of a state, \(1, 2"),
    (lambda p: Regional(states(), torch.zeros(SHAPE)), ValueError, "bool with an entry, got torch.float32"),
    (lambda p: Regional(states(), MASK & False), ValueError, "bool with an entry"),
    (lambda p: Regional(states(), MASK, eta=1.5), ValueError, "eta is 1.5, expected 0..1"),
    (lambda p: Regional(states(), MASK, eta=math.nan), ValueError, "eta is nan"),
    (lambda p: Regional(states(), MASK, levels=(0, 3)), ValueError, "levels are"),
    (lambda p: Regional(states(), MASK, levels=(2, T + 1)), ValueError, "levels are"),
    (lambda p: regional(states(), p / "none.png"), ValueError, "no such file"),
    (lambda p: regional(states(), image(p, (5, 4), True)), ValueError, r"shape \(4, 5\), expected \(2, 3\) or a"),
    (lambda p: regional(states(), image(p, (3, 2), False)), ValueError, "no white pixel"),
    (lambda p: regional(LinearGaussian(dim=2, num_steps=3), image(p, (3, 2), True)), ValueError, "a mask of a picture"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG)
def test_what_cannot_have_regional_noise_is_told_so(tmp_path, call, error, words):
    with pytest.raises(error, match=words):
        call(tmp_path)


def test_a_guide_with_weights_goes_around_it():
    inside = Guided(states(), shift_mean(lambda x, t, base, cond: x))
    x, t = rows()
    with pytest.raises(TypeError, match="put the guide around it"):
        Regional(inside, MASK).transition(x, t)
