"""Attention of pivots: words aligned, dense references of maps and of keys and values, shares of steps, places."""

import pytest
import torch

from tests.support import tiny
from tests.support.attending import bed, rows_of
from tests.support.tolerance import float32_tolerance
from treesearch.backends.base.taps import on_rows, tapped
from treesearch.backends.interventions.alignment import Words, alignment, emphasis, words_of
from treesearch.backends.interventions.heads import attentions
from treesearch.backends.interventions.mutual import Mutual
from treesearch.backends.interventions.paired import Pairs, steps_of
from treesearch.backends.interventions.prompt_to_prompt import PromptToPrompt, maps_of
from treesearch.backends.roots import direct

SOURCE, TARGET = "a small cat", "a big cat"  # five and three letters, a token each
T = 5


@pytest.fixture(scope="module")
def load(tiny_root):
    kept = {}

    def model(name):
        if name not in kept:
            kept[name] = bed(name, tiny_root, **({} if name == "mnist" else {"eta": 0.0}))
        return kept[name]

    return model


def near(found, expected, layers=30):
    """Equal up to the rounding of sums over 77 entries, layer after layer."""
    return torch.allclose(
        found, expected, rtol=0, atol=float32_tolerance(7.5 * expected.abs().max().item(), 77, layers)
    )


def prompt(text, start=1):
    """A prompt of one token a letter."""
    words = tuple(text.split())
    return Words(words, tuple(tuple(map(ord, word)) for word in words), start)


# Which token stands for which


def test_words_are_exchanged_one_by_one():
    m = alignment(prompt("ab cd e"), prompt("ab xyz e"), 10, "replace")
    want = torch.zeros(10, 10)
    for i, j in ((0, 0), (1, 1), (2, 2), (5, 6), (6, 7), (7, 8), (8, 9)):  # the mark, "ab", "e", what follows
        want[i, j] = 1
    want[3:5, 3:6] = 1 / 3
    assert torch.equal(m, want)
    assert torch.equal(alignment(prompt("ab cd"), prompt("ab cd"), 8, "replace"), torch.eye(8))
    shorter = alignment(prompt("ab cde"), prompt("ab c"), 8, "replace")
    assert shorter.sum(0).tolist() == [1, 1, 1, 3, 1, 1, 0, 0]  # three tokens on one; nothing is left for the last two


def test_a_prompt_that_says_more_keeps_what_both_have():
    m = alignment(prompt("ab cd"), prompt("ab x cd yz"), 12, "refine")
    assert m.nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 4], [4, 5], *([5 + i, 8 + i] for i in range(4))]
    back = alignment(prompt("ab x cd yz"), prompt("ab cd"), 12, "refine")
    assert back[:8, :5].equal(m.T[:8, :5])
    crossed = alignment(prompt("abc d"), prompt("d abc"), 8, "refine")
    assert crossed.sum() == 1 + 3 + 3  # the mark, "abc" and not "d", what follows


def test_either_is_by_the_number_of_words():
    for target, how in (("ab xyz", "replace"), ("ab x cd", "refine")):
        found, want = (alignment(prompt("ab cd"), prompt(target), 9, each) for each in ("either", how))
        assert torch.equal(found, want)
    assert not torch.equal(*(alignment(prompt("ab cd"), prompt("ab xd"), 9, each) for each in ("either", "refine")))


def test_words_count_more_or_less():
    assert emphasis(prompt("ab cd ab"), 9, {"ab": 2.0, "cd": -1.0}).tolist() == [1, 2, 2, -1, -1, 2, 2, 1, 1]


def test_tokens_are_those_of_the_pipelines(tiny_root):
    found = words_of(tiny.clip_tokenizer(), SOURCE, 77)
    assert (found.start, found.stop, [len(each) for each in found.ids]) == (1, 10, [1, 5, 3])
    t5 = tiny.t5_tokenizer(32)
    found = words_of(t5, SOURCE, 32)
    assert found.start == 0
    assert [i for each in found.ids for i in each] == t5(SOURCE).input_ids[:-1]
    for length, words in ((9, "9 tokens, and the network reads 8"), (10, None)):
        if words is None:
            assert words_of(tiny.clip_tokenizer(), SOURCE, length).stop == length
        else:
            with pytest.raises(ValueError, match=words):
                words_of(tiny.clip_tokenizer(), SOURCE, length)


def test_a_prompt_that_is_not_its_words_is_refused():
    class Backwards:
        """Reads a whole prompt from its end."""

        def __call__(self, text, **settings):
            return type("", (), {"input_ids": [ord(letter) for letter in reversed(text.replace(" ", ""))]})

    with pytest.raises(ValueError, match="are not those of its words"):
        words_of(Backwards(), "ab cd", 9)


# What the network makes of it


