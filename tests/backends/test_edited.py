"""Edits of a picture in a pipeline: the source's path without guidance, masks of latents, prompts."""

import numpy as np
import pytest
import torch
from PIL import Image

import treesearch as ts
from tests.support import kernels, tiny
from treesearch.backends import diffusers, edited
from treesearch.backends.chains.inversion import invert, walk
from treesearch.backends.roots.edited import conditioning, kept, reconstruction, state_of

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    there = tmp_path_factory.mktemp("edited")
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[4:9, 4:12] = 0
    Image.fromarray(pixels).save(there / "photo.png")
    Image.fromarray(mask).save(there / "keep.png")
    return there


@pytest.fixture(scope="module")
def kernel(tiny_root):
    return diffusers(tiny.checkpoint("sd", tiny_root), num_steps=4, guidance_scale=6.0, eta=1.0)


def test_the_path_is_that_of_the_source_without_guidance(folder, kernel, tiny_root):
    made = edited(kernel, folder / "photo.png", source="a cat")
    plain = diffusers(tiny.checkpoint("sd", tiny_root), num_steps=4, guidance_scale=1.0)
    x0 = state_of(kernel, folder / "photo.png")[None]
    path = invert(plain, x0, cond=conditioning(plain, "a cat"))
    rows = 1e-6 * (2 * 6.0 - 1) * 4  # of a row alone and in a batch of two, times w and w - 1, over four levels
    assert torch.allclose(made.path, path, rtol=0, atol=rows)
    other = edited(kernel, folder / "photo.png", source="a dog")
    assert (made.path[-1] - other.path[-1]).abs().max() > 1e-3


def test_latents_of_kept_pixels_stay_and_prompts_move_the_rest(folder, kernel):
    made = edited(kernel, folder / "photo.png", source="a cat", keep=folder / "keep.png")
    found = ts.search(made, kernels.total, ts.BestOfN(n=2), budget=ts.Budget(nfe=8), prompts=["a dog"])
    assert found.samples.shape == (2, 3, SIZE, SIZE)
    x, cond = made.prior(torch.zeros(1, *made.state_shape)), conditioning(made, "a dog")
    for t in range(made.num_steps, 0, -1):
        x = made.transition(x, torch.tensor([t]), cond).sample(torch.randn(1, *made.state_shape))
    held = made.kernel.mask
    assert torch.equal(x[:, held], made.path[0][:, held])
    assert (x - made.path[0])[:, ~held].abs().max() > 0.1


@pytest.mark.parametrize("inversion", ["negative_prompt", "null_text"])
def test_an_empty_prompt_of_its_own_brings_the_picture_back_under_guidance(folder, kernel, inversion):
    """Null text may not be worse than where it begins, the pipeline's ∅."""
    x0 = state_of(kernel, folder / "photo.png")

    def missed(how):
        made = edited(kernel, folder / "photo.png", source="a cat", inversion=how)
        back = walk(made.kernel, made.path[-1], made.num_steps, cond=conditioning(made.kernel, "a cat"))
        return float((back[0] - x0).square().mean())

    assert missed(inversion) < missed("ddim")


@pytest.mark.parametrize("control", ["either", "kv", None])
def test_direct_inversion_has_the_picture_beside_the_edit(folder, kernel, control):
    made = edited(
        kernel, folder / "photo.png", source="a cat", keep=folder / "keep.png", inversion="direct", control=control
    )
    found = ts.search(made, kernels.total, ts.BestOfN(n=2), budget=ts.Budget(nfe=8), prompts=["a dog"])
    assert found.cost.nfe == 8
    assert torch.equal(reconstruction(made, "a cat"), kernel.decode(made.path[0])[0])


def test_bdia_brings_the_picture_back_under_guidance(folder, tiny_root):
    still = diffusers(tiny.checkpoint("sd", tiny_root), num_steps=4, guidance_scale=6.0, eta=0.0)
    made = edited(still, folder / "photo.png", source="a cat", inversion="bdia")
    again = reconstruction(made, "a cat")
    assert (again - still.decode(state_of(still, folder / "photo.png")[None])[0]).abs().max() < 1e-3
    with pytest.raises(ValueError, match="pairs"):
        edited(still, folder / "photo.png", keep=folder / "keep.png", source="a cat", inversion="bdia")


def test_a_latent_is_kept_where_all_of_its_pixels_are(folder):
    mask = kept(folder / "keep.png", (4, 8, 8), (SIZE, SIZE))
    want = torch.ones(8, 8, dtype=torch.bool)
    want[2:5, 2:6] = False
    assert torch.equal(mask, want.expand(4, 8, 8))


def test_a_reconstruction_is_decoded_and_nothing_is_kept_in_it(folder, kernel):
    made = edited(kernel, folder / "photo.png", source="a cat", keep=folder / "keep.png")
    again = reconstruction(made, "a cat")
    assert tuple(again.shape) == (3, SIZE, SIZE)
    assert reconstruction(edited(kernel, folder / "photo.png", inversion="noise", source="a cat"), "a cat") is None
