"""Memory in the self-attention of Wan, its encoder and filters, and its retrieval by prompt."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import treesearch as ts
from tests.support import tiny
from treesearch.backends import mnist
from treesearch.backends.base import Shared, fingerprint
from treesearch.backends.interventions import Actions, Intervened, Rows
from treesearch.backends.interventions.memory import Memory
from treesearch.backends.interventions.retrieval import Retrieved, keys_of, memory, pooled
from treesearch.backends.models.memory_encoder import Filter, MemoryEncoder, Plan, curve
from treesearch.backends.models.memory_file import Library
from treesearch.rewards.base import as_reward
from treesearch.testing import check_kernel

RNG = torch.Generator().manual_seed(0)
T = torch.tensor([5, 4, 2, 1])
TOKENS = torch.randn(2, 10, 32, generator=RNG)
PLAN = Plan(clip=(4, 3, 8, 8), width=32, filters=(6, 8), kernels=(3, 3), strides=(1, 1), pool=(1, 2, 2), tokens=3)
CAPTIONS = ("a ball falls", "a car drives off", "snow", "two dogs", "a ball rolls")
CHOSEN = torch.tensor([[0], [1], [2], [0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint("wan_euler", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def kernel(folder):
    """Tiny Wan under classifier-free guidance."""
    return load(folder)


def load(folder, **more):
    settings = {"num_steps": 5, "height": 32, "width": 32, "num_frames": 5} | more
    return ts.backends.diffusers(str(folder), **settings)


@pytest.fixture(scope="module")
def cond(kernel):
    return rows_of(kernel.encode(["a"]))


def rows_of(cond):
    return {n: v.value if isinstance(v, Shared) else v.repeat(4, *[1] * (v.ndim - 1)) for n, v in cond.items()}


@pytest.fixture(scope="module")
def x(kernel):
    return torch.randn(4, *kernel.state_shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def library():
    with tiny.seeded():
        encoder = MemoryEncoder(PLAN).eval().requires_grad_(False)
        return Library(encoder, torch.randn(5, *PLAN.clip), CAPTIONS)


def means(kernel, x, cond, chosen=CHOSEN):
    return kernel.transition(x, T, cond | {"choices": chosen}).mean


# attention


def test_rows_without_memory_stay_to_the_bit_and_others_are_as_alone(kernel, cond, x):
    plain, both = kernel.transition(x, T, cond).mean, Intervened(kernel, Memory(("a", "b"), TOKENS))
    found = means(both, x, cond)
    assert torch.equal(found[[0, 3]], plain[[0, 3]])
    for i in (1, 2):
        alone = Intervened(kernel, Memory(("one",), TOKENS[i - 1 : i])).transition(x, T, cond).mean
        assert torch.equal(found[i], alone[i])
        assert (found[i] - plain[i]).abs().max() > 1e-2
    windowed = means(replace(both, levels=(1, 3)), x, cond)
    assert torch.equal(windowed[[0, 1, 3]], plain[[0, 1, 3]])
    assert torch.equal(windowed[2], found[2])
    none = Intervened(kernel, Memory(("none",), TOKENS[:1, :0])).transition(x, T, cond).mean
    assert torch.equal(none, plain)


def test_memory_has_no_order(kernel, cond, x):
    mixed = TOKENS[:, torch.randperm(10, generator=torch.Generator().manual_seed(2))]
    one, other = (means(Intervened(kernel, Memory(("a", "b"), tokens)), x, cond) for tokens in (TOKENS, mixed))
    assert not torch.equal(one, other)
    assert (one - other).abs().max() < 1e-5


def test_keys_and_values_are_extended_and_that_is_all(kernel, cond, x):
    """Beside a block that takes [x; m] whole: norm, modulation and attention over all, then only the rows of x."""
    network, t, text = kernel.network, torch.tensor([900.0, 300.0]), cond["prompt_embeds"][:2]
    rows = Rows(T[:2], torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool))
    with torch.no_grad():
        with Memory(("a", "b"), TOKENS).on(network, rows):
            found = network(x[:2], t, text, return_dict=False)[0]
        kept = [(block.attn1.forward, block.norm1.forward) for block in network.blocks]
        try:
            for block in network.blocks:
                block.norm1.forward = joined(block.norm1.forward, block)
                block.attn1.forward = cut(block.attn1)
            expected = network(x[:2], t, text, return_dict=False)[0]
        finally:
            for block, (attention, norm) in zip(network.blocks, kept, strict=True):
                block.attn1.forward, block.norm1.forward = attention, norm
    assert (found - expected).abs().max() < 1e-5


def joined(norm, block):
    """The norm of [x; m]: the block then modulates both."""
    return lambda h: norm(torch.cat([h, TOKENS], 1))


def cut(attention):
    """Attention of [x; m], positions on x, without the rows of m."""

    def forward(h, _context, _mask, rotary):
        n = h.shape[1] - TOKENS.shape[1]
        q, k = (attention.norm_q(attention.to_q(h)), attention.norm_k(attention.to_k(h)))
        q, k, v = (part.unflatten(2, (attention.heads, -1)) for part in (q, k, attention.to_v(h)))
        q, k = (torch.cat([turned(part[:, :n], *rotary), part[:, n:]], 1) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2)[:, :n])

    return forward


def turned(part, cos, sin):
    even, odd = part[..., 0::2], part[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)


def test_the_rows_of_no_prompt_have_it_or_not(folder, kernel, cond, x):
    """ε(∅) + w (ε(c) - ε(∅)) with memory in ε(c) alone is that of both blocks where w = 1 leaves ε(c) alone."""
    plain, single = kernel.transition(x, T, cond), load(folder, guidance_scale=1.0)
    w, means_of = kernel.family.guidance_scale, lambda k, both: remembered(k, both).transition(x, T, cond).mean
    alone = means_of(single, True)
    assert torch.equal(alone, means_of(single, False))
    absent = single.transition(x, T, {"prompt_embeds": cond["negative_prompt_embeds"].expand(4, -1, -1)}).mean
    assert torch.allclose(means_of(kernel, False), absent + w * (alone - absent), atol=1e-4)
    assert (means_of(kernel, True) - means_of(kernel, False)).abs().max() > 1e-2
    assert not torch.equal(plain.mean, means_of(kernel, False))


def remembered(kernel, both):
    return Intervened(kernel, Memory(("a",), TOKENS[:1], both))


def test_a_gradient_reaches_the_memory_and_no_weight(kernel, cond, x):
    tokens, network = TOKENS.clone().requires_grad_(), kernel.network.requires_grad_(False)
    rows = Rows(T[:2], torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool))
    with Memory(("a", "b"), tokens).on(network, rows):
        out = network(x[:2], torch.tensor([900.0, 300.0]), cond["prompt_embeds"][:2], return_dict=False)[0]
    out.square().mean().backward()
    assert (tokens.grad.abs().amax((1, 2)) > 0).all()
    assert all(w.grad is None for w in network.parameters())


def test_both_experts_have_it(kernel, folder, cond, x):
    from diffusers import WanPipeline

    parts = load(folder).pipe.components
    with tiny.seeded():
        second = tiny.stirred(type(parts["transformer"]).from_config(parts["transformer"].config))
    pipe = WanPipeline(**parts | {"transformer_2": second}, boundary_ratio=0.7)
    experts = ts.backends.diffusers.__self__(pipe, num_steps=5, height=32, width=32, num_frames=5)
    plain, both = experts.transition(x, T, cond).mean, Intervened(experts, Memory(("a", "b"), TOKENS))
    chosen = torch.tensor([[1], [0], [2], [1]])
    found = means(both, x, cond, chosen)
    early = experts.chain.timestep[T] >= experts.family.boundary
    assert early.any()
    assert not early.all()
    assert (found != plain).flatten(1).any(1).tolist() == [True, False, True, True]
    for i in (0, 2, 3):  # each row alone meets one expert
        one = both.transition(x[i : i + 1], T[i : i + 1], row(cond, i) | {"choices": chosen[i : i + 1]}).mean
        assert torch.allclose(one[0], found[i], atol=1e-5)


def row(cond, i):
    return {name: v[i : i + 1] if len(v) == 4 else v for name, v in cond.items()}


# encoder


def test_filters_are_what_they_are_called():
    size = (6, 8, 8)
    high, low = (curve(size, 5, high=h) for h in (True, False))
    assert high.shape == low.shape == (5, 6, 8, 5)
    middle_high, middle_low = high[2], low[2]  # a = 1, b = 0
    assert middle_high[0, 0, 0] == pytest.approx(0.2)
    assert middle_high[3, 4, 4] == pytest.approx(1.0)  # the fastest
    assert middle_low[0, 0, 0] == pytest.approx(1.2)
    assert middle_low[3, 4, 4] == pytest.approx(0.4)
    assert torch.equal(middle_high[1], middle_high[5])  # frequencies 1 and -1
    index = curve(size, 5, high=True, frequencies="index")[2]
    assert index[5, 7, 4] == pytest.approx(1.0)  # the last index, of frequency -1
    assert index[1, 0, 0] < index[5, 0, 0]


def test_a_filter_passes_its_band():
    plan, x = replace(PLAN, dropout=0.0), torch.randn(2, 4, 6, 8, 8, generator=torch.Generator().manual_seed(3))
    high, low = (Filter((6, 8, 8), 4, plan, high=h).filtered(x) for h in (True, False))
    fast = curve((6, 8, 8), 3, high=True)[1] > 0.75
    share = lambda y: float(spectrum(y)[..., fast].sum() / spectrum(y).sum())  # noqa: E731
    assert share(low) < share(x) < share(high)
    assert not torch.allclose(high + low, x, atol=0.1)


def spectrum(x):
    return torch.fft.rfftn(x, dim=(2, 3, 4)).abs().square()


def test_an_encoder_gives_two_streams_of_tokens(library):
    clips = library.clips[:4].unflatten(0, (2, 2))
    tokens = library.encoder(clips)
    assert tokens.shape == (2, 2 * 2 * PLAN.tokens, PLAN.width)
    assert torch.allclose(library.encoder(clips[:1]), tokens[:1], atol=1e-5)
    swapped = library.encoder(clips.flip(1)).unflatten(1, (2, 2, 3)).flip(2).flatten(1, 3)
    assert torch.allclose(swapped, tokens, atol=1e-5)  # clips of a set have no order
    train = MemoryEncoder(PLAN)
    train(clips).square().mean().backward()
    assert all(w.grad is not None for w in train.parameters())
    assert not any("filter" in name for name, _ in train.named_parameters())
    assert Plan(clip=(16, 21, 60, 104), width=1536).stages[-1][1] == (1, 3, 6)  # the published sizes leave a frame


def test_attention_has_normed_queries_and_keys(library):
    attention, x = library.encoder.attention, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4))
    q, k = (F.rms_norm(part(x), (32,), eps=1e-6).unflatten(2, (8, 4)) for part in (attention.q, attention.k))
    weights = (torch.einsum("nahd,nbhd->nhab", q, k) / 2).softmax(-1)
    out = attention.out(torch.einsum("nhab,nbhd->nahd", weights, attention.v(x).unflatten(2, (8, 4))).flatten(2))
    assert torch.allclose(attention(x), out, atol=1e-5)


# files and retrieval


def test_a_library_is_a_file(library, tmp_path, kernel):
    library.save(tmp_path / "clips.safetensors")
    again = Library.load(tmp_path / "clips.safetensors")
    assert again.captions == CAPTIONS
    assert again.encoder.plan == PLAN
    which = torch.tensor([[0, 1], [2, 4]])
    assert torch.allclose(again.memory(which), library.memory(which), atol=1e-2)  # float16
    again.save(tmp_path / "again.safetensors")
    assert torch.equal(Library.load(tmp_path / "again.safetensors").memory(which), again.memory(which))
    assert fingerprint.of(again) == fingerprint.of(Library.load(tmp_path / "clips.safetensors"))
    made = ts.backends.memory(kernel, str(tmp_path / "clips.safetensors"), clips=("snow", "two dogs"))
    assert made.intervention.settings == ("snow", "two dogs")
    assert torch.equal(made.intervention.tokens, again.memory(torch.tensor([[2], [3]])))


def test_prompts_find_their_clips(library, kernel, x):
    found = memory(kernel, library, k=2, sets=2)
    prompts = ["a ball falls", "two dogs", "a bal falls"]
    cond = found.encode(prompts)
    assert cond["memories"].shape == (3, 2, 12, 32)
    plain = kernel.encode(prompts)
    assert torch.equal(cond["prompt_embeds"], plain["prompt_embeds"])
    keys, own = keys_of(kernel, CAPTIONS), keys_of(kernel, prompts)
    order = F.cosine_similarity(own[:, None], keys[None], dim=-1).argsort(1, descending=True)
    assert order[:, 0].tolist()[:2] == [0, 3]  # a prompt that is a caption finds it
    assert torch.allclose(cond["memories"][:, 1], library.memory(order[:, 2:4]), atol=1e-5)
    assert memory(kernel, library, k=1, levels=(2, 3)).levels == (2, 3)
    assert memory(kernel, library, clips=("snow",), levels=(2, 3)).levels == (2, 3)
    with_keys = memory(
        kernel, replace(library, keys=torch.tensor([[1.0], [9.0], [0.1], [3.0], [1.0]]) * keys), k=2, sets=2
    ).encode(prompts)
    assert torch.allclose(with_keys["memories"], cond["memories"], atol=1e-5)
    rows = {n: v.value if isinstance(v, Shared) else v[[0, 1, 2, 0]] for n, v in cond.items()}
    moved = means(found, x, rows, torch.tensor([[0], [1], [2], [2]]))
    assert torch.equal(moved[0], kernel.transition(x, T, rows).mean[0])
    for i, setting in ((1, 1), (2, 2), (3, 2)):
        tokens = rows["memories"][i, setting - 1][None]
        alone = Intervened(kernel, Memory(("one",), tokens)).transition(x, T, rows_without(rows)).mean
        assert torch.equal(moved[i], alone[i])


def rows_without(rows):
    return {name: v for name, v in rows.items() if name != "memories"}


def test_a_key_is_the_mean_of_the_tokens_at_length_1():
    embeds = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]])
    found = pooled({"prompt_embeds": embeds}, "one")
    assert torch.allclose(found, torch.tensor([[3.0 / 10**0.5, 1.0 / 10**0.5], [0.0, 1.0]]))


def test_they_are_kernels_and_which_memory_is_an_action(library, kernel):
    prompts = ["a ball", "dogs"]
    check_kernel(memory(kernel, library, k=2), prompts, rows=4)
    tree = Actions(memory(kernel, library, k=1, sets=3), levels=(3,))
    assert tree.names == ("none", "the nearest", "nearest 2 to 2", "nearest 3 to 3")
    result = ts.search(tree, as_reward(bright), ts.BestOfN(n=4), prompts=prompts[:1], budget=ts.Budget(nfe=20))
    assert "under Memory" in result.certificate().base_law


def bright(videos):
    return videos.mean((1, 2, 3, 4))


def test_a_kernel_of_memory_is_told_by_all_of_it(library, kernel):
    others = [
        memory(kernel, library, k=2),
        memory(kernel, library, k=1),
        memory(kernel, library, k=1, sets=2),
        memory(kernel, replace(library, clips=library.clips + 1), k=2),
        memory(kernel, library, k=2, both=False),
        memory(kernel, library, clips=("snow",)),
        memory(kernel, library, clips=("two dogs",)),
    ]
    found = [each.fingerprint for each in others]
    assert None not in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda k, lib: memory(mnist(num_steps=2), lib), "no blocks of Wan"),
        (lambda k, lib: Intervened(k, Memory(("a",), TOKENS[:1, :, :16])), "16 wide, and the network's tokens 32"),
        (lambda k, lib: memory(k, other_width(lib)), "memory of another model"),
        (lambda k, lib: Memory(("a",), TOKENS), "a setting for each"),
        (lambda k, lib: Memory(()), "name one or more"),
        (lambda k, lib: Intervened(k, Memory(("a", "a"), TOKENS)), "each once"),
        (lambda k, lib: memory(k, lib, k=1, levels=(2, 9)), "levels are"),
        (lambda k, lib: Memory(("a", "b"), TOKENS / 0), "not finite"),
        (lambda k, lib: memory(k, lib, k=3, sets=2), "the library has 5"),
        (lambda k, lib: memory(k, lib, k=0), "the library has 5"),
        (lambda k, lib: memory(k, lib, clips=("snowe",)), "no clip is called 'snowe'"),
        (lambda k, lib: memory(k, lib, clips=("snow", ("snow", "two dogs"))), "as many captions each"),
        (lambda k, lib: memory(k, "mnist.safetensors"), "no library of clips"),
        (lambda k, lib: memory(k, "nowhere.safetensors"), "nowhere"),
        (lambda k, lib: memory(k, replace(lib, keys=torch.ones(5, 3)), k=1).encode(["a"]), "3 wide"),
        (lambda k, lib: Retrieved(Promptless(k), Memory(("a",)), lib, k=1).encode(["a"]), "no embeddings of prompts"),
        (lambda k, lib: memory(k, lib, k=1).transition(torch.zeros(1, *k.state_shape), T[:1]), "encode them"),
        (lambda k, lib: Library(lib.encoder, lib.clips[:2], CAPTIONS), "expected"),
        (lambda k, lib: Library(lib.encoder, lib.clips[:2], ("a", "a")), "one caption"),
        (lambda k, lib: Library(lib.encoder, lib.clips, CAPTIONS, torch.ones(2, 3)), "one a clip"),
        (lambda k, lib: Library(lib.encoder, lib.clips / 0, CAPTIONS), "not finite"),
        (lambda k, lib: lib.encoder(lib.clips[None, ..., :4]), "as the encoder has"),
        (lambda k, lib: replace(PLAN, strides=(8, 4)), "stages leave"),
        (lambda k, lib: replace(PLAN, frequencies="true"), "radial or index"),
        (lambda k, lib: replace(PLAN, heads=5), "heads divide"),
        (lambda k, lib: replace(PLAN, kernels=(3,)), "one length"),
        (lambda k, lib: replace(PLAN, filters=(6, 1.5)), "whole sizes"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(kernel, library, make, says):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=says):
        make(kernel, library)


class Promptless:
    """A kernel of Wan that takes no prompts."""

    def __init__(self, kernel):
        self.network, self.num_steps = kernel.network, kernel.num_steps

    def encode(self, prompts):
        return None


def other_width(library):
    plan = replace(PLAN, width=16)
    return Library(MemoryEncoder(plan), library.clips, CAPTIONS)