def evaluated(model, control, source=SOURCE, target=TARGET, t=(5, 4, 2, 1)):
    """Means of four rows beside four pivots of a path, and the path."""
    path = torch.randn(T + 1, 1, *model.kernel.state_shape, generator=torch.Generator().manual_seed(2))
    wrapped = direct_of(model.kernel, path, source, control)
    cond = (rows_of(wrapped, (target,)) if source else {}) | {"task": torch.zeros(4, dtype=torch.long)}
    return wrapped.transition(model.x, torch.tensor(t), cond).mean, path


def direct_of(kernel, path, source, control):
    wrapped = direct(kernel, path, source, None)
    return type(wrapped)(kernel, path, source, control=control)


def dense(model, path, taps, source=SOURCE, target=TARGET, t=(5, 4, 2, 1)):
    """The same by hand: pivot i beside row i, attention modules changed by `taps`, ∅ and prompts four rows each."""
    kernel, levels = model.kernel, torch.tensor(t)
    both = [rows_of(kernel, (text,)) for text in (source, target)] if source else []
    shared = ("negative_prompt_embeds", "negative_pooled_embeds", "negative_prompt_mask", "text_ids")
    told = {k: both[1][k] if k in shared else torch.cat([each[k] for each in both]) for k in both[0]} if both else None
    with tapped(kernel.network, taps):
        return kernel.transition(torch.cat([path[levels, 0], model.x]), levels.repeat(2), told).mean[4:]


def rows_acted(step_limit, t=(5, 4, 2, 1)):
    return [i for i, level in enumerate(t) if T - level < step_limit]


@pytest.mark.parametrize(("how", "name"), [("replace", "sd"), ("refine", "sd"), ("refine", "wan"), ("replace", "ltx")])
def test_maps_are_those_of_a_dense_reference(load, how, name):
    model = load(name)
    weights = {"big": 1.5}
    found, path = evaluated(model, PromptToPrompt(how, cross=0.8, own=0.5, weights=weights))
    tokenizer = model.kernel.pipe.tokenizer
    length = rows_of(model.kernel, (SOURCE,))["prompt_embeds"].shape[1]
    source, target = (words_of(tokenizer, text, length) for text in (SOURCE, TARGET))
    m, scale, seen = alignment(source, target, length, how), emphasis(target, length, weights), []

    def cross(attend, q, k, v):
        out, maps = attend(q, k, v), attend(q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1))
        seen.append(maps.shape[-1])
        for i in rows_acted(4):
            mine = len(q) - 4 + i
            for j in range(length):
                column = maps[mine - 4] @ m[:, j] if m[:, j].any() else maps[mine, ..., j]
                maps[mine, ..., j] = column * scale[j]
            out[mine] = maps[mine] @ v[mine]
        return out

    def own(attend, q, k, v):
        out = attend(q, k, v)
        for i in rows_acted(2):
            mine = len(q) - 4 + i
            scores = (q[mine - 4] @ k[mine - 4].mT / q.shape[-1] ** 0.5).double().softmax(-1)
            out[mine] = (scores @ v[mine].double()).float()
        return out

    network = model.kernel.network
    taps = dict.fromkeys(attentions(network, ("cross",)), cross) | dict.fromkeys(attentions(network, ("self",)), own)
    expected = dense(model, path, taps)
    assert near(found, expected)
    plain = model.kernel.transition(model.x, torch.tensor((5, 4, 2, 1)), rows_of(model.kernel, (TARGET,))).mean
    assert not near(found[0], plain[0])
    assert near(found[3], plain[3])
    assert set(seen) == {length}


def test_maps_are_the_softmax():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    want = (q.double() @ k.double().mT / 8**0.5).softmax(-1)
    found = maps_of(torch.nn.functional.scaled_dot_product_attention, q, k)
    assert (found - want).abs().max() < 1e-6


def test_self_attention_over_many_tokens_and_rows_of_no_prompt_stay(load):
    model = load("sd")
    few, many = (evaluated(model, PromptToPrompt(cross=0.0, own=1.0, tokens=n))[0] for n in (15, 64))
    plain = model.kernel.transition(model.x, torch.tensor((5, 4, 2, 1)), rows_of(model.kernel, (TARGET,))).mean
    assert near(few, plain)  # 16 tokens and more in each of its modules
    assert not near(many, plain)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan", "mnist"])
