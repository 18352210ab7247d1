"""Multi-head attention, the operation shared by the text encoder, the autoencoder and the UNet.

Attention Is All You Need (arXiv 1706.03762), eq. 1: softmax(Q Kᵀ / sqrt(d_head)) V.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

BLOCK = 512  # queries at a time on the CPU: their weights stay in the cache
MARGIN = 64  # how far below 0 the scores of `attend_in_blocks` are shifted


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
    if in_blocks and not causal and not torch.is_grad_enabled() and onednn_computes(q.dtype):
        return attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def onednn_computes(dtype):
    """Returns whether oneDNN, which is in most builds of PyTorch, computes in a dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attend_in_blocks(q, k, v):
    """`attend` with plain products of bfloat16, for thousands of tokens on the CPU: PyTorch's own takes 1.6 times as long.

    Far below 0, sigmoid is exp, and oneDNN computes it on the way out of a product, before the result is rounded. Softmax
    stays the same when a query's scores are all shifted, so they are shifted there, within the product: by MARGIN more
    than the largest among some 64 keys. The sums to divide by come from ones beside the values. Where they say that a
    score was too large for this, by 55 or more, or beyond what bfloat16 can shift, PyTorch attends.
    """
    d_head = q.shape[-1]
    pad = 16 - d_head % 16  # at least 1, for the shift and the ones; without a remainder for the vector units
    padded_q, padded_k, padded_v = (F.pad(x, (0, pad)) for x in (q * d_head**-0.5, k, v))
    padded_q[..., d_head] = -MARGIN - (padded_q @ padded_k[:, :, :: k.shape[2] // 64].mT).amax(-1)
    padded_k[..., d_head] = padded_v[..., d_head] = 1
    for q_head, k_head, v_head in zip(*(x.flatten(0, 1) for x in (padded_q, padded_k, padded_v))):
        for block in q_head.split(BLOCK):
            weights = torch.ops.mkldnn._linear_pointwise(block, k_head, None, "sigmoid", [], "")
            torch.mm(weights, v_head, out=block)  # in the place of the queries, to save memory
    sums = padded_q[..., d_head:d_head + 1]
    if sums.min() > math.exp(-MARGIN - 8) and sums.max() < math.exp(-8):
        return padded_q[..., :d_head] / sums
    return F.scaled_dot_product_attention(q, k, v)


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
