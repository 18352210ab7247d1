"""Multi-head attention, the operation shared by the text encoder, the autoencoder and the UNet.

Attention Is All You Need (arXiv 1706.03762), eq. 1: softmax(Q Kᵀ / sqrt(d_head)) V.
"""

from torch import nn
from torch.nn import functional as F


def split_heads(x, n_heads):
    """(batch, tokens, channels) -> (batch, heads, tokens, channels / heads)"""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(batch, heads, tokens, channels / heads) -> (batch, tokens, channels)"""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Each token looks at all tokens of its own sequence.

    Args:
        n_heads: number of heads; divides d_embed.
        d_embed: channels of the tokens.
        in_proj_bias: whether the projection to queries, keys and values has a bias.
    """

    def __init__(self, n_heads, d_embed, in_proj_bias=True):
        super().__init__()
        self.n_heads = n_heads
        self.in_proj = nn.Linear(d_embed, 3 * d_embed, bias=in_proj_bias)  # queries, keys, values in one product
        self.out_proj = nn.Linear(d_embed, d_embed)

    def forward(self, x, causal=False):
        """(batch, tokens, channels) -> the same shape; `causal` hides the tokens that come later."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))


class CrossAttention(nn.Module):
    """Each token of the picture looks at all tokens of the context.

    Args:
        n_heads: number of heads; divides d_embed.
        d_embed: channels of the picture's tokens.
        d_cross: channels of the context's tokens.
    """

    def __init__(self, n_heads, d_embed, d_cross):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_embed, d_embed, bias=False)
        self.k_proj = nn.Linear(d_cross, d_embed, bias=False)
        self.v_proj = nn.Linear(d_cross, d_embed, bias=False)
        self.out_proj = nn.Linear(d_embed, d_embed)

    def forward(self, x, context):
        """x (batch, tokens, d_embed), context (batch, context tokens, d_cross) -> the shape of x"""
        q = split_heads(self.q_proj(x), self.n_heads)
        k = split_heads(self.k_proj(context), self.n_heads)
        v = split_heads(self.v_proj(context), self.n_heads)
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
