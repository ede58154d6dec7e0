"""Training of the small text model: a resumed run is an uninterrupted one, and its file is a kernel."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import treesearch as ts
from experiments.text import corpus, train_classifiers, train_text
from treesearch.backends import scaffold, small_text
from treesearch.backends.text.own import OwnTokenizer
from treesearch.rewards import json_schema, ngrams, text_length
from treesearch.testing import check_kernel

LINES = ["the film was good .", "a bad plot", "very good , and very bad !", "é the"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("rt-polarity.pos", "rt-polarity.neg"):
        (folder / name).write_text("\n".join(LINES * 10), "utf-8")
    rows = [f"x\t{i % 2}\t\tThe plot is number {i}." for i in range(10)]
    (folder / "cola_in_domain_train.tsv").write_text("\n".join(rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    how = {
        "data": data,
        "steps": 2,
        "batch_size": 6,
        "vocabulary": 420,
        "length": 80,
        "width": 16,
        "depth": 1,
        "heads": 2,
    }
    how |= {"warmup": 1, "cooldown": 1e-9}
    for folder, epochs in (("once", 2), ("twice", 1), ("twice", 2)):
        args = train_text.Args(out=out / folder, weights=out / f"{folder}.safetensors", epochs=epochs, **how)
        train_text.main(args)
    return out


def test_a_resumed_run_is_an_uninterrupted_one(trained):
    one, other = (load_file(trained / f"{name}.safetensors") for name in ("once", "twice"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len((trained / "twice" / "curve.csv").read_text("utf-8").splitlines()) == 3


def test_its_file_is_a_kernel_of_texts_and_of_records(trained):
    kernel = small_text(str(trained / "once.safetensors"), num_steps=3, length=60)
    check_kernel(kernel, prompts=["the film", "a"], rows=4)
    assert kernel.words is not None
    assert kernel.words.texts(torch.tensor([kernel.words.ids("the film was good")])) == ["the film was good"]
    result = ts.search(kernel, text_length(), ts.BestOfN(), prompts=["the film"], budget=ts.Budget(nfe=12))
    assert all(text.startswith("the film") for text in result.samples)
    records = scaffold(small_text(str(trained / "once.safetensors"), num_steps=3), corpus.SCHEMA, blanks=4, null="none")
    found = ts.search(records, json_schema(corpus.SCHEMA), ts.BestOfN(), prompts=["ada lee"], budget=ts.Budget(nfe=12))
    assert (found.rewards == 1).all()


def test_a_record_is_what_a_scaffold_knows(trained):
    made = corpus.Rows(OwnTokenizer((trained / "once" / "tokenizer.json").read_text("utf-8")), 80)
    kernel = small_text(str(trained / "once.safetensors"), num_steps=1)
    records = scaffold(kernel, corpus.SCHEMA, blanks=corpus.FIELD, null=corpus.NONE)
    seed = next(s for s in range(50) if None not in corpus.person(random.Random(s))[1].values())
    sentence, told = corpus.person(random.Random(seed))
    row, fields = made.record(random.Random(seed))
    known = records.encode([sentence])["known"][0]
    assert [token for token, inside in zip(row, fields, strict=True) if not inside] == known[known >= 0].tolist()
    assert (known < 0).tolist() == fields
    (text,) = records.decode(torch.tensor([row]))
    found = json.loads(text)
    assert all(told[key].startswith(found[key] or "?") for key in told)


def test_files_of_other_kinds_are_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor"):
        small_text(str(tmp_path / "no.safetensors"))
    with pytest.raises(ValueError, match="holds no masked transformer"):
        small_text("mnist.safetensors")
    with pytest.raises(ValueError, match="knows texts of 80 tokens at most"):
        small_text(str(trained / "once.safetensors"), length=81)


def test_classifiers_learn_apart_and_say_how_well(trained, tmp_path, capsys):
    for name, words in (("pos", "good fine"), ("neg", "bad dull")):
        lines = [f"the film {i} was {word}" for i in range(30) for word in words.split()]
        (tmp_path / f"rt-polarity.{name}").write_text("\n".join(lines), "utf-8")
    args = train_classifiers.Args(
        data=tmp_path, out=tmp_path, weights=str(trained / "once.safetensors"), draws=30, num_steps=2
    )
    rows = train_classifiers.main(args)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["accuracy"] for row in rows] == [1, 1, 1, 1]
    _, told = train_classifiers.sentiment(args)
    given = train_classifiers.parts(told, 0)
    assert not set(given["reward"].texts) & set(given["judge"].texts)
    assert not set(given["test"].texts) & set(given["reward"].texts + given["judge"].texts)
    for role in ("", "_judge"):
        good, bad = ngrams(str(tmp_path / f"text_sentiment{role}.safetensors"), "positive")(["it was good", "was bad"])
        assert good > -0.3
        assert bad < -1.2


def test_weights_begin_from_the_log_ratio_of_counts():
    texts, classes = ["a b", "a", "c", "b"], [1, 1, 0, 0]
    bags = [train_classifiers.grams(text, "words") for text in texts]
    row = torch.tensor([i for i, bag in enumerate(bags) for _ in bag])
    bucket = torch.tensor([b for bag in bags for b in bag])
    found = train_classifiers.log_ratio(row, bucket, torch.tensor(classes).double(), 1.0)
    size = train_classifiers.BUCKETS
    (a,), (b,) = train_classifiers.grams("a", "words"), train_classifiers.grams("b", "words")
    assert float(found[a]) == pytest.approx(math.log(3 / (4 + size)) - math.log(1 / (2 + size)))
    assert float(found[b]) == pytest.approx(math.log(2 / (4 + size)) - math.log(2 / (2 + size)))
    assert int((found != 0).sum()) == 4  # a, b, "a b", c
