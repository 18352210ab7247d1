"""LoRA files of every dialect and kind, against diffusers, peft and lycoris, which read or made the same weights."""

import copy
import os
import re
from dataclasses import replace

import peft
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file

import oracle
from checkpoint_file import CheckpointError
from clip import CLIP
from cpu.packed import pack
from diffusion import Diffusion, get_time_embedding
from extensions.lora import add_lora, find_lora, lora, parse_tags, read_changes

SCALES = [1.0, 0.6, -0.5]
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"
ATTENTION_REGEX = r".*attn\d\.to_(q|k|v|out\.0)|.*self_attn\.(q|k|v|out)_proj"  # PEFT matches the whole name


@pytest.fixture
def own(models):
    """A copy of the tiny models, to be changed."""
    return copy.deepcopy({"clip": models["clip"], "diffusion": models["diffusion"]})


@pytest.fixture(scope="session")
def oracles(weights):
    return {"diffusion": oracle.unet_oracle(weights), "clip": oracle.clip_oracle(weights)}


@pytest.fixture
def theirs(oracles):
    """The same networks of diffusers and transformers, to be changed."""
    return copy.deepcopy(oracles)


@pytest.fixture(scope="session")
def original(weights, oracles):
    """{diffusers' path: the original's} of the UNet's layers, by diffusers' converter."""
    prefix = "model.diffusion_model."
    names = {tensor.data_ptr(): name.removeprefix(prefix) for name, tensor in weights.items() if prefix in name}
    converted = oracle.single_file_utils.convert_ldm_unet_checkpoint(dict(weights), oracles["diffusion"].config)
    return {name.removesuffix(".weight"): names[tensor.data_ptr()].removesuffix(".weight")
            for name, tensor in converted.items()}


