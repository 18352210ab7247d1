"""Multi-head attention, the operation shared by the text encoder, the autoencoder and the UNet.

Attention Is All You Need (arXiv 1706.03762), section 3.2.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(d_head)) v, eq. 1.

    Written out, for a mask that is 0 where a token may look and -infinity where it may not, this is

        scores = q @ k.transpose(-1, -2) / d_head**0.5 + mask        # (batch, heads, tokens, context tokens)
        return scores.softmax(dim=-1) @ v

    PyTorch's fused call computes the same without ever holding all the scores.

    Args:
        q: (batch, heads, tokens, d_head), the queries.
        k, v: (batch, heads, context tokens, d_head), the keys and values.
        causal: whether to hide the tokens that come later.

    Returns:
        (batch, heads, tokens, d_head). Memory is linear in the number of tokens.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """Returns (batch, tokens, channels) as (batch, heads, tokens, channels / heads)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Returns (batch, heads, tokens, channels / heads) as (batch, tokens, channels)."""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Each token looks at all tokens of its own sequence.

    Args:
        n_heads: number of heads; divides d_embed.
        d_embed: channels of the tokens.
        in_proj_bias: whether the projection to queries, keys and values has a bias.
    """

    attend = staticmethod(attend)

    def __init__(self, n_heads: int, d_embed: int, in_proj_bias: bool = True):
        super().__init__()
        self.n_heads = n_heads
        self.in_proj = nn.Linear(d_embed, 3 * d_embed, bias=in_proj_bias)  # queries, keys, values in one product
        self.out_proj = nn.Linear(d_embed, d_embed)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(batch, tokens, d_embed) -> the same shape; `causal` hides the tokens that come later."""
        q, k, v = (split_heads(part, self.n_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        return self.out_proj(merge_heads(self.attend(q, k, v, causal)))


class CrossAttention(nn.Module):
    """Each token of the picture looks at all tokens of the context.

    Args:
        n_heads: number of heads; divides d_embed.
        d_embed: channels of the picture's tokens.
        d_cross: channels of the context's tokens.
    """

    def __init__(self, n_heads: int, d_embed: int, d_cross: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_embed, d_embed, bias=False)
        self.k_proj = nn.Linear(d_cross, d_embed, bias=False)
        self.v_proj = nn.Linear(d_cross, d_embed, bias=False)
        self.out_proj = nn.Linear(d_embed, d_embed)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (batch, tokens, d_embed), context (batch, context tokens, d_cross) -> the shape of x"""
        q = split_heads(self.q_proj(x), self.n_heads)
        k = split_heads(self.k_proj(context), self.n_heads)
        v = split_heads(self.v_proj(context), self.n_heads)
        return self.out_proj(merge_heads(attend(q, k, v)))
