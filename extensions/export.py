"""The four networks as programs for other runtimes, and such programs as networks for `generate`.

    python -m extensions.export CHECKPOINT FOLDER --format onnx       # or pt2 (torch.export), torchscript
    models = load_exported(FOLDER, "cpu")

A program has a file of its own, takes any number of pictures of any size and any number of tokens, and has the inputs
and outputs of diffusers' OnnxStableDiffusionPipeline, which draws from a folder in ONNX:

    text_encoder   input_ids (int32)                                  last_hidden_state, pooler_output
    unet           sample, timestep, encoder_hidden_states            out_sample
    vae_decoder    latent_sample                                      sample
    vae_encoder    sample                                             latent_sample: mean and log-variance, 8 channels

The latents of the VAE have their own scale there, not the unit scale that ours return: divided by 0.18215.
"""

import argparse
import importlib
import json
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.export import Dim

from checkpoint_file import CheckpointError
from clip import CLIP, CLIPConfig
from cpu.packed import Packed
from decoder import DecoderConfig, VAE_Decoder
from diffusers_folder import to_json
from diffusion import Diffusion, DiffusionConfig, get_frequencies, repeat_rows
from encoder import LATENT_SCALE, EncoderConfig, VAE_Encoder
from extensions.tiny_vae import TinyDecoder, TinyEncoder, load_tiny_decoder, load_tiny_encoder
from model_loader import DTYPES, ROOT, TOKENIZER, check_device, preload_models_from_standard_weights

FILES = {"onnx": "model.onnx", "pt2": "model.pt2", "torchscript": "model.ts"}
FOLDERS = {"clip": "text_encoder", "diffusion": "unet", "decoder": "vae_decoder", "encoder": "vae_encoder"}
CONFIGS = {"clip": CLIPConfig, "diffusion": DiffusionConfig, "decoder": DecoderConfig, "encoder": EncoderConfig}
SETTINGS = "networks.json"  # in the folder: the format, and the config and dtype of each network
OPSET = 18  # what PyTorch's exporter is written in; asked for another, it converts
LARGE = 2**30  # bytes of weights, from which they get a file beside the program: an ONNX file ends at 2 GiB

BATCH, TOKENS, HEIGHT, WIDTH = (Dim(name) for name in ("batch", "tokens", "height", "width"))
IMAGE = {0: BATCH, 2: HEIGHT, 3: WIDTH}


# ---- the programs: networks as the outside calls them


class TextEncoder(nn.Module):
    inputs, outputs = ["input_ids"], ["last_hidden_state", "pooler_output"]

    def __init__(self, clip: CLIP):
        super().__init__()
        self.network = clip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens) int32 -> (batch, tokens, d_embed), and of these the one at the end token (batch, d_embed)"""
        hidden = self.network.forward(input_ids)  # not a call, which runs hooks; so below
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden, hidden[rows, input_ids.argmax(-1)]  # the end token has the greatest id

    def example(self) -> tuple[tuple, tuple]:
        config = self.network.config
        tokens = torch.arange(config.n_tokens // 2, dtype=torch.int32).expand(2, -1) % config.n_vocab
        return (tokens,), ({0: BATCH, 1: Dim("tokens", max=config.n_tokens)},)


class UNet(nn.Module):
    outputs = ["out_sample"]

    def __init__(self, diffusion: Diffusion):
        super().__init__()
        self.network = diffusion
        self.inputs = ["sample", "timestep", "encoder_hidden_states", "timestep_cond"][: self.count_inputs()]
        self.register_buffer("frequencies", get_frequencies(diffusion.config.channels[0]), persistent=False)

    def count_inputs(self) -> int:
        return 4 if self.network.config.d_guidance else 3

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
                timestep_cond: Tensor | None = None) -> Tensor:
        """(batch, 4, h / 8, w / 8), (batch,) float32, (batch, tokens, d_context), and for a model that is told its
        guidance scale (batch, d_guidance) -> (batch, 4, h / 8, w / 8)"""
        angles = timestep[:, None] * self.frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(sample.dtype)
        if timestep_cond is not None:
            embedding = torch.cat([embedding, timestep_cond], dim=1)
        return self.network.forward(sample, encoder_hidden_states, embedding)

    def example(self) -> tuple[tuple, tuple]:
        config, dtype = self.network.config, dtype_of(self.network)
        tensors = (torch.zeros(2, config.in_channels, 18, 20, dtype=dtype), torch.tensor([500.0, 500.0]),
                   torch.zeros(2, 11, config.d_context, dtype=dtype), torch.zeros(2, config.d_guidance, dtype=dtype))
        sizes = IMAGE, {0: BATCH}, {0: BATCH, 1: TOKENS}, {0: BATCH}
        return tensors[: self.count_inputs()], sizes[: self.count_inputs()]


class Decoder(nn.Module):
    inputs, outputs = ["latent_sample"], ["sample"]

    def __init__(self, decoder: VAE_Decoder | TinyDecoder):
        super().__init__()
        self.network = decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        """(batch, 4, h / 8, w / 8), unscaled -> (batch, 3, h, w)"""
        return self.network.forward(latent_sample * LATENT_SCALE)

    def example(self) -> tuple[tuple, tuple]:
        channels = self.network.config.latent_channels
        return (torch.zeros(2, channels, 6, 10, dtype=dtype_of(self.network)),), (IMAGE,)


class Encoder(nn.Module):
    inputs, outputs = ["sample"], ["latent_sample"]

    def __init__(self, encoder: VAE_Encoder | TinyEncoder):
        super().__init__()
        self.network = encoder

    def forward(self, sample: Tensor) -> Tensor:
        """(batch, 3, h, w) -> mean and log-variance of the latents, unscaled: (batch, 8, h / 8, w / 8)"""
        if isinstance(self.network, TinyEncoder):  # it finds no distribution: the least variance there is
            mean = self.network.forward(sample) / LATENT_SCALE
            return torch.cat([mean, torch.full_like(mean, -30)], dim=1)
        return torch.cat(self.network.moments(sample), dim=1)

    def example(self) -> tuple[tuple, tuple]:
        channels = self.network.config.in_channels
        sizes = {0: BATCH, 2: 8 * Dim("latent_height"), 3: 8 * Dim("latent_width")}
        return (torch.zeros(2, channels, 48, 80, dtype=dtype_of(self.network)),), (sizes,)


PROGRAMS = {"clip": (TextEncoder, CLIP), "diffusion": (UNet, Diffusion),
            "decoder": (Decoder, (VAE_Decoder, TinyDecoder)), "encoder": (Encoder, (VAE_Encoder, TinyEncoder))}


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


# ---- networks to files


@torch.no_grad()
def export(models: dict[str, nn.Module], folder, format: str = "onnx") -> None:
    """Writes four networks as programs, in the dtype that each has.

    Args:
        models: what `preload_models_from_standard_weights` returns, on the CPU and not packed; LoRAs may be in them,
            and the halves of a tiny VAE in place of the VAE's.
        folder: a path that does not exist, or an empty folder. It gets `text_encoder/`, `unet/`, `vae_decoder/` and
            `vae_encoder/`, and networks.json for `load_exported`; in ONNX tokenizer and scheduler as well.
        format: "onnx", "pt2" for `torch.export` or "torchscript". In ONNX, large weights lie in a file of their own
            beside the program, model.onnx.data. PyTorch no longer develops TorchScript, and warns of removing it.

    Raises:
        FileExistsError: there is something in the folder.
        ModuleNotFoundError: ONNX needs what is in extensions/requirements-export.txt.
        ValueError: there is no such format, or a network cannot be exported in it.
    """
    if format not in FILES:
        raise ValueError(f"format is {format!r}; give {', '.join(FILES)}")
    if format == "onnx":
        need("onnx", "onnxscript")
    programs = {network: make_program(models, network, format) for network in FOLDERS}
    folder = Path(folder)
    check_empty(folder)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as temporary:
        whole = Path(temporary) / "programs"
        for network, program in programs.items():
            path = whole / FOLDERS[network] / FILES[format]
            path.parent.mkdir(parents=True)
            try:
                WRITERS[format](program, path)
            except OSError:
                raise
            except Exception as error:  # of exporters, which raise all there is
                raise ValueError(f"PyTorch {torch.__version__} does not make models[{network!r}] into {format} "
                                 f"({first_line(error)}); try another format: {', '.join(FILES)}") from error
        write_settings(whole, format, {network: program.network for network, program in programs.items()})
        if folder.exists():
            folder.rmdir()  # which fails if anything was put there meanwhile
        whole.rename(folder)


def make_program(models, network, format):
    """Returns a network as one of the modules above, or raises ValueError for one that cannot be exported."""
    wrapper, kinds = PROGRAMS[network]
    module = models.get(network)
    if not isinstance(module, kinds):
        raise ValueError(f"models[{network!r}] is a {type(module).__name__}; expected one of four networks, as "
                         f"preload_models_from_standard_weights returns them")
    if any(isinstance(part, Packed) for part in module.modules()):
        raise ValueError(f"models[{network!r}] is packed, and cannot be exported; load with pack=False")
    weight = next(module.parameters())
    if weight.device.type != "cpu":
        raise ValueError(f"models[{network!r}] is on {weight.device}; load it on the CPU to export it")
    if format == "onnx" and weight.dtype == torch.bfloat16:
        raise ValueError("onnxruntime does not compute in bfloat16 on the CPU, so nothing is exported in it; give "
                         "float32 or float16, or the format pt2")
    return wrapper(module).eval()


def check_empty(folder):
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: exists and is not a folder; give another name")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; give another name, or empty it")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no such folder to make {folder.name} in; make it first")


def to_exported_program(program):
    """Returns a torch.export.ExportedProgram in which all sizes vary."""
    tensors, sizes = program.example()
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # sizes of 1 as well
        return torch.export.export(program, tensors, dynamic_shapes=sizes)


def write_onnx(program, path):
    import onnx_ir

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about itself
        result = torch.onnx.export(to_exported_program(program), dynamo=True, opset_version=OPSET, verbose=False,
                                   input_names=program.inputs, output_names=program.outputs)
    graph = result.model.graph
    outside = [(value, onnx_ir.Shape(name_sizes(value))) for value in [*graph.inputs, *graph.outputs]]
    for node in graph:
        for value in node.outputs:
            value.shape = None  # PyTorch's formulas of sizes, which hold for as many timesteps as pictures alone
    for value, shape in outside:
        value.shape = shape
    size = sum(weight.nbytes for weight in program.state_dict().values())
    result.save(path, external_data=size >= LARGE)


def name_sizes(value):
    """Returns the shape of an input or output with names for the sizes that vary. The same name is the same size."""
    names = {1: ["timesteps"], 2: ["batch", "tokens"], 3: ["batch", "tokens", "channels"],
             4: ["batch", "channels", *(f"{'latent_' * (value.name == 'latent_sample')}{side}"
                                        for side in ("height", "width"))]}[len(value.shape)]
    return [size if isinstance(size, int) else name for size, name in zip(value.shape, names)]


WRITERS = {
    "onnx": write_onnx,
    "pt2": lambda program, path: torch.export.save(to_exported_program(program), path),
    "torchscript": lambda program, path: trace(program).save(path),
}


def trace(program):
    """Returns a torch.jit.ScriptModule."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that vary are compared with each other alone
        return torch.jit.trace(program, program.example()[0], check_trace=False)


