"""What each word of the prompt looked at: the UNet's cross-attention, recorded while it draws.

    with record_attention(models["diffusion"]) as attention:
        image = generate("a red apple", models=models, tokenizer=tokenizer)
    for word, heat in merge_words(attention.maps(), "a red apple", tokenizer):
        Image.fromarray(overlay(image, heat)).save(f"{word}.png")

In each cross-attention layer every pixel of the latents spreads an attention of 1 over the tokens of the prompt. The
mean of that over heads, layers and steps, with the coarse layers enlarged to the size of the latents, says how much a
pixel was led by a token (DAAM, arXiv 2210.04885, section 3.2, which takes sums and bicubic interpolation instead).
"""

from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from attention import split_heads
from diffusion import AttentionBlock


@contextmanager
def record_attention(diffusion, row=0):
    """Records the cross-attention of a UNet inside a `with` block, by hooks that are gone after it.

    What the UNet computes stays the same, bit for bit. One picture a block: a second one would be averaged in.

    Args:
        diffusion: a `diffusion.Diffusion`.
        row: which row of its batch to record. `generate` puts the prompts before what guidance moves away from, so
            row k belongs to prompt k, with and without guidance.

    Yields:
        An `AttentionRecord`, whose maps() are to be had once the picture is drawn.
    """
    record = AttentionRecord(row)
    hooks = [diffusion.register_forward_pre_hook(record.begin_step)]
    for block in diffusion.modules():
        if isinstance(block, AttentionBlock):
            hooks.append(block.register_forward_pre_hook(record.enter_block))
            hooks.append(block.attention_2.register_forward_hook(record.add_layer))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


class AttentionRecord:
    """The running sum of one row's attention, in float32 on the UNet's device."""

    def __init__(self, row):
        self.row = row
        self.total, self.n_layers = 0, 0

    def maps(self):
        """Returns (n_tokens, h, w) float32 on the CPU, the size of the latents: at each pixel a distribution over the
        tokens, start and padding included. Raises ValueError if the UNet was not called."""
        if self.n_layers == 0:
            raise ValueError("no attention was recorded: draw the picture inside `with record_attention(diffusion)`")
        return (self.total / self.n_layers).cpu()

    # ---- hooks, called by PyTorch

    def begin_step(self, diffusion, inputs):
        n_rows, self.latents_size = len(inputs[1]), inputs[0].shape[2:]  # rows of the context: guidance has twice as many
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
def get_probabilities(attention, x, context):
    """What `attention.CrossAttention` computes inside its fused product: softmax(Q Kᵀ / sqrt(d_head)), eq. 1 of arXiv
    1706.03762. x (b, tokens, d_embed), context (b, context tokens, d_cross) -> (b, heads, tokens, context tokens)
    float32"""
    q = split_heads(attention.q_proj(x), attention.n_heads).float()
    k = split_heads(attention.k_proj(context), attention.n_heads).float()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)


def merge_words(maps, prompt, tokenizer):
    """Returns [(word, map (h, w))] for the words of the prompt, adding up the tokens that a word was split into.

    maps: (n_tokens, h, w), from `AttentionRecord.maps`. Words beyond n_tokens are left out, as the encoder never saw
    them, and so are start token and padding.
    """
    words, word, heat = [], [], 0
    ids = tokenizer(prompt, verbose=False).input_ids[1:-1]
    for token_id, token_map in zip(ids, maps[1:-1]):
        word, heat = word + [token_id], heat + token_map
        if tokenizer.convert_ids_to_tokens(token_id).endswith("</w>"):  # the end of a word
            words.append((tokenizer.decode(word).strip(), heat))
            word, heat = [], 0
    return words


def overlay(image, heat):
    """Lays a map over a picture, scaled to its own range: dark where it is lowest, red, yellow where it is highest.

    image: (height, width, 3) uint8. heat: (h, w) floats. Returns (height, width, 3) uint8.
    """
    heat = Image.fromarray(np.asarray(heat, dtype=np.float32)).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    heat = np.asarray(heat)[:, :, None]
    heat = (heat - heat.min()) / max(heat.max() - heat.min(), 1e-12)
    grey = image.mean(axis=2, keepdims=True)
    colour = 255 * np.concatenate([1.5 * heat, 2.5 * heat - 1, 0.3 * heat], axis=2).clip(0, 1)  # black, red, yellow
    return (0.4 * grey + 0.6 * colour).round().astype(np.uint8)
