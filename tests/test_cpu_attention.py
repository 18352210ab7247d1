import math

import pytest
import torch
from torch.nn import functional as F

import cpu.attention
from attention import SelfAttention
from cpu.attention import attend_in_blocks, onednn_computes
from cpu.packed import pack


@pytest.fixture(autouse=True)
def product_of_any_processor(monkeypatch):
    """Where oneDNN has no bfloat16, its product is computed in float32 and rounded, which is what it does."""
    if not onednn_computes(torch.bfloat16):
        monkeypatch.setattr(cpu.attention, "sigmoids", lambda q, k: (q.float() @ k.float().mT).sigmoid().bfloat16())


def tokens(n_tokens, d_head, n_context=None, scale=1.0):
    """q, k, v in bfloat16, whose scores have about this deviation."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d_head, generator=generator)
               for n in (n_tokens, n_context or n_tokens, n_context or n_tokens))
    return (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()


def formula(q, k, v):
    """Eq. 1 in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("d_head", [40, 64, 80, 7])
@pytest.mark.parametrize("n_tokens, n_context", [(1024, 1024), (700, 900), (1, 600)])
def test_blocks_are_the_formula(d_head, n_tokens, n_context, monkeypatch):
    q, k, v = tokens(n_tokens, d_head, n_context)
    exact = formula(q, k, v)
    of_torch = rms(F.scaled_dot_product_attention(q, k, v) - exact)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    result = attend_in_blocks(q, k, v)
    assert result.shape == q.shape and result.dtype == torch.bfloat16
    assert rms(result - exact) <= 2 * of_torch


@pytest.mark.parametrize("scale", [3.0, 10.0])
def test_the_shift_keeps_large_scores_fine(scale):
    """Scores rounded to bfloat16 as they are would be 7 to 11 times as far off as PyTorch's."""
    q, k, v = tokens(1024, 40, scale=scale)
    exact = formula(q, k, v)
    assert rms(attend_in_blocks(q, k, v) - exact) <= 2 * rms(F.scaled_dot_product_attention(q, k, v) - exact)


@pytest.mark.parametrize("d_head", [40, 64, 80])
def test_large_scores_may_be_tied(d_head):
    """Four keys in channels of their own, 256 times each, all score 30. Queries rounded to bfloat16 after scaling would tip
    the balance, with heads of 40 by 10% of the largest value."""
    _, k, v = tokens(4, d_head)
    k = torch.where(torch.arange(d_head) % 4 == torch.arange(4)[:, None], k.double(), 0)
    k = (6 * k / k.norm(dim=-1, keepdim=True)).bfloat16()
    q = (30 / 36 * d_head**0.5 * k.double().sum(2, keepdim=True)).bfloat16().expand(2, 3, 1024, d_head).contiguous()
    k, v = k.repeat(1, 1, 256, 1), v.repeat(1, 1, 256, 1)
    assert ((q.double() @ k.double().mT / d_head**0.5) - 30).abs().max() < 0.2
    exact = formula(q, k, v)
    assert rms(attend_in_blocks(q, k, v) - exact) <= 2 * rms(F.scaled_dot_product_attention(q, k, v) - exact)


@pytest.mark.parametrize("height", [40, 55, 70, 300])
@pytest.mark.parametrize("place", [0, 101])
def test_two_keys_may_stand_out(place, height):
    """Key 101 is not looked at for the shift: up to some 55 scores are shifted far enough, beyond PyTorch steps in."""
    q, k, v = tokens(1024, 64)
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, place, 0], k[:, :, place + 1, 0] = 8 * height, 8 * height - 8
    torch.testing.assert_close(attend_in_blocks(q, k, v).double(), formula(q, k, v), atol=0.03, rtol=0.01)


@pytest.mark.parametrize("common", [-1000.0, 0.0, 1000.0])
def test_what_all_scores_have_in_common_does_not_count(common):
    q, k, v = tokens(1024, 64)
    q[..., 0], k[..., 0] = 8, common
    torch.testing.assert_close(attend_in_blocks(q, k, v).double(), formula(q, k, v), atol=0.02, rtol=0)


@pytest.mark.parametrize("scale", [1e4, 1e20])
def test_scores_of_any_size_are_pytorchs(scale):
    q, k, v = tokens(600, 40, scale=scale)
    assert torch.equal(attend_in_blocks(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("case", ["few tokens", "causal", "float32", "gradients"])
def test_elsewhere_pytorch_attends(case, monkeypatch):
    monkeypatch.setattr(cpu.attention, "sigmoids", None)
    q, k, v = tokens(77 if case == "few tokens" else 600, 40)
    if case == "float32":
        q, k, v = q.float(), k.float(), v.float()
    with torch.set_grad_enabled(case == "gradients"):
        result = attend_in_blocks(q, k, v, causal=case == "causal")
    assert torch.equal(result, F.scaled_dot_product_attention(q, k, v, is_causal=case == "causal"))


@pytest.mark.parametrize("wins", [True, False])
def test_packing_puts_them_where_they_win(wins, monkeypatch):
    monkeypatch.setattr(cpu.attention, "blocks_win", lambda: wins)
    layer = pack(SelfAttention(2, 80))
    assert (layer.attend is attend_in_blocks) == wins
    x = torch.randn(1, 600, 80, generator=torch.Generator().manual_seed(0))
    assert layer(x).shape == x.shape


def test_shifted_sigmoids_are_exponentials():
    """What the method rests on: below -64, sigmoid is exp to the last digit of float32."""
    x = torch.linspace(-85, -64, 100, dtype=torch.float64)
    assert (x.sigmoid() / x.exp() - 1).abs().max() < 2**-24 and math.exp(-85) > torch.finfo(torch.float32).tiny
