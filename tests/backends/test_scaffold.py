"""Scaffolds: structure that nothing touches, fields read by their places, schemas that have none."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Regex
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split

import treesearch as ts
from tests.support import text
from treesearch.backends.base import describe
from treesearch.backends.exact.gaussian import LinearGaussian
from treesearch.backends.text.fields import Field, layout, pieces, record
from treesearch.backends.text.kernel import FREE, KNOWN, PROMPTED, MaskedTextKernel
from treesearch.backends.text.scaffold import scaffold
from treesearch.backends.text.words import Words
from treesearch.registry import registry as specs
from treesearch.rewards import json_schema
from treesearch.rewards.base import Reward
from treesearch.testing import check_kernel

SCHEMA = {
    "type": "object",
    "properties": {
        "film": {"type": "string"},
        "plot": {"type": "object", "properties": {"good": {"type": ["string", "null"]}}, "required": ["good"]},
    },
    "required": ["film"],
}
LETTERS = sorted(set('abcdefghilmnoprstuvwy {}":,'))


def words():
    """A token a letter."""
    made = text.tokenizer(marks=False, words=LETTERS)
    made.backend_tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    made.backend_tokenizer.decoder = Fuse()
    return Words(made)


SPOKEN = words()
SIZE = len(SPOKEN.tokenizer)
LENGTH = 52


def kernel(**settings):
    given = {"length": LENGTH, "num_steps": 4, "mask": SPOKEN.mask, "words": SPOKEN, "name": "tiny"}
    return MaskedTextKernel(text.Net(SIZE - 1, LENGTH), **(given | settings))


def keeping(seen):
    """A reward of states that keeps what it sees."""

    def score(x, prompts):
        seen.append(x.clone())
        return torch.zeros(len(x))

    return score


def structure(made, x):
    """Tokens of a row where something is known."""
    known = made.encode(["the film"])[KNOWN][0]
    return x[:, known != FREE], known[known != FREE]


@pytest.mark.parametrize(
    "method",
    [ts.BestOfN(), ts.FeynmanKac(num_particles=4), ts.DiffusionTreeSearch(wave=4), ts.TreeSearch(), ts.TreeSampling()],
    ids=lambda m: type(m).__name__,
)
def test_no_method_touches_the_structure_and_every_sample_fits_the_schema(method):
    made, seen = scaffold(kernel(), SCHEMA, blanks=4, null="none"), []

    def score(samples, prompts=None):
        seen.extend(samples)
        return torch.tensor([float(len(s)) for s in samples])

    budget = ts.Budget(nfe=160)
    found = ts.search(made, score, method, prompts=["the film"], budget=budget)
    assert (json_schema(SCHEMA)(seen) == 1).all()
    assert len(found.samples) > 3
    seen.clear()
    ts.search(made, Reward(keeping(seen), "kept", "state"), method, prompts=["the film"], budget=budget)
    x = torch.cat(seen)
    known, want = structure(made, x)
    assert (known == want).all()


@pytest.mark.parametrize("reveal", [None, "confidence", "left"])
def test_it_is_a_kernel_with_prompts_and_without(reveal):
    made = scaffold(kernel(), SCHEMA, blanks=4, null="none", reveal=reveal)
    check_kernel(made, prompts=["the film", "a"], rows=6)
    check_kernel(made, rows=6)
    assert ("law of its own" in (made.departs or "")) == (reveal is not None)


def test_fields_are_read_by_their_places_and_nulls_are_stripped():
    made = scaffold(kernel(), SCHEMA, blanks=4, null="none")
    assert [field.path for field in made.fields] == [("film",), ("plot", "good")]
    known = made.encode(["the film"])[KNOWN]
    x, free = known.clone(), (known[0] == FREE).nonzero().flatten()
    for fields, want in (
        ("good" + "none", {"film": "good", "plot": {"good": None}}),
        ("none" + "a no", {"film": None, "plot": {"good": "a no"}}),
        ('"}a"' + "none", {"film": '"}a"', "plot": {"good": None}}),
    ):
        x[0, free] = torch.tensor(SPOKEN.plain(fields))
        assert json.loads(made.decode(x)[0]) == want
    once = scaffold(kernel(), SCHEMA, blanks=5, null="n")
    x = once.encode(["the"])[KNOWN]
    x[0, (x[0] == FREE).nonzero().flatten()] = torch.tensor(SPOKEN.plain("annnn" + "nnnnn"))
    assert json.loads(once.decode(x)[0]) == {"film": "a", "plot": {"good": None}}
    with pytest.raises(ValueError, match="without its scaffold"):
        made.decode(torch.zeros(1, LENGTH, dtype=torch.int64))


def test_guidance_hides_the_prompt_and_leaves_the_structure():
    seen = []

    def network(x):
        seen.append(x)
        return torch.zeros(*x.shape, SIZE, dtype=torch.float64)

    inner = MaskedTextKernel(network, length=LENGTH, num_steps=2, mask=SPOKEN.mask, words=SPOKEN, guidance_scale=2.0)
    made = scaffold(inner, SCHEMA, blanks=2)
    cond = made.encode(["the film"])
    x = made.prior(torch.zeros(1, LENGTH), cond)
    made.transition(x, torch.tensor([2]), cond)
    absent, given = seen[0]
    assert cond[PROMPTED].sum() == len(SPOKEN.ids("the film"))
    assert (absent[cond[PROMPTED][0]] == SPOKEN.mask).all()
    assert torch.equal(absent[~cond[PROMPTED][0]], given[~cond[PROMPTED][0]])


def test_what_is_drawn_in_the_fields_is_the_law_given_the_structure():
    """Acceptance (c): one reveal a step at temperature 1 beside exact conditional enumeration of four tokens."""
    table = text.Table(4, 3)
    known = torch.tensor([1, FREE, 2, FREE])

    made = MaskedTextKernel(table, length=4, num_steps=2, mask=3, reveal="confidence")
    n = 20_000
    cond = {KNOWN: known.expand(n, -1)}

    from treesearch.testing.chains import noise

    keys, spec = np.arange(n, dtype=np.uint64), describe(made)
    x = made.prior(noise(spec, keys, 3), cond)
    for t in (2, 1):
        x = made.transition(x, torch.full((n,), t), cond).sample(noise(spec, keys, t))
    joint = torch.zeros(3, 3, dtype=torch.float64)
    for row, p in zip(table.every, table.data, strict=True):
        if row[0] == 1 and row[2] == 2:
            joint[row[1], row[3]] = p
    counts = (3 * x[:, 1] + x[:, 3]).bincount(minlength=9)
    assert (x[:, [0, 2]] == torch.tensor([1, 2])).all()
    assert stats.chisquare(counts, n * (joint / joint.sum()).flatten()).pvalue > 1e-3


def test_pieces_of_a_schema():
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"const": "x"},
            "c": {"type": "object", "properties": {"d": {"enum": ["u", "v"]}}},
        },
    }
    found = pieces(schema)
    a, d = Field(("a",), "integer"), Field(("c", "d"), "string", ("u", "v"))
    assert found == ['{"a": ', a, ', "b": "x", "c": {"d": "', d, '"}}']
    assert record(layout(schema), ["12", "u"]) == {"a": 12, "b": "x", "c": {"d": "u"}}
    assert record([a], ["1e999"]) == {"a": "1e999"}
    assert record([a, d], ["12", "u"]) == {"a": 12, "c": {"d": "u"}}
    assert record([a, d], ["twelve", None]) == {"a": "twelve", "c": {"d": None}}
    assert record([a, d], ["[1]", "7"]) == {"a": "[1]", "c": {"d": "7"}}


@pytest.mark.parametrize(
    ("inner", "kind"),
    [
        ({"enum": [1, None]}, "integer"),
        ({"enum": [1, 2.5]}, "number"),
        ({"enum": [True]}, "boolean"),
        ({"enum": ["u"]}, "string"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}], "title": "a"}, "integer"),
        ({"oneOf": [{"type": "null"}, {"enum": [1.5]}]}, "number"),
        ({}, "string"),
    ],
)
def test_a_property_is_of_the_kind_of_its_values(inner, kind):
    (field,) = layout({"properties": {"a": inner}})
    assert field.kind == kind
    (place,) = layout({"properties": {"a": {"properties": {"b": {}}}}})
    assert place.path == ("a", "b")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({}, "the schema is empty"),
        ([1], "expected a JSON object"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}}, "a has anyOf: alternatives"),
        ({"properties": {"a": {"anyOf": [{"const": "u"}, {"type": "null"}]}}}, "a has anyOf: alternatives"),
        ({"properties": {"a": {"anyOf": []}}}, r"no JSON schema: \[\] should be non-empty"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}}, r"a has \$ref: alternatives and references"),
        ({"properties": {"a": {}}, "oneOf": [{}]}, "the schema has oneOf"),
        ({"properties": {"a": {"items": {}}}}, "a is of type 'array', which has no fixed place"),
        ({"properties": {"a": {"enum": ["u", 1]}}}, "a may be string or integer"),
        ({"properties": {"a": {"type": ["string", "integer"]}}}, "a may be string or integer"),
        ({"properties": {"a": {"minimum": "x"}}}, r"no JSON schema: 'x' is not of type 'number' \(\$.properties.a"),
        ({"type": "object", "properties": {}}, "names no properties"),
        ({"type": "array"}, "names no properties"),
        ({"properties": {"a": {}}, "required": ["b"]}, "requires 'b', which is none of its properties"),
        ({"properties": {"a": {"type": "array"}}}, "a is of type 'array', which has no fixed place"),
        ({"properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}}, "minimum is 2, maximum is 1"),
        ({"properties": {"a": {"enum": []}}}, "none of no values"),
        ({"properties": {"a": 3}}, "no JSON schema: 3 is not of type"),
    ],
)
def test_schemas_without_a_scaffold_are_refused(schema, said):
    with pytest.raises(ValueError, match=said):
        scaffold(kernel(), schema, blanks=2)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(TypeError, match="MaskedTextKernel of masked diffusion with words"):
        scaffold(LinearGaussian(), SCHEMA)
    with pytest.raises(ValueError, match="take fewer blanks"):
        scaffold(kernel(), SCHEMA, blanks=20)
    with pytest.raises(ValueError, match="blanks is 0"):
        scaffold(kernel(), SCHEMA, blanks=0)
    with pytest.raises(ValueError, match="no tokens for a part of 'zebra'"):
        scaffold(kernel(), SCHEMA, blanks=2, null="zebra")
    with pytest.raises(ValueError, match=r"with \{prompt\} in it"):
        scaffold(kernel(), SCHEMA, blanks=2, ask="a film")
    made = scaffold(kernel(), SCHEMA, blanks=4)
    with pytest.raises(ValueError, match="leaves no room for a scaffold"):
        made.encode(["the film was good"])
    with pytest.raises(ValueError, match="the mask token stands in"):
        scaffold(kernel(), {"properties": {"[MASK]": {}}}, blanks=2)
    with pytest.raises(FileNotFoundError, match=r"schema is 'none.json', and there is no such file"):
        scaffold(kernel(), "none.json")
    with pytest.raises(ValueError, match="schema is the folder"):
        scaffold(kernel(), str(tmp_path))
    with pytest.raises(ValueError, match="schema is JSON written out"):
        scaffold(kernel(), "{}")
    (tmp_path / "schema.json").write_text("{")
    with pytest.raises(ValueError, match="holds no JSON"):
        scaffold(kernel(), str(tmp_path / "schema.json"))


def test_it_stands_on_the_command_line(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    text.bert(folder)
    (tmp_path / "schema.json").write_text(json.dumps({"properties": {"film": {"type": "string"}}}))
    spec = f"scaffold(masked_text({str(folder)!r}, 20, 4, device='cpu'), {str(tmp_path / 'schema.json')!r}, blanks=2)"
    with pytest.raises(ts.errors.UsageError, match="knows no tokens for"):
        specs.kernel(spec)
