"""Files to ready modules: the networks of an SD 1.x checkpoint on a device, and the tokenizer."""

import functools
from pathlib import Path

import torch

from cpu import packed
from cpu.attention import onednn_computes
from model_converter import read_networks

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def preload_models_from_standard_weights(path, device, dtype="auto", use_ema=True, pack=False, compile=False):
    """Loads an SD 1.x checkpoint.

    Args:
        path: a `.ckpt`, `.pt` or `.safetensors` file in the layout of the original release.
        device: "cpu", "cuda", "mps" or a torch.device.
        dtype: "float32", "float16", "bfloat16" or the torch.dtype; "auto" is float16 on CUDA, float32 on MPS, and on
            the CPU bfloat16 where the processor computes in it natively (AVX512_BF16, AMX) and float32 elsewhere.
        use_ema: take the moving average of the UNet's weights where the file has it beside the plain ones.
        pack: on the CPU, rearrange the weights for speed: for drawing alone, see `cpu/packed.py`.
        compile: on CUDA, make UNet and decoder into CUDA graphs (torch.compile, mode "reduce-overhead"): the first picture
            of each size then takes minutes, later ones less; PyTorch keeps what it compiled on disk, in the folder
            TORCHINDUCTOR_CACHE_DIR.

    Returns:
        {'clip': CLIP, 'encoder': VAE_Encoder, 'decoder': VAE_Decoder, 'diffusion': Diffusion}, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not an SD 1.x checkpoint, or it is broken.
        ValueError: there is no such device or dtype here, or pack or compile is asked for where it cannot be done.
    """
    device = check_device(device)
    dtype = resolve_dtype(dtype, device)
    if pack and not can_pack(device, dtype):
        raise ValueError(f"pack=True needs the CPU, and oneDNN in float32 or, where it can, bfloat16, not {device} and "
                         f"{dtype}; load with pack=False")
    if compile and device.type != "cuda":
        raise ValueError(f"compile=True needs CUDA, not {device}; load with compile=False")
    modules = read_networks(path, device, dtype, use_ema, packed.pack if pack else None)
    for network, module in modules.items():
        module.eval()
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
    model's, which take longer packed."""
    return can_pack(device, dtype) and Path(path).is_file() and Path(path).stat().st_size > 2**28


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


def find_checkpoint(folder=ROOT / "data"):
    """Returns the path of the best checkpoint in a folder: SD 1.5's EMA weights, then the pruned file, then the
    embedded model."""
    for pattern in ("*emaonly*", "*pruned*", "emoji"):
        for suffix in (".safetensors", ".ckpt", ".pt"):
            for path in sorted(Path(folder).glob(pattern + suffix)):
                return path
    raise FileNotFoundError(f"no checkpoint in {folder}: put v1-5-pruned-emaonly.safetensors (or another SD 1.x "
                            f"checkpoint of that name) there, or name a file: --checkpoint on the command line, "
                            f"preload_models_from_standard_weights in Python")


@functools.cache
def default_models(device):
    """Returns the networks of the best checkpoint in data/, loaded once a process and device."""
    path = find_checkpoint()
    return preload_models_from_standard_weights(path, device, pack=pays_to_pack(path, device))


@functools.cache
def default_tokenizer():
    """Returns the tokenizer in data/, loaded once a process."""
    return load_tokenizer()


def load_tokenizer(folder="data"):
    """CLIP's byte-pair tokenizer, a `transformers.CLIPTokenizer`, from vocab.json and merges.txt (or vocab and merges)
    in `folder`, which is an absolute path or one relative to the repository.

    `tokenizer(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]` are the lists of ids that
    the text encoder takes. Raises FileNotFoundError if the two files are not there.
    """
    from transformers import CLIPTokenizerFast  # slow to import

    folder = ROOT / folder
    for vocab, merges in [("vocab.json", "merges.txt"), ("vocab", "merges")]:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            # By position, as the keywords of transformers 4 (vocab_file, merges_file) are swallowed unread by 5, which
            # then has a vocabulary of two tokens. Fast, as that is what 5 made the only one: the slow one of 4 splits
            # Chinese and Japanese otherwise, and changes with whether ftfy is installed.
            return CLIPTokenizerFast(str(folder / vocab), str(folder / merges), model_max_length=77)
    raise FileNotFoundError(f"no tokenizer in {folder}: expected vocab.json and merges.txt (or vocab and merges); "
                            "take them from this repository's data folder")


def check_tokenizer(tokenizer, vocab_size):
    """Raises ValueError unless `tokenizer` is the one that CLIP was trained with. `vocab_size` is the number of rows of
    the text encoder's token embedding, 49408 in SD 1.x; the last two are <|startoftext|> and <|endoftext|>."""
    fix = "use model_loader.load_tokenizer()"
    if len(tokenizer) != vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {vocab_size}: {fix}")
    # The last of CLIP's merges makes the word jekyll, so this sees a cut off merges file too.
    expected = [vocab_size - 2, vocab_size - 3, vocab_size - 1, vocab_size - 1]
    ids = tokenizer("jekyll", padding="max_length", max_length=4, truncation=True)["input_ids"]
    if ids != expected:
        raise ValueError(f"the tokenizer turns 'jekyll' into {ids}, the text encoder expects {expected} "
                         f"(<|startoftext|>, the word, <|endoftext|>, and that again as padding): {fix}")