@pytest.mark.parametrize("mode", ["replace", "concat"])
def test_keys_and_values_are_those_of_a_dense_reference(load, name, mode):
    model = load(name)
    source = None if name == "mnist" else SOURCE
    found, path = evaluated(model, Mutual(mode, after=0.2, until=0.8), source)
    length = 0 if source is None else rows_of(model.kernel, (SOURCE,))["prompt_embeds"].shape[1]
    acted = (1, 2)  # rows at steps 0, 1, 3, 4: .2 T <= step < .8 T

    def tap(attend, q, k, v):
        joint = name in ("sd3", "flux") and q.shape[2] > 16
        text = range(q.shape[2] - length, q.shape[2]) if name == "sd3" else range(length)
        image = [i for i in range(q.shape[2]) if not joint or i not in text]
        out = attend(q, k, v)
        for block in range(len(q) // 8):
            for i in acted:
                mine, its = 8 * block + 4 + i, 8 * block + i
                kv = [each[mine].clone() for each in (k, v)]
                new = [each[its][:, image] for each in (k, v)]
                if mode == "replace":
                    kv[0][:, image], kv[1][:, image] = new
                else:
                    kv = [torch.cat(two, 1) for two in zip(kv, new, strict=True)]
                scores = (q[mine].double() @ kv[0].double().mT / q.shape[-1] ** 0.5).softmax(-1)
                out[mine] = (scores @ kv[1].double()).float()
        return out

    expected = dense(model, path, dict.fromkeys(attentions(model.kernel.network), tap), source)
    assert near(found, expected)
    plain = model.kernel.transition(
        model.x, torch.tensor((5, 4, 2, 1)), rows_of(model.kernel, (TARGET,)) if source else None
    ).mean
    assert near(found[[0, 3]], plain[[0, 3]])
    assert not any(near(found[i], plain[i]) for i in acted)


@pytest.mark.parametrize(
    "control", [PromptToPrompt(cross=1.0, own=1.0), Mutual(after=0.0), Mutual("concat", after=0.0)]
)
def test_a_rows_own_attention_is_the_identity(load, control):
    """The row is the pivot, and the prompt the source's."""
    model = load("sd")
    path = model.x[None, :1].expand(T + 1, *model.x[:1].shape)
    wrapped = direct_of(model.kernel, path, SOURCE, control)
    cond = rows_of(wrapped, (SOURCE,)) | {"task": torch.zeros(4, dtype=torch.long)}
    x, t = model.x[:1].expand(4, *model.x.shape[1:]), torch.tensor((5, 4, 2, 1))
    assert near(
        wrapped.transition(x, t, cond).mean, model.kernel.transition(x, t, rows_of(model.kernel, (SOURCE,))).mean
    )


def test_parts_are_named(load):
    model = load("sd")
    up = evaluated(model, Mutual(parts="up_blocks", after=0.0))[0]
    every = evaluated(model, Mutual(after=0.0))[0]
    assert not near(up, every)
    with pytest.raises(ValueError, match="no part is called 'nowhere'"):
        evaluated(model, Mutual(parts="nowhere"))


# Where rows are


def test_shares_are_whole_steps():
    assert [steps_of(*each) for each in ((0.5, 5), (0.8, 5), (0.08, 50), (0.29, 100), (1.0, 7))] == [2, 4, 4, 29, 7]


def test_rows_are_found_in_blocks_and_in_parts():
    pairs = Pairs(torch.tensor([0, -1, 1, 0]), 2, torch.tensor([5, 1, 4, 5]), T)
    every = torch.ones(4, dtype=torch.bool)
    at = pairs.places(torch.zeros(12), every)
    assert [each.tolist() for each in at] == [[2, 4, 5, 8, 10, 11], [0, 1, 0, 6, 7, 6], [0, 2, 3] * 2]
    at = pairs.places(torch.zeros(12), torch.tensor([True, True, False, False]), prompted=True)
    assert [each.tolist() for each in at] == [[8], [6], [0]]
    with on_rows(torch.tensor([False, True, False, True, True, False])):  # the second pivot, rows 1 and 2
        at = pairs.places(torch.zeros(6), every)
        assert [each.tolist() for each in at] == [[2, 5], [0, 3], [2, 2]]
    with pytest.raises(RuntimeError, match="called on 7 rows for 6"):
        pairs.places(torch.zeros(7), every)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PromptToPrompt("swap"), "how is 'swap'"),
        (lambda: PromptToPrompt(cross=1.2), "cross is 1.2"),
        (lambda: PromptToPrompt(own=True), "own True"),
        (lambda: PromptToPrompt(tokens=2.5), "tokens is 2.5"),
        (lambda: PromptToPrompt(weights={"big": "x"}), "expected numbers by words"),
        (lambda: Mutual("add"), "mode is 'add'"),
        (lambda: Mutual(after=0.5, until=0.5), "0 <= after < until <= 1"),
        (lambda: Mutual(parts=3), "expected names"),
        (lambda: alignment(prompt("a b"), prompt("a b c"), 9, "replace"), "exchanges words one by one, use 'refine'"),
        (lambda: emphasis(prompt("a b"), 9, {"c": 1.0}), "'c' is no word of 'a b'"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@pytest.mark.parametrize(
    ("name", "words"),
    [("flux", "attend jointly"), ("sd3", "attend jointly"), ("mnist", "has no cross-attention")],
)
def test_networks_without_maps_of_words_are_refused(load, name, words):
    with pytest.raises(ValueError, match=words):
        PromptToPrompt().check(load(name).kernel)
    with pytest.raises(TypeError, match="names no network"):
        Mutual().check(object())
