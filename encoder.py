"""The encoder half of the autoencoder: a picture in, latents an eighth as wide and high out.

The KL autoencoder of Latent Diffusion Models (arXiv 2112.10752, section 3.1; ldm/modules/diffusionmodules/model.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention import SelfAttention

LATENT_SCALE = 0.18215  # gives SD 1.x's latents about unit variance


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of the encoder; the defaults are SD 1.5's. Each level but the last halves width and height."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # one entry a level, full resolution first
    n_blocks: int = 2  # residual blocks a level
    n_groups: int = 32  # of the group norms


class VAE_ResidualBlock(nn.Module):
    """(batch, in_channels, h, w) -> (batch, out_channels, h, w)"""

    def __init__(self, in_channels: int, out_channels: int, n_groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(n_groups, in_channels, eps=1e-6)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(n_groups, out_channels, eps=1e-6)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        hidden = self.conv_2(F.silu(self.norm_2(hidden)))
        return self.skip(x) + hidden


class VAE_AttentionBlock(nn.Module):
    """Self-attention with one head over all pixels: (batch, channels, h, w) -> the same shape"""

    def __init__(self, channels: int, n_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(n_groups, channels, eps=1e-6)
        self.attention = SelfAttention(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (batch, h * w, channels)
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class VAE_Downsample(nn.Module):
    """(batch, channels, h, w) -> (batch, channels, h / 2, w / 2)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and at the bottom only, as it was trained


class VAE_Encoder(nn.Module):
    """Pictures to latents."""

    def __init__(self, config: EncoderConfig = EncoderConfig()):
        super().__init__()
        self.config = config
        width = config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, channels in enumerate(config.channels):
            level = nn.Sequential()
            for _ in range(config.n_blocks):
                level.append(VAE_ResidualBlock(width, channels, config.n_groups))
                width = channels
            if i < len(config.channels) - 1:
                level.add_module("downsample", VAE_Downsample(width))
            self.down.append(level)
        self.mid = nn.Sequential(
            VAE_ResidualBlock(width, width, config.n_groups),
            VAE_AttentionBlock(width, config.n_groups),
            VAE_ResidualBlock(width, width, config.n_groups),
        )
        self.norm_out = nn.GroupNorm(config.n_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)  # mean and log-variance
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Draws latents from the distribution that the encoder finds for each picture.

        Args:
            images: (batch, 3, h, w) in [-1, 1]; h and w multiples of 8.
            noise: (batch, 4, h / 8, w / 8), standard normal; zeros give the mean.

        Returns:
            (batch, 4, h / 8, w / 8), already times 0.18215: latents of unit scale, ready for the UNet.
        """
        return self.sample(self.moments(images), noise)

    def reduce(self, images: Tensor) -> Tensor:
        """The part in which a pixel depends on those near it: (batch, 3, h, w) -> (batch, channels, h / 8, w / 8)"""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return x

    def look_around(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rest, which sees the whole picture: mean and log-variance (in [-30, 20]) of the latents, unscaled, each
        (batch, 4, h / 8, w / 8)."""
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        mean, log_variance = self.quant_conv(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def sample(self, moments: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """Draws latents of unit scale from mean and log-variance, with the noise given."""
        mean, log_variance = moments
        return (mean + torch.exp(0.5 * log_variance) * noise) * LATENT_SCALE

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance of the latents for images, as `look_around`."""
        return self.look_around(self.reduce(images))
