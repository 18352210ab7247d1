"""The decoder half of the autoencoder: latents in, a picture eight times as wide and high out.

The KL autoencoder of Latent Diffusion Models (arXiv 2112.10752, section 3.1; ldm/modules/diffusionmodules/model.py).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from encoder import LATENT_SCALE, VAE_AttentionBlock, VAE_ResidualBlock


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of the decoder; the defaults are SD 1.5's. Each level but the first doubles width and height."""

    out_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry a level, full resolution first
    n_blocks: int = 3  # residual blocks a level
    n_groups: int = 32  # of the group norms


class Upsample(nn.Module):
    """(batch, channels, h, w) -> (batch, channels, 2 * h, 2 * w)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAE_Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config=DecoderConfig()):
        super().__init__()
        self.config = config
        width = config.channels[-1]
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = nn.Sequential(
            VAE_ResidualBlock(width, width, config.n_groups),
            VAE_AttentionBlock(width, config.n_groups),
            VAE_ResidualBlock(width, width, config.n_groups),
        )
        self.up = nn.ModuleList()  # full resolution first, as in the config; used from the last to the first
        for i, channels in reversed(list(enumerate(config.channels))):
            level = nn.Sequential()
            for _ in range(config.n_blocks):
                level.append(VAE_ResidualBlock(width, channels, config.n_groups))
                width = channels
            if i > 0:
                level.add_module("upsample", Upsample(width))
            self.up.insert(0, level)
        self.norm_out = nn.GroupNorm(config.n_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, latents):
        """Decodes latents.

        Args:
            latents: (batch, 4, h / 8, w / 8) of unit scale, as the encoder returns them.

        Returns:
            (batch, 3, h, w), about [-1, 1] (not clamped).
        """
        return self.enlarge(self.look_around(latents))

    def look_around(self, latents):
        """The part that sees the whole picture: (batch, 4, h / 8, w / 8) -> (batch, channels, h / 8, w / 8)"""
        x = self.conv_in(self.post_quant_conv(latents / LATENT_SCALE))
        for block in self.mid:  # not self.mid(x), which would hold on to its input to the end
            x = block(x)
        return x

    def enlarge(self, x):
        """The rest, in which a pixel depends on those near it: (batch, channels, h / 8, w / 8) -> (batch, 3, h, w)"""
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))

    def decode_tiled(self, latents, tile_size):
        """Decodes latents in overlapping square tiles, in the memory that one tile takes.

        Only the enlarging part is tiled, which takes nearly all of the memory. Tiles overlap by a quarter and are blended.
        The group norms see one tile at a time, so that the picture is not quite that of `forward`:
        benchmarks/results/memory.md says by how much.

        Args:
            latents: (batch, 4, h / 8, w / 8) of unit scale.
            tile_size: side of a tile in pixels, a multiple of 32.

        Returns:
            (batch, 3, h, w) float32, about [-1, 1].
        """
        size = tile_size // 8
        x = self.look_around(latents)
        height, width = x.shape[2:]
        if height <= size and width <= size:
            return self.enlarge(x).float()
        images = torch.zeros(len(x), self.config.out_channels, 8 * height, 8 * width, device=x.device)
        weights = torch.zeros(8 * height, 8 * width, device=x.device)
        for top in tile_starts(height, size):
            for left in tile_starts(width, size):
                tile = self.enlarge(x[:, :, top : top + size, left : left + size]).float()
                rows, columns = (torch.arange(n, device=x.device) + 0.5 for n in tile.shape[2:])
                weight = torch.outer(*(torch.minimum(n, n.flip(0)).clamp(max=tile_size / 4) for n in (rows, columns)))
                place = slice(8 * top, 8 * top + len(rows)), slice(8 * left, 8 * left + len(columns))
                images[:, :, *place] += weight * tile
                weights[place] += weight
        return images.div_(weights)


def tile_starts(length, size):
    """Where tiles begin that overlap by at least a quarter: the last one ends at the end."""
    last = max(length - size, 0)
    return [*range(0, last, size * 3 // 4), last]
