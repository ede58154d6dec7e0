"""Negative prompts in cross-attention: off to the bit, dense references, rows, concepts, what is refused."""

import math

import pytest
import torch

import treesearch as ts
from tests.support import tiny
from tests.support.attending import CLASSES, bed, rows_of
from tests.support.tolerance import float32_tolerance
from treesearch.backends import mnist, nasa
from treesearch.backends.base.taps import tapped
from treesearch.backends.interventions import Actions, Rows
from treesearch.backends.interventions.heads import attentions
from treesearch.backends.interventions.nasa import NASA, seen
from treesearch.testing import check_kernel

NAMES = ("sd", "wan", "ltx")
NEGATIVE = "a dog"


@pytest.fixture(scope="module")
def load(tiny_root):
    kept = {}

    def model(name):
        if name not in kept:
            kept[name] = bed(name, tiny_root)
        return kept[name]

    return model


def near(found, expected, layers=30):
    """Equal up to the rounding of sums over 64 entries, layer after layer."""
    return torch.allclose(found, expected, rtol=0, atol=float32_tolerance(expected.abs().max().item(), 64, layers))


def keys_and_values(name, kernel, text):
    """K and V (heads, length, width) of one negative text by module, by the weights."""
    network, cond = kernel.network, rows_of(kernel, (text,))
    tokens = cond["prompt_embeds"][:1]
    if name == "wan":
        tokens = network.condition_embedder.text_embedder(tokens)
    if name == "ltx":  # those that its mask lets through
        tokens = network.caption_projection(tokens)[:, cond["prompt_mask"][0].bool()]
    for at in attentions(network, ("cross",)):
        part = network.get_submodule(at)
        k, v = part.to_k(tokens), part.to_v(tokens)
        k = k if getattr(part, "norm_k", None) is None else part.norm_k(k)
        yield at, tuple(each.unflatten(2, (part.heads, -1)).transpose(1, 2)[0] for each in (k, v))


def dense(model, name, combine, text=NEGATIVE):
    """Means with Z made in full in the rows of the prompts."""

    def tap(k_, v_):
        def of(attend, q, k, v):
            z = attend(q, k, v)
            away = torch.softmax(q @ k_.mT / q.shape[-1] ** 0.5, -1) @ v_
            given = torch.arange(len(q)) >= len(q) - 4
            return torch.where(given[:, None, None, None], combine(z, away), z)

        return of

    taps = {at: tap(k, v) for at, (k, v) in keys_and_values(name, model.kernel, text)}
    with tapped(model.kernel.network, taps):
        return model.mean(model.kernel)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_off_to_the_bit_and_the_formula_where_it_is_on(load, name):
    model = load(name)
    plain = model.mean(model.kernel)
    assert torch.equal(model.mean(nasa(model.kernel, NEGATIVE, 0.0)), plain)
    expected = dense(model, name, lambda z, away: z - 0.3 * away)
    found = model.mean(nasa(model.kernel, NEGATIVE, 0.3))
    assert near(found, expected)
    assert not near(plain, expected)
    assert torch.equal(model.mean(model.kernel), plain)


def test_the_prompt_against_itself_is_less_of_it(load):
    model = load("sd")
    cond = rows_of(model.kernel, ("a dog",))
    same = model._replace(cond=cond)
    names = attentions(model.kernel.network, ("cross",))

    def less(attend, q, k, v):
        given = torch.arange(len(q)) >= len(q) - 4
        return attend(q, k, v) * torch.where(given, 0.75, 1.0)[:, None, None, None]

    with tapped(model.kernel.network, dict.fromkeys(names, less)):
        expected = same.mean(model.kernel)
    assert near(same.mean(nasa(model.kernel, "a dog", 0.25)), expected)


def test_normalised_it_is_clipped_and_blended(load):
    """NAG, of a token over all heads; τ where it clips some tokens and not others."""
    model, clipped = load("sd"), []

    def combine(z, away):
        guided = (z + 3.0 * (z - away)).transpose(1, 2).flatten(2)
        flat = z.transpose(1, 2).flatten(2)
        ratio = guided.norm(p=1, dim=-1, keepdim=True) / flat.norm(p=1, dim=-1, keepdim=True)
        clipped.append((ratio > 1.5).float().mean().item())
        new = 0.4 * guided * torch.minimum(ratio, torch.tensor(1.5)) / ratio + 0.6 * flat
        return new.unflatten(2, (z.shape[1], -1)).transpose(1, 2)

    expected = dense(model, "sd", combine)
    assert 0 < sum(clipped) / len(clipped) < 1
    kernel = nasa(model.kernel, NEGATIVE, 3.0, normalised=True, tau=1.5, blend=0.4)
    assert near(model.mean(kernel), expected)
    assert torch.equal(model.mean(nasa(model.kernel, NEGATIVE, 0.0, normalised=True)), model.mean(model.kernel))


