"""Energies of regions: the map, where features are read, the shift, its weights, and what it goes around and into."""

import math

import pytest
import torch

import treesearch as ts
from tests.support import tiny
from treesearch.backends.base import describe
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.inversion import invert
from treesearch.backends.chains.schedules import Schedule
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.guidance import TDS
from treesearch.backends.guidance.diffeditor import DiffEditor
from treesearch.backends.guidance.regions import Places, Region, Strengths, dragged, moved
from treesearch.backends.models.mnist import cosine_alphas_cumprod, mnist_kernel
from treesearch.backends.roots import Regional, Rooted
from treesearch.backends.wrappers.cycle import Cycle
from treesearch.backends.wrappers.inpainting import Clamp
from treesearch.rewards.base import Reward
from treesearch.testing import check_kernel

F64 = torch.float64
SIZE, T = 8, 5
TOTAL = Reward(lambda x, _: x.double().flatten(1).sum(1), "total", "state")


class Net(torch.nn.Module):
    """v of 8 x 8 pictures, at half of the resolution inside."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.up = torch.nn.Conv2d(6, 5, 3, padding=1)
        self.last = torch.nn.Conv2d(5, 1, 3, padding=1)

    def forward(self, x, timestep):
        h = torch.tanh(self.up(torch.tanh(self.down(x)) * (1 + timestep.view(-1, 1, 1, 1) / 1000)))
        return self.last(torch.nn.functional.interpolate(h, scale_factor=2.0))


def kernel(eta=0.0, dtype=torch.float32, steps=T):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Net().to(dtype)
    schedule = Schedule.variance_preserving(cosine_alphas_cumprod(), steps, prediction="v")
    made = DiffusionKernel(net, state_shape=(1, SIZE, SIZE), schedule=schedule, eta=eta, name="net")
    made.dtype = dtype
    return made


def mask(top=1, left=1, size=3, shape=(SIZE, SIZE)):
    found = torch.zeros(shape, dtype=torch.bool)
    found[top : top + size, left : left + size] = True
    return found


REGIONS = moved(mask(), (0, 3))
INSIDE = (mask() | mask(left=4)).expand(1, SIZE, SIZE)


def path(dtype=torch.float32, n=1):
    images = torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(5), dtype=dtype)[:n]
    return invert(kernel(dtype=dtype), images)


def edited(base=None, of=None, **settings):
    base = Regional(kernel(), INSIDE, eta=0.6) if base is None else base
    settings = {"parts": ("up",), "window": (1, T), "scale": 3.0} | settings
    return DiffEditor(base, path() if of is None else of, settings.pop("regions", REGIONS), **settings)


def rows(n=T, dtype=torch.float32):
    x = torch.randn(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return x, torch.arange(n) % T + 1


def test_a_region_that_moves_grows_or_is_dragged_is_where_the_map_says():
    assert torch.equal(Region(mask(), (2, 3)).target, mask(3, 4))
    assert torch.equal(Region(mask(), size=5 / 3).target, mask(0, 0, 5))
    assert torch.equal(Region(mask(5, 5), (2, 2)).target, mask(7, 7))  # what leaves the picture is gone
    grown = Region(mask(), (1, 0), size=2.0)
    centre = torch.tensor([[3.0, 2.0]], dtype=F64)
    assert torch.equal(grown.source(centre), centre - torch.tensor([[1.0, 0.0]], dtype=F64))
    assert torch.equal(grown.source(centre + 1), centre + torch.tensor([[-0.5, 0.5]], dtype=F64))
    one, other = dragged((SIZE, SIZE), [((2, 2), (4, 5)), ((6, 1), (6, 2))], radius=1)
    assert (one.mask.sum(), one.by, other.by) == (5, (2, 3), (0, 1))
    assert one.target[4, 5]
    assert not one.target[2, 2]


@pytest.mark.parametrize(("shape", "cells"), [((28, 28), 8), ((28, 28), 16), ((8, 8), 8), ((64, 64), 32), ((8, 8), 2)])
def test_features_are_read_where_the_entries_are(shape, cells):
    """Cells that say where their middles are, as a U-Net has them that pads 28 pixels to 32."""
    wide = {(28, 8): 4, (28, 16): 2, (8, 8): 1, (64, 32): 2, (8, 2): 4}[shape[0], cells]
    middles = (torch.arange(cells, dtype=F64) + 0.5) * wide - 0.5 - (cells * wide - shape[0]) / 2
    features = torch.stack(torch.meshgrid(middles, middles, indexing="ij"))[None]
    inside = (torch.arange(shape[0]) >= middles[0]) & (torch.arange(shape[0]) <= middles[-1])
    places = (inside[:, None] & inside).nonzero()
    read = Places(moved(mask(shape=shape), (1, 1)), pasted=False)._read(features, places)
    assert (read[0].T - places).abs().max() < 1e-12 * shape[0]


def test_energies_are_those_of_the_paper_on_features_that_can_be_told():
    """Features that moved as the region does, and four that did not."""
    own = torch.randn(1, 5, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=F64)
    places = Places(REGIONS, pasted=False)
    shifted = own.clone()
    shifted[:, :, 1:4, 4:7] = own[:, :, 1:4, 1:4]
    weights = Strengths(4.0, 6.0, 0.2, 0.8)
    (edit, others), (still, unmoved) = (places.energies([f], [own], [own], weights) for f in (shifted, own))
    assert abs(float(edit) - 4 / 5) < 1e-12  # S = 1 at every place of m'
    assert float(still) > 0.9
    around, here = own[:, :, ~(mask() | mask(left=4))].mean(2), own[:, :, mask()].mean(2)
    alike = (1 + torch.cosine_similarity(here, around)) / 2
    want = 6 / 5 + 0.2 + 0.8 / (1 + 4 * float(alike))
    assert abs(float(others) - want) < 1e-12
    assert torch.equal(others, unmoved)
    alone = places.energies([own], [own], [own], weights._replace(contrast=0.0, inpaint=0.0))[1]
    assert abs(float(alone) - 6 / 5) < 1e-12
    pasted = Places(REGIONS, pasted=True)
    assert not len(pasted.left)
    near = Places(moved(mask(), (0, 1)), pasted=False)  # what is left behind is one column of three
    assert near.left.tolist() == [[1, 1], [2, 1], [3, 1]]
    assert len(near.rest) == SIZE * SIZE - 12
    other = own.flip(1)
    assert abs(float(pasted.energies([own], [own], [own], weights)[1]) - 6 / 5) < 1e-12
    assert float(pasted.energies([own], [own], [other], weights)[0]) != float(still)


def test_the_shift_is_the_energies_gradient_by_the_rule_of_the_paper():
    """-κ α_s σ_t / α_t times central differences of E_edit inside m' and of the others outside."""
    base = kernel(dtype=F64)
    editor = edited(base, path(F64), scale=0.7, weights=False)
    x, t = rows(dtype=F64)
    moves = editor.transition(x, t).mean - base.transition(x, t).mean
    chain, h = base.chain, 1e-5
    for place, which in (((2, 5), 0), ((1, 4), 0), ((2, 2), 1), ((7, 7), 1)):
        step = torch.zeros_like(x)
        step[:, 0, place[0], place[1]] = h
        up, down = (editor.energies(x + sign * step, t)[which] for sign in (1, -1))
        rate = (chain.alpha_s[t] * chain.sigma[t] / chain.alpha[t]).to(F64)
        assert torch.allclose(
            moves[:, 0, place[0], place[1]], -0.7 * rate * (up - down) / (2 * h), rtol=1e-5, atol=1e-9
        )


