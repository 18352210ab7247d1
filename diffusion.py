"""The UNet of SD 1.x: noisy latents, a timestep and a text in, the predicted noise out.

Latent Diffusion Models (arXiv 2112.10752, section 3.2 and 3.3; ldm/modules/diffusionmodules/openaimodel.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention import CrossAttention, SelfAttention


@dataclass(frozen=True)
class DiffusionConfig:
    """The sizes of the UNet; the defaults are SD 1.5's. Each level but the last halves width and height."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one entry a level, full resolution first
    attends: tuple[bool, ...] = (True, True, True, False)  # which levels look at the text
    n_blocks: int = 2  # residual blocks a level on the way down; one more on the way up
    n_heads: int = 8
    d_context: int = 768
    n_groups: int = 32  # of the group norms
    sample_size: int = 512  # pixels a side of the pictures it was trained on
    cfg_scale: float = 7.5  # the guidance scale that suits it
    prediction: str = "epsilon"  # or "v" (arXiv 2202.00512), from which `ddpm.eps_from_v` finds the noise
    zero_terminal_snr: bool = False  # whether the noise schedule ends in noise alone (arXiv 2305.08891, section 3.1)
    guidance_rescale: float = 0.0  # for `ddpm.rescale_guidance` (the same, section 3.4)
    d_guidance: int = 0  # channels of the guidance scale's embedding, where a model is told it (LCM, arXiv 2310.04378)


def get_frequencies(width: int) -> Tensor:
    """Returns the angular frequencies of `get_time_embedding`, from 1 down: (width / 2,) float32 on the CPU."""
    half = width // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half)


