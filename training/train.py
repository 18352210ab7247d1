"""Trains the embedded model, each stage on top of the one before:

    python -m training.emoji              # the drawings (see there)
    python -m training.train restore      # training/runs/ from data/emoji.safetensors, to train on from there
    python -m training.train vae          # the autoencoder, on scenes
    python -m training.store 0 80         # 80 x 250 scenes as latents; several processes may share the numbers
    python -m training.train text         # the text encoder alone, until it says what is where
    python -m training.train diffusion    # the UNet and the text encoder together, on the store
    python -m training.train attention    # the UNet's attention and the text encoder alone; the rest stays as it is
    python -m training.train decoder      # the decoder alone, on slightly noisy latents; the store stays valid
    python -m training.train judge        # a classifier of scenes, for training/evaluate.py
    python -m training.train export       # data/emoji.safetensors, in the layout of SD 1.x

Everything a stage needs to go on lies in training/runs/STAGE.pt, written now and then: kill it at any moment and run
the same command again. More --steps than last time train on. Batches depend on the step's number alone, so a run that
was interrupted ends with the same weights as one that was not. Two processes share a step's work with
`torchrun --nproc-per-node 2 -m training.train diffusion`, each with a batch of its own.
"""

import argparse
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.nn import functional as F

from clip import CLIP, CLIPConfig
from decoder import DecoderConfig, VAE_Decoder
from diffusion import Diffusion, DiffusionConfig
from encoder import LATENT_SCALE, EncoderConfig, VAE_Encoder
from images import to_uint8
from model_converter import NETWORKS, to_standard_weights
from model_loader import load_tokenizer, preload_models_from_standard_weights
from pipeline import generate, tokenize
from training import emoji, loop, scenes
from training.judge import JudgeStage, to_images
from training.loop import Settings, make_optimizer, save, sheet
from training.reader import Reader

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "training" / "runs"
STORE = ROOT / "training" / "cache" / "store"
MODEL = ROOT / "data" / "emoji.safetensors"

CLIP_CONFIG = CLIPConfig(d_embed=64, d_mlp=256, n_layers=5, n_heads=4)
ENCODER_CONFIG = EncoderConfig(channels=(32, 64, 96, 128), n_blocks=1, n_groups=8)
DECODER_CONFIG = DecoderConfig(channels=(32, 64, 96, 128), n_blocks=2, n_groups=8)
DIFFUSION_CONFIG = DiffusionConfig(channels=(64, 128, 160), attends=(False, True, True), n_blocks=1, n_heads=4,
                                   d_context=64, n_groups=16, sample_size=128)


SETTINGS = {
    "vae": Settings(steps=1200, batch=8, learning_rate=5e-4, decay=0.6, ema=0.99, report_every=400),
    "text": Settings(steps=1200, batch=32, learning_rate=7e-4, ema=0.99, weight_decay=0),
    "diffusion": Settings(steps=2150, batch=16, learning_rate=7e-4, ema=0.998, save_every=48),
    "attention": Settings(steps=3000, batch=16, learning_rate=7e-4, decay=0.6, ema=0.998, weight_decay=0),
    "decoder": Settings(steps=1200, batch=8, learning_rate=4e-4, warmup=20, decay=0.7, ema=0.98, save_every=20),
    "judge": Settings(steps=3000, batch=64, learning_rate=1e-3, ema=0.99, report_every=500),
}
N_STATISTICS = 256  # scenes from which the scale of latents is taken


def load_grammar():
    return scenes.Grammar(emoji.load_drawings(styles=scenes.STYLES))


# ---- stage 1: the autoencoder


