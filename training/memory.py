"""How much memory teaching SD 1.5 takes, by the shapes alone: nothing is computed, on the device "meta".

    python -m training.memory [--resolution 512] [--batch 1]

Counted are the weights, in 16 bits where they are not trained; 20 bytes for each that is (float32 weight, gradient,
AdamW's two moments, the average); and what the forward pass keeps for the backward pass, in 16 bits, attention fused. A
GPU takes one to two gigabytes more: for CUDA itself, for work space, and where autocast keeps float32.
"""

import argparse

import torch
from torch import nn

import attention
from clip import CLIP
from diffusion import Diffusion
from extensions.controlnet import ControlNet
from training import loop, lora

NOT_IN_STEP = 84e6 * 2  # bytes of the autoencoder, in 16 bits


class Fused(torch.autograd.Function):
    """What PyTorch's fused attention keeps: queries, keys, values and result. (On "meta" it would keep the scores.)"""

    @staticmethod
    def forward(context, q, k, v):
        out = torch.empty_like(q)
        context.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError


def kept(networks, step):
    """Returns the bytes that the forward pass of step() keeps, other than weights."""
    weights = {id_of(weight) for network in networks for weight in network.parameters()}
    storages = {}

    def pack(tensor):
        if id_of(tensor) not in weights:
            storages[id_of(tensor)] = tensor.untyped_storage()  # held, so that its number stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    del result
    return sum(storage.nbytes() for storage in storages.values())


def id_of(tensor):
    return tensor.untyped_storage()._cdata


def measure(what, side, batch, recompute):
    """Returns (bytes of weights that are not trained, of what is trained, of what is kept)."""
    with torch.device("meta"):
        unet, clip = Diffusion().half().requires_grad_(False), CLIP().half().requires_grad_(False)
        control = ControlNet().half() if what == "ControlNet" else None
        vectors = nn.Parameter(torch.empty(4, 768, dtype=torch.float16))
        changes = nn.ModuleDict()
        if what.startswith("LoRA"):
            changes.update(lora.add_low_rank("diffusion", unet, 16, 16))
        if what == "LoRA, text encoder too":
            changes.update(lora.add_low_rank("clip", clip, 16, 16))
        changes.half()
        if recompute:
            for network in filter(None, (unet, control)):
                loop.checkpoint_gradients(network)
        latents = torch.empty(batch, 4, side // 8, side // 8, dtype=torch.float16)
        time = torch.empty(batch, 320, dtype=torch.float16)
        tokens = torch.empty(batch, 77, dtype=torch.long)
        pixels = torch.empty(batch, 3, side, side, dtype=torch.float16)

    def step():
        if what == "textual inversion":
            x = clip.token_embedding(tokens).clone()
            x[:, 4:8] = vectors
            return unet(latents, clip.transform(x), time).float().square().mean()
        if what != "ControlNet":
            return unet(latents, clip(tokens), time).float().square().mean()
        controls = control(latents, clip(tokens), time, control.input_hint_block(pixels))
        context, embedded = clip(tokens), unet.time_embedding(time)
        x, skips = unet.encode(latents, context, embedded)
        skips = [a + b for a, b in zip([*skips, unet.bottleneck(x, context, embedded)], controls)]
        x = unet.decode(skips.pop(), skips, context, embedded)
        return unet.conv_out(nn.functional.silu(unet.norm_out(x))).float().square().mean()

    trained = [*(control.parameters() if control else []), *changes.parameters()] or [vectors]
    frozen = sum(weight.numel() * 2 for network in (unet, clip) for weight in network.parameters())
    activations = kept([network for network in (unet, clip, control, changes) if network is not None], step)
    return frozen + NOT_IN_STEP, sum(20 * weight.numel() for weight in trained), activations


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    attention.attend = lambda q, k, v, causal=False: Fused.apply(q, k, v)
    attention.SelfAttention.attend = staticmethod(attention.attend)
    print("| GB | not trained | trained | kept | sum | kept, with --gradient-checkpointing | sum |\n"
          "|---|---|---|---|---|---|---|")
    for what in ("LoRA", "LoRA, text encoder too", "textual inversion", "ControlNet"):
        (frozen, trained, plain), (_, _, recomputed) = (
            measure(what, arguments.resolution, arguments.batch, recompute) for recompute in (False, True))
        numbers = [frozen, trained, plain, frozen + trained + plain, recomputed, frozen + trained + recomputed]
        print(f"| {what} | " + " | ".join(f"{number / 1e9:.1f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
