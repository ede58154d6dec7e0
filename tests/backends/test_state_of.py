"""The state of a picture: the inverse of `decode`, for whatever file a picture came in."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import tiny
from treesearch.backends.base import optional
from treesearch.backends.chains.diffusion import DiffusionKernel
from treesearch.backends.chains.second_order import SecondOrder
from treesearch.backends.interventions import Actions
from treesearch.backends.interventions.softpag import softpag
from treesearch.backends.models.mnist import mnist_kernel
from treesearch.backends.models.shortest_path import shortest_path_kernel
from treesearch.backends.pipelines import DiffusersKernel

LEVELS = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PICTURE = Image.fromarray(LEVELS.numpy())
PIXELS = LEVELS[None] / 255


@pytest.fixture(scope="module")
def mnist():
    return mnist_kernel(num_steps=2)


def turned():
    """The picture as a camera writes that was held on its side, and says so."""
    image = Image.fromarray(np.ascontiguousarray(np.rot90(LEVELS.numpy())))
    image.getexif()[0x0112] = 6  # to be turned clockwise
    return image


@pytest.mark.parametrize(
    "image",
    [PICTURE, PIXELS, PICTURE.convert("RGB"), turned(), PIXELS.double()],
    ids=["grey", "pixels", "colour", "turned", "double"],
)
def test_what_is_decoded_is_the_picture(image, mnist):
    state = mnist.state_of(image)
    assert (state.shape, state.dtype) == ((1, 28, 28), torch.float32)
    assert (mnist.decode(state[None])[0] - PIXELS).abs().max() < 1e-6


def test_a_chain_of_cosines_decodes_the_picture_too():
    kernel = shortest_path_kernel("spd_mnist.safetensors", num_steps=2)
    assert (kernel.decode(kernel.state_of(PICTURE)[None])[0] - PIXELS).abs().max() < 1e-5


def test_states_that_hold_more_begin_without_it(mnist):
    state = SecondOrder(mnist).state_of(PICTURE)
    assert state.shape == (2, 1, 28, 28)
    assert torch.equal(state[0], mnist.state_of(PICTURE))
    assert not state[1].any()


def test_states_with_labels_begin_with_the_first(mnist):
    kernel = Actions(softpag(mnist, {"mid_block": [0, 2]}), levels=(2, 1))
    state = kernel.state_of(PICTURE)
    assert tuple(state.shape) == kernel.state_shape
    assert torch.equal(state[:-1], mnist.state_of(PICTURE))


def test_a_kernel_that_draws_no_pictures_has_none(mnist):
    plain = DiffusionKernel(lambda x, t: x, state_shape=(4,), schedule=mnist.chain.schedule)
    assert optional(plain, "state_of") is None
    assert optional(SecondOrder(plain), "state_of") is None


WRONG = {
    "size": (Image.new("L", (24, 28)), "28 x 24 pixels, expected 28 x 28: resize it"),
    "alpha": (Image.new("RGBA", (28, 28)), "mode RGBA, expected 8-bit grey or RGB without transparency"),
    "deep": (Image.new("I;16", (28, 28)), "mode I;16, expected 8-bit"),
    "bytes": (LEVELS[None], r"torch.uint8 in 0..255, expected floats in 0..1: divide bytes by 255"),
    "range": (2 * PIXELS - 1, "expected floats in 0..1"),
    "NaN": (PIXELS * torch.nan, "expected floats in 0..1"),
    "axes": (PIXELS[0], r"shape \(28, 28\), expected \(1, h, w\)"),
    "colours": (PIXELS.expand(3, -1, -1), r"shape \(3, 28, 28\), expected \(1, h, w\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_pictures_that_are_none(name, mnist):
    image, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        mnist.state_of(image)


def test_a_path_is_no_picture(mnist):
    with pytest.raises(TypeError, match="the image is str, expected a tensor"):
        mnist.state_of("photo.png")


SIDE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["sd", "flux", "dit", "ddim"])
def test_a_pipeline_has_the_state_that_its_image_to_image_begins_at(name, tiny_root):
    kernel = opened(name, tiny_root)
    state = kernel.state_of(SIDE)
    assert tuple(state.shape) == kernel.state_shape
    assert torch.equal(state, kernel.from_image(SIDE, 0.5)._root.state)
    assert torch.equal(kernel.state_of(SIDE[:1]), kernel.state_of(SIDE[:1].expand(3, -1, -1)))


@pytest.mark.parametrize("size", [(17, 16), (16, 19), (32, 32)])
def test_a_pixel_too_many_is_not_cut_off(size, tiny_root):
    """An encoder takes 17 pixels and gives the latents of 16."""
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels, expected 16 x 16: resize it"):
        opened("sd", tiny_root).state_of(torch.rand(3, *size))


def opened(name, root):
    size = {"height": 16, "width": 16} if name == "flux" else {}
    return DiffusersKernel.from_pretrained(str(tiny.checkpoint(name, root)), num_steps=4, device="cpu", **size)
