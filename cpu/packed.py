"""Layers with their weights arranged for the CPU, for drawing alone.

    models["diffusion"] = pack(models["diffusion"])

The networks compute what they did before, but can no longer be trained, saved or moved to another device.

- oneDNN, PyTorch's library for the CPU, rearranges the weights of convolutions and linear layers at each call, so that
  the processor reads them in one go. That is a tenth of a UNet's step; `pack` does it once.
- A convolution that follows a nearest-neighbour enlargement becomes four smaller ones on the small picture, with 4/9 of
  the work (`PackedUpsample`).
- On processors with AVX2 alone, most 3x3 convolutions take a quarter of the products (`cpu/winograd.py`). Those with
  more weights than pixels are one product of matrices. Linear layers stay plain: packed, they are slower there.
- Packed convolutions return tensors in channels_last, where PyTorch's group norms are less exact for large pictures.
  `BandedGroupNorm` makes up for that.
"""

import torch
from torch import nn
from torch.nn import functional as F

from attention import SelfAttention
from cpu import attention, winograd
from decoder import VAE_Upsample
from diffusion import GEGLU, ResidualBlock, Upsample
from encoder import VAE_ResidualBlock

onednn = torch.ops.mkldnn
AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"  # which has float32 alone; benchmarks/README.md


def pack(layer: nn.Module) -> nn.Module:
    """Packs the weights of a layer, or of a whole network.

    Args:
        layer: on the CPU, in float32 or bfloat16. A network is changed in place, one layer after the other.

    Returns:
        The packed layer, or the network. Packed layers hold `packed_weight` instead of `weight`.
    """
    if isinstance(layer, nn.Linear) and AVX2_ALONE:
        return layer
    if isinstance(layer, GEGLU):
        return PackedGEGLU(layer)
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.weight, layer.bias)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return PackedConv1x1(layer)
    if isinstance(layer, nn.Conv2d):
        return pack_convolution(layer.weight, layer.bias, layer.stride, layer.padding)
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


def pack_convolution(weight, bias, stride, padding):
    """Returns the layer for a convolution with a kernel (channels out, channels in, h, w) of more than one pixel."""
    n_out, n_in, *kernel = weight.shape
    bias = nn.Parameter(weight.new_zeros(n_out)) if bias is None else bias
    if not AVX2_ALONE or weight.dtype != torch.float32:
        return PackedConv2d(weight, bias, stride, padding)
    if n_out * n_in > 1920 * 640:  # SD's see 16x16 pixels and fewer in pictures of 512x512: transforms would not pay
        return UnfoldedConv2d(weight, bias, stride, padding)
    if (kernel, stride, padding) == ([3, 3], (1, 1), (1, 1)) and min(n_out, n_in) >= 32:
        return WinogradConv2d(weight.detach(), bias)
    return PackedConv2d(weight, bias, stride, padding)


