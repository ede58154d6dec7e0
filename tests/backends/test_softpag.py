"""Perturbed attention: off to the bit, dense references, heads and rows apart, blurred queries, what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch

import treesearch as ts
from tests.support import tiny
from tests.support.attending import CLASSES, bed
from tests.support.tolerance import float32_tolerance
from treesearch.backends import mnist, nasa, pag, seg, softpag
from treesearch.backends.base.taps import tapped
from treesearch.backends.interventions import Actions, Intervened, Proposal, Rows
from treesearch.backends.interventions.heads import attentions, chosen, told
from treesearch.backends.interventions.seg import SEG, blur, grid, sides_of
from treesearch.backends.interventions.softpag import SoftPAG
from treesearch.testing import check_kernel

PARTS = {
    "mnist": "mid_block",
    "sd": "mid_block.attentions.0",
    "sd3": "transformer_blocks.0",
    "flux": "single_transformer_blocks",
    "wan": "blocks.1.attn1",
}
MNIST = mnist(num_steps=5)


@pytest.fixture(scope="module")
def load(tiny_root):
    kept = {}

    def model(name):
        if name not in kept:
            kept[name] = bed(name, tiny_root)
        return kept[name]

    return model


def weak(kernel, heads, u=1.0, kind="identity"):
    return Intervened(kernel, SoftPAG(heads, u, kind))


def near(found, expected, layers=20):
    """Equal up to the rounding of sums over 64 entries, layer after layer."""
    return torch.allclose(found, expected, rtol=0, atol=float32_tolerance(expected.abs().max().item(), 64, layers))


def joint_text(model, name):
    """Tokens of the text that attend with the image's."""
    return model.cond["prompt_embeds"].shape[1] if name in ("sd3", "flux") else 0


def rows(n):
    return Rows(torch.ones(n, dtype=torch.long), torch.ones(n, dtype=torch.long), torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize("name", PARTS)
def test_off_is_the_kernel_to_the_bit(load, name):
    model = load(name)
    plain = model.mean(model.kernel)
    assert torch.equal(model.mean(weak(model.kernel, {PARTS[name]: "all"}, 0.0)), plain)
    chosen = {**(model.cond or {}), "choices": torch.tensor([[0], [1], [0], [2]])}
    mixed = weak(model.kernel, {PARTS[name]: [0]}, (0.5, 1.0)).transition(model.x, model.t, chosen).mean
    for u, row in ((0.5, 1), (1.0, 3)):
        assert torch.equal(mixed[row], model.mean(weak(model.kernel, {PARTS[name]: [0]}, u))[row])
        assert not torch.equal(mixed[row], plain[row])
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert torch.equal(model.mean(model.kernel), plain)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("u", [0.3, 1.0])
def test_it_is_the_attention_with_that_map(load, name, u):
    """A' = (1 - u) A + u I, made in full: rows of the image alone where a text attends jointly."""
    model, heads = load(name), {PARTS[name]: [1]}
    network = model.kernel.network
    text = joint_text(model, name)

    def dense(attend, q, k, v):
        a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        image = torch.arange(q.shape[2])
        if text:  # before the image, or after it
            image = image[text:] if name == "flux" else image[:-text]
        b = a[:, 1].clone()
        b[:, image] = torch.lerp(a[:, 1, image], torch.eye(k.shape[2])[image], u)
        a[:, 1] = b
        return a @ v

    if name == "sd3":  # its second attention of that block is the image's alone
        heads = {"transformer_blocks.0.attn": [1]}
    with tapped(network, dict.fromkeys(chosen(network, heads), dense)):
        expected = model.mean(model.kernel)
    assert not near(model.mean(model.kernel), expected)
    assert near(model.mean(weak(model.kernel, heads, u)), expected)


def test_on_all_heads_it_is_the_path_of_values():
    """PAG: to_out(to_v(x)) alone, every head of the module."""
    part = MNIST.network.get_submodule("unet.mid_block.attentions.0")
    x = torch.randn(2, 96, 4, 4, generator=torch.Generator().manual_seed(1))
    tokens = part.group_norm(x.flatten(2)).transpose(1, 2)
    expected = part.to_out[0](part.to_v(tokens)).transpose(1, 2).reshape(x.shape) + x
    with SoftPAG({"mid_block": []}).on(MNIST.network, rows(2)):
        found = part(x)
    assert torch.allclose(found, expected / part.rescale_output_factor, rtol=0, atol=1e-6)


def test_blocks_are_those_of_diffusers(load):
    from diffusers.models.attention_processor import JointAttnProcessor2_0, PAGJointAttnProcessor2_0

    model = load("sd3")
    network, name = model.kernel.network, "transformer_blocks.1.attn"
    part = network.get_submodule(name)
    image, text = (torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n)) for n in (16, 5))
    norms = part.norm_q, part.norm_k, part.norm_added_q, part.norm_added_k
    part.norm_q = part.norm_k = part.norm_added_q = part.norm_added_k = None  # that processor has none
    try:
        with SoftPAG({name: "all"}, 1.0, "block").on(network, rows(2)):
            network(model.x[:2], text.repeat(1, 1, 2), torch.randn(2, 48), model.t[:2])
            found = part(image, text)[0]
        part.set_processor(PAGJointAttnProcessor2_0())
        theirs = part(image.repeat(2, 1, 1), text.repeat(2, 1, 1))[0][2:]
    finally:
        part.set_processor(JointAttnProcessor2_0())
        part.norm_q, part.norm_k, part.norm_added_q, part.norm_added_k = norms
    assert near(found, theirs)


