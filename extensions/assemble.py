"""A checkpoint with what changes its weights or stands beside them, loaded in the one order that works: LoRAs are added
and ControlNets made before weights are packed."""

from torch import Tensor, nn

import model_loader
from cpu import packed


def load_with(checkpoint, device, dtype="auto", loras: list[tuple] = (), controlnets: list = (),
              **settings) -> tuple[dict[str, nn.Module], list[nn.Module], dict[str, Tensor]]:
    """Loads a model for drawing alone, packed for the CPU where that pays.

    Args:
        checkpoint, device, dtype: as for `model_loader.preload_models_from_standard_weights`.
        loras: (path, scale in the UNet, scale in the text encoder) of each.
        controlnets: their paths.
        settings: what else that function takes, but pack.

    Returns:
        (the four networks, the ControlNets, the embeddings {name: vectors} that the LoRAs bring along)

    Raises:
        As that function, `add_lora` and `load_controlnet`.
    """
    changes_weights = bool(loras or controlnets)
    pack = model_loader.pays_to_pack(checkpoint, device, dtype)
    models = model_loader.preload_models_from_standard_weights(
        checkpoint, device, dtype, pack=pack and not changes_weights, **settings)

    embeddings, loaded = {}, []
    for path, unet_scale, text_scale in loras:
        from extensions.lora import add_lora

        embeddings |= add_lora(models, path, unet_scale=unet_scale, text_scale=text_scale)
    for path in controlnets:
        from extensions.controlnet import load_controlnet

        loaded.append(load_controlnet(path, device, dtype, base=models))
    if pack and changes_weights:
        models = {name: packed.pack(network) for name, network in models.items()}
        loaded = [packed.pack(controlnet) for controlnet in loaded]
    return models, loaded, embeddings
