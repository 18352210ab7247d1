"""Attention over thousands of tokens in bfloat16 on the CPU, for processors on which it beats PyTorch's own."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 512  # queries at a time: their weights stay in the cache
MARGIN = 64  # how far below 0 the scores are shifted


def onednn_computes(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN, which is in most builds of PyTorch, computes in a dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def blocks_win() -> bool:
    """Returns whether `attend_in_blocks` is the faster one on this processor (benchmarks/attention.py).

    4,096 tokens, heads of 40: on AMD's Zen 4 and 5 it took 1/1.3 to 1/1.7 of PyTorch's time, before queries had their
    rest beside them. Intel's processors with AMX compute PyTorch's products in tiles: there it took 84 ms against 45,
    and PyTorch attends.
    """
    return onednn_computes(torch.bfloat16) and not torch.cpu._is_amx_tile_supported()


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """`attention.attend` with plain products of bfloat16, where there are many keys.

    Softmax stays the same when a query's scores are all shifted, so they are shifted far below 0, where `sigmoids` is
    exp: by MARGIN more than the largest among some 64 keys. The shift is part of the product, as are the sums to divide
    by, which come from ones beside the values. Where they say that a score was too large for this, by 55 or more, or
    beyond what bfloat16 can shift, PyTorch attends.

    Rounding the scaled queries to bfloat16 would change large scores by more than softmax forgives. What that rounding
    drops stands beside them, and meets the same keys.

    Args:
        q: (batch, heads, tokens, d_head).
        k, v: (batch, heads, context tokens, d_head).
        causal: as for `attend`; PyTorch then attends, as it does for few keys, other dtypes than bfloat16 and training.

    Returns:
        (batch, heads, tokens, d_head), with at most twice the error of PyTorch's own.
    """
    if k.shape[2] <= BLOCK or causal or q.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    d_head = q.shape[-1]
    scaled_q = q.float() * d_head**-0.5
    rounded_q = scaled_q.to(q.dtype)
    rest = (scaled_q - rounded_q).to(q.dtype)  # all zero where 1 / sqrt(d_head) is a power of two
    shift = -MARGIN - (rounded_q @ k[:, :, :: k.shape[2] // 64].mT).amax(-1, keepdim=True)
    ones = torch.ones_like(k[..., :1])
    if math.frexp(d_head**-0.5)[0] == 0.5:
        padded_q, padded_k = pad_to_16(rounded_q, shift), pad_to_16(k, ones)
    else:
        padded_q, padded_k = pad_to_16(rounded_q, rest, shift), pad_to_16(k, k, ones)
    padded_v = pad_to_16(v, ones)

    result = torch.empty(*q.shape[:-1], padded_v.shape[-1], dtype=q.dtype)
    for q_head, k_head, v_head, result_head in zip(*(x.flatten(0, 1) for x in (padded_q, padded_k, padded_v, result))):
        for q_block, result_block in zip(q_head.split(BLOCK), result_head.split(BLOCK)):
            torch.mm(sigmoids(q_block, k_head), v_head, out=result_block)

    sums = result[..., d_head : d_head + 1]
    if sums.min() > math.exp(-MARGIN - 8) and sums.max() < math.exp(-8):
        return result[..., :d_head] / sums
    return F.scaled_dot_product_attention(q, k, v)


def sigmoids(q: Tensor, k: Tensor) -> Tensor:
    """sigmoid(q kᵀ), which oneDNN takes on the way out of the product, before the result is rounded to bfloat16."""
    return torch.ops.mkldnn._linear_pointwise(q, k, None, "sigmoid", [], "")


def pad_to_16(*parts: Tensor) -> Tensor:
    """Returns the parts side by side, (batch, heads, tokens, …), with zeros up to a width that vector units divide."""
    x = torch.cat(parts, dim=-1)
    return F.pad(x, (0, -x.shape[-1] % 16))
