"""Tiny masked language models: a network that is enumerated, checkpoints with tokenizers, code of their own."""

import itertools
import json
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn

from tests.support.tiny_clip import stirred
from treesearch.backends.exact.enumerable import enumerate_tilt

F64 = torch.float64
WORDS = ("the", "film", "was", "good", "bad", "a", "very", "plot", "{", "}", '"', ":", ",")


class Net(nn.Module):
    """Logits of tokens and their places: a sum over all positions through a hidden layer, in float64."""

    def __init__(self, vocabulary, length, width=8, seed=0):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocabulary + 1, length, width, dtype=F64))
        self.hidden = nn.Parameter(torch.empty(width, width, dtype=F64))
        self.out = nn.Parameter(torch.empty(width, length, vocabulary + 1, dtype=F64))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=F64))
            self.tokens /= length**0.5
            self.out /= 2
        self.requires_grad_(False)

    def forward(self, x):
        seen = self.tokens[x, torch.arange(x.shape[1], device=x.device)].sum(1)
        return torch.einsum("nw,wlv->nlv", (seen @ self.hidden).tanh(), self.out)


class Table(nn.Module):
    """The true conditionals of a table of sequences, as logits: one joint law in any order."""

    def __init__(self, length=3, vocabulary=3, seed=0):
        super().__init__()
        self.vocabulary = vocabulary
        draw = torch.Generator().manual_seed(seed)
        rows = -torch.rand(vocabulary**length, generator=draw, dtype=F64).log()
        self.data = nn.Buffer(rows / rows.sum())
        self.every = nn.Buffer(torch.tensor(list(itertools.product(range(vocabulary), repeat=length))))

    def forward(self, x):
        agree = ((x[:, None] == self.every) | (x[:, None] == self.vocabulary)).all(2)
        onehot = nn.functional.one_hot(self.every, self.vocabulary).double()
        return torch.einsum("sq,qiv->siv", agree * self.data, onehot).log()


def states(vocabulary, length):
    """All (V + 1)^L states, the mask being token V; last token fastest."""
    return torch.tensor(list(itertools.product(range(vocabulary + 1), repeat=length)))


def matrices(network, alpha, vocabulary, length, temperature=1.0, known=None):
    """P[t - 1][x_t, x_s] from the formula: every position apart, revealed with its probability."""
    every, steps = states(vocabulary, length), []
    p = (network(every)[..., :vocabulary] / temperature).softmax(-1)
    masked = every == vocabulary
    for t in range(1, len(alpha)):
        reveal = (alpha[t - 1] - alpha[t]) / (1 - alpha[t])
        rows = torch.ones(len(every), len(every), dtype=F64)
        for i in range(length):
            law = torch.cat([reveal * p[:, i], torch.full((len(every), 1), 1 - reveal, dtype=F64)], 1)
            law = torch.where(masked[:, i, None], law, nn.functional.one_hot(every[:, i], vocabulary + 1).double())
            rows *= law[:, every[:, i]]
        steps.append(rows)
    return torch.stack(steps)


def tilted(network, alpha, reward, *, vocabulary, length, lam=1.0, temperature=1.0, start=None):
    """log Z, π(x_0) and soft values over `states` under exp(λ reward), from the state that is known at T."""
    every = states(vocabulary, length)
    start = torch.full((length,), vocabulary) if start is None else start
    prior = (every == start).all(1).double()
    return enumerate_tilt(prior, matrices(network, alpha, vocabulary, length, temperature), reward, lam)


def index(x, vocabulary):
    """Row of `states` that each state is."""
    powers = (vocabulary + 1) ** torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    return (x * powers).sum(1)


def tokenizer(*, marks=True, mask="[MASK]", unknown="[UNK]", words=WORDS):
    """Words apart by spaces; with marks around a text as BERT has them."""
    special = [token for token in ("[PAD]", unknown, "[CLS]", "[SEP]", mask) if token]
    table = {word: i for i, word in enumerate([*special, *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token=unknown))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    inner.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=False)
    if marks:
        pair = [("[CLS]", table["[CLS]"]), ("[SEP]", table["[SEP]"])]
        inner.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pair)
    named = {"pad_token": "[PAD]", "unk_token": unknown, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": mask}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in named.items() if v})


def config_of(kind, words, **more):
    """A small configuration of BERT's form."""
    return kind(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


def bert(folder, seed=0):
    """A BertForMaskedLM on the words above, saved with its tokenizer."""
    words = tokenizer()
    stirred(transformers.BertForMaskedLM(config_of(transformers.BertConfig, words)), seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def classifier(folder, labels=("unacceptable", "acceptable"), seed=1):
    """A BertForSequenceClassification on the words above, saved with its tokenizer."""
    words, named = tokenizer(), dict(enumerate(labels))
    config = config_of(transformers.BertConfig, words, id2label=named, label2id={v: k for k, v in named.items()})
    stirred(transformers.BertForSequenceClassification(config), seed, 3.0).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def causal(folder, seed=2):
    """A GPT-2 on the words above, saved with its tokenizer."""
    words = tokenizer(marks=False, mask=None)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=40, bos_token_id=None, eos_token_id=None
    )
    stirred(transformers.GPT2LMHeadModel(config), seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "KIND"

    def __init__(self, vocab_size=20, **more):
        super().__init__(**more)
        self.vocab_size = vocab_size


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.head = nn.Linear(8, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, timesteps=None):
        x = self.embed(input_ids)
        x = x + x.cumsum(1) + (0 if timesteps is None else timesteps[:, None, None])
        return MaskedLMOutput(logits=self.head(x.tanh()))
"""


def with_own_code(folder, kind, words, auto="AutoModel", **says):
    """A checkpoint whose code comes with it, as LLaDA's, Dream's and MDLM's do."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "modeling_own.py").write_text(CODE.replace("KIND", kind))
    words.save_pretrained(folder)
    scope = {}
    exec(CODE.replace("KIND", kind), scope)
    network = stirred(scope["OwnModel"](scope["OwnConfig"](vocab_size=says.pop("vocab_size", len(words)))))
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "modeling_own.OwnConfig", auto: "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config | says))
    return str(folder), network