def weights_of(models):
    return {f"{network} {name}": weight.clone() for network, module in models.items()
            for name, weight in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_outputs(own, theirs, tolerance=1e-5):
    """Both networks, with the same inputs, compute the same, and not what they did before a LoRA was added."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[49406, 320, 1125, 49407]])
    context = theirs["clip"](tokens).last_hidden_state
    torch.testing.assert_close(own["clip"](tokens), context, atol=tolerance, rtol=0)
    eps = theirs["diffusion"](latents, 500, context).sample
    time = get_time_embedding(500, own["diffusion"].config.channels[0])
    torch.testing.assert_close(own["diffusion"](latents, context, time), eps, atol=tolerance, rtol=0)


def random_lora(theirs, pattern=ATTENTION, rank=4, seed=0):
    """Returns {(network, diffusers' path): (down, up)} for the layers that a pattern finds, at a scale that shows."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for network, module in theirs.items():
        for path, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if re.search(pattern, path) and weight is not None and weight.ndim > 1 and "embedding" not in path:
                out, *rest = weight.shape
                down = torch.randn(rank, *rest, generator=generator) / rest[0] ** 0.5
                up = torch.randn(out, rank, *[1] * len(rest[1:]), generator=generator) / 3
                layers[network, with_text_model(network, path)] = down, up
    return layers


def with_text_model(network, path):
    return path if network in ("diffusion", "unet") or path.startswith("text_model.") else f"text_model.{path}"


def underscored(path):
    return path.replace(".", "_")


def old_name(path, half):
    """The attention processors' names, and the text encoder's of the same age."""
    parent, _, layer = path.replace("to_out.0", "to_out").rpartition(".")
    layer = layer.replace("_proj", "")
    where = f"{parent}.processor" if "attn1" in path or "attn2" in path else parent
    return f"{where}.{layer if layer.startswith('to_') else f'to_{layer}'}_lora.{half}.weight"


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
DIALECTS = {  # (network, path, path in the original layout, "down" or "up") -> key
    "kohya": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te'}_{underscored(path)}.{KOHYA[half]}",
    "kohya, original layout": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te'}_{underscored(ldm)}.{KOHYA[half]}",
    "OneTrainer": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te1'}_{underscored(path)}.{KOHYA[half]}",
    "kohya, without text_model": lambda net, path, ldm, half:
        f"lora_{'unet' if net == 'diffusion' else 'te'}_{underscored(path.removeprefix('text_model.'))}.{KOHYA[half]}",
    "LyCORIS": lambda net, path, ldm, half: f"lycoris_{underscored(path)}.{KOHYA[half]}",
    "ComfyUI": lambda net, path, ldm, half:
        f"{'diffusion_model' if net == 'diffusion' else 'text_encoders'}.{ldm}.{KOHYA[half]}",
    "ComfyUI, full path": lambda net, path, ldm, half:
        f"{'diffusion_model' if net == 'diffusion' else 'text_encoders.clip_l.transformer'}.{ldm}.{KOHYA[half]}",
    "diffusers": lambda net, path, ldm, half:
        f"{'unet' if net == 'diffusion' else 'text_encoder'}.{path}.{PEFT[half]}",
    "diffusers, without text_model": lambda net, path, ldm, half:
        f"{'unet' if net == 'diffusion' else 'text_encoder'}.{path.removeprefix('text_model.')}.{PEFT[half]}",
    "PEFT": lambda net, path, ldm, half: f"base_model.model.{path}.{PEFT[half]}",
    "PEFT, live adapter": lambda net, path, ldm, half:
        f"base_model.model.{path}.{PEFT[half].replace('.', '.default.')}",
    "attention processors": lambda net, path, ldm, half:
        ("" if net == "diffusion" else "text_encoder.") + old_name(path, half),
    "attention processors, unet.": lambda net, path, ldm, half:
        ("unet." if net == "diffusion" else "text_encoder.") + old_name(path, half),
    "middle era": lambda net, path, ldm, half:
        f"unet.{path}.lora.{half}.weight" if net == "diffusion" else
        f"text_encoder.{path}.lora_linear_layer.{half}.weight",
}


def write(path, layers, original, dialect="kohya", alpha=None, metadata=None):
    name, tensors = DIALECTS[dialect], {}
    for (network, layer), halves in layers.items():
        for half, tensor in zip(("down", "up"), halves):
            tensors[name(network, layer, original.get(layer, layer), half)] = tensor
        if alpha is not None:
            key = name(network, layer, original.get(layer, layer), "up")
            tensors[key.replace("lora_up.weight", "alpha")] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def compare_with_diffusers(own, oracles, path, scales):
    """Has diffusers merge a file into its networks, at each scale."""
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    for scale in scales:
        theirs = copy.deepcopy(oracles)
        pipe = StableDiffusionPipeline(
            vae=None, text_encoder=theirs["clip"], tokenizer=None, unet=theirs["diffusion"], scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe.load_lora_weights(path)
        pipe.fuse_lora(lora_scale=scale)
        with lora(own, path, scale):
            check_outputs(own, theirs)


# ---- names


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "middle era", "attention processors, unet."])
def test_the_same_as_diffusers(own, oracles, original, tmp_path, dialect):
    alpha, scales = (1.5, SCALES) if dialect == "kohya" else (None, [1.0])
    path = write(tmp_path / "lora.safetensors", random_lora(oracles), original, dialect, alpha)
    compare_with_diffusers(own, oracles, path, scales)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_same(own, oracles, original, tmp_path, dialect):
    layers = random_lora(oracles, ATTENTION if "processors" in dialect else ".")
    before = weights_of(own)
    with lora(own, write(tmp_path / "kohya.safetensors", layers, original)):
        expected = weights_of(own)
    add_lora(own, write(tmp_path / "lora.safetensors", layers, original, dialect))
    assert same(weights_of(own), expected) and not same(expected, before)


def test_a_file_in_both_layouts_counts_once(own, oracles, original, tmp_path):
    layers = random_lora(oracles)
    once = write(tmp_path / "once.safetensors", layers, original)
    again = write(tmp_path / "again.safetensors", layers, original, "kohya, original layout")
    twice = tmp_path / "twice.safetensors"
    save_file({**load_file(once), **load_file(again)}, twice)
    with lora(own, once):
        expected = weights_of(own)
    add_lora(own, twice)
    assert same(weights_of(own), expected)


def test_a_pickled_file(own, oracles, original, tmp_path):
    path = write(tmp_path / "lora.safetensors", random_lora(oracles), original)
    torch.save(load_file(path), tmp_path / "lora.pt")
    with lora(own, path):
        expected = weights_of(own)
    add_lora(own, tmp_path / "lora.pt")
    assert same(weights_of(own), expected)


def test_all_layers_of_the_full_size_model(tmp_path):
    with torch.device("meta"):
        own = {"diffusion": Diffusion(), "clip": CLIP()}
        unet, _, text = oracle.empty_models({"clip": CLIP().config, "encoder": oracle.TINY["encoder"],
                                             "diffusion": Diffusion().config})
    tensors = {}
    for prefix, module, pattern in [
        ("unet", unet, r"attentions.*(proj_in|proj_out|to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)$|"
                       r"resnets.*(conv1|conv2|time_emb_proj|conv_shortcut)$|(down|up)samplers\.0\.conv$"),
        ("te", text, r"_proj$|fc\d$"),
    ]:
        for path, layer in module.named_modules():
            if re.search(pattern, path):
                stem = f"lora_{prefix}_{underscored(with_text_model(prefix, path))}"
                out, *rest = layer.weight.shape
                tensors[f"{stem}.lora_down.weight"] = torch.ones(1, *rest)
                tensors[f"{stem}.lora_up.weight"] = torch.ones(out, 1, *[1] * len(rest[1:]))
                tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    assert len(tensors) == 3 * (278 + 72)
    save_file(tensors, tmp_path / "lora.safetensors")
    changes, *_ = read_changes(own, tmp_path / "lora.safetensors", 1.0, None, None)
    assert len({(layer, kind) for layer, kind, _ in changes}) == 278 + 72


# ---- kinds


KINDS = {
    "LoCon": {"algo": "locon"},
    "LoCon, Tucker": {"algo": "locon", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 8},
    "LoKr, both factored": {"algo": "lokr", "factor": 16, "decompose_both": True},
    "LoKr, Tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "LoKr, whole": {"algo": "lokr", "full_matrix": True},
    "full": {"algo": "full", "train_norm": True},
}


def lycoris_networks(theirs, seed=0, **settings):
    """Has LyCORIS make changes of all layers of both networks, with random values: (networks, what it saves)."""
    LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    networks, tensors = [], {}
    for module in theirs.values():
        network = create_lycoris(module, 1.0, linear_dim=2, linear_alpha=1.5, warn_on_unmatched=False, **settings)
        network.apply_to()
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            bound = 0.15 if parameter.ndim > 1 and settings["algo"] != "full" else 0.03
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=bound)
        tensors |= {key: tensor.clone().contiguous() for key, tensor in network.state_dict().items()}
        networks.append(network)
    return networks, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_lycoris(own, theirs, tmp_path, kind):
    networks, tensors = lycoris_networks(theirs, **KINDS[kind])
    save_file(tensors, tmp_path / "lycoris.safetensors")
    for scale in SCALES:
        for network in networks:
            network.set_multiplier(scale)
        with lora(own, tmp_path / "lycoris.safetensors", scale):
            check_outputs(own, theirs)


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_dora_of_lycoris(own, theirs, tmp_path, algo, on_output):
    _, tensors = lycoris_networks(theirs, algo=algo, dora_wd=True, wd_on_output=on_output)
    path = tmp_path / "dora.safetensors"
    save_file(tensors, path)
    before = weights_of(own)
    with lora(own, path, 0.6):
        partly = weights_of(own)
    add_lora(own, path)
    check_outputs(own, theirs)
    for name, wholly in weights_of(own).items():  # the web UIs' scale: a straight line
        torch.testing.assert_close(partly[name], before[name] + 0.6 * (wholly - before[name]), atol=1e-6, rtol=1e-5)


PEFT_CONFIGS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION_REGEX),
    "rsLoRA, patterns": peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=ATTENTION_REGEX,
        rank_pattern={"to_q": 2, "q_proj": 3}, alpha_pattern={r"attn2\.to_k": 7, "k_proj": 5}),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=ATTENTION_REGEX + "|.*(conv1|proj_in)"),
    "LoHa": peft.LoHaConfig(r=4, alpha=3, target_modules=ATTENTION_REGEX + "|.*conv1", use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, target_modules=ATTENTION_REGEX + "|.*conv1", rank_pattern={"to_q": 200}),
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_folders_of_peft(own, theirs, tmp_path, kind):
    for network, folder in [("diffusion", "unet"), ("clip", "text_encoder")]:
        model = peft.get_peft_model(theirs[network], copy.deepcopy(PEFT_CONFIGS[kind]))
        randomize_adapter(model)
        model.save_pretrained(tmp_path / folder)
        theirs[network] = model.merge_and_unload()
    add_lora(own, tmp_path)
    check_outputs(own, theirs)


