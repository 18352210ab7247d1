import pytest
import torch

from attention import CrossAttention, SelfAttention, attend


def formula(q, k, v, mask=0.0):
    """Eq. 1 in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_tokens, n_context, d_head", [(9, 9, 8), (700, 77, 40), (1, 3, 7)])
def test_attention_is_the_formula(n_tokens, n_context, d_head):
    q, k, v = draw(2, 3, n_tokens, d_head), draw(2, 3, n_context, d_head, seed=1), draw(2, 3, n_context, d_head, seed=2)
    torch.testing.assert_close(attend(q, k, v).double(), formula(q, k, v), atol=1e-6, rtol=0)


def test_causal_attention_hides_what_comes_later():
    q, k, v = (draw(1, 2, 6, 4, seed=seed) for seed in range(3))
    mask = torch.full((6, 6), -torch.inf).triu(1).double()
    torch.testing.assert_close(attend(q, k, v, causal=True).double(), formula(q, k, v, mask), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_pytorchs(bias):
    ours = SelfAttention(4, 16, in_proj_bias=bias)
    theirs = torch.nn.MultiheadAttention(16, 4, bias=True, batch_first=True)
    theirs.in_proj_weight.copy_(ours.in_proj.weight)
    theirs.in_proj_bias.copy_(ours.in_proj.bias if bias else torch.zeros(48))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = draw(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=0)


def test_cross_attention_equals_pytorchs():
    ours = CrossAttention(4, 16, 12)
    theirs = torch.nn.MultiheadAttention(16, 4, bias=False, kdim=12, vdim=12, batch_first=True)
    for name in "qkv":
        getattr(theirs, f"{name}_proj_weight").copy_(getattr(ours, f"{name}_proj").weight)
    theirs.out_proj.weight.copy_(ours.out_proj.weight)
    ours.out_proj.bias.zero_()
    x, context = draw(2, 5, 16), draw(2, 3, 12, seed=1)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0], atol=1e-6, rtol=0)