def test_blocks_of_one_around_another_are_blocks_of_both(load):
    model, part = load("sd3"), "transformer_blocks.1.attn"
    inner = weak(model.kernel, {part: [0]}, kind="block")
    both = model.mean(weak(model.kernel, {part: [0, 1]}, kind="block"))
    assert near(model.mean(weak(inner, {part: [1]}, kind="block")), both)
    assert not near(model.mean(inner), both)


@pytest.mark.parametrize("name", ["mnist", "sd3"])
def test_half_of_it_moves_half_as_far_and_heads_differ(load, name):
    model = load(name)
    part, plain = {PARTS[name]: [0]}, model.mean(model.kernel)
    half, whole = ((model.mean(weak(model.kernel, part, u)) - plain).norm().item() for u in (0.5, 1.0))
    assert 0.4 < half / whole < 0.6
    assert not torch.equal(model.mean(weak(model.kernel, {PARTS[name]: [1]})), model.mean(weak(model.kernel, part)))


def test_guidance_goes_away_from_it_and_passes_for_a_kernel():
    short = mnist(num_steps=2)
    check_kernel(Actions(softpag(short, {"mid_block": [0, 2]}, (0.5, 1.0), 2.0, levels=(2, 2)), (1,)), rows=4)
    check_kernel(Proposal(seg(short, ["mid_block"])), proposal=True, rows=4)
    whole, layer = softpag(MNIST, {"mid_block": "all"}, 1.0, 3.0), pag(MNIST, "mid_block.attentions.0", scale=3.0)
    x, t = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.tensor([4, 2])
    assert torch.equal(whole.transition(x, t).mean, layer.transition(x, t).mean)


def test_names_of_settings_are_of_sets_and_strengths():
    several = SoftPAG(({"a": [0, 2]}, {"b": []}), (0.5, 1.0))
    assert several.settings == ("a 0 2, u = 0.5", "a 0 2, u = 1", "b all, u = 0.5", "b all, u = 1")
    assert (
        softpag(MNIST, ({"mid_block": [0]}, {"mid_block": [1]})).fingerprint
        != softpag(MNIST, ({"mid_block": [1]}, {"mid_block": [0]})).fingerprint
    )


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_both_blocks_of_guidance_are_perturbed(load, name):
    model = load(name)
    part = next(iter(chosen(model.kernel.network, {PARTS[name]: "all"})))
    with tapped(model.kernel.network, {part: lambda attend, q, k, v: v}):
        expected = model.mean(model.kernel)
    assert torch.equal(model.mean(weak(model.kernel, {part: "all"})), expected)