def get_time_embedding(timestep: float | Tensor, width: int = 320) -> Tensor:
    """Returns the sinusoidal embedding of timesteps, cosines first (ldm/modules/diffusionmodules/util.py).

    Args:
        timestep: a number in [0, 1000), or a tensor of them (batch,).
        width: channels of the embedding: those of the UNet's first level.

    Returns:
        (1 or batch, width) float32 on the CPU.
    """
    angles = torch.as_tensor(timestep, dtype=torch.float32, device="cpu").reshape(-1, 1) * get_frequencies(width)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def get_guidance_embedding(cfg_scale: float, width: int) -> Tensor:
    """Returns the sinusoidal embedding of a guidance scale, sines first, for models that are told it (LCM, arXiv
    2310.04378, section 4.1; w = cfg_scale - 1, times 1000).

    Args:
        cfg_scale: the guidance scale, from 1 (none) on.
        width: channels of the embedding: the config's d_guidance.

    Returns:
        (1, width) float32 on the CPU.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / (half - 1))
    angles = 1000 * (float(cfg_scale) - 1) * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """The sinusoidal embedding (batch, width) -> what the residual blocks are told (batch, 4 * width)

    With d_guidance, the embedding of the guidance scale follows that of the timestep: (batch, width + d_guidance).
    """

    def __init__(self, width: int, d_guidance: int = 0):
        super().__init__()
        self.cond_proj = nn.Linear(d_guidance, width, bias=False) if d_guidance else None
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        if self.cond_proj:
            width = self.linear_1.in_features
            x = x[:, :width] + self.cond_proj(x[:, width:])
        return self.linear_2(F.silu(self.linear_1(x)))


class ResidualBlock(nn.Module):
    """Two convolutions, the timestep added between them: (batch, in_channels, h, w) -> (batch, out_channels, h, w)"""

    takes = "time"

    def __init__(self, in_channels: int, out_channels: int, d_time: int, n_groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(n_groups, in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(d_time, out_channels)
        self.norm_2 = nn.GroupNorm(n_groups, out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv_1(F.silu(self.norm_1(x)))
        hidden = hidden + self.time(F.silu(time))[:, :, None, None]
        hidden = self.conv_2(F.silu(self.norm_2(hidden)))
        return self.skip(x) + hidden


class GEGLU(nn.Linear):
    """Half of a linear layer gates the other half (arXiv 2002.05202): (..., channels) -> (..., out_features / 2)"""

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = super().forward(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class AttentionBlock(nn.Module):
    """The pixels look at each other, then at the text, then think: (batch, channels, h, w) -> the same shape"""

    takes = "context"

    def __init__(self, channels: int, n_heads: int, d_context: int, n_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(n_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)  # the original's 1x1 convolution, applied to tokens
        self.layer_norm_1 = nn.LayerNorm(channels)
        self.attention_1 = SelfAttention(n_heads, channels, in_proj_bias=False)
        self.layer_norm_2 = nn.LayerNorm(channels)
        self.attention_2 = CrossAttention(n_heads, channels, d_context)
        self.layer_norm_3 = nn.LayerNorm(channels)
        self.linear_geglu = GEGLU(channels, 2 * 4 * channels)
        self.linear_out = nn.Linear(4 * channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (batch, h * w, channels)
        tokens = tokens + self.attention_1(self.layer_norm_1(tokens))
        x, tokens = repeat_rows(x, context.shape[0]), repeat_rows(tokens, context.shape[0])
        tokens = tokens + self.attention_2(self.layer_norm_2(tokens), context)
        tokens = tokens + self.linear_out(self.linear_geglu(self.layer_norm_3(tokens)))
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """(batch, channels, h, w) -> (batch, channels, ceil(h / 2), ceil(w / 2))"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(batch, channels, h, w) -> (batch, channels, *size), with size that of the skip connection it will meet:
    2 * h and 2 * w, or one less where the way down rounded up."""

    takes = "size"

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def repeat_rows(x: Tensor, batch: int) -> Tensor:
    """(batch or a part of it, ...) -> (batch, ...), the rows in turn as often as it takes"""
    n_rows = x.shape[0]  # of which, unlike len(x), torch.export knows that it varies
    return x if n_rows == batch else torch.cat([x] * (batch // n_rows))  # keeps channels_last, which x.repeat does not


class SwitchSequential(nn.Sequential):
    """A sequence of layers, each of which says by `takes` what it wants besides x: time, context, size or nothing."""

    def forward(self, x: Tensor, context: Tensor, time: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        at_hand = {"context": context, "time": time, "size": size}
        for layer in self:
            takes = getattr(layer, "takes", None)
            x = layer(x, at_hand[takes]) if takes else layer(x)
        return x


class Diffusion(nn.Module):
    """Predicts the noise in the latents.

    The UNet of SD 1.5, from top to bottom on the way down, from bottom to top on the way up. Each encoder leaves one
    skip connection, each decoder takes one. The last encoder of a level but the lowest halves width and height (↓), its
    last decoder doubles them (↑).

        level   size    channels   encoders       decoders       looks at the text
        0       1          320     0, 1, 2, 3↓    9, 10, 11      yes
        1       1/2        640     4, 5, 6↓       6, 7, 8↑       yes
        2       1/4       1280     7, 8, 9↓       3, 4, 5↑       yes
        3       1/8       1280     10, 11         0, 1, 2↑       no
                          1280          bottleneck               yes

    Encoder 0 is a convolution, an encoder with an arrow a Downsample alone; all others are a ResidualBlock, followed by
    an AttentionBlock where the level looks at the text; a decoder with an arrow ends in an Upsample. The arrows point
    where the level ends: 8↑ of level 1 hands on pixels of level 0.
    """

    def __init__(self, config: DiffusionConfig = DiffusionConfig()):
        super().__init__()
        self.config = config
        width, n_levels = config.channels[0], len(config.channels)
        d_time = 4 * width

        def residual(in_channels, out_channels):
            return ResidualBlock(in_channels, out_channels, d_time, config.n_groups)

        def attention(channels):
            return AttentionBlock(channels, config.n_heads, config.d_context, config.n_groups)

        self.time_embedding = TimeEmbedding(width, config.d_guidance)
        self.encoders = nn.ModuleList([SwitchSequential(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        skips = [width]  # channels of the skip connections, to be met in reverse
        for i, channels in enumerate(config.channels):
            for _ in range(config.n_blocks):
                block = SwitchSequential(residual(width, channels))
                if config.attends[i]:
                    block.append(attention(channels))
                self.encoders.append(block)
                width = channels
                skips.append(width)
            if i < n_levels - 1:
                self.encoders.append(SwitchSequential(Downsample(width)))
                skips.append(width)

        self.bottleneck = SwitchSequential(residual(width, width), attention(width), residual(width, width))

        self.decoders = nn.ModuleList()
        for i, channels in reversed(list(enumerate(config.channels))):
            for j in range(config.n_blocks + 1):
                block = SwitchSequential(residual(width + skips.pop(), channels))
                if config.attends[i]:
                    block.append(attention(channels))
                if i > 0 and j == config.n_blocks:
                    block.append(Upsample(channels))
                self.decoders.append(block)
                width = channels

        self.norm_out = nn.GroupNorm(config.n_groups, width)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, context: Tensor, time_embedding: Tensor) -> Tensor:
        """Predicts the noise.

        Args:
            latents: (batch, 4, h / 8, w / 8) of unit scale, noisy; odd sizes are fine.
            context: (batch, tokens, d_context), from the text encoder; or a multiple of the rows, such as 2 * batch for
                guidance: then the latents are repeated, but only where the first block looks at the context.
            time_embedding: (1 or batch, channels[0]), from `get_time_embedding`; 1 if latents are repeated.

        Returns:
            The predicted noise (rows of context, 4, h / 8, w / 8).
        """
        time = self.time_embedding(time_embedding)  # (1 or batch, 4 * width)
        x, skips = self.encode(latents, context, time)
        x = self.bottleneck(x, context, time)
        x = self.decode(x, skips, context, time)
        return self.conv_out(F.silu(self.norm_out(x)))

    def encode(self, x: Tensor, context: Tensor, time: Tensor,
               blocks: nn.ModuleList | None = None) -> tuple[Tensor, list[Tensor]]:
        """The way down.

        Args:
            x: (batch, 4, h / 8, w / 8), the latents.
            context: as for `forward`.
            time: (1 or batch, 4 * width), from `time_embedding`.
            blocks: some of `encoders`, from the first on; None is all.

        Returns:
            What the last block returns, and a list of skip connections, one a block.
        """
        skips = []
        for block in self.encoders if blocks is None else blocks:
            x = block(x, context, time)
            skips.append(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor], context: Tensor, time: Tensor,
               blocks: nn.ModuleList | None = None) -> Tensor:
        """The way up.

        Args:
            x: what the bottleneck returns, or the decoder before `blocks`.
            skips: from `encode`; each block takes one off the end.
            context, time: as for `encode`.
            blocks: some of `decoders`, one after the other; None is all.

        Returns:
            What the last block returns.
        """
        for block in self.decoders if blocks is None else blocks:
            x = torch.cat([x, repeat_rows(skips.pop(), x.shape[0])], dim=1)
            x = block(x, context, time, size=skips[-1].shape[2:] if skips else None)
        return x
