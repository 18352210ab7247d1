"""Convolutions and linear layers with their weights in oneDNN's own layout, for drawing on the CPU.

PyTorch keeps weights as the checkpoint has them, and oneDNN rearranges them at each call, for its vector units to read
in one go: a tenth of a UNet's step. `pack` does that once. A convolution after a nearest-neighbour enlargement is also
rewritten as what it amounts to, four small ones on the small picture, at 4/9 of the work. Packed convolutions return
channels_last, for which group norms of large pictures are made as exact as they are without. What the networks compute
stays the same; weights can no longer be trained, saved or moved to another device.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attention import SelfAttention
from cpu import attention
from decoder import VAE_Upsample
from diffusion import GEGLU, ResidualBlock, Upsample
from encoder import VAE_ResidualBlock

onednn = torch.ops.mkldnn


def pack(layer):
    """Returns a layer, or whatever is made of layers, with its weights (on the CPU, float32 or bfloat16) packed.

    What is made of layers is changed in place, one layer after the other.
    """
    if isinstance(layer, GEGLU):
        return PackedGEGLU(layer)
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.weight, layer.bias)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return PackedConv1x1(layer.weight[:, :, 0, 0], layer.bias)
    if isinstance(layer, nn.Conv2d):
        return PackedConv2d(layer.weight, layer.bias, layer.stride, layer.padding)
    if isinstance(layer, (VAE_Upsample, Upsample)):
        return PackedUpsample(layer)
    if isinstance(layer, (VAE_ResidualBlock, ResidualBlock)):
        return PackedResidualBlock(layer)
    if isinstance(layer, nn.GroupNorm) and layer.weight.dtype == torch.float32:
        return BandedGroupNorm(layer)
    if isinstance(layer, SelfAttention) and attention.blocks_win():
        layer.attend = attention.attend_in_blocks
    for name, child in layer.named_children():
        setattr(layer, name, pack(child))
    return layer


class Packed(nn.Module):
    """Holds a packed weight, which PyTorch can neither move nor convert."""

    def __init__(self, weight, bias):
        super().__init__()
        self.packed_weight = weight  # no parameter: an opaque tensor
        self.register_parameter("bias", bias)

    def _apply(self, function, recurse=True):
        like = torch.empty(0, dtype=self.packed_weight.dtype)
        moved = function(like)
        if (moved.device, moved.dtype) != (like.device, like.dtype):
            raise ValueError(f"packed weights stay on the CPU in {like.dtype}; load the checkpoint with pack=False to "
                             f"have it on {moved.device} in {moved.dtype}")
        return super()._apply(function, recurse)


class PackedLinear(Packed):
    def __init__(self, weight, bias):
        super().__init__(onednn._reorder_linear_weight(weight.detach().contiguous()), bias)

    def forward(self, x):
        return onednn._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")


class PackedConv1x1(PackedLinear):
    """A linear layer over the channels."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedGEGLU(nn.Module):
    """Both halves as layers of their own, so that gelu and the product are done on the way out of them."""

    def __init__(self, geglu):
        super().__init__()
        self.hidden, self.gate = (PackedLinear(weight, nn.Parameter(bias)) for weight, bias in
                                  zip(geglu.weight.chunk(2), geglu.bias.detach().chunk(2)))

    def forward(self, x):
        gate, hidden = self.gate, self.hidden
        gate = onednn._linear_pointwise(x, gate.packed_weight, gate.bias, "gelu", [], "none")
        return onednn._linear_pointwise.binary(x, gate, hidden.packed_weight, hidden.bias, "mul")


class PackedConv2d(Packed):
    def __init__(self, weight, bias, stride, padding):
        self.geometry = padding, stride, (1, 1), 1  # dilation, groups
        super().__init__(onednn._reorder_convolution_weight(weight.detach(), *self.geometry), bias)

    def forward(self, x):
        return onednn._convolution_pointwise(x, self.packed_weight, self.bias, *self.geometry, "none", [], "")