class VaeStage:
    """Pictures of scenes through four numbers a patch of 8x8 pixels and back."""

    def __init__(self, grammar):
        self.grammar = grammar
        self.modules = nn.ModuleDict({"encoder": VAE_Encoder(ENCODER_CONFIG), "decoder": VAE_Decoder(DECODER_CONFIG)})
        zero_residuals(self.modules)
        wire_colours(self.modules["encoder"], self.modules["decoder"])

    def images(self, step, batch, generator):
        """Parts of scenes (batch, 3, 64, 64), and now and then whole ones, for the statistics of the group norms."""
        rng = random.Random(torch.randint(2**60, (), generator=generator).item())
        if step % 4 == 3:
            return draw_scenes(self.grammar, rng, max(batch // 4, 1))
        n_plain = batch // 2 if step % 4 == 1 else 0  # nothing but a colour, of which group norms leave little
        images = draw_scenes(self.grammar, rng, batch - n_plain)
        if rng.random() < 0.5:  # plain areas of any colour teach the latents all three colour axes
            shift = 2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1
            images = (images * rng.uniform(0.5, 1) + shift).clamp(-1, 1)
        top, left = (8 * rng.randrange(9) for _ in range(2))
        colours = torch.tensor(rng.choices(list(emoji.COLOURS.values()), k=n_plain)).view(n_plain, 3, 1, 1) / 127.5 - 1
        return torch.cat([images[:, :, top : top + 64, left : left + 64], colours.expand(-1, -1, 64, 64)])

    def loss(self, step, batch, generator):
        images = self.images(step, batch, generator)
        mean, log_variance = self.modules["encoder"].moments(images)
        latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        decoded = self.modules["decoder"](slightly_noised(latents * LATENT_SCALE, generator))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return picture_loss(decoded, images) + 1e-5 * kl

    def report(self):
        """PSNR on 64 scenes, and a sheet of them above their reconstructions."""
        images = draw_scenes(self.grammar, random.Random(-1), 64)
        decoded = torch.cat([self.reconstruct(part) for part in images.split(16)])
        mse = (decoded - images).square().mean(dim=(1, 2, 3))
        return f"PSNR {(10 * (4 / mse).log10()).mean():.2f} dB", sheet(to_uint8(torch.cat([images, decoded])), 16)

    def reconstruct(self, images):
        latents = self.modules["encoder"](images, torch.zeros(len(images), 4, 16, 16))
        return self.modules["decoder"](latents).clamp(-1, 1)


def draw_scenes(grammar, rng, n):
    """n scenes of which nothing is held out, as `draw_images` draws them"""
    return draw_images(grammar, rng, (grammar.scene(rng) for _ in range(n)))


def draw_images(grammar, rng, some):
    """Scenes -> (n, 3, 128, 128) in [-1, 1]"""
    return to_images(torch.stack([torch.tensor(grammar.draw(rng, scene)) for scene in some])).contiguous()


def slightly_noised(latents, generator):
    """Half of the latents with noise of deviation up to 0.1, as a UNet leaves them: the decoder learns to forgive."""
    strength = 0.1 * (2 * torch.rand(len(latents), 1, 1, 1, generator=generator) - 1).clamp(min=0)
    return latents + strength * torch.randn(latents.shape, generator=generator)


def picture_loss(decoded, images):
    return (F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images) + 0.5 * edge_loss(decoded, images)
            + F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8)))


