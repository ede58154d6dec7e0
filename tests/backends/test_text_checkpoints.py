"""Masked language models by checkpoint: tiny ones with random weights, saved and read as real ones are."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import treesearch as ts
from tests.support import text
from tests.support.tiny_clip import stirred
from treesearch.backends.text.kernel import MaskedTextKernel
from treesearch.backends.text.words import Words
from treesearch.registry import registry as specs
from treesearch.rewards.loading import CheckpointError
from treesearch.testing import bare_chain, check_kernel

READ = {"length": 6, "num_steps": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return text.bert(tmp_path_factory.mktemp("bert"))


def test_a_masked_language_model_of_transformers(bert):
    made = MaskedTextKernel.from_pretrained(bert, **READ)
    network = transformers.AutoModelForMaskedLM.from_pretrained(bert).eval()
    words = transformers.AutoTokenizer.from_pretrained(bert)
    cond = made.encode(["the film was"])
    x = made.prior(torch.zeros(1, 6), cond)
    inputs = words("the film was [MASK] [MASK] [MASK]", return_tensors="pt")["input_ids"]
    want = network(inputs).logits[0, 4:7]
    want[:, words.mask_token_id] = -torch.inf
    assert torch.equal(made.transition(x, torch.tensor([2]), cond).logits, want)
    assert made.mask == words.mask_token_id
    samples = made.decode(bare_chain(made, 5, prompts=["the film was"])[-1])
    assert all(sample.startswith("the film was") for sample in samples)


def test_it_is_a_kernel_under_prompts_and_guidance(bert):
    check_kernel(MaskedTextKernel.from_pretrained(bert, **READ, guidance_scale=2.0), prompts=["the film", "a"])


def test_samples_are_texts_in_a_search_and_on_the_command_line(bert):
    made = specs.kernel(f"masked_text({bert!r}, 6, 4, schedule='cosine', device='cpu')")
    seen = []

    def short(samples, prompts=None):
        seen.extend(samples)
        return torch.tensor([-float(len(s)) for s in samples])

    result = ts.search(made, short, ts.BestOfN(), prompts=["the film"], budget=ts.Budget(nfe=40))
    assert all(isinstance(sample, str) for sample in seen)
    best, rewards = result.best(3)
    assert [len(sample) for sample in best] == [-int(r) for r in rewards]
    assert min(map(len, seen)) == len(best[0])


def test_a_protein_model_is_a_masked_model(tmp_path):
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWC", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(letters))
    words = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    config = text.config_of(
        transformers.EsmConfig, letters, pad_token_id=1, mask_token_id=24, position_embedding_type="rotary",
        token_dropout=True,
    )  # fmt: skip
    stirred(transformers.EsmForMaskedLM(config)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    others = [i for i, letter in enumerate(letters) if letter[0] == "<" and letter != "<mask>"]
    made = MaskedTextKernel.from_pretrained(str(tmp_path), 8, 4, device="cpu", forbid=others)
    check_kernel(made, prompts=["MKV", "LA"], rows=4)
    (sample,) = made.decode(bare_chain(made, 1, prompts=["MKV"])[-1])
    assert sample.replace(" ", "").startswith("MKV")
    assert set(sample.replace(" ", "")) <= set("LAGVSERTIDPKQNFYMHWC")
    assert len(sample.replace(" ", "")) == 8


def test_code_of_its_own_runs_only_with_consent(tmp_path):
    folder, network = text.with_own_code(tmp_path / "llada", "llada", text.tokenizer(marks=False), mask_token_id=4)
    with pytest.raises(ValueError, match=r"code of its own \(modeling_own.py\).*pass trust_remote_code=True"):
        MaskedTextKernel.from_pretrained(folder, **READ)
    made = MaskedTextKernel.from_pretrained(folder, **READ, trust_remote_code=True)
    x = torch.tensor([[5, 4, 4, 7, 4, 8]])
    law = made.transition(x, torch.tensor([2]))
    torch.testing.assert_close(law.logits[:, 5:], network(x).logits[0, [1, 2, 4], 5:])


def test_dream_s_logits_are_of_the_next_position(tmp_path):
    folder, network = text.with_own_code(tmp_path / "dream", "Dream", text.tokenizer(marks=False), mask_token_id=4)
    made = MaskedTextKernel.from_pretrained(folder, **READ, trust_remote_code=True)
    x = torch.tensor([[4, 4, 6, 7, 4, 8]])
    law = made.transition(x, torch.tensor([2]))
    torch.testing.assert_close(law.logits[:, 5:], network(x).logits[0, [0, 0, 3], 5:])


def test_mdlm_is_told_sigma_and_has_its_mask_behind_the_words(tmp_path):
    words = text.tokenizer(marks=False, mask=None)
    folder, network = text.with_own_code(
        tmp_path / "mdlm", "mdlm", words, auto="AutoModelForMaskedLM", vocab_size=len(words) + 1
    )
    for file in [*(tmp_path / "mdlm").glob("*token*")]:
        file.rename(tmp_path / file.name)
    made = MaskedTextKernel.from_pretrained(folder, **READ, trust_remote_code=True, tokenizer=str(tmp_path))
    assert made.mask == len(words)
    x = torch.full((1, 6), made.mask)
    law = made.transition(x, torch.tensor([2]))
    want = network(x, -torch.tensor([0.5]).log()).logits[0, :, :-1]
    torch.testing.assert_close(law.logits[:, :-1], want)
    assert (law.logits[:, -1] == -torch.inf).all()


def test_a_chat_is_asked_by_its_template_and_answers_alone(tmp_path):
    words = text.tokenizer(marks=False)
    words.chat_template = (
        "{% for m in messages %}a {{ m.content }} : {% endfor %}{% if add_generation_prompt %}very {% endif %}"
    )
    words.eos_token = "[SEP]"
    folder, _ = text.with_own_code(tmp_path / "chat", "llada", words, mask_token_id=4)
    made = MaskedTextKernel.from_pretrained(folder, **(READ | {"length": 9}), trust_remote_code=True, chat=True)
    known = made.encode(["film"])["known"][0].tolist()
    ids = {word: words.convert_tokens_to_ids(word) for word in text.WORDS}
    assert known == [ids["a"], ids["film"], ids[":"], ids["very"], *[-1] * 5]
    end = words.eos_token_id
    answer = torch.tensor([[*known[:4], ids["plot"], ids["bad"], end, ids["the"], end]])
    assert made.decode(answer) == ["plot bad"]


def test_uniform_noise_takes_the_vocabulary(bert):
    made = MaskedTextKernel.from_pretrained(bert, **READ, noise="uniform")
    assert made.vocabulary == len(transformers.AutoTokenizer.from_pretrained(bert))
    assert made.mask is None


def with_config(folder, to, **says):
    """A copy of a checkpoint that says something else."""
    to.mkdir()
    for file in Path(folder).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | says))
    return str(to)


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ({"model_type": "gpt2"}, "is a gpt2 network, expected a masked language model"),
        ({"model_type": "llada2_moe"}, "commits blocks by confidence"),
        ({"model_type": "diffusion_gemma"}, "conditions on the logits of the step before"),
    ],
)
def test_other_models_are_refused_before_their_weights(bert, tmp_path, says, said):
    with pytest.raises(CheckpointError, match=said):
        MaskedTextKernel.from_pretrained(with_config(bert, tmp_path / "other", **says), **READ)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "floaty"}, "dtype is 'floaty', expected float32"),
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"forbid": 7}, "forbid is 7"),
        ({"forbid": [9999]}, "forbid names token 9999, the network knows 18"),
        ({"mask": 500}, "mask is 500, the network knows 18"),
        ({"guidance_scale": "a"}, "guidance_scale is 'a'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bert, settings, said):
    with pytest.raises(ValueError, match=said):
        MaskedTextKernel.from_pretrained(bert, **(READ | settings))


def test_settings_are_looked_at_before_the_checkpoint():
    with pytest.raises(ValueError, match="forbid is 7"):
        MaskedTextKernel.from_pretrained("./nothing-here", **READ, forbid=7)


def test_settings_are_named_where_they_are_listed():
    with pytest.raises(ts.errors.UsageError, match=r"bogus.*reveal"):
        specs.kernel("masked_text('./nothing-here', 6, 4, bogus=3)")
    with pytest.raises(ts.errors.UsageError, match=r"bogus.*reveal"):
        specs.kernel("small_text('./nothing-here', 4, bogus=3)")


def test_a_piece_of_a_word_without_its_beginning_is_text():
    words = Words(text.tokenizer(words=["the", "##y", "b"]))
    ids = [words.tokenizer.convert_tokens_to_ids(t) for t in ("##y", "the", "##y")]
    assert words.texts(torch.tensor([ids])) == ["y they"]


def test_what_does_not_fit_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="reads 40 tokens, got a length of 42"):
        MaskedTextKernel.from_pretrained(bert, **(READ | {"length": 40}))
    with pytest.raises(CheckpointError, match=r"there is no folder ./nothing-here"):
        MaskedTextKernel.from_pretrained("./nothing-here", **READ)
    with pytest.raises(CheckpointError, match="name is empty"):
        MaskedTextKernel.from_pretrained("", **READ)
    text.tokenizer(words=[*text.WORDS, "more", "words"]).save_pretrained(folder := tmp_path / "tokens")
    other = with_config(bert, tmp_path / "other")
    for file in folder.iterdir():
        (Path(other) / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="the tokenizer has token 19, the network knows 18: it is of another model"):
        MaskedTextKernel.from_pretrained(other, **READ)
    text.tokenizer(marks=False, mask=None).save_pretrained(folder)
    for file in folder.iterdir():
        (Path(other) / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"says no mask token: give its number, mask="):
        MaskedTextKernel.from_pretrained(other, **READ)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("the zebra", "knows no tokens for a part of 'the zebra'"),
        ("the film was good bad a", "a prompt of 6 tokens leaves no room in length=6"),
        (["the"], "a prompt is list, expected a text"),
        ("the [MASK]", r"the mask token stands in 'the \[MASK\]'"),
        ("\ud800", "cannot encode"),
    ],
)
def test_prompts_that_cannot_be_encoded_are_refused(bert, prompt, said):
    with pytest.raises((TypeError, ValueError), match=said):
        MaskedTextKernel.from_pretrained(bert, **READ).encode([prompt])