def test_experts_are_perturbed_each_on_its_rows(load, tiny_root):
    from diffusers import WanPipeline

    from treesearch.backends.pipelines import DiffusersKernel

    plain = load("wan")
    with tiny.seeded():
        torch.manual_seed(7)
        parts = WanPipeline.from_pretrained(tiny.checkpoint("wan", tiny_root)).components
        second = tiny.stirred(type(parts["transformer"])(**parts["transformer"].config))
    settings = {k: v for k, v in CLASSES["wan"].items() if k != "num_steps"}
    kernel = DiffusersKernel(
        WanPipeline(**parts | {"transformer_2": second}, boundary_ratio=0.7), num_steps=5, **settings
    )
    early = kernel.chain.timestep[plain.t] >= 700
    assert 0 < int(early.sum()) < 4
    assert chosen(kernel.network, {"blocks.0.attn1": [1]}) == {"0.blocks.0.attn1": (1,), "1.blocks.0.attn1": (1,)}
    before, both = plain.mean(kernel), plain.mean(weak(kernel, {"blocks.0.attn1": [1]}))
    one = plain.mean(weak(kernel, {"1.blocks.0.attn1": [1]}))
    assert (both != before).flatten(1).any(1).all()
    assert torch.equal(one[early], before[early])
    assert torch.equal(one[~early], both[~early])
    assert torch.equal(both[early], plain.mean(weak(plain.kernel, {"blocks.0.attn1": [1]}))[early])
    assert (plain.mean(nasa(kernel, "a dog", 0.5)) != before).flatten(1).any(1).all()


def test_queries_are_blurred_along_the_image():
    q = torch.randn(2, 3, 2 * 3 * 4, 5, generator=torch.Generator().manual_seed(0))
    found = blur(q, (2, 3, 4), 1.5)
    expected = torch.zeros_like(q)
    for frame in range(2):
        for i in range(3):
            for j in range(4):
                weight = torch.tensor(
                    [[math.exp(-((i - a) ** 2 + (j - b) ** 2) / (2 * 1.5**2)) for b in range(4)] for a in range(3)]
                ).flatten()
                mine = q[:, :, frame * 12 : frame * 12 + 12]
                expected[:, :, frame * 12 + i * 4 + j] = (mine * (weight / weight.sum())[:, None]).sum(2)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(blur(q, (1, 4, 6), math.inf), q.mean(2, keepdim=True).expand_as(q), atol=1e-6)
    assert blur(q, (2, 3, 4), 0) is q
    assert (grid(24, (1, 2, 3)), grid(35, (1, 9, 13)), grid(48, (3, 8, 8))) == ((1, 4, 6), (1, 5, 7), (3, 4, 4))


@pytest.mark.parametrize("name", PARTS)
def test_smoothed_energy_is_that_of_mean_queries(load, name):
    model, part = load(name), PARTS[name]
    network, text = model.kernel.network, joint_text(model, name)

    def mean_query(attend, q, k, v):
        joint = text and q.shape[2] > 16
        image = slice(text if joint and name == "flux" else 0, q.shape[2] - (text if joint and name == "sd3" else 0))
        q = q.clone()
        frames = q[:, :, image].unflatten(2, (3 if name == "wan" else 1, -1))
        q[:, :, image] = frames.mean(3, keepdim=True).expand_as(frames).flatten(2, 3)
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v

    with tapped(network, dict.fromkeys(chosen(network, {part: "all"}), mean_query)):
        expected = model.mean(model.kernel)
    found = seg(model.kernel, part).weak
    assert near(model.mean(found), expected)
    assert not near(model.mean(model.kernel), expected)
    some = Intervened(model.kernel, SEG({part: "all"}, found.intervention.sides, (0.0, math.inf)))
    mixed = {**(model.cond or {}), "choices": torch.tensor([[0], [1], [2], [0]])}
    means = some.transition(model.x, model.t, mixed).mean
    assert torch.equal(means[[0, 1, 3]], model.mean(model.kernel)[[0, 1, 3]])
    assert torch.equal(means[2], model.mean(found)[2])


