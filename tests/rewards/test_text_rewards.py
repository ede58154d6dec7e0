"""Rewards of texts against their definitions, at tiny size; and which samples they and rewards of images refuse."""

import json
import math
import zlib

import pytest
import torch
import transformers

from tests.support import text
from tests.support.tiny_clip import stirred
from treesearch import rewards
from treesearch.rewards.base import RewardError
from treesearch.rewards.loading import CheckpointError
from treesearch.rewards.text import ngrams as text_ngrams

TEXTS = ["the film was good", "a bad plot", "the", "very very bad"]
IMAGES = torch.zeros(2, 3, 8, 8)
SCHEMA = {
    "title": "record",
    "type": "object",
    "properties": {"name": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["name", "year"],
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return text.causal(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return text.classifier(tmp_path_factory.mktemp("classifier"))


def test_perplexity_is_the_mean_log_probability_of_the_tokens(causal):
    network = transformers.AutoModelForCausalLM.from_pretrained(causal).eval()
    words = transformers.AutoTokenizer.from_pretrained(causal)
    found = rewards.perplexity(causal, batch_size=3)(TEXTS)
    for value, one in zip(found, TEXTS, strict=True):
        ids = torch.tensor([words(one, add_special_tokens=False)["input_ids"]])
        if ids.shape[1] == 1:
            assert value == -math.inf  # nothing before its only token
            continue
        logits = network(input_ids=ids).logits[0, :-1].detach().log_softmax(-1)
        want = logits.gather(-1, ids[0, 1:, None]).mean()
        assert float(value) == pytest.approx(float(want), abs=1e-5)
    assert rewards.perplexity(causal)([""]) == -math.inf


def test_perplexity_begins_with_the_mark_of_a_beginning(tmp_path):
    folder = text.causal(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.bos_token = "[CLS]"
    words.save_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[words.bos_token_id, words.convert_tokens_to_ids("the")]])
    want = network(input_ids=ids).logits[0, 0].detach().log_softmax(-1)[ids[0, 1]]
    assert float(rewards.perplexity(folder)(["the"])) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize("label", ["acceptable", 1, ("unacceptable", "acceptable")])
def test_a_classifier_is_the_log_probability_of_its_labels(classifier, label):
    network = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    words = transformers.AutoTokenizer.from_pretrained(classifier)
    found = rewards.text_classifier(classifier, label, combine="logsumexp", batch_size=2)(TEXTS)
    for value, one in zip(found, TEXTS, strict=True):
        logits = network(**words(one, return_tensors="pt")).logits[0].detach().log_softmax(0)
        want = 0.0 if isinstance(label, tuple) else float(logits[1])
        assert float(value) == pytest.approx(want, abs=1e-5)
    assert len({round(float(v), 4) for v in rewards.acceptability(classifier)(TEXTS)}) > 1


def test_the_named_classifiers_are_the_checkpoint_s_labels(classifier):
    want = rewards.text_classifier(classifier, "acceptable")(TEXTS)
    assert torch.equal(rewards.acceptability(classifier)(TEXTS), want)
    assert torch.equal(rewards.sentiment("acceptable", classifier)(TEXTS), want)
    assert torch.equal(rewards.toxicity(1, classifier)(TEXTS), want)
    for name in ("acceptability", "sentiment", "toxicity", "perplexity"):
        assert getattr(rewards, name).facts.checkpoint
        assert getattr(rewards, name).facts.licence
    with pytest.raises(ValueError, match="did you mean 'acceptable'"):
        rewards.text_classifier(classifier, "aceptable")
    with pytest.raises(CheckpointError, match="there is no folder"):
        rewards.acceptability("./nothing-here")


def test_perplexity_needs_a_causal_model(tmp_path):
    with pytest.raises(CheckpointError, match="is a bert network, which sees both sides"):
        rewards.perplexity(text.bert(tmp_path))


def test_length_counts_or_aims():
    assert rewards.text_length()(TEXTS).tolist() == [4, 3, 1, 3]
    assert rewards.text_length(unit="characters")(TEXTS).tolist() == [len(one) for one in TEXTS]
    assert rewards.text_length(3)(TEXTS).tolist() == [-1, 0, -2, 0]
    with pytest.raises(ValueError, match="unit is 'tokens'"):
        rewards.text_length(unit="tokens")
    with pytest.raises(ValueError, match="target is -1"):
        rewards.text_length(-1)


def test_a_pattern_is_found_or_the_whole_text():
    assert rewards.matches("ba.")(TEXTS).tolist() == [0, 1, 0, 1]
    assert rewards.matches("THE", whole=True, ignore_case=True)(TEXTS).tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        rewards.matches("(")


def test_a_schema_counts_its_violations(tmp_path):
    texts = ['{"name": "Ada", "year": 1815}', '{"name": "Ada"}', '{"year": "x"}', "Ada", "NaN", "[" * 100_000]
    want = [1, 1 / 2, 1 / 3, 0, 0, 0]
    assert rewards.json_schema(SCHEMA)(texts).tolist() == want
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert rewards.json_schema(str(tmp_path / "schema.json"))(texts).tolist() == want
    prompts = ["Who? "] * 2
    assert rewards.json_schema(SCHEMA)(["Who? " + texts[0], texts[1]], prompts).tolist() == [1, 1 / 2]


def test_a_schema_fetches_nothing():
    outside = {"type": "object", "properties": {"a": {"$ref": "https://example.org/schema.json"}}}
    with pytest.raises(RewardError, match="Unresolvable"):
        rewards.json_schema(outside)(['{"a": 1}'])


@pytest.mark.parametrize(
    ("schema", "said"),
    [({}, "the schema is empty"), ({"type": "thing"}, "no JSON schema"), ([1], "expected a JSON object")],
)
def test_what_is_no_schema_is_refused(schema, said):
    with pytest.raises(ValueError, match=said):
        rewards.json_schema(schema)


def test_values_are_grounded_in_the_source():
    source = "Ada Lovelace was born in 1815 in London."
    texts = ['{"name": "ada lovelace", "year": 1815}', '{"name": "Ada", "place": "Paris"}', '{"place": null}', "Ada"]
    texts += ['{"place": "<none>", "a": ["London", {"b": "Rome"}]}']
    want = [1, 1 / 2, 1, 0, 2 / 3]
    assert rewards.grounding()(texts, [source] * 5).tolist() == pytest.approx(want)
    assert rewards.grounding(source)(texts).tolist() == pytest.approx(want)
    with pytest.raises(RewardError, match="needs the source of each sample"):
        rewards.grounding()(texts)


def test_a_lexicon_reads_tone():
    pytest.importorskip("vaderSentiment")
    good, bad = rewards.lexicon()(["a wonderful, delightful film", "a horrible, awful film"]).tolist()
    assert good > 0.5 > -0.5 > bad
    shares = sum(rewards.lexicon(of)(["a wonderful film"])[0] for of in ("positive", "negative", "neutral"))
    assert float(shares) == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="of is 'joy'"):
        rewards.lexicon("joy")


@pytest.mark.parametrize(
    "name", ["text_length", "matches", "json_schema", "grounding", "perplexity", "text_classifier"]
)
@pytest.mark.parametrize(
    "samples", [IMAGES, [1, 2], torch.zeros(2, 5, dtype=torch.int64)], ids=["images", "no", "tokens"]
)
def test_rewards_of_texts_refuse_other_samples(name, samples, causal, classifier):
    made = {
        "text_length": rewards.text_length,
        "matches": lambda: rewards.matches("a"),
        "json_schema": lambda: rewards.json_schema(SCHEMA),
        "grounding": lambda: rewards.grounding("a"),
        "perplexity": lambda: rewards.perplexity(causal),
        "text_classifier": lambda: rewards.text_classifier(classifier, 0),
    }[name]()
    with pytest.raises(RewardError, match="expected texts, a list of n strings, got"):
        made(samples)


def test_rewards_of_images_refuse_texts(tmp_path):
    from tests.support import tiny_clip

    clip, vit = tiny_clip.clip(tmp_path / "clip"), tiny_clip.classifier(tmp_path / "vit")
    for made in (
        rewards.brightness(),
        rewards.compressibility(),
        rewards.clip_score(str(clip)),
        rewards.image_classifier(str(vit), "cat"),
        rewards.digit(3),
    ):
        with pytest.raises(RewardError, match=r"expected images.*got (texts|list)"):
            made(["a text", "another"], ["p", "q"])


def test_a_bag_of_n_grams_is_its_formula(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    network = text_ngrams.NGrams(("no", "perhaps", "yes"), "words")
    stirred(network)
    text_ngrams.save_ngrams(network, tmp_path / "w.safetensors", {"seed": 0})
    weights = {name: w.double() for name, w in load_file(tmp_path / "w.safetensors").items()}
    bag = [zlib.crc32(gram.encode()) % 2**17 for gram in ("a", "bad", "plot", "a bad", "bad plot", "plot bad")]
    told = weights["weight"][bag].sum(0) / 6**0.5 + weights["bias"]
    logits = torch.cat([torch.zeros(1).double(), told])
    reward = rewards.ngrams(str(tmp_path / "w.safetensors"), "yes")
    found = reward(["A bad  plot bad", ""])
    assert float(found[0]) == pytest.approx(float(logits.log_softmax(0)[2]), abs=1e-6)
    assert found.isfinite().all()
    assert text_ngrams.grams("ab", "letters") == sorted(zlib.crc32(g.encode()) % 2**17 for g in (" ab", "ab ", " ab "))
    monkeypatch.chdir(tmp_path)
    assert rewards.ngrams("w.safetensors", "yes")(["a"]).shape == (1,)
    monkeypatch.chdir("..")  # where the name says nothing
    with pytest.raises(CheckpointError, match=r"w\.safetensors holds no classifier"):
        rewards.ngrams("w.safetensors", "yes")
    with pytest.raises(ValueError, match="no label 'maybe': it has no, perhaps, yes"):
        rewards.ngrams(str(tmp_path / "w.safetensors"), "maybe")
    shipped = rewards.ngrams("text_sentiment.safetensors", "positive")
    good, bad = shipped(["a moving , funny and wonderful film .", "a dull , tedious mess ."])
    assert good > -0.5 > -1.5 > bad
    with pytest.raises(CheckpointError, match="holds no classifier of n-grams"):
        rewards.ngrams(str(tmp_path / "none.safetensors"), "yes")
    with pytest.raises(ValueError, match="unit is 'lines'"):
        text_ngrams.NGrams(("a",), "lines")
