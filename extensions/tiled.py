"""Decoding and encoding in tiles, for pictures whose decoding would not fit into memory at once.

    models["decoder"] = TiledDecoder(models["decoder"], tile_size=512)
    models["encoder"] = TiledEncoder(models["encoder"], tile_size=512)

The parts between full resolution and an eighth of it take nearly all of the memory, and a pixel there depends only on those
near it: these run on overlapping square tiles, which are blended. The parts in the middle, where each pixel looks at all
others, see the whole picture. Group norms see one tile at a time, so that the result is not quite that of the network at
once: benchmarks/results/memory.md says by how much.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TiledDecoder(nn.Module):
    """A decoder that is called like `decoder.VAE_Decoder` and works in the memory that one tile takes.

    Args:
        decoder: a `decoder.VAE_Decoder`.
        tile_size: side of a tile in pixels, a multiple of 32 from 64 on. Raises ValueError for others.
    """

    def __init__(self, decoder: nn.Module, tile_size: int):
        super().__init__()
        check_tile_size(tile_size)
        self.decoder, self.tile_size = decoder, tile_size
        self.config = decoder.config

    def forward(self, latents: Tensor) -> Tensor:
        """(batch, 4, h / 8, w / 8) -> (batch, 3, h, w), about [-1, 1]; float32 where there is more than one tile"""
        x = self.decoder.look_around(latents)
        return blend_tiles(self.decoder.enlarge, x, self.tile_size // 8, scale=8)


class TiledEncoder(nn.Module):
    """An encoder that is called like `encoder.VAE_Encoder` and works in the memory that one tile takes.

    Args: as TiledDecoder's.
    """

    def __init__(self, encoder: nn.Module, tile_size: int):
        super().__init__()
        check_tile_size(tile_size)
        self.encoder, self.tile_size = encoder, tile_size
        self.config = encoder.config

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """As `encoder.VAE_Encoder.forward`."""
        x = blend_tiles(self.encoder.reduce, images, self.tile_size, scale=1 / 8)
        return self.encoder.sample(self.encoder.look_around(x.to(images.dtype)), noise)


def blend_tiles(network: Callable, x: Tensor, size: int, scale: float) -> Tensor:
    """Calls a network on overlapping tiles of x, and puts what it returns together.

    Args:
        network: (batch, channels, h, w) -> (batch, others, scale * h, scale * w)
        x: (batch, channels, height, width).
        size: side of a tile of x. Tiles overlap by a quarter at least; weights fall off linearly towards their edges.
        scale: size of what the network returns over that of what it is given.

    Returns:
        (batch, others, scale * height, scale * width), float32 where there is more than one tile.
    """
    height, width = x.shape[2:]
    if height <= size and width <= size:
        return network(x)
    total, weights = 0, torch.zeros(int(height * scale), int(width * scale), device=x.device)
    for top in tile_starts(height, size):
        for left in tile_starts(width, size):
            tile = network(x[:, :, top : top + size, left : left + size]).float()
            if isinstance(total, int):
                total = torch.zeros(*tile.shape[:2], *weights.shape, device=x.device)
            rows, columns = (torch.arange(n, device=x.device) + 0.5 for n in tile.shape[2:])
            weight = torch.outer(*(torch.minimum(n, n.flip(0)).clamp(max=size * scale / 4) for n in (rows, columns)))
            first_row, first_column = int(top * scale), int(left * scale)
            place = slice(first_row, first_row + len(rows)), slice(first_column, first_column + len(columns))
            total[:, :, *place] += weight * tile
            weights[place] += weight
    return total.div_(weights)


def tile_starts(length: int, size: int) -> list[int]:
    """Returns where tiles begin that overlap by at least a quarter: the last one ends at the end."""
    last = max(length - size, 0)
    return [*range(0, last, size * 3 // 4), last]


def check_tile_size(tile_size: int) -> None:
    if isinstance(tile_size, bool) or not isinstance(tile_size, int) or tile_size < 64 or tile_size % 32:
        raise ValueError(f"tile_size is {tile_size!r}; give a multiple of 32 from 64 on")