def test_a_tree_searches_over_heads(tiny_root):
    kernel = ts.backends.diffusers(str(tiny.checkpoint("sd", tiny_root)), num_steps=3, height=16, width=16, eta=0.0)
    heads = ({"mid_block.attentions.0": [0]}, {"mid_block.attentions.0": [1]})
    result = ts.search(
        Actions(softpag(kernel, heads, scale=2.0), (3, 2)),
        ts.rewards.brightness(),
        ts.DiffusionTreeSearch(branch_at=(3, 2), widening_c=1.0, widening_alpha=0.5),
        prompts=["a cat"],
        budget=ts.Budget(nfe=30),
        batch_size=4,
    )
    assert "away from" in result.certificate().base_law
    assert len(set(result.rewards.tolist())) > 1


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: softpag(MNIST, {"mid_blok": [0]}), ValueError, "did you mean .*mid_block.*attentions.0 \\(3\\)"),
        (lambda: softpag(MNIST, {"down_blocks": [0]}), ValueError, "no attention of this kind below it"),
        (lambda: softpag(MNIST, {"attentions": [3]}), ValueError, r"heads 0\.\.2, got \[3\]"),
        (lambda: softpag(MNIST, {"resnets.0": [0]}), ValueError, "end of several names"),
        (lambda: softpag(MNIST, {"mid_block": [-1]}), TypeError, "list of numbers from 0"),
        (lambda: softpag(MNIST, {"mid_block": "some"}), TypeError, "or 'all'"),
        (lambda: softpag(MNIST, {}), TypeError, "expected such as"),
        (lambda: softpag(MNIST, [0, 2]), TypeError, "expected such as"),
        (lambda: softpag(MNIST, ()), TypeError, "expected such as"),
        (lambda: softpag(MNIST, ({"mid_block": [0, 2]}, {"mid_block": [2, 0]})), ValueError, "each once"),
        (lambda: softpag(MNIST, {"mid_block": [0]}, (0.5, 0.5)), ValueError, "each once"),
        (lambda: softpag(MNIST, {"mid_block": [0]}, 1.5), ValueError, r"in \[0, 1\]"),
        (lambda: softpag(MNIST, {"mid_block": [0]}, math.nan), ValueError, r"in \[0, 1\]"),
        (lambda: softpag(MNIST, {"mid_block": [0]}, ()), ValueError, r"in \[0, 1\]"),
        (lambda: softpag(MNIST, {"mid_block": [0]}, kind="whole"), ValueError, "'identity' or 'block'"),
        (lambda: pag(MNIST, 3), TypeError, "names such as"),
        (lambda: seg(MNIST, "mid_block", -1.0), ValueError, "numbers >= 0"),
        (lambda: seg(ts.backends.gaussian(dim=2), "mid_block"), TypeError, "no images"),
        (lambda: softpag(ts.backends.gaussian(dim=2), {"mid_block": [0]}), TypeError, "no network"),
        (lambda: grid(13, (1, 1, 1)), RuntimeError, "does not know where they lie"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_heads_of_a_part_under_several_names_are_joined():
    assert chosen(MNIST.network, {"mid_block": [2], "attentions.0": [0]}) == {"unet.mid_block.attentions.0": (0, 2)}
    assert told({"a": [2, 0, 2], "b": []}) == "a 0 2; b all"


def test_sides_are_frames_height_and_width():
    for shape, family, expected in (
        ((4, 6, 9), None, (1, 6, 9)),
        ((4, 3, 6, 9), None, (3, 6, 9)),
        ((54, 16), SimpleNamespace(latent_size=(6, 9)), (1, 6, 9)),
        ((54, 16), SimpleNamespace(patches=(3, 6, 9)), (3, 6, 9)),
    ):
        assert sides_of(SimpleNamespace(state_shape=shape, family=family)) == expected


def test_attention_modules_are_listed(load):
    assert attentions(MNIST.network) == {"unet.mid_block.attentions.0": 3}
    own, cross = (attentions(load("sd").kernel.network, kinds) for kinds in (("self",), ("cross",)))
    assert len(own) == len(cross) > 0
    assert all(name.endswith("attn1") for name in own)
    assert set(attentions(load("wan").kernel.network)) == {"blocks.0.attn1", "blocks.1.attn1"}
    assert attentions(load("flux").kernel.network, ("joint",)) == {
        "transformer_blocks.0.attn": 2,
        "single_transformer_blocks.0.attn": 2,
    }
