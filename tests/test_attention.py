import pytest
import torch
from torch.nn import functional as F

import attention
from attention import SelfAttention, attend


def tokens(n_tokens, d_head, n_context=None, scale=1.0):
    """q, k, v in bfloat16, whose scores have about this deviation."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(2, 3, n, d_head, generator=generator)
    q, k, v = draw(n_tokens) * scale, draw(n_context or n_tokens), draw(n_context or n_tokens)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def formula(q, k, v):
    """Eq. 1 in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("d_head", [40, 64, 80, 7])
@pytest.mark.parametrize("n_tokens, n_context", [(1024, 1024), (700, 900), (1, 600)])
@torch.no_grad()
def test_blocks_are_the_formula(d_head, n_tokens, n_context, monkeypatch):
    q, k, v = tokens(n_tokens, d_head, n_context)
    exact = formula(q, k, v)
    of_torch = (F.scaled_dot_product_attention(q, k, v).double() - exact).square().mean().sqrt()
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    result = attend(q, k, v)
    assert result.shape == q.shape and result.dtype == torch.bfloat16
    assert (result.double() - exact).square().mean().sqrt() <= 2.2 * of_torch


@pytest.mark.parametrize("scale", [3.0, 10.0])
@torch.no_grad()
def test_the_shift_keeps_large_scores_fine(scale):
    """Scores rounded to bfloat16 as they are would be 7 to 11 times as far off as PyTorch's."""
    q, k, v = tokens(1024, 40, scale=scale)
    exact = formula(q, k, v)
    error = (attend(q, k, v).double() - exact).square().mean().sqrt()
    assert error <= 4.5 * (F.scaled_dot_product_attention(q, k, v).double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("height", [40, 55, 70, 300])
@pytest.mark.parametrize("place", [0, 101])
@torch.no_grad()
def test_two_keys_may_stand_out(place, height):
    """Key 101 is not looked at for the shift: up to some 55 scores are shifted far enough, beyond PyTorch steps in."""
    q, k, v = tokens(1024, 64)
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, place, 0], k[:, :, place + 1, 0] = 8 * height, 8 * height - 8
    torch.testing.assert_close(attend(q, k, v).double(), formula(q, k, v), atol=0.03, rtol=0.01)


@pytest.mark.parametrize("common", [-1000.0, 0.0, 1000.0])
@torch.no_grad()
def test_what_all_scores_have_in_common_does_not_count(common):
    q, k, v = tokens(1024, 64)
    q[..., 0], k[..., 0] = 8, common
    torch.testing.assert_close(attend(q, k, v).double(), formula(q, k, v), atol=0.02, rtol=0)


@pytest.mark.parametrize("scale", [1e4, 1e20])
@torch.no_grad()
def test_scores_of_any_size_are_pytorchs(scale):
    q, k, v = tokens(600, 40, scale=scale)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("case", ["few tokens", "causal", "float32", "gradients"])
def test_elsewhere_pytorch_attends(case, monkeypatch):
    monkeypatch.setattr(attention, "attend_in_blocks", None)
    q, k, v = tokens(77 if case == "few tokens" else 600, 40)
    if case == "float32":
        q, k, v = q.float(), k.float(), v.float()
    with torch.set_grad_enabled(case == "gradients"):
        result = attend(q, k, v, causal=case == "causal")
    if case != "causal":
        torch.testing.assert_close(result.double(), formula(q, k, v), atol=0.02, rtol=0)


@torch.no_grad()
def test_a_layer_uses_them():
    layer = SelfAttention(2, 80).bfloat16()
    x = torch.randn(1, 1024, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (layer(x).float() - layer.float()(x.float())).abs().max() < 0.02