class DecoderStage(VaeStage):
    """The decoder alone, on the latents of the finished encoder: what a UNet has learnt stays valid."""

    def __init__(self, grammar):
        self.grammar = grammar
        vae = load_vae(grammar)
        self.encoder = vae["encoder"]
        self.modules = nn.ModuleDict({"decoder": vae["decoder"].requires_grad_(True)})

    def loss(self, step, batch, generator):
        images = self.images(step, batch, generator)
        with torch.no_grad():
            latents = self.encoder(images, torch.zeros(len(images), 4, *(n // 8 for n in images.shape[2:])))
        return picture_loss(self.modules["decoder"](slightly_noised(latents, generator)), images)

    def reconstruct(self, images):
        return self.modules["decoder"](self.encoder(images, torch.zeros(len(images), 4, 16, 16))).clamp(-1, 1)


@torch.no_grad()
def wire_colours(encoder, decoder):
    """Starts the autoencoder as one that keeps the mean colour of each 8x8 patch, in three of its four latents.

    From a random start, group norms hide plain colours so well that one of three colour axes is found late or never.
    Channels 4k to 4k + 3 of the residual stream carry colour k, its negative, and the constants 4 and -4, which make
    the group norm at the end a fixed scaling; silu(x) - silu(-x) = x then undoes the last non-linearity.
    """
    wires = torch.arange(12)

    def identity(conv, taps):
        """The wired channels go through, weighted by taps (3, 3) or (1, 1)."""
        conv.weight[wires] = 0
        conv.weight[wires, wires] = taps
        conv.bias[wires] = 0

    centre = torch.zeros(3, 3)
    centre[1, 1] = 1
    patch = torch.zeros(3, 3)
    patch[:2, :2] = 0.25
    for network in (encoder, decoder):
        network.conv_in.weight[wires] = 0
        network.conv_in.bias[wires] = torch.tensor([0.0, 0.0, 4.0, -4.0]).repeat(3)
        for name, module in network.named_modules():
            if name.endswith("downsample.conv"):
                identity(module, patch)
            if name.endswith("upsample.conv"):
                identity(module, centre)
            if name.endswith("skip") and isinstance(module, nn.Conv2d):
                identity(module, torch.ones(1, 1))
        for k in range(3):
            network.conv_in.weight[4 * k : 4 * k + 2, k, 1, 1] = torch.tensor([1.0, -1.0])
            network.conv_out.weight[k] = 0
            network.conv_out.weight[k, 4 * k : 4 * k + 2, 1, 1] = torch.tensor([2.9, -2.9])
            network.conv_out.bias[k] = 0
    encoder.quant_conv.weight[:4] = torch.eye(8)[:4, :, None, None]
    encoder.quant_conv.bias[:4] = 0
    encoder.quant_conv.weight[4:] *= 0.1
    encoder.quant_conv.bias[4:] = -6  # start with little noise, or nothing comes through
    decoder.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    decoder.post_quant_conv.bias.zero_()


def edge_loss(decoded, images):
    """L1 on the differences between neighbouring pixels: what makes edges crisp."""
    return sum(F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))


# ---- stage 2: the text encoder


class TextStage:
    """The text encoder, with a reader for which it has to tell what is where; no pictures are needed for that."""

    learning_rates = {"reader": 4.0}  # as shares of the stage's own

    def __init__(self, grammar):
        self.grammar, self.tokenizer = grammar, load_tokenizer()
        clip = CLIP(CLIP_CONFIG)
        nn.init.normal_(clip.token_embedding.weight, std=0.02)
        nn.init.normal_(clip.position_embedding.weight, std=0.01)
        reader = Reader(len(grammar.world), grammar.backgrounds, CLIP_CONFIG.d_embed, CLIP_CONFIG.n_heads)
        self.modules = nn.ModuleDict({"clip": clip, "reader": reader})

    def loss(self, step, batch, generator):
        rng = random.Random(torch.randint(2**60, (), generator=generator).item())
        some = [self.grammar.scene(rng) for _ in range(batch)]
        return self.modules["reader"].loss(self.encode([self.grammar.caption(rng, scene) for scene in some]), some)

    def encode(self, captions):
        return self.modules["clip"](tokenize(captions, self.tokenizer))

    def report(self):
        """The share of held-out combinations that are read wholly right, in trained and in held-out wordings."""
        rng, told = random.Random(0), []
        for wording in (scenes.TRAINED, scenes.HELD_OUT):
            for kind in scenes.SHARES:
                some = self.grammar.held_out_scenes(rng, kind, 20)
                context = self.encode([self.grammar.caption(rng, scene, wording) for scene in some])
                told.append(f"{kind} {self.modules['reader'].is_right(context, some).float().mean():.0%}")
        n = len(scenes.SHARES)
        return f"read right: {', '.join(told[:n])}; in held-out wordings: {', '.join(told[n:])}", None


# ---- stage 3: the UNet and the text encoder


class DiffusionStage:
    """Predicts the noise in latents (DDPM, 2006.11239, eq. 14), weighted by min-SNR (2303.09556).

    The text encoder is trained along, at half the learning rate, and goes on to tell its reader what is where.
    """

    learning_rates = {"clip": 0.5}
    snr_floor = 0.0

    def __init__(self, grammar):
        self.grammar = grammar
        diffusion = Diffusion(DIFFUSION_CONFIG)
        zero_residuals(diffusion)
        text = load_stage("text", grammar).requires_grad_(True)
        self.modules = nn.ModuleDict({"clip": text["clip"], "diffusion": diffusion, "reader": text["reader"]})
        self.tokenizer = load_tokenizer()
        self.noise_loss = loop.NoiseLoss(DIFFUSION_CONFIG, snr_gamma=5, snr_floor=self.snr_floor)
        self.scenes, self.latents, self.vae = None, None, None  # read when they are needed

    def loss(self, step, batch, generator):
        if self.latents is None:
            self.scenes, self.latents = read_store(STORE)
        rng = random.Random(torch.randint(2**60, (), generator=generator).item())
        rows = [rng.randrange(len(self.scenes)) for _ in range(batch)]
        captions = ["" if rng.random() < 0.1 else self.grammar.caption(rng, self.scenes[row]) for row in rows]
        context = self.modules["clip"](tokenize(captions, self.tokenizer))
        told = [k for k, caption in enumerate(captions) if caption]
        reading = self.modules["reader"].loss(context[told], [self.scenes[rows[k]] for k in told])
        noise = self.noise_loss(self.modules["diffusion"], self.latents[rows].float(), context, generator)
        return noise + 0.1 * reading

    def report(self):
        """The loss on 40 held-out combinations, which stands still where only the trained ones are learnt; a sheet."""
        if self.vae is None:
            self.vae = load_vae(self.grammar)
        rng = random.Random(0)
        found = [scene for kind in ("colour", "position", "count", "pair", "background")
                 for scene in self.grammar.held_out_scenes(rng, kind, 8)]
        prompts = [self.grammar.caption(rng, scene) for scene in found]
        latents = self.vae["encoder"](draw_images(self.grammar, rng, found), torch.zeros(len(found), 4, 16, 16))
        context, generator = self.modules["clip"](tokenize(prompts, self.tokenizer)), torch.Generator().manual_seed(0)
        losses = [self.noise_loss(self.modules["diffusion"], latents, context, generator).item() for _ in range(8)]
        models = {**self.vae, "clip": self.modules["clip"], "diffusion": self.modules["diffusion"]}
        images = generate(prompts, models=models, tokenizer=self.tokenizer, seed=42, sampler_name="ddim",
                          n_inference_steps=20, cfg_scale=3.0)
        return f"held-out loss {sum(losses) / len(losses):.4f}", sheet(images, 8)


class AttentionStage(DiffusionStage):
    """What tells a prompt's things apart and puts them in their places: the attention, and the text encoder.

    All other numbers of the exported file stay as they are (words that no caption has are among them: no weight decay),
    so that git stores a new version of it in 3 MB instead of 28.
    """

    snr_floor = 0.1

    def __init__(self, grammar):
        super().__init__(grammar)
        self.modules["diffusion"].load_state_dict(load_stage("diffusion", grammar)["diffusion"].state_dict())
        for name, weight in self.modules["diffusion"].named_parameters():
            weight.requires_grad_("attention_" in name)


def read_store(folder):
    """All scenes of the store, and their latents (scenes, 4, 16, 16) in float16."""
    shards = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]
    if not shards:
        raise FileNotFoundError(f"{folder} is empty; run `python -m training.store 0 80` first")
    return [scene for shard in shards for scene in shard["scenes"]], torch.cat([shard["latents"] for shard in shards])


STAGES = {"vae": VaeStage, "text": TextStage, "diffusion": DiffusionStage, "attention": AttentionStage,
          "decoder": DecoderStage, "judge": JudgeStage}


def zero_residuals(network):
    """Makes every block start as the identity: what it adds to its input begins as nothing (1901.09321)."""
    for name, module in network.named_modules():
        if name.endswith(("conv_2", "attention.out_proj", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


# ---- the loop


def train(name, settings, grammar, runs):
    """Runs one stage from where its checkpoint left off to settings.steps, and returns its modules with EMA weights."""
    torch.manual_seed(0)
    return loop.train(name, STAGES[name](grammar), settings, runs)


# ---- the result


def load_stage(name, grammar):
    """Returns a finished stage's modules with their EMA weights."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; run `python -m training.train {name}` first")
    modules = STAGES[name](grammar).modules
    modules.load_state_dict(torch.load(path)["ema"], strict=False)
    return modules.eval().requires_grad_(False)


def load_vae(grammar):
    """Returns encoder and decoder, whose latents have unit scale: those of an exported model have it already."""
    modules = load_stage("vae", grammar)
    if torch.load(RUNS / "vae.pt")["step"] > 0:
        fold_scale(modules, draw_scenes(grammar, random.Random(-2), N_STATISTICS))
    return dict(modules)


@torch.no_grad()
def fold_scale(vae, images):
    """Changes encoder and decoder so that each latent channel has mean 0 and deviation 1 over the images.

    SD's constant 0.18215 stays in the code: the true shift and scale go into quant_conv and post_quant_conv.
    """
    latents = torch.cat([vae["encoder"].moments(part)[0] for part in images.split(16)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) * LATENT_SCALE
    conv = vae["encoder"].quant_conv  # mean' = (mean - shift) / scale; the noise shrinks with it
    conv.weight[:4] /= std[:, None, None, None]
    conv.bias[:4] = (conv.bias[:4] - mean) / std
    conv.bias[4:] -= 2 * std.log()
    conv = vae["decoder"].post_quant_conv  # takes scale * latents + shift
    conv.bias += conv.weight[:, :, 0, 0] @ mean
    conv.weight *= std[None, :, None, None]


def export(grammar, path=MODEL, cfg_scale=4.0):
    """Writes the finished model in the layout of SD 1.x, float16, with what shapes cannot tell in the metadata."""
    models = {**load_vae(grammar), **load_stage("diffusion", grammar)}
    for name in ("attention", "decoder"):
        if (RUNS / f"{name}.pt").exists():
            models.update(load_stage(name, grammar))
    weights = to_standard_weights({network: models[network].state_dict() for network in NETWORKS})
    weights = {name: weight.half() for name, weight in weights.items()}
    last = "attention" if (RUNS / "attention.pt").exists() else "diffusion"
    steps = torch.load(RUNS / f"{last}.pt")["step"]
    metadata = {
        "clip_heads": CLIP_CONFIG.n_heads, "unet_heads": DIFFUSION_CONFIG.n_heads,
        "unet_groups": DIFFUSION_CONFIG.n_groups, "vae_groups": ENCODER_CONFIG.n_groups,
        "sample_size": DIFFUSION_CONFIG.sample_size, "cfg_scale": cfg_scale, "words": " ".join(grammar.words()),
        "training": f"from scratch by training/train.py; the last stage {steps} steps on {len(grammar.world)} things",
        "concepts": json.dumps([thing.singular for thing in grammar.world]),
        "styles": json.dumps(grammar.drawings.styles),
        "licence": "drawings: noto Apache-2.0, twemoji and emojione CC-BY-4.0, "
                   "fluent-emoji-flat (flat) MIT; see data/README.md",
    }
    temporary = path.with_suffix(".tmp")
    save_file(weights, temporary, {key: str(value) for key, value in metadata.items()})
    os.replace(temporary, path)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")


def restore(grammar, path=MODEL):
    """Writes training/runs/ from an exported model, as the start of a new run of each stage."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if kept := [name for name in STAGES if (RUNS / f"{name}.pt").exists()]:
        raise ValueError(f"{RUNS} has runs already ({', '.join(kept)}); move them away first")
    models = preload_models_from_standard_weights(path, "cpu", "float32")
    for name in ("vae", "text", "diffusion"):
        stage = STAGES[name](grammar)
        for part in stage.modules.keys() & models.keys():
            stage.modules[part].load_state_dict(models[part].state_dict())
        save(RUNS / f"{name}.pt", {"step": 0, "weights": stage.modules.state_dict(),
                                   "ema": {key: weight.detach() for key, weight in stage.modules.named_parameters()},
                                   "optimizer": make_optimizer(stage, SETTINGS[name]).state_dict()})


def main():
    parser = argparse.ArgumentParser(description="Trains the embedded model; see the top of this file.")
    parser.add_argument("stage", choices=[*STAGES, "export", "restore"])
    parser.add_argument("--steps", type=int, help="train up to this step in all (default: the stage's own number)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group("gloo")
    grammar = load_grammar()
    if arguments.stage in ("export", "restore"):
        return {"export": export, "restore": restore}[arguments.stage](grammar)
    settings = SETTINGS[arguments.stage]
    if arguments.steps:
        settings = replace(settings, steps=arguments.steps)
    train(arguments.stage, settings, grammar, RUNS)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
