"""Files to ready modules: the networks of an SD 1.x model on a device, and the tokenizer; and modules to files."""

import functools
import hashlib
import json
import threading
import warnings
import weakref
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import nn

from checkpoint_configs import to_metadata
from checkpoint_file import CheckpointError, read_checkpoint
from checkpoint_layout import PREDICTIONS, PREFIXES, UNET, refuse_other_models
from cpu import packed
from cpu.attention import onednn_computes
from cpu.threads import use_one_thread
from diffusers_folder import save_weights, write_folder
from model_converter import NETWORKS, read_networks, to_diffusers_weights, to_standard_weights
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
TOKENIZER = "vocab.json", "merges.txt"
N_VOCAB = 49408  # tokens that CLIP was trained with
VOCAB_SHA256 = "34e72cb97f090e096b8b1f879a911f9c2d809252d3a7c8f7fa77f786147420d3"
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
FILES_SHA256 = "a2431b136ccde4adb3fbea2fe38f71898fb8e995102d917f3dc46d00c8ddfa10"  # of both as in data/
CHECKED = weakref.WeakKeyDictionary()  # tokenizers that `check_tokenizer` has found right
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def preload_models_from_standard_weights(path, device, dtype="auto", use_ema: bool = False, pack: bool = False,
                                         compile: bool = False, vae=None,
                                         prediction: str | None = None) -> dict[str, nn.Module]:
    """Loads an SD 1.x model.

    Args:
        path: a `.ckpt`, `.pt` or `.safetensors` file in the layout of the original release, or a diffusers folder.
        device: "cpu", "cuda", "mps" or a torch.device.
        dtype: "float32", "float16", "bfloat16" or the torch.dtype; "auto" is float16 on CUDA, float32 on MPS, and on
            the CPU bfloat16 where the processor computes in it natively (AVX512_BF16, AMX) and float32 elsewhere.
        use_ema: take the moving average of the UNet's weights where the file has it beside the plain ones (in a folder:
            the variant "ema").
        pack: on the CPU, rearrange the weights for speed: for drawing alone, see `cpu/packed.py`.
        compile: on CUDA, make UNet and decoder into CUDA graphs (torch.compile, mode "reduce-overhead"): the first
            picture of each size then takes minutes, later ones less; PyTorch keeps what it compiled on disk, in the
            folder TORCHINDUCTOR_CACHE_DIR.
        vae: a file or folder whose VAE is to be used instead: a separate VAE in the layout of the original release or
            of diffusers, or another model.
        prediction: what the UNet predicts, "epsilon" or "v"; None is what the file says of itself.

    Returns:
        {'clip': CLIP, 'encoder': VAE_Encoder, 'decoder': VAE_Decoder, 'diffusion': Diffusion}, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not an SD 1.x checkpoint, or it is broken.
        ValueError: there is no such device, dtype or prediction, or pack or compile cannot be done there.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}; give 'epsilon', 'v' or None, for what the file says")
    device = check_device(device)
    dtype = resolve_dtype(dtype, device)
    if pack and not can_pack(device, dtype):
        raise ValueError(f"pack=True needs the CPU, and oneDNN in float32 or, where it can, bfloat16, not {device} and "
                         f"{dtype}; load with pack=False")
    if compile and device.type != "cuda":
        raise ValueError(f"compile=True needs CUDA, not {device}; load with compile=False")
    modules = read_networks(path, device, dtype, use_ema, packed.pack if pack else None, vae, prediction)
    for network, module in modules.items():
        module.eval()
        if device.type == "cpu":
            use_one_thread(module)
        if device.type == "cuda":
            module.to(memory_format=torch.channels_last)  # what the tensor cores' convolutions read
        if compile and network in ("diffusion", "decoder"):
            module.compile(mode="reduce-overhead")
    return modules


def can_pack(device, dtype="auto"):
    """Returns whether `pack` is possible for a device and dtype."""
    device = check_device(device)
    return device.type == "cpu" and onednn_computes(resolve_dtype(dtype, device))


def pays_to_pack(path, device, dtype="auto"):
    """Returns whether `pack` makes a checkpoint faster: where it is possible, but for networks as small as the embedded
    model's, which take longer packed (benchmarks/README.md)."""
    path = Path(path)
    files = [path] if path.is_file() else path.glob("unet/*")
    return can_pack(device, dtype) and sum(file.stat().st_size for file in files) > 2**28


def check_device(device):
    """Returns a torch.device that exists on this machine, or raises ValueError."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; give cpu, cuda or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type):
        here = ", ".join(name for name, is_here in available.items() if is_here)
        raise ValueError(f"device is {str(device)!r}, which PyTorch does not find on this machine; it has: {here}")
    return device


def best_device():
    """Returns "cuda", "mps" or "cpu": the fastest that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype, device):
    """Returns the torch.dtype for a name, a torch.dtype or "auto"."""
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        computes_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if device.type == "cpu" and computes_bf16 else torch.float32
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; give auto, {', '.join(DTYPES)}")
    return dtype


def save_checkpoint(models: dict[str, nn.Module], path, overwrite: bool = False) -> None:
    """Writes four networks as one `.safetensors` file in the layout of the original release.

    Args:
        models: what `preload_models_from_standard_weights` returns; the dtypes are kept.
        path: the file's.
        overwrite: whether a file of that name may be replaced.

    Raises:
        FileExistsError: there is such a file.
        ValueError: a network is packed, missing, or not one of SD 1.x; or the name is that of a pickle.
    """
    path = Path(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path}: checkpoints are written as safetensors; give a name that ends in .safetensors")
    check_new(path, overwrite)
    configs, state_dicts = take_apart(models)
    weights = {name: tensor.cpu() for name, tensor in to_standard_weights(state_dicts).items()}
    with NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        temporary = Path(file.name)
    try:
        save_weights(weights, temporary, to_metadata(configs))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_folder(models: dict[str, nn.Module], folder) -> None:
    """Writes four networks as a diffusers folder, which `StableDiffusionPipeline.from_pretrained` takes, with the
    tokenizer in data/.

    Args:
        models: as for `save_checkpoint`.
        folder: a path that does not exist.

    Raises:
        FileExistsError: it does.
        ValueError: a network is packed, missing, or not one of SD 1.x, or the sizes are such that diffusers has none.
    """
    check_new(Path(folder), overwrite=False)
    configs, state_dicts = take_apart(models)
    encoder, decoder = configs["encoder"], configs["decoder"]
    if (encoder.channels, encoder.n_blocks + 1) != (decoder.channels, decoder.n_blocks):
        raise ValueError(f"the encoder's levels {encoder.channels} of {encoder.n_blocks} blocks and the decoder's "
                         f"{decoder.channels} of {decoder.n_blocks} do not mirror each other, as diffusers has it; use "
                         f"save_checkpoint")
    weights = {part: {name: tensor.cpu() for name, tensor in tensors.items()}
               for part, tensors in to_diffusers_weights(state_dicts, configs).items()}
    write_folder(folder, weights, configs, to_metadata(configs), [ROOT / "data" / name for name in TOKENIZER])


def check_new(path, overwrite):
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: there is such a file or folder already; give another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into; make it first")


def take_apart(models):
    """Returns (configs, state dicts) of four networks, be they inside torch.compile or DataParallel or not."""
    configs, state_dicts = {}, {}
    for network, kind in NETWORKS.items():
        if network not in models:
            raise ValueError(f"models has no {network!r}, but {list(models)}; give all of {', '.join(NETWORKS)}")
        module = models[network]
        while hasattr(module, "_orig_mod") or isinstance(module, nn.DataParallel):
            module = module.module if isinstance(module, nn.DataParallel) else module._orig_mod
        if any(isinstance(part, packed.Packed) for part in module.modules()):
            raise ValueError(f"{network!r} is packed, and packed weights cannot be saved; load it with pack=False")
        if not isinstance(module, kind):
            raise ValueError(f"{network!r} is a {type(module).__name__}; expected a {kind.__name__} of SD 1.x")
        configs[network], state_dicts[network] = module.config, module.state_dict()
    return configs, state_dicts


def find_checkpoint(folder=ROOT / "data") -> Path:
    """Returns the path of the model in a folder that was put there last, or else of the embedded one.

    Whole SD 1.x models are looked for, files and diffusers folders, by what is in them: a separate VAE, a ControlNet or
    a LoRA is none. Inpainting models, which `generate` alone cannot use, come after the others.
    """
    folder = Path(folder)
    found = []
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".ckpt", ".pt") and path.is_file() or (path / "unet").is_dir():
            in_channels = count_channels(path)
            if in_channels:
                found.append((path.name != "emoji.safetensors", in_channels == 4, path.stat().st_mtime_ns, path))
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}: put v1-5-pruned-emaonly.safetensors (or another SD 1.x "
                                f"checkpoint or diffusers folder) there, or name a file: --checkpoint on the command "
                                f"line, preload_models_from_standard_weights in Python")
    return max(found)[-1]


def count_channels(path):
    """Returns how many channels the UNet of a whole SD 1.x model takes, without reading weights; 0 for other files."""
    try:
        if path.is_dir():
            parts = all((path / part).is_dir() for part in ("unet", "vae", "text_encoder"))
            return parts and json.loads((path / "unet" / "config.json").read_text("utf-8")).get("in_channels", 4)
        weights = read_checkpoint(path, mapped=True)[0]
        refuse_other_models(weights)
    except (CheckpointError, OSError, ValueError) as error:
        if "broken" in str(error):
            warnings.warn(f"passed over: {error}", stacklevel=3)
        return 0
    whole = all(any(str(name).startswith(prefix) for name in weights) for prefix in PREFIXES.values())
    first = weights.get(f"{UNET}input_blocks.0.0.weight")
    return first.shape[1] if whole and isinstance(first, torch.Tensor) and first.ndim == 4 else 0


