"""Four steps without guidance: distils a model into a LoRA for the LCM sampler.

    python -m training.lcm                # training/runs/lcm.pt, then data/loras/lcm.safetensors, then its figures;
                                          # of a file that is there, its figures alone
    python cli.py "a panda on a yellow background" --lora lcm --sampler lcm --steps 4 --cfg-scale 1

Latent consistency distillation (arXiv 2310.04378, algorithm 1) of a LoRA alone (arXiv 2311.05556): from any latents on
the way, the network learns to say at once what guided DDIM would come to. It needs no drawings: the latents are the
model's own, drawn with guidance for each concept in each style that the checkpoint names.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import model_loader
from checkpoint_file import read_checkpoint
from ddpm import draw_noise
from diffusion import get_time_embedding
from extensions.lora import lora
from pipeline import denoise, encode_prompts, generate, seed_generators
from samplers import DPMpp2MSampler, LCMSampler
from training import loop, teaching, train
from training.evaluate import cut, small, write
from training.lora import add_low_rank, to_kohya

LORA = train.ROOT / "data" / "loras" / "lcm.safetensors"
RANK = 6
GUIDED_STEPS = 20  # that four are to stand for
GRID = 50  # timesteps that are distilled, as the sampler picks from
SETTINGS = loop.Settings(steps=2000, batch=16, learning_rate=1e-3, warmup=20, ema=0.98, weight_decay=0.0,
                         save_every=20, report_every=500)


class LcmStage:
    """The LoRA of the UNet in a checkpoint, for `loop.train`.

    Args:
        checkpoint: its path. Its metadata name the concepts and styles.
        cfg_scale: the guidance that four steps are to have built in.
        n_latents: how many pictures it draws to learn from, over all prompts in turn.
    """

    def __init__(self, checkpoint, cfg_scale, n_latents):
        self.models = teaching.load_frozen(checkpoint)
        self.tokenizer = model_loader.load_tokenizer(with_transformers=False)
        self.unet = self.models["diffusion"]
        self.teacher = copy.deepcopy(self.unet)
        self.config = self.unet.config
        self.prompts = list_prompts(checkpoint)
        self.modules = nn.ModuleDict({"diffusion": add_low_rank("diffusion", self.unet, RANK, RANK, conv_rank=RANK)})
        self.sampler = LCMSampler(original_inference_steps=GRID)
        self.cfg_scale, self.n_latents, self.latents = cfg_scale, n_latents, None

    def prepare(self):
        """Encodes the prompts, and draws latents with guidance, {prompt's number k: latents k, k + n, …}."""
        with torch.no_grad():
            self.context, self.uncond = (encode_prompts(texts, [], self.models["clip"], self.tokenizer)
                                         for texts in (self.prompts, [""]))
            self.rows = torch.arange(self.n_latents) % len(self.prompts)
            self.latents = torch.cat([self.draw(rows, 2 * 10**6 + 20 * k)
                                      for k, rows in enumerate(tqdm(self.rows.split(20), "pictures to learn from"))])

    def draw(self, rows, seed):
        """Latents (rows, 4, h, w) of some prompts, drawn with guidance."""
        side = self.config.sample_size // 8
        generators = seed_generators(seed, len(rows))
        sampler = DPMpp2MSampler(generators)
        sampler.set_inference_timesteps(GUIDED_STEPS)
        context = torch.cat([self.context[rows], self.uncond.expand(len(rows), -1, -1)])
        noise = draw_noise(generators, (len(rows), 4, side, side))
        return denoise(self.teacher, sampler, noise, context, self.cfg_scale, progress=False)

    def loss(self, step, batch, generator):
        """From noisy latents, and from where one guided DDIM step leads from there, the same picture is to be seen."""
        if self.latents is None:
            self.prepare()
        picked = torch.randint(len(self.latents), (batch,), generator=generator)
        latents, context = self.latents[picked], self.context[self.rows[picked]]
        stride = 1000 // GRID
        timesteps = (torch.randint(GRID, (batch,), generator=generator) + 1) * stride - 1
        earlier = (timesteps - stride).clamp(min=0)
        eps = torch.randn(latents.shape, generator=generator)
        noisy = self.signal(timesteps) * latents + self.noise(timesteps) * eps

        with torch.no_grad():
            eps = self.predict(noisy.repeat(2, 1, 1, 1), torch.cat([context, self.uncond.expand_as(context)]),
                               timesteps.repeat(2), self.teacher)
            cond, uncond = eps.chunk(2)
            eps = uncond + self.cfg_scale * (cond - uncond)
            clean = (noisy - self.noise(timesteps) * eps) / self.signal(timesteps)
            target = self.see(self.signal(earlier) * clean + self.noise(earlier) * eps, context, earlier)
        distance = (self.see(noisy, context, timesteps) - target).square()
        return ((distance + 1e-6).sqrt() - 1e-3).mean()  # pseudo-Huber, as LCM's training has it

    def see(self, latents, context, timesteps):
        """The consistency function f = c_skip x + c_out x_0 (eq. 9), as the sampler computes it."""
        scaled, data = (self.sampler.timestep_scaling * timesteps)[:, None, None, None], self.sampler.SIGMA_DATA
        c_skip, c_out = data**2 / (scaled**2 + data**2), scaled / (scaled**2 + data**2).sqrt()
        eps = self.predict(latents, context, timesteps)
        return c_skip * latents + c_out * (latents - self.noise(timesteps) * eps) / self.signal(timesteps)

    def predict(self, latents, context, timesteps, unet=None):
        return (unet or self.unet)(latents, context, get_time_embedding(timesteps, self.config.channels[0]))

    def signal(self, timesteps):
        return torch.tensor(self.sampler.alphas_cumprod[timesteps], dtype=torch.float32).sqrt()[:, None, None, None]

    def noise(self, timesteps):
        return (1 - self.signal(timesteps) ** 2).sqrt()

    def report(self):
        """A sheet of 32 pictures in four steps."""
        prompts = self.prompts[:: max(len(self.prompts) // 32, 1)][:32]
        images = generate(prompts, models=self.models, tokenizer=self.tokenizer, seed=42, cfg_scale=1,
                          sampler_name="lcm", n_inference_steps=4, progress=False)
        return f"{len(prompts)} prompts from {prompts[0]!r} on", loop.sheet(images, 8 if len(prompts) == 32 else 1)


def list_prompts(checkpoint):
    """Returns each concept in each style that a checkpoint's metadata name, such as "rocket emoji, noto style"."""
    metadata = read_checkpoint(checkpoint, mapped=True)[1]
    if not {"concepts", "styles"} <= metadata.keys():
        raise ValueError(f"{checkpoint} does not name its concepts and styles; give a checkpoint of training.train")
    concepts, styles = json.loads(metadata["concepts"]), json.loads(metadata["styles"])
    return [f"{concept} emoji, {style} style" for style in styles for concept in concepts]


# ---- how good it is


@torch.no_grad()
def evaluate(checkpoint, path, cfg_scale, n):
    """Returns a table of ways to draw n prompts: the mean distance to the same seed's 20 guided steps, and recall, the
    share of pictures that of all prompts' pictures, drawn in 20 guided steps with other seeds, are nearest to their
    own prompt's."""
    models = model_loader.preload_models_from_standard_weights(checkpoint, "cpu", "float32")
    tokenizer = model_loader.load_tokenizer(with_transformers=False)
    prompts = list_prompts(checkpoint)
    prompts = prompts[:: max(len(prompts) // n, 1)][:n]
    guided = {"sampler_name": "dpmpp_2m", "n_inference_steps": GUIDED_STEPS, "cfg_scale": cfg_scale}

    def draw(seed, **settings):
        return np.concatenate([generate(prompts[k : k + 20], models=models, tokenizer=tokenizer, seed=seed + k,
                                        progress=False, **settings) for k in range(0, len(prompts), 20)])

    four = {"n_inference_steps": 4, "cfg_scale": 1}
    known, reference = cut(draw(10**6, **guided)), draw(0, **guided)
    rows = [(f"{GUIDED_STEPS} guided steps of dpmpp_2m", reference),
            ("4 unguided steps of dpmpp_2m", draw(0, sampler_name="dpmpp_2m", **four)),
            ("4 unguided steps of lcm", draw(0, sampler_name="lcm", **four))]
    with lora(models, path):
        rows.append(("4 unguided steps of lcm with the LoRA", draw(0, sampler_name="lcm", **four)))
    lines = [f"| {len(prompts)} prompts | distance, grey levels | recall |", "|---|---|---|"]
    for name, pictures in rows:
        distance = (small(pictures) - small(reference)).square().mean(dim=1).sqrt().mean() * 255
        nearest = torch.cdist(cut(pictures), known).argmin(dim=1)
        recall = (nearest == torch.arange(len(prompts))).float().mean()
        lines.append(f"| {name} | {distance:.1f} | {recall:.0%} |")
    return "\n".join(lines)


def distil(arguments):
    """Trains the LoRA, and writes it in kohya's layout."""
    torch.manual_seed(0)
    stage = LcmStage(arguments.checkpoint, arguments.cfg_scale, arguments.latents)
    modules = loop.train("lcm", stage, replace(SETTINGS, steps=arguments.steps), train.RUNS)
    teaching.write(LORA, to_kohya(modules), {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
                                             "ss_network_dim": RANK, "ss_network_alpha": RANK})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=train.MODEL)
    parser.add_argument("--cfg-scale", type=float, default=4.0, help="guidance to be built in (%(default)s)")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="train up to this step in all (%(default)s)")
    parser.add_argument("--latents", type=int, default=600, help="pictures that the model draws first (%(default)s)")
    parser.add_argument("--prompts", type=int, default=150, help="of the table at the end (%(default)s)")
    arguments = parser.parse_args()
    if LORA.exists():
        print(f"{LORA} is there and is not trained again: move it away for another")
    else:
        distil(arguments)
    table = evaluate(arguments.checkpoint, LORA, arguments.cfg_scale, arguments.prompts)
    text = f"# `{LORA.name}`, {LORA.stat().st_size / 1e6:.2f} MB\n\n{table}\n"
    write("lcm.md", lambda target: target.write_text(text))
    print(text)


if __name__ == "__main__":
    teaching.run(main)