def write_settings(folder, format, networks):
    """Writes networks.json and, for diffusers' pipeline, configs and tokenizer."""
    settings = {network: {"dtype": str(dtype_of(module)).removeprefix("torch."), "config": asdict(module.config)}
                for network, module in networks.items()}
    files = {SETTINGS: {"format": format, "networks": settings}}
    if format == "onnx":
        configs = to_json({network: module.config for network, module in networks.items()})
        vae = configs.pop("vae/config.json")
        files |= configs | {f"{FOLDERS[half]}/config.json": vae for half in ("encoder", "decoder")}
        files["model_index.json"] = to_onnx_index(configs["model_index.json"])
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for name in TOKENIZER if format == "onnx" else ():
        shutil.copy(ROOT / "data" / name, folder / "tokenizer")


def to_onnx_index(index):
    """Returns the model_index.json of an ONNX pipeline for that of a PyTorch one."""
    parts = {name: ["diffusers", "OnnxRuntimeModel"] for name in FOLDERS.values()}
    return {name: part for name, part in index.items() if name != "vae"} | parts | {
        "_class_name": f"Onnx{index['_class_name']}"}


# ---- files to networks


def load_exported(folder, device="cpu") -> dict[str, nn.Module]:
    """Loads what `export` wrote, as networks for `generate`.

    Programs are code: a file of torch.export or TorchScript may do to this machine what any program may, and a hostile
    one in ONNX may abuse a fault of the runtime. Load only what comes from somebody you trust.

    Args:
        folder: as `export` has written it.
        device: "cpu", "cuda" (for ONNX: an onnxruntime that has CUDA) or, but for ONNX, "mps". Programs stay there:
            `generate`'s idle_device has no effect on them.

    Returns:
        {"clip": …, "encoder": …, "decoder": …, "diffusion": …}: modules that are called like the networks and have
        their `config`, but no weights to be changed and no parts to be called alone.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: it is not one that `export` wrote, or a file in it is missing or broken.
        ModuleNotFoundError: ONNX needs onnxruntime.
        ValueError: there is no such device.
    """
    folder, device = Path(folder), check_device(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that python -m extensions.export wrote")
    format, configs, dtypes = read_settings(folder / SETTINGS)
    if format == "onnx":
        need("onnxruntime")
        check_providers(device)
    models = {}
    for network, place in FOLDERS.items():
        path = folder / place / FILES[format]
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing in the folder of exported networks; export them again")
        try:
            run = READERS[format](path, device)
        except Exception as error:  # whatever a broken file makes the runtimes stumble over
            raise CheckpointError(f"{path}: cannot be loaded ({first_line(error)}); export it again") from error
        models[network] = NETWORKS[network](run, configs[network], dtypes[network]).eval()
    return models


def read_settings(path):
    """Returns (format, {network: config}, {network: dtype}) of a networks.json."""
    try:
        settings = json.loads(path.read_text("utf-8"))
        networks = settings["networks"]
        configs = {network: kind(**{name: tuple(value) if isinstance(value, list) else value
                                    for name, value in networks[network]["config"].items()})
                   for network, kind in CONFIGS.items()}
        dtypes = {network: DTYPES[networks[network]["dtype"]] for network in CONFIGS}
        return {name: name for name in FILES}[settings["format"]], configs, dtypes
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: found no settings of exported networks ({first_line(error)}); expected what "
                              f"python -m extensions.export writes") from None