def once(function):
    """As functools.cache, but with threads that come while the first one is at it waiting for its result."""
    cached, lock = functools.cache(function), threading.Lock()

    @functools.wraps(function)
    def call(*args):
        with lock:
            return cached(*args)

    call.cache_clear = cached.cache_clear
    return call


@once
def default_models(device):
    """Returns the networks of the best checkpoint in data/, loaded once a process and device."""
    path = find_checkpoint()
    return preload_models_from_standard_weights(path, device, pack=pays_to_pack(path, device))


@once
def default_tokenizer():
    """Returns the tokenizer in data/, loaded once a process."""
    return load_tokenizer(with_transformers=False)


def load_tokenizer(folder="data", with_transformers: bool = True):
    """CLIP's byte-pair tokenizer, a `transformers.CLIPTokenizer`, from vocab.json and merges.txt (or vocab and merges)
    in `folder`, which is an absolute path or one relative to the repository.

    `tokenizer(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]` are the lists of ids that
    the text encoder takes. Without transformers, whose import takes longer than a picture, it is a
    `tokenizer.Tokenizer`: the same ids, and no more than drawing needs. Raises FileNotFoundError if the two files are
    not there, ValueError if they were cut off or edited.
    """
    folder = ROOT / folder
    for vocab, merges in [TOKENIZER, ("vocab", "merges")]:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            check_tokenizer_files(folder / vocab, folder / merges)
            if not with_transformers:
                return Tokenizer(folder / vocab, folder / merges)
            from transformers import CLIPTokenizerFast  # slow to import

            # By position, as the keywords of transformers 4 (vocab_file, merges_file) are swallowed unread by 5, which
            # then has a vocabulary of two tokens. Fast, as that is what 5 made the only one: the slow one of 4 splits
            # Chinese and Japanese otherwise, and changes with whether ftfy is installed.
            return CLIPTokenizerFast(str(folder / vocab), str(folder / merges), model_max_length=77)
    raise FileNotFoundError(f"no tokenizer in {folder}: expected vocab.json and merges.txt (or vocab and merges); "
                            "take them from this repository's data folder")


def check_tokenizer_files(vocab, merges):
    """Raises ValueError unless the two files say what CLIP's do, however they are written; the vocabulary may have more
    tokens after CLIP's."""
    if hashlib.sha256(vocab.read_bytes() + merges.read_bytes()).hexdigest() == FILES_SHA256:
        return  # which takes a fiftieth of what follows
    try:
        ids = json.loads(vocab.read_text("utf-8"))
        tokens = sorted((number, token) for token, number in ids.items() if number < N_VOCAB)
    except (ValueError, TypeError, AttributeError):
        tokens = []
    for path, content, expected in [
        (vocab, "\n".join(f"{number} {token}" for number, token in tokens), VOCAB_SHA256),
        (merges, merges.read_text("utf-8", "replace").partition("\n")[2].strip(), MERGES_SHA256),
    ]:
        if hashlib.sha256(content.encode("utf-8", "replace")).hexdigest() != expected:
            raise ValueError(f"{path} is not CLIP's, or was cut off or edited; take it from this repository's data "
                             f"folder")


def check_tokenizer(tokenizer, vocab_size: int) -> None:
    """Raises ValueError unless `tokenizer` is the one that CLIP was trained with, or that one and more tokens.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizer.Tokenizer`; it is not changed.
        vocab_size: the number of rows of the text encoder's token embedding: 49408 in SD 1.x, of which the last two are
            <|startoftext|> and <|endoftext|>, or more where tokens were added after these.
    """
    fix = "use model_loader.load_tokenizer()"
    n_trained = min(vocab_size, N_VOCAB)
    if not n_trained <= len(tokenizer) <= vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {vocab_size}: {fix}")
    if CHECKED.get(tokenizer) == n_trained:
        return
    # The last of CLIP's merges makes the word jekyll, so this sees a cut off merges file too. Without the tokenizer's
    # own padding and truncation, which would stay set, for other threads, too.
    expected = [n_trained - 2, n_trained - 3, n_trained - 1, n_trained - 1]
    ids = tokenizer("jekyll").input_ids + [tokenizer.pad_token_id]
    if ids != expected:
        raise ValueError(f"the tokenizer turns 'jekyll' into {ids}, the text encoder expects {expected} "
                         f"(<|startoftext|>, the word, <|endoftext|>, and that again as padding): {fix}")
    CHECKED[tokenizer] = n_trained
