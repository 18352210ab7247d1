"""Multi-head attention, the operation shared by the text encoder, the autoencoder and the UNet.

Attention Is All You Need (arXiv 1706.03762), eq. 1: softmax(Q Kᵀ / sqrt(d_head)) V.
"""

import torch
from torch import nn
from torch.nn import functional as F

BLOCK = 512  # queries at a time on the CPU: their scores stay in the cache


def attend(q, k, v, causal=False):
    """softmax(q kᵀ / sqrt(d_head)) v, eq. 1.

    Args:
        q: (batch, heads, tokens, d_head).
        k, v: (batch, heads, context tokens, d_head).
        causal: whether to hide the tokens that come later.

    Returns:
        (batch, heads, tokens, d_head). Memory is linear in the number of tokens.
    """
    in_blocks = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] > BLOCK
    if in_blocks and not causal and not torch.is_grad_enabled():
        return attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attend_in_blocks(q, k, v):
    """`attend` with plain products of bfloat16, for thousands of tokens on the CPU: PyTorch's own takes twice the time.

    Such a product rounds the scores to 8 bits. Softmax does not change when a query's scores are all shifted, so they are
    shifted within the product, by the largest among every 8th key: where they matter they are then near 0, and fine.
    """
    d_head = q.shape[-1]
    q = q * d_head**-0.5
    shift = torch.cat([(block @ k[:, :, ::8].mT).amax(-1, keepdim=True) for block in q.split(BLOCK, dim=2)], dim=2)
    pad = -(d_head + 1) % 16  # heads of 41 would leave the vector units a remainder
    q = F.pad(torch.cat([q, -shift], dim=-1), (0, pad))
    k = F.pad(torch.cat([k, torch.ones_like(k[..., :1])], dim=-1), (0, pad))
    v = F.pad(v, (0, -d_head % 16)).contiguous()
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for out_head, q_head, k_head, v_head in zip(*(x.flatten(0, 1) for x in (out, q, k, v))):
        for out_block, q_block in zip(out_head.split(BLOCK), q_head.split(BLOCK)):
            torch.mm((q_block @ k_head.T).softmax(dim=-1), v_head, out=out_block)
    return out[..., :d_head]


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
        return self.out_proj(merge_heads(attend(q, k, v, causal)))


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
        return self.out_proj(merge_heads(attend(q, k, v)))
