"""The text encoder of SD 1.x: the text half of OpenAI's CLIP ViT-L/14 (arXiv 2103.00020)."""

from dataclasses import dataclass

import torch
from torch import nn

from attention import SelfAttention


@dataclass(frozen=True)
class CLIPConfig:
    """The sizes of the text encoder; the defaults are SD 1.5's."""

    n_vocab: int = 49408  # rows of the token embedding; the last two are <|startoftext|> and <|endoftext|>
    n_tokens: int = 77  # positions, start and end token included
    d_embed: int = 768
    d_mlp: int = 3072
    n_layers: int = 12
    n_heads: int = 12
    words: tuple[str, ...] = ()  # the words it was trained on, where these are few


class CLIPLayer(nn.Module):
    """A transformer layer: causal self-attention, then a two-layer perceptron, each on a normalised input."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_embed)
        self.attention = SelfAttention(config.n_heads, config.d_embed)
        self.norm_2 = nn.LayerNorm(config.d_embed)
        self.linear_1 = nn.Linear(config.d_embed, config.d_mlp)
        self.linear_2 = nn.Linear(config.d_mlp, config.d_embed)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x), causal=True)
        hidden = self.linear_1(self.norm_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden)  # QuickGELU, as OpenAI trained CLIP
        return x + self.linear_2(hidden)


class CLIP(nn.Module):
    """Token ids in, one vector a token out: the `context` that the UNet attends to."""

    def __init__(self, config=CLIPConfig()):
        super().__init__()
        self.config = config
        # Zeros, as weights come from a checkpoint: drawing random ones takes seconds, on the meta device too.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(config.n_vocab, config.d_embed), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.zeros(config.n_tokens, config.d_embed), freeze=False)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_embed)

    def forward(self, tokens):
        """Encodes token ids.

        Args:
            tokens: (batch, tokens) integers below n_vocab, at most n_tokens of them a row.

        Returns:
            (batch, tokens, d_embed) in the dtype of the weights.
        """
        return self.transform(self.token_embedding(tokens))

    def transform(self, x, n_layers=None):
        """Encodes tokens that are vectors already.

        Args:
            x: (batch, tokens, d_embed), rows of the token embedding or what stands for them.
            n_layers: how many of the layers to go through before the last norm; None is all.

        Returns:
            (batch, tokens, d_embed) in the dtype of the weights.
        """
        x = x + self.position_embedding.weight[: x.shape[1]]
        for layer in self.layers[:n_layers]:
            x = layer(x)
        return self.final_norm(x)
