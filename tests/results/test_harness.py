"""The model that lm-eval is given: likelihoods of a joint law that is known, and texts of a search."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import treesearch as ts
from tests.support import text
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.text.kernel import MaskedTextKernel
from treesearch.backends.text.words import Words
from treesearch.harness import language_model, until

TABLE = text.Table(3, 3)


class Letters:
    """Words of one letter, a to c."""

    filler = None
    chat = False
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 2})

    def plain(self, text):
        return ["abc".index(letter) for letter in text]

    ids = plain

    def behind(self, row, size):
        return self.texts(torch.tensor([row[size:]]))[0]

    def texts(self, rows):
        return ["".join("abc"[token] for token in row) for row in rows.tolist()]


@pytest.fixture
def lm_eval(monkeypatch):
    """The part of lm-eval that a model derives from, as its guide of models describes it."""
    model = ModuleType("lm_eval.api.model")
    model.LM = type("LM", (), {})
    for name, module in (("lm_eval", ModuleType("lm_eval")), ("lm_eval.api", ModuleType("lm_eval.api"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", model)


def kernel(**settings):
    return MaskedTextKernel(TABLE, **({"length": 3, "num_steps": 3, "mask": 3, "words": Letters()} | settings))


def asked(*args):
    return SimpleNamespace(args=args)


def joint(begin):
    """Probability of texts that begin so."""
    rows = Letters().plain(begin)
    return TABLE.data[(TABLE.every[:, : len(rows)] == torch.tensor(rows)).all(1)].sum()


@pytest.mark.usefixtures("lm_eval")
def test_likelihoods_are_those_of_the_joint_law():
    made = language_model(kernel(), batch_size=2)
    pairs = [("a", "bc"), ("ab", "c"), ("", "ca"), ("b", "a")]
    found = made.loglikelihood([asked(*pair) for pair in pairs])
    for (context, after), (log_p, greedy) in zip(pairs, found, strict=True):
        assert log_p == pytest.approx(float((joint(context + after) / joint(context)).log()), abs=1e-6)
        best = [max("abc", key=lambda c, i=i: float(joint(context + after[:i] + c))) for i in range(len(after))]
        assert greedy == (best == list(after))
    assert len({greedy for _, greedy in found}) == 2
    assert made.loglikelihood_rolling([asked("cab")])[0] == pytest.approx(float(joint("cab").log()), abs=1e-6)
    with pytest.raises(ValueError, match="a context of 2 tokens and a continuation of 2"):
        made.loglikelihood([asked("ab", "ca")])


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.5}, {"top_p": 0.3}, {"guidance_scale": 2.0}, {"endpoint": "draw"}]
)
def test_likelihoods_are_the_network_s_whatever_is_drawn(settings):
    pairs = [asked(*pair) for pair in (("a", "bc"), ("ab", "c"), ("", "ca"), ("b", "a"), ("", "cab"))]
    plain, other = language_model(kernel()), language_model(kernel(**settings))
    assert other.loglikelihood(pairs) == plain.loglikelihood(pairs)


@pytest.mark.usefixtures("lm_eval")
def test_documents_are_read_in_windows():
    found = language_model(kernel()).loglikelihood_rolling([asked("cabba"), asked("")])
    assert found[0] == pytest.approx(float((joint("cab") * joint("ba")).log()), abs=1e-6)
    assert found[1] == 0


class Shouting(Letters):
    """A tokenizer that does not give a text back as it was."""

    def texts(self, rows):
        return [text.upper() for text in super().texts(rows)]


@pytest.mark.usefixtures("lm_eval")
def test_a_prompt_that_comes_back_otherwise_is_no_part_of_the_answer():
    found = language_model(kernel(words=Shouting())).generate_until([asked("a", {})])
    assert len(found[0]) == 2


def test_what_is_behind_a_prompt_ends_where_the_text_does():
    words = Words(text.tokenizer(marks=False))
    words.tokenizer.eos_token = "[SEP]"
    prompt, end = words.plain("the film"), words.tokenizer.eos_token_id
    rest = words.plain("was good")
    assert words.behind([*prompt, *rest, end, *prompt], len(prompt)).split() == ["was", "good"]
    assert words.behind([*prompt, end, *rest], len(prompt)) == ""


@pytest.mark.usefixtures("lm_eval")
def test_texts_are_the_best_of_a_search_up_to_where_they_stop():
    def score(samples, prompts=None):
        return torch.tensor([float(sample.count("c")) for sample in samples])

    plain, searched = language_model(kernel()), language_model(kernel(), score, ts.BestOfN(), nfe=90)
    requests = [asked("a", {"until": []}), asked("b", {"until": ["x", "c"]})]
    assert searched.generate_until(requests) == ["cc", ""]
    assert [len(found) for found in plain.generate_until(requests[:1])] == [2]
    assert plain.generate_until([]) == []
    assert until("one. two", ".") == "one"
    assert until("one", ["", "two"]) == "one"


def test_what_it_needs_is_said(lm_eval, monkeypatch):
    with pytest.raises(TypeError, match="language_model is for kernels of masked texts with words, got LinearGaussian"):
        language_model(LinearGaussian())
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.model")
    with pytest.raises(ImportError, match=r"language_model needs lm_eval: pip install 'treesearch\[lm-eval\]'"):
        language_model(kernel())