class PackedResidualBlock(nn.Module):
    """A residual block, of the UNet or the autoencoder, that works in place.

    At full size each picture of 128 channels is 128 MB of fresh memory. Inner layers are called by `forward`, past any
    hook, so that nobody has seen what is overwritten.
    """

    def __init__(self, block):
        super().__init__()
        self.takes = getattr(block, "takes", None)
        for name, child in list(block.named_children()):
            self.add_module(name, pack(child))

    def forward(self, x, time=None):
        """As `diffusion.ResidualBlock`; without `time` as `encoder.VAE_ResidualBlock`."""
        hidden = self.conv_1.forward(F.silu(self.norm_1.forward(x), inplace=True))
        if time is not None:
            hidden += self.time(F.silu(time))[:, :, None, None]
        hidden = self.conv_2.forward(F.silu(self.norm_2.forward(hidden), inplace=True))
        hidden += self.skip(x)
        return hidden


class PackedUpsample(nn.Module):
    """Nearest-neighbour enlargement by 2, then a 3x3 convolution.

    Of the 3x3 pixels that the convolution sees, those that were enlarged from the same one are equal, so their weights
    add up: each of the four pixels made from one is a 2x2 convolution of the small picture.
    """

    def __init__(self, layer):
        super().__init__()
        conv = layer.conv
        self.takes = getattr(layer, "takes", None)
        self.plain = PackedConv2d(conv.weight, conv.bias, conv.stride, conv.padding)
        weight = conv.weight.detach().float()
        self.phases = nn.ModuleList(
            PackedConv2d(sum_taps(sum_taps(weight, 2, i), 3, j).to(conv.weight.dtype), conv.bias, (1, 1), (1, 1))
            for i in range(2) for j in range(2))

    def forward(self, x, size=None):
        """(batch, channels, h, w) -> (batch, channels, 2 * h, 2 * w), or of the size given, which may be 1 less"""
        b, c, h, w = x.shape
        if size is not None and tuple(size) != (2 * h, 2 * w):
            return self.plain(F.interpolate(x, size=size, mode="nearest"))
        out = torch.empty((b, len(self.plain.bias), 2 * h, 2 * w), dtype=x.dtype, memory_format=torch.channels_last)
        for k, conv in enumerate(self.phases):
            i, j = divmod(k, 2)
            out[:, :, i::2, j::2] = conv(x)[:, :, i : i + h, j : j + w]  # conv(x) is (b, channels, h + 1, w + 1)
        return out


class BandedGroupNorm(nn.Module):
    """A group norm in bands of 4 rows, put together exactly.

    In channels_last, PyTorch's adds up a channel's pixels one after another: in float32, at 512x512, an error of 2e-4.
    """

    ROWS, SMALL = 4, 2**14  # PyTorch's is exact enough for fewer pixels than SMALL

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        """(batch, channels, h, w) -> the same shape"""
        b, c, h, w = x.shape
        if h * w < self.SMALL or h % self.ROWS or torch.is_grad_enabled():
            return self.norm(x)
        groups, bands = self.norm.num_groups, h // self.ROWS
        x = x.unflatten(2, (bands, self.ROWS)).transpose(1, 2).flatten(0, 1)  # (b * bands, c, ROWS, w)
        x, mean, rstd = torch.native_group_norm(x, None, None, b * bands, c, self.ROWS * w, groups, self.norm.eps)
        mean, rstd = mean.view(b, bands, groups), rstd.view(b, bands, groups)
        offset = mean - mean.mean(1, keepdim=True)
        common_rstd = (rstd**-2 + offset**2).mean(1, keepdim=True).rsqrt()  # variances: within bands and between them
        scale, shift = ((y * common_rstd).repeat_interleave(c // groups, 2) * self.norm.weight for y in (1 / rstd, offset))
        shift += self.norm.bias
        torch.addcmul(shift.view(-1, c, 1, 1), x, scale.view(-1, c, 1, 1), out=x)
        return x.unflatten(0, (b, bands)).transpose(1, 2).flatten(2, 3)


def sum_taps(weight, dim, phase):
    """A kernel's 3 weights along a dimension -> 2: an even pixel's last two look at the same pixel, an odd one's first.
    """
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], dim)
