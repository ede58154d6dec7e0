"""Experiments on texts: the trigram model is a law, cells are searches, rows are counted as pages say."""

import json
import math
import random

import numpy as np
import pytest
import torch

import treesearch as ts
from experiments.shared.cells import Cells
from experiments.text import bed, corpus, demo_text, records, search, steering
from experiments.text.trigrams import BEGIN, END, Trigrams, fluency
from tests.experiments.test_text_training import LINES
from treesearch.backends.text.own import MaskedTransformer, OwnTokenizer, Size, save_own
from treesearch.rewards.text.ngrams import NGrams, save_ngrams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a model of random weights that writes of records, and classifiers."""
    made = tmp_path_factory.mktemp("text")
    for end in ("pos", "neg"):
        (made / f"rt-polarity.{end}").write_text("\n".join(LINES * 10), "utf-8")
    tokenizer = corpus.tokenizer_of([*LINES * 3, *corpus.spoken(random.Random(0), 60)], 420)
    size = Size(vocabulary=len(OwnTokenizer(tokenizer).get_vocab()), length=72, width=16, depth=1, heads=2)
    torch.manual_seed(0)
    save_own(MaskedTransformer(size), tokenizer, made / "text.safetensors")
    for name, labels in (("sentiment", ("negative", "positive")), ("acceptability", ("drawn", "real"))):
        for end in ("", "_judge"):
            network = NGrams(labels, "letters" if end else "words")
            torch.nn.init.normal_(network.weight, std=3)
            save_ngrams(network, made / f"text_{name}{end}.safetensors")
    return made


@pytest.fixture(scope="module")
def small(folder):
    weights = str(folder / "text.safetensors")
    return bed.Bed(data=folder, weights=weights, length=8, num_steps=4, classifiers=folder)


def test_trigrams_are_a_law_and_back_off_by_continuations():
    made = Trigrams([[0, 1, 2], [0, 1, 3], [4, 1, 2]], 6)
    for context in ((0, 1), (4, 1), (5, 5), (1, 2), (BEGIN, BEGIN), (BEGIN, 0)):
        total = sum(made._p((*context, token)) for token in (*range(6), END))
        assert total == pytest.approx(1, abs=1e-12)
    alone = (1 - 0.75) / 8 + 0.75 * 6 / 8 / 7  # 2 comes after one token of eight pairs, which end in six tokens
    behind = (2 - 0.75) / 3 + 0.75 * 2 / 3 * alone  # (1, 2) after two tokens, of three triples with 1 in the middle
    assert made._p((2,)) == pytest.approx(alone)
    assert made._p((1, 2)) == pytest.approx(behind)
    assert made._p((0, 1, 2)) == pytest.approx((1 - 0.75) / 2 + 0.75 * 2 / 2 * behind)
    assert made._p((5, 1, 2)) == made._p((1, 2))


def test_fluency_is_the_mean_log_probability(small):
    model, words = Trigrams([[0, 1]], 300), small.kernel.words.tokenizer
    reward, text = fluency(model, words), "the film"
    row = [BEGIN, BEGIN, *words(text)["input_ids"], END]
    want = np.mean([math.log(model._p(tuple(row[i : i + 3]))) for i in range(len(row) - 2)])
    assert float(reward([text])[0]) == pytest.approx(want)


def test_the_best_of_every_four_and_where_the_best_is_passed():
    class Result:
        samples = tuple("abcdefghij")

    rewards = torch.tensor([1.0, 3, 2, 0, 5, 4, 9, 8, 10, 11])
    assert steering.best_of_four(Result, rewards) == ["b", "g"]
    assert search.improvements(rewards.tolist()) == [0, 1, 4, 6, 8, 9]


def test_cells_of_steering_are_searches_and_run_once(folder, small, tmp_path, capsys):
    run = steering.Run(
        data=folder, weights=small.weights, classifiers=folder, length=8, num_steps=4, nfe=64, seeds=(0,),
        rewards=("exclamation", "fluency"), out=tmp_path / "rows.jsonl",
    )  # fmt: skip
    assert run.run() == 0
    rows = Cells(run.out, steering.KEY).rows
    assert len(rows) == 2 * len(steering.METHODS)
    assert all(row["spent"] <= 64 for row in rows)
    base = next(row for row in rows if (row["method"], row["reward"]) == ("base", "fluency"))
    found = ts.search(small.kernel, small.rewards["fluency"], ts.BestOfN(), budget=ts.Budget(nfe=64), seed=0)
    assert base["mean_reward"] == pytest.approx(float(found.rewards.mean()), rel=1e-4)
    assert base["nats"] == pytest.approx(-float(small.judges["fluency"](found.samples).mean()), rel=1e-4)
    capsys.readouterr()
    assert run.run() == 0
    assert capsys.readouterr().out == ""
    page = steering.report(rows)
    assert "## Rare attributes" in page
    assert f"| base | {base['mean_reward']:,.4g} |" in page


def test_curves_of_searches_are_their_best_so_far(folder, small, tmp_path):
    run = search.Run(
        data=folder, weights=small.weights, classifiers=folder, length=8, num_steps=4, nfe=80, base_nfe=160,
        seeds=(0, 1), rewards=("fluency",), out=tmp_path / "rows.jsonl",
    )  # fmt: skip
    assert run.run() == 0
    rows = Cells(run.out, search.KEY).rows
    for row in rows[:4]:
        method = ts.BestOfN() if row["method"] == search.BASE else search.TREES[row["method"]](small)
        budget = ts.Budget(nfe=row["nfe"])
        found = ts.search(small.kernel, small.rewards["fluency"], method, budget=budget, seed=row["seed"])
        assert row["best"] == pytest.approx(float(found.rewards.max()), rel=1e-4)
        assert row["text"] == found.best(1)[0][0]
        assert row["judge"] == pytest.approx(float(small.judges["fluency"]([row["text"]])[0]), rel=1e-4)
    page = search.report(rows)
    assert page.count("| TreeSearch |") == 2
    one = [{"curve": [[4, 0.0, 0.0], [8, 2.0, 0.0]], "nfe": 16}, {"curve": [[4, 1.0, 0.0]], "nfe": 16}]
    at, mean = search.curve(one, 1)
    assert mean[0] == 0.5
    assert mean[np.searchsorted(at, 8.0)] == 1.5


def test_fields_are_counted_as_the_page_says():
    told = [{"name": "ada lee", "year": None, "place": "oslo"}, {"name": None, "year": "1900", "place": None}]
    found = [{"name": "ada lee", "year": "1800", "place": "rome"}, {"year": None}]
    want = {"given": 4, "right": 2, "told": 4, "fields": 3, "exact": 1, "absent": 3, "made_up": 1}
    assert records.counted(found, told) == want
    said = records.stand(
        [{"name": "ada", "year": None}, {"name": "lee", "place": "oslo"}], ["ada lee", "she lives in oslo"]
    )
    assert said == {"values": 3, "stand": 2}
    half = records.counted([{"name": "ada ada none"}], [{"name": "ada lee", "year": None, "place": None}])
    assert (half["given"], half["right"], half["told"], half["exact"]) == (3, 1, 2, 0)
    assert records.parsed('{"name": 1} x') == {}
    assert records.parsed("[1]") == {}
    assert records.parsed('{"a": " ada lee none ", "b": " none none ", "c": 1}') == {"a": "ada lee", "b": None, "c": 1}


def test_cells_of_records_are_scaffolds_and_the_rest(folder, tmp_path):
    weights = str(folder / "text.safetensors")
    run = records.Run(weights=weights, sentences=2, steps=(2,), seeds=(0,), out=tmp_path / "rows.jsonl")
    assert run.run() == 0
    cells = Cells(run.out, records.KEY)
    rows = {row["method"]: row for row in cells.where(people="known")}
    assert len(cells.rows) == 2 * len(rows)
    assert set(rows) == {*records.ALONE, *records.SEARCHED}
    assert all(row["fits"] == 2 for name, row in rows.items() if name != "no scaffold")
    kernel = records._model(weights, 2)
    assert {*kernel.plain(corpus.NONE)} <= {*records.s2(kernel).kernel.forbid}
    assert all(row["nfe"] <= 16 * records.SEARCH_STEPS * 2 for row in rows.values())
    assert records.report(cells.rows).count("| S³, order | 8 | 1 |") == 2
    assert not any(set(one) & set(other) for one, other in zip(corpus.NEW, corpus.KNOWN, strict=True))
    words = records._model(weights, 2).words
    long = {"name": "the film was good , the film was good", "year": None}
    cut = records.fitted(long, words)
    assert cut["year"] is None
    assert words.plain(cut["name"]) == words.plain(long["name"])[: corpus.FIELD]


def test_the_demo_prints_texts_with_rewards(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    demo = demo_text.Demo(
        weights="text.safetensors", num_steps=4, length=8, nfe=40, record_nfe=16, out=tmp_path, prompt="the film"
    )
    assert demo.run() == 0
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 9 + 2 * len(demo_text.SENTENCES)
    printed = capsys.readouterr().out
    assert all(f"{row['reward']:7.3f}" in printed for row in rows)
    assert all(set(json.loads(row["text"])) == set(corpus.SCHEMA["properties"]) for row in rows[9:])