class Packed(nn.Module):
    """A layer with a packed weight, which PyTorch can only compute with.

    Raises ValueError when it is to be moved, converted, saved or copied, rather than leave the weight out.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.packed_weight = weight  # no parameter: an opaque tensor
        self.register_parameter("bias", bias)

    def refuse(self, *args, **kwargs):
        raise ValueError("packed weights can be neither saved nor copied; load the checkpoint with pack=False for that")

    state_dict = __deepcopy__ = __reduce_ex__ = refuse

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
        x = x.to(self.packed_weight.dtype)  # which within torch.autocast it may have lost
        return onednn._linear_pointwise(x, self.packed_weight, self.bias, "none", [], "")


class PackedConv1x1(nn.Module):
    """A linear layer over the channels."""

    def __init__(self, conv):
        super().__init__()
        linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
        linear.weight, linear.bias = nn.Parameter(conv.weight.detach()[:, :, 0, 0]), conv.bias
        self.linear = pack(linear)

    def forward(self, x):
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedGEGLU(nn.Module):
    """`diffusion.GEGLU` with a layer for each half: oneDNN applies gelu, and multiplies, as it writes their results."""

    def __init__(self, geglu):
        super().__init__()
        self.hidden, self.gate = (PackedLinear(weight, nn.Parameter(bias)) for weight, bias in
                                  zip(geglu.weight.chunk(2), geglu.bias.detach().chunk(2)))

    def forward(self, x):
        gate, hidden = self.gate, self.hidden
        x = x.to(gate.packed_weight.dtype)
        gate = onednn._linear_pointwise(x, gate.packed_weight, gate.bias, "gelu", [], "none")
        return onednn._linear_pointwise.binary(x, gate, hidden.packed_weight, hidden.bias, "mul")


class PackedConv2d(Packed):
    """With AVX2 alone, weights that are arranged for another size of picture take up to four times as long: there they
    are arranged for the first picture, and again when its size changes."""

    def __init__(self, weight, bias, stride, padding):
        self.geometry, self.size = (padding, stride, (1, 1), 1), None  # dilation, groups
        weight = weight.detach()
        super().__init__(weight if AVX2_ALONE else onednn._reorder_convolution_weight(weight, *self.geometry), bias)

    def forward(self, x):
        weight = self.packed_weight
        x = x.to(weight.dtype)
        if AVX2_ALONE and x.shape[2:] != self.size:
            weight = weight.to_dense() if weight.is_mkldnn else weight
            weight = self.packed_weight = onednn._reorder_convolution_weight(weight, *self.geometry, x.shape)
            self.size = x.shape[2:]
        return onednn._convolution_pointwise(x, weight, self.bias, *self.geometry, "none", [], "")


class WinogradConv2d(Packed):
    """A 3x3 convolution in float32 by `cpu/winograd.py`."""

    def forward(self, x):
        return winograd.convolve(x.to(self.packed_weight.dtype), self.packed_weight, self.bias)


class UnfoldedConv2d(Packed):
    """A convolution as one product of matrices: its weights, which are more than its pixels, are read as they lie."""

    def __init__(self, weight, bias, stride, padding):
        super().__init__(weight.detach(), bias)
        self.stride, self.padding = stride, padding

    def forward(self, x):
        weight = self.packed_weight
        h, w = ((size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride
                in zip(x.shape[2:], self.padding, weight.shape[2:], self.stride))
        columns = F.unfold(x.to(weight.dtype), weight.shape[2:], padding=self.padding, stride=self.stride)
        columns = columns.transpose(0, 1).flatten(1)  # (channels in * kernel, batch * h * w)
        out = torch.addmm(self.bias[:, None], weight.flatten(1), columns)
        return out.view(len(weight), len(x), h, w).transpose(0, 1)


class PackedResidualBlock(nn.Module):
    """A residual block, of the UNet or the autoencoder, that overwrites tensors instead of making new ones.

    At 512x512 pixels, 128 channels in float32 are 128 MB of fresh memory each time. No hook may have seen a tensor that
    is overwritten: layers whose result is overwritten are called by `forward`, which runs no hooks.
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

    The enlargement makes each pixel into four equal ones. The convolution's 3x3 window covers only 2x2 pixels of the
    small picture, whose weights are sums of the 3x3. Which sums depends on which of the four pixels the window is
    centred on: that makes four convolutions, each with a 2x2 kernel, on the small picture.
    """

    def __init__(self, layer):
        super().__init__()
        conv = layer.conv
        self.takes = getattr(layer, "takes", None)
        self.plain = pack_convolution(conv.weight, conv.bias, conv.stride, conv.padding)
        weight = conv.weight.detach().float()
        self.phases = nn.ModuleList(
            pack_convolution(sum_taps(sum_taps(weight, 2, i), 3, j).to(conv.weight.dtype), conv.bias, (1, 1), (1, 1))
            for i in range(2) for j in range(2))

    def forward(self, x, size=None):
        """(batch, channels, h, w) -> (batch, channels, 2 * h, 2 * w), or h and w as in size, which may be 1 less"""
        b, c, h, w = x.shape
        if size is not None and tuple(size) != (2 * h, 2 * w):
            return self.plain(F.interpolate(x, size=size, mode="nearest"))
        out = torch.empty((b, len(self.plain.bias), 2 * h, 2 * w), dtype=x.dtype, memory_format=torch.channels_last)
        for k, conv in enumerate(self.phases):
            i, j = divmod(k, 2)
            out[:, :, i::2, j::2] = conv(x)[:, :, i : i + h, j : j + w]  # conv(x) is (b, channels, h + 1, w + 1)
        return out


class BandedGroupNorm(nn.Module):
    """A group norm whose statistics are taken over bands of 4 rows, then combined exactly.

    In channels_last, PyTorch's own sums up all pixels of a channel one after another. In float32 at 512x512 pixels that
    makes an error of 2e-4.
    """

    ROWS, SMALL = 4, 2**14  # PyTorch's is exact enough for fewer pixels than SMALL

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        """(batch, channels, h, w) -> the same shape"""
        b, c, h, w = x.shape
        if h * w < self.SMALL or h % self.ROWS or torch.is_grad_enabled():
            return self.norm.forward(x)  # past its hooks: a PackedResidualBlock works on in what this returns
        groups, bands = self.norm.num_groups, h // self.ROWS
        x = x.unflatten(2, (bands, self.ROWS)).transpose(1, 2).flatten(0, 1)  # (b * bands, c, ROWS, w)
        x, mean, rstd = torch.native_group_norm(x, None, None, b * bands, c, self.ROWS * w, groups, self.norm.eps)
        mean, rstd = mean.view(b, bands, groups), rstd.view(b, bands, groups)
        offset = mean - mean.mean(1, keepdim=True)
        common_rstd = (rstd**-2 + offset**2).mean(1, keepdim=True).rsqrt()  # variances: within bands and between them
        scale, shift = ((y * common_rstd).repeat_interleave(c // groups, 2) * self.norm.weight
                        for y in (1 / rstd, offset))
        shift += self.norm.bias
        torch.addcmul(shift.view(-1, c, 1, 1), x, scale.view(-1, c, 1, 1), out=x)
        return x.unflatten(0, (b, bands)).transpose(1, 2).flatten(2, 3)


def sum_taps(weight, dim, phase):
    """Returns a kernel with its 3 weights along `dim` made into 2.

    For an even pixel (phase 0) the last two look at the same pixel of the small picture, for an odd one the first two.
    """
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], dim)
