"""Maps of images: edges and silhouettes."""

from __future__ import annotations

import math

import pytest
import torch

from treesearch.rewards import edges, measurement, silhouette
from treesearch.rewards.outlines import outline

STEP = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
STEP[..., 4:] = 1.0


def test_an_edge_is_where_a_step_is():
    seen = edges(1)(STEP)
    want = torch.zeros_like(STEP)
    want[..., 3:5] = 1.0  # both pixels beside it, in every row: the border is no edge
    assert (seen - want).abs().max() < 2e-4
    assert (edges(1)(STEP.mT) - want.mT).abs().max() < 2e-4
    assert (edges(2)(STEP) - 0.5 * (want[..., ::2, ::2] + want[..., 1::2, 1::2])).abs().max() < 2e-4


def test_every_channel_has_its_own_edges():
    both = torch.cat([STEP, STEP.mT], 1)
    assert torch.equal(edges(2)(both), torch.cat([edges(2)(STEP), edges(2)(STEP.mT)], 1))


def test_a_silhouette_is_the_share_that_is_brighter():
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    assert (silhouette(2)(x) - 0.5).abs().max() < 1e-12
    assert (silhouette(4, softness=0.01)(STEP[..., 2:6, 2:6]) - 0.5).abs().max() < 1e-12
    x[:] = 0.7
    assert (silhouette(2, threshold=0.6, softness=0.1)(x) - 1 / (1 + math.exp(-1))).abs().max() < 1e-12


@pytest.mark.parametrize("of", [edges(2), silhouette(2)])
def test_gradients_are_finite_where_nothing_is(of):
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(of(x).sum(), x)
    assert gradient.isfinite().all()


def test_what_is_measured_is_in_the_settings():
    y = torch.zeros(1, 14, 14)
    told = {measurement(of, y, tolerance=0.1, of="sample").settings for of in (edges(2), edges(4), silhouette(2))}
    assert len(told) == 3
    assert measurement(edges(2), y, tolerance=0.1).name == "measurement(edges(2))"
    assert outline("edges(4)") == edges(4)
    assert outline(silhouette(2).name) == silhouette(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edges(0), "size is 0"),
        (lambda: silhouette(2, threshold=2.0), "threshold is 2.0"),
        (lambda: silhouette(2, softness=0.0), "softness is 0.0"),
        (lambda: edges(3)(STEP), "multiples of 3"),
        (lambda: edges(2)(STEP[0]), "expected images"),
        (lambda: outline("edges"), "no map of images"),
        (lambda: outline("faces(2)"), "no map of images"),
        (lambda: outline(silhouette(2, threshold=0.3).name), "no map of images"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
