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

    With 4,096 tokens and heads of 40, it took 1/1.3 to 1/1.7 of PyTorch's time on AMD's Zen 4 and 5; that was before
    queries had their rest beside them. On Intel's processors with AMX, whose matrix units PyTorch's own attention uses,
    it took 84 ms against 45: there PyTorch attends.
    """
    return onednn_computes(torch.bfloat16) and not torch.cpu._is_amx_tile_supported()


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """`attention.attend` with plain products of bfloat16, where there are many keys.

    Softmax does not change when all scores of a query are shifted. Here they are shifted so far below 0 that their
    sigmoid is their exponential: by MARGIN more than the largest score among some 64 of the keys. The shift is one more
    column of queries, with a column of ones beside the keys. The sums that softmax divides by come from a column of
    ones beside the values. They also tell where a score was too large for this, by 55 or more, or too large for
    bfloat16 to shift: then PyTorch attends.

    Scaled queries that are rounded to bfloat16 would change large scores by more than softmax forgives. So what the
    rounding drops is put beside them, in columns of its own with the same keys.

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
