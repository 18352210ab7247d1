"""Which pixels looked at each word of the prompt: the UNet's cross-attention, recorded while it draws.

    with record_attention(models["diffusion"]) as attention:
        image = generate("a red apple", models=models, tokenizer=tokenizer)
    for word, heat in merge_words(attention.maps(), "a red apple", tokenizer):
        Image.fromarray(overlay(image, heat)).save(f"{word}.png")

In each cross-attention layer, every pixel gives each token of the prompt a weight, and its weights add up to 1. A
token's map has the mean of its weights at each pixel of the latents, over all heads, layers and steps; the maps of
coarse layers are enlarged first. DAAM (arXiv 2210.04885, section 3.2) does the same, but takes sums, and enlarges by
bicubic interpolation.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from attention import CrossAttention, split_heads
from diffusion import AttentionBlock, Diffusion


@contextmanager
def record_attention(diffusion: nn.Module, row: int = 0) -> Iterator["AttentionRecord"]:
    """Records the cross-attention of a UNet inside a `with` block, by hooks that are removed after it.

    The UNet's results stay the same, bit for bit. Draw one picture inside the block: a second one would be averaged in.

    Args:
        diffusion: a `diffusion.Diffusion`, or what stands for one: a wrapper of the extensions, or a compiled one,
            which runs as it is written meanwhile, since compiled code calls no hooks.
        row: which row of its batch to record. `generate` puts the prompts before what guidance moves away from, so
            row k belongs to prompt k, with and without guidance.

    Yields:
        An `AttentionRecord`. Call its maps() once the picture is drawn.
    """
    record = AttentionRecord(row)
    is_compiled = any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in diffusion.modules())
    unet = next(part for part in diffusion.modules() if isinstance(part, Diffusion))
    hooks = [unet.encoders[0].register_forward_pre_hook(record.begin_step)]  # which wrappers call, too
    for block in unet.modules():
        if isinstance(block, AttentionBlock):
            hooks.append(block.register_forward_pre_hook(record.enter_block))
            hooks.append(block.attention_2.register_forward_hook(record.add_layer))
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield record
    finally:
        for hook in hooks:
            hook.remove()


class AttentionRecord:
    """The running sum of one row's attention, in float32 on the UNet's device."""

    def __init__(self, row: int):
        self.row = row
        self.total, self.n_layers = 0, 0

    def maps(self) -> Tensor:
        """Returns a map for each token, start and padding included.

        Returns:
            (n_tokens, h, w) float32 on the CPU, of the latents' size. At each pixel they add up to 1.

        Raises:
            ValueError: the UNet was not called inside the block.
        """
        if self.n_layers == 0:
            raise ValueError("no attention was recorded: draw the picture inside `with record_attention(diffusion)`")
        return (self.total / self.n_layers).cpu()

    # ---- hooks, called by PyTorch

    def begin_step(self, block, inputs):
        self.latents_size = inputs[0].shape[2:]
        n_rows = len(inputs[1])  # of the context, which with guidance has twice as many as the latents
        if not 0 <= self.row < n_rows:
            raise ValueError(f"row is {self.row}, but the UNet was given {n_rows} rows; "
                             f"take one from 0 to {n_rows - 1}")

    def enter_block(self, block, inputs):
        self.size = inputs[0].shape[2:]  # of this level: the attention layer sees the pixels in one long row

    def add_layer(self, attention, inputs, output):
        x, context = (tensor[self.row, None] for tensor in inputs)
        probabilities = get_probabilities(attention, x, context)  # (1, heads, h * w, n_tokens)
        maps = probabilities.mean(dim=1).transpose(1, 2).unflatten(2, self.size)  # (1, n_tokens, h, w)
        # Bilinear weights sum to one, so that the pixels keep their distribution over the tokens.
        self.total = self.total + F.interpolate(maps, self.latents_size, mode="bilinear")[0]
        self.n_layers += 1


@torch.no_grad()
def get_probabilities(attention: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    """Returns the weights that a cross-attention layer gives to the tokens of the context.

    softmax(q kᵀ / sqrt(d_head)), eq. 1 of arXiv 1706.03762, which the layer's fused call never returns.

    Args:
        attention: the layer.
        x: (batch, tokens, d_embed), the pixels that look.
        context: (batch, context tokens, d_cross), what they look at.

    Returns:
        (batch, heads, tokens, context tokens) float32.
    """
    q = split_heads(attention.q_proj(x), attention.n_heads).float()
    k = split_heads(attention.k_proj(context), attention.n_heads).float()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)


def merge_words(maps: Tensor, prompt: str, tokenizer) -> list[tuple[str, Tensor]]:
    """Adds up the maps of the tokens that each word of the prompt was split into.

    Args:
        maps: (n_tokens, h, w), from `AttentionRecord.maps`.
        prompt: what was drawn.
        tokenizer: what `model_loader.load_tokenizer` returns.

    Returns:
        [(word, map (h, w)), ...] without start token and padding, nor words that the encoder never saw because they lie
        beyond n_tokens.
    """
    words, word, heat = [], [], 0
    ids = tokenizer(prompt, verbose=False).input_ids[1:-1]
    for token_id, token_map in zip(ids, maps[1:-1]):
        word, heat = word + [token_id], heat + token_map
        if tokenizer.convert_ids_to_tokens(token_id).endswith("</w>"):  # the end of a word
            words.append((tokenizer.decode(word).strip(), heat))
            word, heat = [], 0
    return words


def overlay(image: np.ndarray, heat: Tensor) -> np.ndarray:
    """Lays a map over a picture: black where the map is lowest, red in the middle, yellow where it is highest.

    Args:
        image: (height, width, 3) uint8.
        heat: (h, w) floats of any range.

    Returns:
        (height, width, 3) uint8.
    """
    heat = Image.fromarray(np.asarray(heat, dtype=np.float32)).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    heat = np.asarray(heat)[:, :, None]
    heat = (heat - heat.min()) / max(heat.max() - heat.min(), 1e-12)
    grey = image.mean(axis=2, keepdims=True)
    colour = 255 * np.concatenate([1.5 * heat, 2.5 * heat - 1, 0.3 * heat], axis=2).clip(0, 1)  # black, red, yellow
    return (0.4 * grey + 0.6 * colour).round().astype(np.uint8)