def randomize_adapter(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("kind", ["rsLoRA, patterns", "DoRA"])
def test_what_diffusers_saves_of_peft(own, theirs, tmp_path, kind):
    """With the metadata that tell alpha, without which it would be the rank."""
    halves = {}
    for network, name in (("diffusion", "unet"), ("clip", "text_encoder")):
        config = copy.deepcopy(PEFT_CONFIGS[kind])
        config.target_modules = ATTENTION_REGEX
        theirs[network].add_adapter(config)
        randomize_adapter(theirs[network])
        halves[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(theirs[network], adapter_name="default")
        halves[f"{name}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **halves)
    layers = [layer for module in theirs.values() for layer in module.modules() if hasattr(layer, "scale_layer")]
    for scale in SCALES:
        for layer in layers:
            layer.scale_layer(scale)
        with lora(own, tmp_path, scale):
            check_outputs(own, theirs)
        for layer in layers:
            layer.unscale_layer()


def test_a_narrow_first_convolution_in_an_inpainting_model(tmp_path):
    config = replace(oracle.TINY["diffusion"], in_channels=9)
    own = {"diffusion": oracle.randomize(Diffusion(config))}
    before = own["diffusion"].encoders[0][0].weight.clone()
    down, up = torch.randn(2, 4, 3, 3), torch.randn(32, 2, 1, 1)
    save_file({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up},
              tmp_path / "narrow.safetensors")
    add_lora(own, tmp_path / "narrow.safetensors")
    after = own["diffusion"].encoders[0][0].weight
    expected = before[:, :4] + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(after[:, :4], expected)
    assert torch.equal(after[:, 4:], before[:, 4:])


def test_half_precision_is_rounded_once(own, oracles, original, tmp_path):
    path = write(tmp_path / "lora.safetensors", random_lora(oracles), original)
    half = {network: copy.deepcopy(module).half() for network, module in own.items()}
    exact = {network: copy.deepcopy(module).float() for network, module in half.items()}
    add_lora(half, path, 0.3)
    add_lora(exact, path, 0.3)
    assert same(weights_of(half), {name: weight.half() for name, weight in weights_of(exact).items()})


# ---- for good and for a while


def test_for_a_while(own, oracles, original, tmp_path):
    first = write(tmp_path / "first.safetensors", random_lora(oracles, seed=1), original)
    second = write(tmp_path / "second.safetensors", random_lora(oracles, seed=2), original)
    before = weights_of(own)
    with lora(own, first, -0.5):
        between = weights_of(own)
        with pytest.raises(KeyboardInterrupt):
            with lora(own, second):
                own["diffusion"].half().float()  # what moves a network gives it new tensors
                raise KeyboardInterrupt
        changed = {name for name, weight in weights_of(own).items() if not torch.equal(weight, between[name])}
        assert not any(re.search(r"attention.*weight", name) for name in changed)
    after = weights_of(own)
    assert all(torch.equal(after[name], before[name]) for name in before if re.search(r"attention.*weight", name))


def test_scales_of_their_own(own, oracles, original, tmp_path):
    path = write(tmp_path / "lora.safetensors", random_lora(oracles), original)
    before = weights_of(own)
    with lora(own, path, unet_scale=0):
        for name, weight in weights_of(own).items():
            assert torch.equal(weight, before[name]) or name.startswith("clip")
        only_text = weights_of(own)
    with lora(own, path, 0.0, text_scale=1.0):
        assert same(weights_of(own), only_text) and not same(only_text, before)
    for scale in (float("nan"), "1"):
        with pytest.raises(ValueError, match="the scale of a LoRA is"):
            add_lora(own, path, scale)
    assert same(weights_of(own), before)


def test_bundled_embeddings_are_handed_on(own, oracles, original, tmp_path):
    plain, path = write(tmp_path / "plain.safetensors", random_lora(oracles), original), tmp_path / "lora.safetensors"
    bundled = {"bundle_emb.smile.string_to_param.*": torch.randn(2, 32), "bundle_emb.frown.emb_params": torch.randn(32)}
    save_file({**load_file(plain), **bundled}, path)
    with lora(own, path) as embeddings:
        assert embeddings.keys() == {"smile", "frown"} and embeddings["frown"].shape == (1, 32)
        assert torch.equal(embeddings["smile"], bundled["bundle_emb.smile.string_to_param.*"])


def test_packed_models_are_refused(own, oracles, original, tmp_path):
    path = write(tmp_path / "lora.safetensors", random_lora(oracles), original)
    own["diffusion"] = pack(own["diffusion"])
    with pytest.raises(ValueError, match=r"packed.*pack=False, add the LoRA, then pack"):
        add_lora(own, path)


# ---- files that are refused, with the weights untouched


def refused(own, path, *words):
    before = weights_of(own)
    with pytest.raises(CheckpointError) as error:
        add_lora(own, path)
    message = str(error.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message and same(weights_of(own), before)


def test_unknown_keys(own, oracles, original, tmp_path):
    plain, path = write(tmp_path / "plain.safetensors", random_lora(oracles), original), tmp_path / "lora.safetensors"
    strangers = {f"lora_unet_stranger_{i}.lora_up.weight": torch.ones(2, 2) for i in range(5)}
    save_file({**load_file(plain), **strangers}, path)
    refused(own, path, "5 of", *list(strangers)[:3])


def test_shapes_that_do_not_fit(own, oracles, original, tmp_path):
    tensors = load_file(write(tmp_path / "plain.safetensors", random_lora(oracles), original))
    path = tmp_path / "lora.safetensors"
    keys = [key for key in tensors if "attn1" in key and "lora_down" in key][:4]
    save_file({**tensors, **{key: torch.ones(4, 24) for key in keys}}, path)
    refused(own, path, "4 of", *keys[:3], "(4, 24)")


@pytest.mark.parametrize("tensors", [
    {"lora_down.weight": (4, 32)},  # a half
    {"lora_down.weight": (4, 32), "lora_up.weight": (32, 3)},  # two ranks
    {"lora_down.weight": (4, 16), "lora_up.weight": (64, 4)},  # as many numbers, in another shape
    {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "diff": (32, 32)},  # two kinds
    {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "dora_scale": (16, 1)},
    {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "alpha": (2,)},
    {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 1)},
    {"lokr_w1": (4, 4), "lokr_w2": (4, 4)},
    {"alpha": ()},
    {"diff": (32, 32), "diff_b": (32,)},  # this layer has no bias
])
def test_layers_that_make_no_sense(own, tmp_path, tensors):
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "lora.safetensors"
    save_file({f"{stem}.{name}": torch.ones(shape) for name, shape in tensors.items()}, path)
    refused(own, path, "1 of", stem)


@pytest.mark.parametrize("word, key, shape, metadata", [
    ("IA3", "lora_unet_mid_block_attentions_0_proj_in.on_input", (1,), {}),
    ("GLoRA", "lora_unet_mid_block_attentions_0_proj_in.a1.weight", (64, 2), {}),
    ("OFT", "oft_unet_mid_block_attentions_0_proj_in.oft_blocks", (2, 4, 4), {}),
    ("BOFT", "lycoris_mid_block_attentions_0_proj_in.oft_blocks", (2, 2, 4, 4), {}),
    ("T-LoRA", "lycoris_mid_block_attentions_0_proj_in.lambda_layer", (1, 4), {}),
    ("cloneofsimo", "unet:0:up", (4, 4), {}),
    ("SDXL", "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", (), {}),
    ("SDXL", "lora_unet_input_blocks_7_1_transformer_blocks_3_attn1_to_q.alpha", (), {}),
    ("SDXL", "lora_unet_mid_block_attentions_0_proj_in.alpha", (), {"ss_base_model_version": "sdxl_base_v1-0"}),
    ("SD 2", "lora_te_text_model_encoder_layers_22_mlp_fc1.alpha", (), {}),
    ("SD 2", "lora_unet_mid_block_attentions_0_proj_in.alpha", (), {"ss_v2": "True"}),
    ("SD 2", "lora_unet_mid_block_attentions_0_proj_in.alpha", (),
     {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}),
    ("SD 2", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", (4, 1024), {}),
    ("SD 3", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 4), {}),
    ("Flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 4), {}),
    ("AnimateDiff", "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora_A.weight", (4, 4), {}),
])
def test_other_kinds_and_models_are_named(own, tmp_path, word, key, shape, metadata):
    save_file({key: torch.ones(shape)}, tmp_path / "other.safetensors", metadata)
    refused(own, tmp_path / "other.safetensors", word, *[] if metadata else [key])


def test_other_kinds_of_peft(own, theirs, tmp_path):
    peft.get_peft_model(theirs["diffusion"], peft.OFTConfig(r=4, oft_block_size=0, target_modules=["to_q"])
                        ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="OFT"):
        add_lora(own, tmp_path)


class Attack:
    def __reduce__(self):
        return os.system, ("echo must not",)


def test_hostile_and_broken_files(own, oracles, original, tmp_path, capfd):
    path = write(tmp_path / "lora.safetensors", random_lora(oracles), original)
    tensors, whole = load_file(path), path.read_bytes()
    torch.save({**tensors, "callback": Attack()}, tmp_path / "hostile.pt")
    refused(own, tmp_path / "hostile.pt", "nothing was executed")
    assert "must not" not in capfd.readouterr().out
    torch.save([torch.ones(4, 4), torch.ones(4, 4)], tmp_path / "list.pt")
    refused(own, tmp_path / "list.pt", "cloneofsimo")
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(own, tmp_path / "half.safetensors", "truncated")
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key] * float("nan")}, tmp_path / "nan.safetensors")
    refused(own, tmp_path / "nan.safetensors", key, "NaN")
    torch.save({**tensors, key: torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "huge.pt")
    refused(own, tmp_path / "huge.pt", key)
    save_file({}, tmp_path / "empty.safetensors")
    refused(own, tmp_path / "empty.safetensors", "no weights")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        add_lora(own, tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        add_lora(own, tmp_path)


# ---- the command line's


def test_find_lora(tmp_path):
    (tmp_path / "styles").mkdir()
    path = tmp_path / "styles" / "ink.safetensors"
    save_file({"x": torch.ones(1)}, path, {"ss_output_name": "Ink drawing v2"})
    for name in ("ink", "ink.safetensors", "Ink drawing v2", str(path)):
        assert find_lora(name, tmp_path) == path
    assert find_lora("styles", tmp_path) == path.parent
    with pytest.raises(FileNotFoundError, match="oil.*there are: ink"):
        find_lora("oil", tmp_path)


@pytest.mark.parametrize("prompt, rest, tags", [
    ("a red apple", "a red apple", []),
    ("a <lora:ink>apple", "a apple", [("ink", 1, 1)]),
    ("<lora:ink v2:0.5> apple <lyco:oil:-1:0.25>", " apple ", [("ink v2", 0.5, 0.5), ("oil", 0.25, -1)]),
    ("<lora:ink:unet=0.5>", "", [("ink", 0.5, 1)]),
    ("<lora:ink:te=0.5>", "", [("ink", 0.5, 0.5)]),  # the UNet's is the text encoder's if not given
    ("<lora:ink:0.3:0.4:te=0.5>", "", [("ink", 0.4, 0.5)]),
])
def test_parse_tags(prompt, rest, tags):
    assert parse_tags(prompt) == (rest, tags)


@pytest.mark.parametrize("prompt", ["<hypernet:ink:1>", "<lora:ink:much>", "<lora:ink:1:1:8>", "<lora:ink:dyn=8>"])
def test_tags_that_are_refused(prompt):
    with pytest.raises(ValueError, match=re.escape(prompt)):
        parse_tags(f"an apple {prompt}")


def test_words_are_known_as_long_as_the_lora_is_there(models, tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    weights = {f"{name}.lora_down.weight": torch.ones(4, 64), f"{name}.lora_up.weight": torch.zeros(64, 4)}
    save_file(weights, tmp_path / "ink.safetensors", {"ss_tag_frequency": '{"10_ink": {"a cat, ink": 2, "2 Dogs": 1}}'})
    clip = CLIP(replace(models["clip"].config, words=("a", "cat")))
    clip.load_state_dict(models["clip"].state_dict())
    with lora(models | {"clip": clip}, tmp_path / "ink.safetensors"):
        assert clip.config.words == ("2", "a", "cat", "dogs", "ink")
    assert clip.config.words == ("a", "cat")
    with lora(models, tmp_path / "ink.safetensors"):
        assert models["clip"].config.words == ()  # what knows all words goes on to know them
