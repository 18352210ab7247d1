"""3x3 convolutions in float32 with a quarter of the products (Lavin and Gray, arXiv 1509.09308).

A tile of 4x4 pixels of the result depends on 6x6 pixels d of the picture. Computed directly, it takes 144 products for
each pair of channels. But a convolution is a product of polynomials, and the product of two, of degree 5, is known by
its values at six points, where values are just multiplied: 6 x 6 = 36 products in two dimensions. With a kernel g, and
matrices that evaluate and interpolate (eq. 8):

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A

In float32 the result is as exact as that of PyTorch's own convolutions. In bfloat16 it would not be.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)  # and infinity; with the paper's 0, ±1, ±2, errors are twice as large
TILES = 128  # at a time: what belongs to them stays in the cache

spare = []  # memory for transformed weights, one tensor for each call at a time: fresh memory takes four times as long


@functools.cache
def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """Returns Bᵀ (6, 6), G ⊗ G (36, 9), for kernels that are flattened, and Aᵀ (4, 6)."""
    b, g, a = values_at_points(6).inverse().T, values_at_points(3), values_at_points(4).T
    return b.float(), torch.kron(g, g).float(), a.float()


def values_at_points(n: int) -> Tensor:
    """Returns (6, n) float64, which takes n coefficients to a polynomial's values; its highest is that at infinity."""
    return torch.tensor([[point**k for k in range(n)] for point in POINTS] + [[0] * (n - 1) + [1]], dtype=torch.float64)


@contextmanager
def transformed(weight: Tensor) -> Iterator[Tensor]:
    """Lends G g Gᵀ: (channels out, channels in, 3, 3) float32 -> (36, channels in, channels out)"""
    n_out, n_in = weight.shape[:2]
    size = 36 * n_out * n_in
    try:
        memory = spare.pop()
    except IndexError:
        memory = torch.empty(0)
    if len(memory) < size:
        with torch.inference_mode(False):  # or else it could be written to in inference mode alone
            memory = torch.empty(size)
    values = memory[:size].view(36, -1)
    torch.mm(matrices()[1], weight.permute(2, 3, 0, 1).reshape(9, -1), out=values)
    yield values.view(36, n_out, n_in).mT
    spare.append(memory)


def transform(matrix: Tensor, tiles: Tensor) -> Tensor:
    """Returns M t Mᵀ for each tile t: (m, n) and (n, n, ...) -> (m, m, number of tiles)"""
    rows = matrix @ tiles.reshape(len(tiles), -1)
    return matrix @ rows.view(len(matrix), len(tiles), -1)


@torch.autocast("cpu", enabled=False)
def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with a padding of 1, in float32.

    Args:
        x: (batch, channels in, h, w).
        weight: (channels out, channels in, 3, 3).
        bias: (channels out,).

    Returns:
        (batch, channels out, h, w) in channels_last.
    """
    b_t, _, a_t = matrices()
    x = x.permute(0, 2, 3, 1)  # (batch, h, w, channels)
    b, h, w, n_in = x.shape
    n_down, n_across, n_out = -(-h // 4), -(-w // 4), len(bias)  # of tiles
    out = torch.empty(b, n_down, 4, n_across, 4, n_out)
    step = max(1, TILES // (b * n_across))
    with transformed(weight) as weight:
        for begin in range(0, n_down, step):
            end = min(begin + step, n_down)
            top, bottom = 4 * begin - 1, 4 * end + 1  # of the rows that these tiles depend on
            rows = x[:, max(top, 0) : bottom]
            rows = F.pad(rows, (0, 0, 1, 4 * n_across + 1 - w, max(-top, 0), max(bottom - h, 0)))
            tiles = rows.unfold(1, 6, 4).unfold(2, 6, 4)  # (batch, down, across, channels, 6, 6)
            values = transform(b_t, tiles.permute(4, 5, 0, 1, 2, 3)).view(36, -1, n_in)
            values = torch.bmm(values, weight).view(6, 6, -1)
            pixels = transform(a_t, values).view(4, 4, b, end - begin, n_across, n_out)
            torch.add(pixels.permute(2, 3, 0, 4, 1, 5), bias, out=out[:, begin:end])
    return out.view(b, 4 * n_down, 4 * n_across, n_out)[:, :h, :w].permute(0, 3, 1, 2)
