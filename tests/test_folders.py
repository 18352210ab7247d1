"""diffusers folders and written checkpoints, against diffusers' and transformers' own reading and writing."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import model_converter
import oracle
from checkpoint_file import CheckpointError
from model_converter import load_from_standard_weights, standard_names, to_standard_weights
from model_loader import preload_models_from_standard_weights, save_checkpoint, save_folder

load = preload_models_from_standard_weights
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def write_folder(folder, configs=oracle.TINY, weights=None, scheduler=None, **settings):
    """A folder as diffusers and transformers write it, and the weights in it by standard name."""
    weights = weights or oracle.random_weights(configs)
    oracle.unet_oracle(weights, configs["diffusion"]).save_pretrained(folder / "unet", **settings)
    oracle.vae_oracle(weights, configs["encoder"]).save_pretrained(folder / "vae", **settings)
    oracle.clip_oracle(weights, configs["clip"]).save_pretrained(folder / "text_encoder", **settings)
    if scheduler:
        scheduler.save_pretrained(folder / "scheduler")
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder written by diffusers, of the same weights as the fixture `weights`."""
    path = tmp_path_factory.mktemp("folders") / "tiny"
    write_folder(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of that folder, to be spoiled."""
    return shutil.copytree(folder, tmp_path / "copy")


def assert_same(models, weights):
    ours = to_standard_weights({network: module.state_dict() for network, module in models.items()})
    assert ours.keys() == weights.keys()
    for name in ours:
        assert torch.equal(ours[name], weights[name].to(ours[name].dtype).reshape(ours[name].shape)), name


def edit(path, **changes):
    """Changes settings in a JSON file; None takes one away."""
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- reading


def test_a_folder_has_the_weights_and_configs_of_the_checkpoint(folder, weights):
    models = load(folder, "cpu", "float32")
    assert_same(models, weights)
    assert {network: module.config for network, module in models.items()} == oracle.TINY
    assert_same_state_dicts(load_from_standard_weights(str(folder)), models)


def assert_same_state_dicts(state_dicts, models):
    for network, module in models.items():
        assert all(torch.equal(state_dicts[network][name], weight) for name, weight in module.state_dict().items())


def test_bin_files_go_through_the_restricted_unpickler(folder, weights, copied):
    for part, stem in STEMS.items():
        path = copied / part / f"{stem}.safetensors"
        torch.save(load_file(path), copied / part / ("pytorch_model.bin" if part == "text_encoder" else f"{stem}.bin"))
        path.unlink()
    assert_same(load(copied, "cpu", "float32"), weights)
    path = copied / "unet" / "diffusion_pytorch_model.bin"
    path.write_bytes(b"\x80\x02cos\nsystem\n(X\x09\x00\x00\x00touch rantR.")
    with pytest.raises(CheckpointError, match="unet/diffusion_pytorch_model.bin: .*system"):
        load(copied, "cpu")


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "bf16", "ema"])
def test_a_variant_is_taken_where_there_is_nothing_else(copied, variant, weights):
    for part, stem in STEMS.items():
        (copied / part / f"{stem}.safetensors").rename(copied / part / f"{stem}.{variant}.safetensors")
    assert_same(load(copied, "cpu", "float32"), weights)


def test_plain_weights_before_variants_and_safetensors_before_bin(copied, weights):
    plain = load_file(copied / "unet/diffusion_pytorch_model.safetensors")
    other = {name: weight + 1 for name, weight in plain.items()}
    for variant in ("ema", "fp16", "non_ema"):
        save_file(other, copied / f"unet/diffusion_pytorch_model.{variant}.safetensors")
    torch.save(other, copied / "unet/diffusion_pytorch_model.bin")
    assert_same(load(copied, "cpu", "float32"), weights)
    ema = load(copied, "cpu", "float32", use_ema=True)
    assert torch.equal(ema["diffusion"].conv_out.bias, weights["model.diffusion_model.out.2.bias"] + 1)
    assert torch.equal(ema["decoder"].conv_out.bias, weights["first_stage_model.decoder.conv_out.bias"])


@pytest.mark.parametrize("settings", [{}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_shards(copied, weights, settings):
    shutil.rmtree(copied / "unet")
    oracle.unet_oracle(weights).save_pretrained(copied / "unet", max_shard_size="500KB", **settings)
    assert len(list((copied / "unet").glob("diffusion_pytorch_model*-of-*"))) > 2
    assert_same(load(copied, "cpu", "float32"), weights)


def test_the_names_of_sharded_variants_before_2024(copied, weights):
    shutil.rmtree(copied / "unet")
    oracle.unet_oracle(weights).save_pretrained(copied / "unet", max_shard_size="500KB")
    unet = copied / "unet"
    index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        (unet / name).rename(unet / name.replace(".safetensors", ".fp16.safetensors"))
    index["weight_map"] = {key: name.replace(".safetensors", ".fp16.safetensors")
                           for key, name in index["weight_map"].items()}
    (unet / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (unet / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert_same(load(copied, "cpu", "float32"), weights)


def test_old_names_of_the_vaes_attention(copied, weights):
    path = copied / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weight in load_file(path).items():
        for new, older in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{older}.")
        renamed[name] = weight
    assert sum("proj_attn" in name for name in renamed) == 4
    save_file(renamed, path)
    assert_same(load(copied, "cpu", "float32"), weights)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_with_and_without_text_model(copied, weights, prefix):
    path = copied / "text_encoder/model.safetensors"
    renamed = {prefix + name.removeprefix("text_model."): weight for name, weight in load_file(path).items()}
    renamed[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(renamed, path)
    assert_same(load(copied, "cpu", "float32"), weights)


def test_projections_as_linear_layers(copied, weights):
    """As `use_linear_projection` has them."""
    path = copied / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: weight[:, :, 0, 0] if "proj_in" in name and weight.ndim == 4 else weight
               for name, weight in load_file(path).items()}, path)
    assert_same(load(copied, "cpu", "float32"), weights)


@pytest.mark.parametrize("prediction_type, expected", [("v_prediction", "v"), ("epsilon", "epsilon")])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_schedulers_config_says_what_is_predicted(copied, prediction_type, expected, zero_snr):
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
                  rescale_betas_zero_snr=zero_snr).save_pretrained(copied / "scheduler")
    config = load(copied, "cpu")["diffusion"].config
    assert (config.prediction, config.zero_terminal_snr) == (expected, zero_snr)
    assert load(copied, "cpu", prediction="epsilon")["diffusion"].config.prediction == "epsilon"
    assert load(copied, "cpu", prediction="v")["diffusion"].config.prediction == "v"


@pytest.mark.parametrize("file, changes, message", [
    ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'; expected 'silu'"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
    ("unet/config.json", {"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
    ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, r"unet_heads is '\[5, 10, 20, 20\]'"),
    ("vae/config.json", {"scaling_factor": 0.13025}, "scaling_factor is 0.13025; expected 0.18215"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'quick_gelu'"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
])
def test_configs_that_ask_for_something_else(copied, file, changes, message):
    (copied / "scheduler").mkdir(exist_ok=True)
    (copied / file).touch()
    (copied / file).write_text((copied / file).read_text() or "{}")
    edit(copied / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(copied, "cpu")
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def spoil(folder, what):
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    if what == "no vae":
        shutil.rmtree(folder / "vae")
    elif what == "no weights":
        unet.unlink()
    elif what == "broken json":
        (folder / "unet/config.json").write_text('{"in_channels": ')
    elif what == "nested json":
        (folder / "unet/config.json").write_text("[" * 100_000)
    elif what == "json of another kind":
        (folder / "unet/config.json").write_text("[1]")
    elif what == "truncated":
        unet.write_bytes(unet.read_bytes()[:5000])
    elif what == "another model's key":
        save_file({**load_file(unet), "add_embedding.linear_1.weight": torch.zeros(2)}, unet)
    elif what == "a missing key":
        save_file({name: weight for name, weight in load_file(unet).items() if name != "conv_in.bias"}, unet)
    elif what == "NaN":
        save_file({**load_file(unet), "conv_in.bias": torch.full((32,), float("nan"))}, unet)
    elif what == "other weights":
        save_file({"fc.weight": torch.zeros(2)}, unet)
    elif what in ("shard outside", "missing shard", "index of nothing"):
        unet.unlink()
        places = {"shard outside": {"conv_in.bias": "../../secret.safetensors"}, "index of nothing": [],
                  "missing shard": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"}}[what]
        (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("what, message", [
    ("no vae", "without 'vae'"), ("no weights", "unet: found no weights"),
    ("broken json", "config.json: found a broken JSON"), ("nested json", "config.json: found a broken JSON"),
    ("json of another kind", "config.json: found a JSON list"), ("truncated", "broken or truncated safetensors"),
    ("another model's key", "unet: found 'add_embedding.linear_1.weight'"),
    ("a missing key", "unet/conv_in.bias is missing"),
    ("NaN", "unet/conv_in.bias holds NaN"), ("other weights", "unet: no key begins with"),
    ("shard outside", "no table of names and files"), ("index of nothing", "no table of names and files"),
    ("missing shard", "00001-of-00002.safetensors: no such"),
])
def test_broken_folders_get_one_line(copied, what, message):
    spoil(copied, what)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as caught:
        load(copied, "cpu")
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder_and_one_part_alone(folder, tmp_path):
    with pytest.raises(CheckpointError, match="found a folder without 'text_encoder'"):
        load(tmp_path, "cpu")
    with pytest.raises(CheckpointError, match="weights in the layout of a diffusers folder; give that folder"):
        load(folder / "unet/diffusion_pytorch_model.safetensors", "cpu")


# ---- another VAE


@pytest.fixture(scope="module")
def other_vae():
    """Other weights for the VAE, by standard name."""
    return {name: weight for name, weight in oracle.random_weights(seed=7).items() if name.startswith("first_stage_")}


@pytest.mark.parametrize("kind", ["first_stage_model.", "bare", "ckpt with loss", "diffusers file", "diffusers .bin",
                                  "folder of the vae", "folder of a model", "checkpoint", "old names"])
def test_another_vae(kind, checkpoint, weights, other_vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    bare = {name.removeprefix("first_stage_model."): weight for name, weight in other_vae.items()}
    if kind == "first_stage_model.":
        save_file(other_vae, path)
    elif kind == "bare":
        save_file(bare, path)
    elif kind == "ckpt with loss":
        path = tmp_path / "kl-f8.ckpt"
        torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.tensor(3),
                                   "model_ema.decay": torch.tensor(0.9)}, "global_step": 3}, path)
    elif kind == "checkpoint":
        save_file({**weights, **other_vae}, path)
    elif kind == "folder of a model":
        path = tmp_path / "model"
        write_folder(path, weights={**weights, **other_vae})
    else:
        vae = oracle.vae_oracle({**weights, **other_vae})
        vae.save_pretrained(tmp_path / "vae", safe_serialization=kind != "diffusers .bin")
        path = tmp_path / "vae" if kind == "folder of the vae" else next((tmp_path / "vae").glob("diffusion_*"))
        if kind == "old names":
            old = {name.replace("attentions.0.to_q", "attentions.0.query"): weight for name, weight in
                   load_file(path).items()}
            save_file(old, path)
    models = load(checkpoint, "cpu", "float32", vae=path)
    assert_same(models, {**weights, **other_vae})
    assert models["decoder"].config == oracle.TINY["decoder"]


def test_a_model_without_a_vae_takes_another(weights, other_vae, tmp_path):
    rest = {name: weight for name, weight in weights.items() if not name.startswith("first_stage_model.")}
    save_file(rest, tmp_path / "pruned.safetensors", oracle.METADATA)
    save_file(other_vae, tmp_path / "vae.safetensors")
    assert_same(load(tmp_path / "pruned.safetensors", "cpu", "float32", vae=tmp_path / "vae.safetensors"),
                {**weights, **other_vae})
    with pytest.raises(CheckpointError, match="first_stage_model"):
        load(tmp_path / "pruned.safetensors", "cpu")


@pytest.mark.parametrize("change, message", [
    (lambda vae: {"fc.weight": torch.zeros(2)}, "vae.safetensors: found 'fc.weight'; expected the VAE of an SD 1"),
    (lambda vae: {name: weight for name, weight in vae.items() if not name.endswith("mid.attn_1.q.weight")},
     "mid.attn_1.q.weight is missing"),
    (lambda vae: {**vae, "first_stage_model.decoder.conv_out.bias": torch.zeros(7)}, r"has shape \(7,\)"),
    (lambda vae: {**vae, "first_stage_model.post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, "16"),
    (lambda vae: {**vae, "first_stage_model.quantize.embedding.weight": torch.zeros(8, 4)}, "VQ codebook"),
    (lambda vae: {name: weight for name, weight in vae.items() if ".down." not in name}, "down"),
])
def test_vaes_that_do_not_fit(checkpoint, other_vae, tmp_path, change, message):
    save_file(change(other_vae), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint, "cpu", vae=tmp_path / "vae.safetensors")
    assert "vae.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_a_vae_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load(checkpoint, "cpu", vae=tmp_path / "none.safetensors")


# ---- writing


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """A checkpoint whose configs differ from the default ones in all that shapes do not tell."""
    configs = {**oracle.TINY, "clip": replace(oracle.TINY["clip"], words=("fox", "owl")),
               "diffusion": replace(oracle.TINY["diffusion"], cfg_scale=4.5, prediction="v", zero_terminal_snr=True,
                                    guidance_rescale=0.7, d_guidance=6)}
    path = tmp_path_factory.mktemp("special") / "special.safetensors"
    oracle.write_checkpoint(path, configs, model_converter.to_metadata(configs))
    return path, configs


def test_a_written_checkpoint_reads_back_the_same(special, tmp_path):
    path, configs = special
    models = load(path, "cpu", "float32")
    assert {network: module.config for network, module in models.items()} == configs
    save_checkpoint(models, tmp_path / "again.safetensors")
    again = load(tmp_path / "again.safetensors", "cpu", "float32")
    assert {network: module.config for network, module in again.items()} == configs
    assert_same(again, load_file(path))
    assert [file.name for file in tmp_path.iterdir()] == ["again.safetensors"]


def test_a_written_checkpoint_has_the_published_names(models, weights, tmp_path):
    save_checkpoint(models, tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    assert written.keys() == weights.keys()
    ids = written["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert ids.dtype == torch.int64 and torch.equal(ids, torch.arange(77)[None])
    assert all(written[name].shape == weight.shape and torch.equal(written[name], weight)
               for name, weight in weights.items())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_to_checkpoint_to_folder_is_the_same_bit_for_bit(special, folder, tmp_path, dtype):
    for source in (special[0], folder):
        save_folder(load(source, "cpu", dtype), tmp_path / "first")
        save_checkpoint(load(tmp_path / "first", "cpu", dtype), tmp_path / "between.safetensors")
        save_folder(load(tmp_path / "between.safetensors", "cpu", dtype), tmp_path / "second")
        first, second = files_in(tmp_path / "first"), files_in(tmp_path / "second")
        assert len(first) == 11 and first == second
        for path in ("first", "second"):
            shutil.rmtree(tmp_path / path)
        (tmp_path / "between.safetensors").unlink()


def test_what_diffusers_wrote_comes_back_bit_for_bit(folder, tmp_path):
    save_checkpoint(load(folder, "cpu", "float32"), tmp_path / "between.safetensors")
    save_folder(load(tmp_path / "between.safetensors", "cpu", "float32"), tmp_path / "back")
    for part, stem in STEMS.items():
        theirs, ours = (load_file(place / part / f"{stem}.safetensors") for place in (folder, tmp_path / "back"))
        ours = {name.removeprefix("text_model."): weight for name, weight in ours.items()}
        theirs = {name.removeprefix("text_model."): weight for name, weight in theirs.items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) and weight.shape == theirs[name].shape
                   for name, weight in ours.items())


def test_diffusers_reads_a_written_folder_back_equal(models, weights, tmp_path):
    save_folder(models, tmp_path / "written")
    for kind, part, model in [(UNet2DConditionModel, "unet", oracle.unet_oracle(weights)),
                              (AutoencoderKL, "vae", oracle.vae_oracle(weights)),
                              (CLIPTextModel, "text_encoder", oracle.clip_oracle(weights))]:
        read, told = kind.from_pretrained(tmp_path / "written" / part, output_loading_info=True)
        assert not any(told.values())
        read = read.state_dict()
        assert read.keys() == model.state_dict().keys()
        assert all(torch.equal(read[name], weight) for name, weight in model.state_dict().items())
    with safe_open(tmp_path / "written/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["unet_heads"] == "4"


def test_diffusers_pipeline_draws_from_a_written_folder(special, tmp_path):
    models = load(special[0], "cpu", "float32")
    save_folder({**models, "diffusion": replace_guidance(models["diffusion"])}, tmp_path / "written")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "written")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline.tokenizer("jekyll").input_ids == [49406, 49405, 49407]
    assert pipeline.unet.config.sample_size == 8
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def replace_guidance(diffusion):
    """The same UNet without the embedding of the guidance scale, which this pipeline does not give."""
    config = replace(diffusion.config, d_guidance=0)
    network = model_converter.NETWORKS["diffusion"](config)
    network.load_state_dict({name: weight for name, weight in diffusion.state_dict().items()
                             if "cond_proj" not in name})
    return network


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel,
                                  lambda network: torch.nn.DataParallel(torch.compile(network))])
def test_compiled_and_parallel_networks(models, weights, tmp_path, wrap):
    wrapped = {network: wrap(module) for network, module in models.items()}
    ours = to_standard_weights({network: module.state_dict() for network, module in wrapped.items()})
    assert ours.keys() == weights.keys()
    save_checkpoint(wrapped, tmp_path / "wrapped.safetensors")
    assert_same(load(tmp_path / "wrapped.safetensors", "cpu", "float32"), weights)


def test_blocks_compiled_one_by_one(models, weights):
    names = {f"layers.0._orig_mod.{name}": weight for name, weight in models["clip"].layers[0].state_dict().items()}
    ours = to_standard_weights({"clip": names})
    assert ours.keys() == {standard for name in names for standard in
                           standard_names("clip", name.replace("_orig_mod.", ""))}


def test_packed_networks_are_not_written(checkpoint, tmp_path):
    packed = load(checkpoint, "cpu", "float32", pack=True)
    for write in (save_checkpoint, save_folder):
        with pytest.raises(ValueError, match="is packed.*pack=False") as caught:
            write(packed, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_networks_that_are_missing_or_others(models, tmp_path):
    with pytest.raises(ValueError, match="no 'encoder'"):
        save_checkpoint({name: module for name, module in models.items() if name != "encoder"}, tmp_path / "a")
    with pytest.raises(ValueError, match="'decoder' is a Linear; expected a VAE_Decoder"):
        save_checkpoint({**models, "decoder": torch.nn.Linear(1, 1)}, tmp_path / "a")


def test_nothing_is_overwritten_unasked(models, tmp_path):
    path = tmp_path / "there.safetensors"
    path.write_bytes(b"precious")
    for write in (save_checkpoint, save_folder):
        with pytest.raises(FileExistsError, match="there.safetensors: there is such a file"):
            write(models, path)
    assert path.read_bytes() == b"precious"
    save_checkpoint(models, path, overwrite=True)
    assert load(path, "cpu")["clip"].config == oracle.TINY["clip"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_checkpoint(models, tmp_path / "none" / "a.safetensors")