def check_providers(device):
    import onnxruntime

    if device.type == "mps":
        raise ValueError("device is 'mps', where onnxruntime does not compute; give 'cpu', or export in the format pt2")
    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ValueError("device is 'cuda', but this onnxruntime has no CUDA; install onnxruntime-gpu in its place, or "
                         "give 'cpu'")


def read_onnx(path, device):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; they are raised as well
    provider = ("CUDAExecutionProvider", {"device_id": device.index or 0}) if device.type == "cuda" else None
    session = onnxruntime.InferenceSession(path, options, [provider or "CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs):
        outputs = session.run(None, {name: x.numpy(force=True) for name, x in zip(names, inputs, strict=True)})
        return torch.from_numpy(outputs[0])

    return run


def read_pt2(path, device):
    from torch.export.passes import move_to_device_pass

    program = move_to_device_pass(torch.export.load(path), device)
    # Its guards refuse a level of a single pixel, as PyTorch copies tensors otherwise there; the values are the same.
    return first_output(program.module(check_guards=False), device)


def read_torchscript(path, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # which `export` tells who makes such a file
        return first_output(torch.jit.load(path, map_location=device), device)


READERS = {"onnx": read_onnx, "pt2": read_pt2, "torchscript": read_torchscript}


def first_output(module, device):
    """Returns a function that calls a module on its device."""
    def run(*inputs):
        output = module(*(x.to(device) for x in inputs))
        return output[0] if isinstance(output, (tuple, list)) else output

    return run


class Exported(nn.Module):
    """A program in the place of a network. It has no weights of its own, so that `generate` gives it float32.

    Args:
        run: a function of the program's inputs that returns its first output, on any device.
        config: the network's.
        dtype: the program's.
    """

    def __init__(self, run: Callable, config, dtype: torch.dtype):
        super().__init__()
        self.run, self.config, self.dtype = run, config, dtype


class ExportedCLIP(Exported):
    def forward(self, tokens: Tensor) -> Tensor:
        """As `clip.CLIP.forward`."""
        return self.run(tokens.int()).to(tokens.device)


class ExportedDiffusion(Exported):
    def forward(self, latents: Tensor, context: Tensor, time_embedding: Tensor) -> Tensor:
        """As `diffusion.Diffusion.forward`."""
        batch, width = len(context), self.config.channels[0]
        timestep = find_timestep(time_embedding[:, :width]).expand(batch)
        inputs = [repeat_rows(latents, batch).to(self.dtype), timestep, context.to(self.dtype)]
        if self.config.d_guidance:
            inputs.append(time_embedding[:, width:].expand(batch, -1).to(self.dtype))
        return self.run(*inputs).to(latents.device)


class ExportedDecoder(Exported):
    def forward(self, latents: Tensor) -> Tensor:
        """As `decoder.VAE_Decoder.forward`."""
        return self.run((latents / LATENT_SCALE).to(self.dtype)).to(latents.device)


class ExportedEncoder(Exported):
    sample = VAE_Encoder.sample

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """As `encoder.VAE_Encoder.forward`."""
        return self.sample(self.moments(images), noise)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `encoder.VAE_Encoder.moments`."""
        return self.run(images.to(self.dtype)).to(images.device).chunk(2, dim=1)


NETWORKS = {"clip": ExportedCLIP, "diffusion": ExportedDiffusion, "decoder": ExportedDecoder,
            "encoder": ExportedEncoder}


def find_timestep(embedding: Tensor) -> Tensor:
    """The inverse of `diffusion.get_time_embedding`, since networks are told the embedding and programs the timestep.

    The slowest of the waves, which turns by less than half in 1,000 timesteps, tells about where the fastest is, a wave
    of frequency 1: that gives the timestep to float32's last digit.

    Args:
        embedding: (batch, width).

    Returns:
        (batch,) float32.
    """
    cos, sin = embedding.double().chunk(2, dim=1)
    angles = torch.atan2(sin, cos)
    about = angles[:, -1] / get_frequencies(embedding.shape[1])[-1]
    turns = ((about - angles[:, 0]) / (2 * math.pi)).round()
    return (angles[:, 0] + 2 * math.pi * turns).float()


# ---- the command


def need(*packages):
    """Raises ModuleNotFoundError, with what to do, for a package that is not there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise ModuleNotFoundError(f"ONNX needs {package}; install it with: {sys.executable} -m pip install -r "
                                      f"{ROOT / 'extensions' / 'requirements-export.txt'}") from None


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def main():
    parser = argparse.ArgumentParser(prog="python -m extensions.export",
                                     description="Writes the four networks of a checkpoint as programs.")
    add = parser.add_argument
    add("checkpoint", help="a file or diffusers folder, as for cli.py --checkpoint")
    add("folder", help="where to: a path that does not exist, or an empty folder")
    add("--format", choices=list(FILES), default="onnx",
        help="ONNX, a torch.export program, or TorchScript, which PyTorch no longer develops (%(default)s)")
    add("--dtype", choices=list(DTYPES), default="float32", help="what to compute in (%(default)s)")
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA to be added before, a file or a name in data/loras/; once for each")
    add("--tiny-vae", metavar="FILE", help="a TAESD file, whose halves are taken in place of the VAE's")
    arguments = parser.parse_args()
    try:
        models = load(arguments.checkpoint, arguments.dtype, arguments.lora, arguments.tiny_vae)
        export(models, arguments.folder, arguments.format)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.folder}: {', '.join(FOLDERS.values())} in {arguments.format}")


def load(checkpoint, dtype, loras, tiny_vae):
    """Returns the networks of a checkpoint with what is to be merged into them."""
    from cli import split_scale
    from extensions.lora import add_lora, find_lora

    models = preload_models_from_standard_weights(checkpoint, "cpu", dtype)
    for name, scale in map(split_scale, loras):
        for word in add_lora(models, find_lora(name), scale):
            print(f"{name}: the embedding {word!r} in it is not exported: a program has no place for words")
    return models | load_tiny_vae(tiny_vae, dtype) if tiny_vae else models


def load_tiny_vae(path, dtype):
    """Returns the halves that a TAESD file has, and says which it has not."""
    halves, errors = {}, []
    for network, load_half in [("decoder", load_tiny_decoder), ("encoder", load_tiny_encoder)]:
        try:
            halves[network] = load_half(path, "cpu", dtype)
        except CheckpointError as error:
            errors.append(error)
    if not halves:
        raise errors[0]
    for error in errors:
        print(f"this half of the VAE stays the checkpoint's, as {error}")
    return halves


if __name__ == "__main__":
    main()