def test_weights_are_exact_inside_the_mask_and_nothing_moves_outside():
    base = Regional(kernel(), INSIDE, eta=0.6, levels=(2, 4))
    editor = edited(base, max_shift=0.4)
    x, t = rows()
    law, plain = editor.transition(x, t), base.transition(x, t)
    moved_at = law.mean != plain.mean
    assert torch.equal(law.base_mean, plain.mean)
    assert torch.equal(moved_at, (plain.std > 0) & moved_at)
    assert moved_at[2, 0, 1:4, 1:7].all()  # all of the mask, at t = 3
    assert not moved_at[[0, 4]].any()  # no noise at t = 1 and 5
    size = torch.where(plain.std > 0, (law.mean - law.base_mean) / plain.std, 0.0).flatten(1).norm(dim=1)
    assert (size <= 0.4 + 1e-5).all()
    many = law.take(torch.full((4000,), 2))
    drawn = many.sample(torch.randn(4000, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    weights = many.log_weight(drawn).exp()
    assert abs(float(weights.mean()) - 1) < 4 * math.sqrt(math.expm1(0.4**2) / 4000)  # E_q p/q = 1
    assert weights.std() > 0.1
    assert editor.departs is None
    assert editor.proposes_for is base


def test_as_published_it_moves_everywhere_and_says_that_it_departs():
    base = kernel()
    editor = edited(base, weights=False)
    x, t = rows()
    law, plain = editor.transition(x, t), base.transition(x, t)
    assert law.base_mean is None
    assert (law.mean != plain.mean).all()
    assert "as published" in editor.departs
    assert edited(base, weights=False, scale=0.0).departs is None
    assert torch.equal(edited(base, weights=False, scale=0.0).transition(x, t).mean, plain.mean)


def test_the_window_of_the_paper_is_the_first_steps_and_every_second_of_more():
    still = torch.zeros(51, 1, 1, SIZE, SIZE)
    told = DiffEditor(kernel(steps=50), still, REGIONS, parts=("up",), weights=False)
    levels = [t for t, n in enumerate(told.backward_per_nfe) if n]
    assert [50 - t for t in reversed(levels)] == [*range(10), *range(10, 30, 2)]
    assert set(told.backward_per_nfe) == {0, 2}
    assert told.measured.nfe == 20


def test_laws_of_kernels_alone_rooted_in_cycles_and_under_a_clamp():
    base, of = Regional(kernel(), INSIDE, eta=0.6), path()
    check_kernel(edited(base), rows=4, proposal=True)
    check_kernel(edited(Rooted(base, of, level=3), of, window=None), rows=4, proposal=True)
    check_kernel(Rooted(edited(base), of, level=3), rows=4, proposal=True)
    check_kernel(Clamp(edited(base), ~INSIDE, of[:, 0]), rows=4, proposal=True)
    check_kernel(edited(kernel(), weights=False), rows=4)


def test_time_travel_is_a_cycle_once_is_plain_and_again_keeps_the_guidance():
    editor = edited()
    x, t = rows()
    once = Cycle(editor, low=1, high=3, times=0).transition(x, t)
    plain = editor.transition(x, t)
    assert torch.equal(once.mean, plain.mean)
    assert torch.equal(once.base_mean, plain.base_mean)
    again = Cycle(editor, low=1, high=3, times=2)
    assert again.num_steps == T + 4
    up = torch.full((1,), 4)  # the last of a cycle: from x_2 to x_1, and up to x_3
    law, inner = again.transition(x[:1], up), editor.transition(x[:1], torch.tensor([2]))
    scale = float(editor.chain.schedule.alpha[3] / editor.chain.schedule.alpha[1])
    gap = scale * (inner.mean - inner.base_mean)
    assert gap.abs().max() > 1e-3
    assert torch.allclose(law.mean - law.base_mean, gap, rtol=0, atol=1e-5)
    check_kernel(again, rows=4, proposal=True)


def test_each_row_is_edited_by_its_own_picture_and_a_search_pays_for_the_features():
    of = path(n=2)
    both = edited(of=of)
    x, t = rows(4)
    image = torch.tensor([0, 1, 0, 1])
    law = both.transition(x, t, {"task": image})
    alone = [edited(of=of[:, [i]]).transition(x, t) for i in range(2)]
    for row, i in enumerate(image.tolist()):
        assert torch.allclose(law.mean[row], alone[i].mean[row], rtol=0, atol=1e-5)
    assert not torch.allclose(alone[0].mean, alone[1].mean, rtol=0, atol=1e-3)
    pasted = edited(of=of[:, :1], reference=of[:, 1:])  # its region is the other picture's, the rest its own
    got, own, other = (editor.energies(x, t) for editor in (pasted, edited(of=of[:, :1]), edited(of=of[:, 1:])))
    assert torch.allclose(got[0], other[0], rtol=0, atol=1e-5)
    assert not torch.allclose(got[0], own[0], rtol=0, atol=1e-3)
    assert pasted.measured.nfe == 2 * edited(of=of[:, :1]).measured.nfe
    found = ts.search(
        Rooted(both, of), lambda s: s.flatten(1).sum(1), ts.BestOfN(n=2), prompts=["a", "b"], budget=ts.Budget(nfe=20)
    )
    noisy = sum(describe(both).stochastic[1:])
    assert found.tasks[0].diagnostics["measured"] == {"nfe": 2 * noisy}


def test_a_pipeline_under_guidance_is_edited_by_the_features_of_its_prompts_rows(tiny_root):
    """Parts put out two rows an evaluation, ∅ first; the source is the picture's own prompt."""
    folder = str(tiny.checkpoint("sd", tiny_root))
    base = ts.backends.diffusers(folder, num_steps=3, eta=0.0, guidance_scale=3.0, device="cpu")
    cond = {k: getattr(v, "value", v) for k, v in base.encode(["a cat"]).items()}
    of = invert(base, torch.randn(1, *base.state_shape, generator=torch.Generator().manual_seed(0)), cond=cond)
    settings = {"parts": ("up_blocks.0",), "window": (1, 3), "source": ["a cat"], "scale": 10.0}
    inside = Regional(base, torch.ones(base.state_shape, dtype=torch.bool))
    editor = DiffEditor(inside, of, moved(mask(), (0, 3)), **settings)
    x, t = of[2], torch.tensor([2])
    edit, others = editor.energies(x, t, cond)
    law = editor.transition(x, t, cond)
    assert (law.mean != law.base_mean).any()
    places, table = editor._places, editor._table
    own = [table.own[editor.parts[0]][1]]
    assert abs(float(others - places.energies(own, own, own, Strengths())[1])) < 1e-5  # x_t is the source's own
    named = DiffEditor(inside, of, moved(mask(), (0, 3)), **settings | {"source": ["dogs everywhere"]})
    assert abs(float(named.energies(x, t, cond)[0] - edit)) > 1e-6
    with pytest.raises(ValueError, match="needs prompts"):
        DiffEditor(inside, of, moved(mask(), (0, 3)), **settings | {"source": None}).energies(x, t, cond)


def test_on_digits_guided_steps_lower_the_energy_and_the_gradients_regions_spare_the_rest():
    """E_edit below that of the unguided chain at the same levels; outside, less changes than under ∇E_edit alone."""
    base = mnist_kernel(8, eta=0.0)
    start = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    for t in range(8, 0, -1):
        start = base.transition(start, torch.tensor([t])).mean
    of, digit = invert(base, start, iterations=2), start[0, 0] > -0.5
    regions = moved(digit, (0, 3))
    where = (digit | regions[0].target).expand(1, 28, 28)
    change, energy = {}, {}
    for name in ("regional", "everywhere", "none"):
        editor = DiffEditor(base, of, regions, parts=("up_blocks.1",), window=(2, 6), weights=False)
        if name == "everywhere":
            editor._places.target = torch.ones_like(digit)
        x, energy[name] = of[-1], []
        for t in range(8, 0, -1):
            level = torch.tensor([t])
            if 2 <= t <= 6:
                energy[name].append(float(editor.energies(x, level)[0]))
            x = (base if name == "none" else editor).transition(x, level).mean
        change[name] = float((x - start)[0][~where].square().mean())
    assert all(a < b for a, b in zip(energy["regional"][1:], energy["none"][1:], strict=True))
    assert change["regional"] < change["everywhere"]


def test_files_say_what_goes_where(tmp_path):
    from PIL import Image

    for name, box in (("digit", (8, 8, 16, 20)), ("mask", (8, 8, 16, 20)), ("where", (4, 4, 24, 24))):
        made = Image.new("L", (28, 28))
        made.paste(255, box)
        made.save(tmp_path / f"{name}.png")
    base, file, region = mnist_kernel(4, eta=0.0), tmp_path / "digit.png", tmp_path / "mask.png"
    placed = ts.backends.diffeditor(base, file, region, by=(0, 3), window=(1, 4))
    went = placed.regions[0].target
    assert (placed.num_steps, placed.regions[0].by) == (4, (0, 3))
    assert torch.equal(placed.kernel.kernel.mask[0], went | placed.regions[0].mask)
    assert torch.equal(placed.path[0, 0, 0] > 0, placed.regions[0].mask)
    assert torch.equal(placed.prior(torch.zeros(1, 1, 28, 28)), placed.path[-1])
    dragged_ = ts.backends.diffeditor(
        base, file, points=[((8, 8), (6, 8))], window=(1, 4), where=tmp_path / "where.png"
    )
    assert int(dragged_.kernel.kernel.mask.sum()) == 20 * 20
    assert dragged_.regions[0].mask.sum() == 29
    pasted = ts.backends.diffeditor(base, file, region, by=(0, 3), reference=file, weights=False)
    assert torch.equal(pasted.kernel.kernel.mask[0], went)
    assert torch.equal(pasted.reference, pasted.path)
    for settings in ({}, {"mask": region, "points": [((8, 8), (6, 8))]}):
        with pytest.raises(ValueError, match="expected a mask that goes somewhere, or points"):
            ts.backends.diffeditor(base, file, **settings)
    with pytest.raises(TypeError, match="takes no prompts"):
        ts.backends.diffeditor(base, file, region, by=(0, 3), source="a digit")
    Image.new("L", (20, 28)).save(file)
    with pytest.raises(ValueError, match="28 x 28"):
        ts.backends.diffeditor(base, file, region, by=(0, 3))


def test_a_guide_by_a_reward_goes_around_it():
    x, t = rows()
    with pytest.raises(TypeError, match="a guide inside cuts it, put that one around"):
        edited(TDS(Regional(kernel(), INSIDE), TOTAL)).transition(x, t)
    around = TDS(edited(), TOTAL, through_network=False).transition(x, t)
    assert (around.mean != edited().transition(x, t).mean).any()


WRONG = [
    (lambda: edited(LinearGaussian(dim=2, num_steps=3)), TypeError, "no kernel on"),
    (lambda: edited(parts=("upper",)), ValueError, "no part 'upper'"),
    (lambda: edited(of=path()[:3]), ValueError, r"shape \(3, 1, 1, 8, 8\), expected \(6, 1, 1, 8, 8\)"),
    (lambda: edited(of=path()[:, 0]), ValueError, "from `invert`"),
    (lambda: edited(of=path() * math.nan), ValueError, "not finite"),
    (lambda: edited(reference=path(n=2)), ValueError, r"shape \(6, 2, 1, 8, 8\), expected \(6, 1,"),
    (lambda: edited(regions=()), ValueError, "expected regions with masks"),
    (lambda: edited(regions=moved(mask(shape=(9, 8)), (0, 1))), ValueError, r"masks \(8, 8\)"),
    (lambda: edited(scale=-1.0), ValueError, "scale is -1.0"),
    (lambda: edited(strengths=(4.0, math.inf, 0.0, 0.0)), ValueError, "strengths are"),
    (lambda: edited(max_shift=0.0), ValueError, "max_shift is 0.0"),
    (lambda: edited(kernel(), weights=False, max_shift=1.0), ValueError, "max_shift is 1.0"),
    (lambda: edited(window=(0, 3)), ValueError, "levels are"),
    (lambda: edited(kernel()), ValueError, "no step in the window has noise.*weights=False"),
    (lambda: edited(Regional(kernel(), INSIDE, levels=(4, 4)), window=(1, 2)), ValueError, "no step in the window"),
    (lambda: Region(mask().float()), ValueError, "expected .H, W. bool with an entry"),
    (lambda: Region(mask() & False), ValueError, "bool with an entry"),
    (lambda: Region(mask(), (0, math.nan)), ValueError, "by is"),
    (lambda: Region(mask(), (0, 30)), ValueError, "no longer in the picture"),
    (lambda: Region(mask(), size=0), ValueError, "size is 0"),
    (lambda: dragged((8, 8), []), ValueError, "points is empty"),
    (lambda: dragged((8, 8), [((0, 0), (8, 1))]), ValueError, "no pair of points"),
]


@pytest.mark.parametrize(("call", "error", "words"), WRONG)
def test_what_cannot_be_edited_is_told_so(call, error, words):
    with pytest.raises(error, match=words):
        call()
