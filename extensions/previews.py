"""Pictures of what is under way: previews from latents, and what each word of the prompt looked at."""

import torch
from PIL import Image
from torch.nn import functional as F

from decoder import DecoderConfig
from extensions.attention_maps import overlay
from extensions.emphasis import at_step, make_splitter, split_chunks
from images import to_uint8
from pipeline import device_of, to_network


def make_preview(models, data):
    """Returns a function that makes a PIL image of latents (1, 4, h, w): the tiny VAE's, if data/ has SD 1.x's and the
    model has SD 1.x's autoencoder; else a linear map, fitted to the model's own decoder."""
    files = [path for path in sorted(data.glob("taesd_decoder.*")) if path.suffix in (".safetensors", ".pth")]
    if files and models["decoder"].config == DecoderConfig():
        from extensions.tiny_vae import load_tiny_decoder

        decoder = load_tiny_decoder(files[0], device_of(models["decoder"]))
        return lambda latents: to_picture(decode(decoder, latents))
    weights = fit_linear(models)  # (5, 3)

    def preview(latents):
        rgb = torch.einsum("bchw,cd->bdhw", latents.float().cpu(), weights[:4]) + weights[4, :, None, None]
        return to_picture(F.interpolate(rgb, scale_factor=8, mode="bilinear"))

    return preview


@torch.no_grad()
def decode(decoder, latents):
    return decoder(*to_network(decoder, device_of(decoder), latents))


def to_picture(pixels):
    """(1, 3, h, w) in [-1, 1] -> PIL image"""
    return Image.fromarray(to_uint8(pixels)[0])


@torch.no_grad()
def fit_linear(models):
    """Returns (5, 3), by which latents and a 1 become the colour of their 8x8 pixels, by least squares over what the
    model's autoencoder makes of coloured patches."""
    encoder, decoder = models["encoder"], models["decoder"]
    device, generator = device_of(encoder), torch.Generator().manual_seed(0)
    patches = [torch.rand(1, 3, n, n, generator=generator) * 2 - 1 for n in (4, 8, 16)]
    pixels = torch.cat([F.interpolate(patch, size=(128, 128)) for patch in patches])
    latents = encoder(*to_network(encoder, device, pixels, torch.zeros(3, 4, 16, 16))).float()
    colours = F.avg_pool2d(decode(decoder, latents).float(), 8).cpu()
    rows = latents.cpu().movedim(1, -1).reshape(-1, 4)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    return torch.linalg.lstsq(rows, colours.movedim(1, -1).reshape(-1, 3)).solution


def why_no_words(request, prompt):
    """Returns why what each word looked at cannot be shown, or nothing."""
    if at_step(prompt, 0, 2) != prompt:
        return "what each word looked at cannot be shown: the prompt changes from step to step"
    if request.only_masked or request.outpaint is not None:
        return "what each word looked at cannot be shown: only a part of the picture was drawn"
    return ""


def show_words(pixels, maps, prompt, clip, tokenizer, embeddings):
    """Returns [(word, PIL image of where it was looked at)] in the order of the prompt."""
    split = make_splitter(tokenizer, embeddings, clip.config)
    words, ids, heat, before = [], [], 0, None
    for k, chunk in enumerate(split_chunks(prompt, split, clip.config.n_tokens - 2)):
        for i, (token, vector, _) in enumerate(chunk):
            token_map = maps[k * clip.config.n_tokens + 1 + i]
            if vector is not None and before == token:  # an embedding of several vectors is one word
                words[-1] = words[-1][0], words[-1][1] + token_map
                continue
            before = None if vector is None else token
            ids, heat = [*ids, token], heat + token_map
            if tokenizer.convert_ids_to_tokens(token).endswith("</w>") or vector is not None:
                words.append((tokenizer.decode(ids).strip(), heat))
                ids, heat = [], 0
    return [(word, Image.fromarray(overlay(pixels, heat))) for word, heat in words if word.strip(",.")]
