"""The decoder half of the autoencoder: latents in, a picture eight times as wide and high out.

The KL autoencoder of Latent Diffusion Models (arXiv 2112.10752, section 3.1; ldm/modules/diffusionmodules/model.py).
"""

from dataclasses import dataclass

from torch import Tensor, nn
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


class VAE_Upsample(nn.Module):
    """(batch, channels, h, w) -> (batch, channels, 2 * h, 2 * w)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAE_Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: DecoderConfig = DecoderConfig()):
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
                level.add_module("upsample", VAE_Upsample(width))
            self.up.insert(0, level)
        self.norm_out = nn.GroupNorm(config.n_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decodes latents.

        Args:
            latents: (batch, 4, h / 8, w / 8) of unit scale, as the encoder returns them, in any floating point dtype.

        Returns:
            (batch, 3, h, w), about [-1, 1] (not clamped).
        """
        return self.enlarge(self.look_around(latents))

    def look_around(self, latents: Tensor) -> Tensor:
        """The part that sees the whole picture: (batch, 4, h / 8, w / 8) -> (batch, channels, h / 8, w / 8)"""
        latents = latents.to(self.conv_in.bias.dtype)  # as `generate` hands them out, in float32
        x = self.conv_in(self.post_quant_conv(latents / LATENT_SCALE))
        for block in self.mid:  # not self.mid(x), which would hold on to its input to the end
            x = block(x)
        return x

    def enlarge(self, x: Tensor) -> Tensor:
        """The rest, in which a pixel depends on those near it: (batch, channels, h / 8, w / 8) -> (batch, 3, h, w)"""
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