def test_concepts_and_strengths_are_of_rows(load):
    model = load("sd")
    several = nasa(model.kernel, ("a dog", "snow"), (0.1, 0.4), levels=(2, 5))
    assert several.choices == (("not a dog, α = 0.1", "not a dog, α = 0.4", "not snow, α = 0.1", "not snow, α = 0.4"),)
    chosen = torch.tensor([[2], [0], [3], [4]])
    found = several.transition(model.x, model.t, model.cond | {"choices": chosen}).mean
    plain = model.mean(model.kernel)
    assert torch.equal(found[[1, 3]], plain[[1, 3]])  # off, and outside the window
    assert near(found[0], model.mean(nasa(model.kernel, "a dog", 0.4))[0])
    assert near(found[2], model.mean(nasa(model.kernel, "snow", 0.1))[2])
    assert not near(found[2], found[0])


def test_one_around_another_subtracts_both(load):
    model = load("sd")
    two = [dict(keys_and_values("sd", model.kernel, text)) for text in ("a dog", "snow")]

    def tap(at):
        def of(attend, q, k, v):
            z = out = attend(q, k, v)
            for kv, alpha in zip(two, (0.3, 0.2), strict=True):
                out = out - alpha * (torch.softmax(q @ kv[at][0].mT / q.shape[-1] ** 0.5, -1) @ kv[at][1])
            return torch.where((torch.arange(len(q)) >= len(q) - 4)[:, None, None, None], out, z)

        return of

    with tapped(model.kernel.network, {at: tap(at) for at in two[0]}):
        expected = model.mean(model.kernel)
    assert near(model.mean(nasa(nasa(model.kernel, "a dog", 0.3), "snow", 0.2)), expected)


def test_it_is_a_kernel_and_its_concepts_are_actions(tiny_root):
    kernel = ts.backends.diffusers(str(tiny.checkpoint("sd", tiny_root)), num_steps=2, height=16, width=16)
    check_kernel(nasa(kernel, "a dog"), prompts=["a cat", ""], rows=4)
    several = nasa(kernel, ("a dog", "snow"), 0.4)
    result = ts.search(
        Actions(several, (2, 1)),
        ts.rewards.brightness(),
        ts.BestOfN(n=4),
        prompts=["a cat"],
        budget=ts.Budget(nfe=8),
    )
    assert "under NASA" in result.certificate().base_law
    nag = [nasa(kernel, "a dog", 0.1, True, *more) for more in ((), (2.0,), (2.5, 0.5))]
    others = [several, nasa(kernel, "a dog"), nasa(kernel, "snow"), *nag]
    assert len({each.fingerprint for each in others}) == 6


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_where_a_text_attends_jointly_it_is_refused_with_the_reason(tiny_root, name):
    kernel = ts.backends.diffusers(str(tiny.checkpoint(name, tiny_root)), **CLASSES[name])
    with pytest.raises(ValueError, match="jointly: keys of a negative text depend on the image"):
        nasa(kernel, NEGATIVE)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"negative": 3}, TypeError, "expected text"),
        ({"negative": ()}, TypeError, "expected text"),
        ({"alpha": -0.1}, ValueError, "finite numbers >= 0"),
        ({"alpha": math.nan}, ValueError, "finite numbers >= 0"),
        ({"alpha": "much"}, ValueError, "finite numbers >= 0"),
        ({"tau": 0.0}, ValueError, "tau > 0"),
        ({"blend": 2.0}, ValueError, "blend in"),
        ({}, ValueError, "no cross-attention"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments, error, says):
    with pytest.raises(error, match=says):
        nasa(mnist(num_steps=2), **{"negative": NEGATIVE} | arguments)


def test_masks_of_networks_of_other_pipelines_are_those_of_the_negative_text():
    """PixArt, no family of ours: two texts of three and five tokens, the negative of two."""
    from diffusers import PixArtTransformer2DModel

    with tiny.seeded():
        network = tiny.stirred(
            PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                cross_attention_dim=16,
                sample_size=4,
                caption_channels=12,
                norm_num_groups=4,
                use_additional_conditions=False,
            )
        ).eval()
    draw = torch.Generator().manual_seed(0)
    x, text, against = (torch.randn(*s, generator=draw) for s in ((2, 4, 4, 4), (2, 6, 12), (1, 6, 12)))
    masks = torch.arange(6) < torch.tensor([[3], [5]]), torch.arange(6)[None] < 2

    def call(x, text, mask):
        more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}
        at = torch.full((len(x),), 500)
        return network(x, text, at, encoder_attention_mask=mask.float(), **more)[0]

    with torch.no_grad():
        with seen(network, 1) as texts:
            call(x[:1], against, masks[1])
        (name,) = texts
        part, shown = network.get_submodule(name), network.caption_projection(against)[:, :2]
        k_, v_ = (of(shown).unflatten(2, (2, -1)).transpose(1, 2) for of in (part.to_k, part.to_v))

        def tap(attend, q, k, v):
            return attend(q, k, v) - 0.5 * (torch.softmax(q @ k_.mT / 8**0.5, -1) @ v_)

        with tapped(network, {name: tap}):
            expected = call(x, text, masks[0])
        one = torch.ones(2, dtype=torch.long)
        with NASA((NEGATIVE,), (0.5,), texts).on(network, Rows(one, one, one.bool())):
            found = call(x, text, masks[0])
    assert near(found, expected)
    assert not near(call(x, text, masks[0]), expected)
