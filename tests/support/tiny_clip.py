"""Tiny CLIPs and classifiers with random weights, saved as real checkpoints, and a CLIP in open_clip's own layout."""

import tokenizers
import torch
import transformers
from torch import nn


def tokenizer():
    """One token a byte, 256 inside words, 256 at their ends, and the two marks."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=77)


def image_processor(kind="CLIP", **config):
    name = f"{kind}ImageProcessor"
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**config)


@torch.no_grad()
def stirred(model, seed=0, gain=1.0):
    """`model` with matrices of variance gain² / fan-in, so that outputs depend on inputs, and biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim:
            scale = gain * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            offset = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0
            weight.copy_(offset + scale * torch.randn(weight.shape, generator=generator))
    return model.eval()


def clip(folder, size=32, seed=0):
    """A CLIPModel on images of `size`, with its processor."""
    tower = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "hidden_size": 24,
            "vocab_size": 514,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
        vision_config={**tower, "hidden_size": 32, "image_size": size, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=4.6,
    )
    stirred(transformers.CLIPModel(config), seed).save_pretrained(folder)
    images = image_processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer()).save_pretrained(folder)
    return folder


def classifier(folder, labels=("cat", "dog", "newt", "owl")):
    """A ViT that stretches images to 32 × 32 by bilinear interpolation."""
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    stirred(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    image_processor("ViT", size={"height": 32, "width": 32}, image_std=(0.4, 0.5, 0.6)).save_pretrained(folder)
    return folder


class Block(nn.Module):
    """A residual block as open_clip names it; `mask` is None or (length, length)."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads, layers, size, patch, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Stack(width, heads, layers)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """A CLIP whose state dict is open_clip's, of 16 heads as ViT-H-14, on images of 224."""

    def __init__(self, out=16, vocabulary=514, length=77):
        super().__init__()
        self.visual = Visual(64, 16, 3, 224, 56, out)
        self.transformer = Stack(32, 16, 2)
        self.token_embedding = nn.Embedding(vocabulary, 32)
        self.positional_embedding = nn.Parameter(torch.zeros(length, 32))
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.zeros(32, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def text(self, tokens):
        """Tokens (n, length), padded with 0 after the end mark, which has the largest index."""
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection
