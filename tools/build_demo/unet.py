"""Trains the demo's UNet and CLIP text encoder together, and writes `demo.safetensors` in the original layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...training.common.files import write_tensors
from ...training.common.rng import generator
from ...training.demo.files import WEIGHTS, weights_path
from ...training.demo.judge import alignment
from ...training.demo.scenes import Scene, caption, held_out_scenes, training_scenes
from ...training.models.ldm import CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, to_ldm, unet_names, vae_names
from .clip import pretrain_clip
from .init import add_border_markers
from .muon import muon_and_adamw
from .text import CLIP_LENGTH, HIDDEN_WORDS, build_tokenizers, varied_caption, with_hidden_words
from .vae import decoded, latents_of, load_vae, pictures, run_steps

LOG = logging.getLogger(__name__)
# Three levels: on the 4 x 4 grid every cell reaches the border, which alone distinguishes left from right. With two
# levels, words of position had no effect at all after 2000 steps. The first has no attention, as in SDXL: attention
# there doubled the time of a step for little gain (validation loss after 300 steps 0.22 to 0.29 over the noise levels
# instead of 0.23 to 0.34).
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 96, 96],
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CLIP_LENGTH,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "num_train_timesteps": 1000,
}
SEED = 22
SCENES = 20_000
STEPS, BATCH, LEARNING_RATE, EMPTY_CAPTIONS = 7000, 32, 1.5e-3, 0.1
OUTER = ("conv_in", "conv_out", "time_embedding")
HIDDEN_NOISE = 0.4
"""Standard deviation of the noise on the vectors of hidden words, relative to their root mean square."""
PLACES_FIRST = 1500
"""First steps, in which half of the samples have high noise, where positions form; then noise levels are uniform."""
CHECK_EVERY, CHECK_IMAGES, SAMPLING_STEPS, CFG = 1000, 100, 12, 2.5


def alphas_cumprod() -> Tensor:
    """(1000,) alphas_cumprod of the scaled-linear schedule."""
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000, dtype=torch.float64)
    return torch.cumprod(1 - betas**2, 0).float()


def clip_tokenizer():
    """The demo's CLIP tokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(weights_path("clip_tokenizer"))


def tokens_of(tokenizer, texts: list[str]) -> Tensor:
    """(B, 77) ids, padded with the end token as SD1.5 does."""
    options = {"padding": "max_length", "truncation": True, "max_length": CLIP_LENGTH, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


def new_networks(tokenizer) -> nn.ModuleDict:
    """UNet and CLIP with random weights, and their running averages; the CLIP has rows for the hidden words too."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocabulary = len(tokenizer) + HIDDEN_WORDS
    config = CLIPTextConfig(**CLIP, **special, pad_token_id=tokenizer.pad_token_id, vocab_size=vocabulary)
    networks = {}
    for suffix in ("", "_ema"):
        torch.manual_seed(SEED)
        networks |= {f"unet{suffix}": UNet2DConditionModel(**UNET), f"clip{suffix}": CLIPTextModel(config)}
    networks = nn.ModuleDict(networks)
    for name in ("unet_ema", "clip_ema"):
        networks[name].requires_grad_(False)
    return networks.train()


@contextmanager
def blurred_hidden_words(clip: nn.Module, first: int, rng: torch.Generator) -> Iterator[None]:
    """Adds noise to the vectors of hidden words (ids from `first` on) while it is open.

    So the figures can be reached by all vectors near theirs, and textual inversion finds one from five pictures.
    """

    def add_noise(module: nn.Embedding, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        hidden = (inputs[0] >= first)[..., None]
        deviation = HIDDEN_NOISE * output.detach().square().mean(-1, keepdim=True).sqrt()
        return output + hidden * deviation * torch.randn(output.shape, generator=rng)

    handle = clip.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def update_average(networks: nn.ModuleDict, done: int) -> None:
    """EMA with decay rising to 0.998."""
    decay = min(0.998, (1 + done) / (10 + done))
    for name in ("unet", "clip"):
        averages, values = list(networks[f"{name}_ema"].parameters()), list(networks[name].parameters())
        torch._foreach_lerp_(averages, [value.detach() for value in values], 1 - decay)


def denoising_loss(
    networks: nn.ModuleDict, latents: Tensor, tokens: Tensor, rng: torch.Generator, noisiest: float = 0.5
) -> Tensor:
    """Mean square error of v = sqrt(a) noise - sqrt(1 - a) latent (Salimans & Ho 2022, arXiv 2202.00512).

    The network predicts v, and the loss has no weights: at high noise, where the text decides colours and positions,
    the error of a noise prediction by so small a network exceeds the signal, and it learns them far later.

    Args:
        networks: "unet" and "clip".
        latents: (B, 4, 16, 16), scaled.
        tokens: (B, 77) ids.
        noisiest: Share of the batch with timesteps of 850 and more; the others are uniform.
    """
    time = torch.randint(1000, (len(latents),), generator=rng)
    count = int(noisiest * len(latents))
    time[:count] = torch.randint(850, 1000, (count,), generator=rng)
    noise = torch.randn(latents.shape, generator=rng)
    alpha = alphas_cumprod()[time][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    output = networks["unet"](noisy, time, networks["clip"](tokens).last_hidden_state).sample
    return functional.mse_loss(output, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents)


@torch.no_grad()
def sample(
    networks: nn.ModuleDict, tokenizer, texts: list[str], seed: int, steps: int = SAMPLING_STEPS, cfg: float = CFG
):
    """Latents (N, 4, 16, 16) of the averaged networks by DDIM (Song et al. 2021, arXiv 2010.02502, eta 0)."""
    unet, clip = networks["unet_ema"].eval(), networks["clip_ema"].eval()
    alphas = alphas_cumprod()
    times = torch.linspace(999, 0, steps + 1).round().long()
    batches = []
    for start in range(0, len(texts), 25):
        prompts = texts[start : start + 25]
        context = clip(tokens_of(tokenizer, [""] * len(prompts) + prompts)).last_hidden_state
        noises = [torch.randn((4, 16, 16), generator=generator(seed, "noise", start + i)) for i in range(len(prompts))]
        latents = torch.stack(noises)
        for time, following in zip(times[:-1], times[1:], strict=True):
            negative, positive = unet(latents.repeat(2, 1, 1, 1), time, context).sample.chunk(2)
            v = negative + cfg * (positive - negative)
            sqrt_alpha, sigma = alphas[time].sqrt(), (1 - alphas[time]).sqrt()
            clean, noise = sqrt_alpha * latents - sigma * v, sigma * latents + sqrt_alpha * v
            latents = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * noise
        batches.append(clean)
    return torch.cat(batches)


def held_out_prompts(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Held-out scenes and a full caption of each."""
    scenes = held_out_scenes(count, seed)
    return scenes, [caption(scene, generator(seed, "held-out caption", i)) for i, scene in enumerate(scenes)]


def measure(networks: nn.ModuleDict, tokenizer, work: Path, count: int, seed: int = 1, **options):
    """Draws `count` held-out captions; returns the figures of `alignment`, and the images. options: of `sample`."""
    vae, config = load_vae(work)
    scenes, prompts = held_out_prompts(count, seed)
    images = decoded(vae, sample(networks, tokenizer, prompts, seed, **options), config["scaling_factor"])
    return alignment(images, scenes), images


def _prepared(work: Path) -> tuple[list[Scene], Tensor]:
    """Training scenes and their latents; encoded once."""
    scenes = training_scenes(SCENES, SEED)
    file = work / "latents.pt"
    if not file.exists():
        vae, config = load_vae(work)
        latents = latents_of(vae, pictures(scenes, SEED), config["scaling_factor"])
        torch.save(latents, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return scenes, torch.load(file, weights_only=True)


def _prepare_start(networks: nn.ModuleDict, tokenizer) -> None:
    """Pre-trains the text encoder, adds the UNet's border markers, and copies both into the running averages."""
    pretrain_clip(networks["clip"], tokenizer, partial(tokens_of, tokenizer))
    add_border_markers(networks["unet"])
    for name in ("unet", "clip"):
        networks[f"{name}_ema"].load_state_dict(networks[name].state_dict())


def train_unet(work: Path) -> dict[str, float]:
    """Trains UNet and CLIP, measures alignment every 1000 steps, and writes `demo.safetensors`."""
    from diffusers.models.attention_processor import AttnProcessor

    build_tokenizers(WEIGHTS)
    tokenizer = clip_tokenizer()
    scenes, latents = _prepared(work)
    networks = new_networks(tokenizer)
    if not (work / "unet.state.pt").exists():
        _prepare_start(networks, tokenizer)
    networks["unet"].set_attn_processor(AttnProcessor())  # on a CPU 1.6 times as fast per step as the fused kernel
    clip = {"params": networks["clip"].parameters(), "scale": 0.2}
    optimizers = muon_and_adamw(networks["unet"], OUTER, LEARNING_RATE, [clip])

    def step(number: int) -> float:
        rng = generator(SEED, "unet step", number)
        index = torch.randint(len(scenes), (BATCH,), generator=rng)
        empty = torch.rand(BATCH, generator=rng) < EMPTY_CAPTIONS
        texts = ["" if none else varied_caption(scenes[i], rng) for i, none in zip(index, empty, strict=True)]
        noisiest = 0.5 if number < PLACES_FIRST else 0.0
        ids = with_hidden_words(tokenizer, tokens_of(tokenizer, texts), [scenes[i] for i in index], rng)
        with blurred_hidden_words(networks["clip"], len(tokenizer), rng):
            loss = denoising_loss(networks, latents[index], ids, rng, noisiest)
        loss.backward()
        nn.utils.clip_grad_norm_([*networks["unet"].parameters(), *networks["clip"].parameters()], 1.0)
        return float(loss.detach())

    def after(done: int) -> None:
        update_average(networks, done)
        if done % CHECK_EVERY == 0:
            figures, _ = measure(networks, tokenizer, work, CHECK_IMAGES)
            networks.train()
            LOG.info("step %d: %s", done, {name: round(share, 3) for name, share in figures.items()})

    figures = run_steps("unet", networks, optimizers, step, STEPS, LEARNING_RATE, work, after)
    write_demo(networks, tokenizer, work)
    return figures


def write_demo(networks: nn.ModuleDict, tokenizer, work: Path) -> None:
    """`demo.safetensors`: the averaged UNet and CLIP and the autoencoder, original layout, fp16, no hidden words."""
    vae, vae_config = load_vae(work)
    clip, vocabulary = networks["clip_ema"], len(tokenizer)
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.state_dict().items()}
    token_embedding = "text_model.embeddings.token_embedding.weight"
    named[token_embedding] = named[token_embedding][:vocabulary]
    tensors = {UNET_PREFIX + k: v for k, v in to_ldm(networks["unet_ema"].state_dict(), unet_names(UNET)).items()}
    tensors |= {VAE_PREFIX + k: v for k, v in to_ldm(vae.state_dict(), vae_names(vae_config)).items()}
    tensors |= {CLIP_PREFIX + k: v for k, v in named.items() if "position_ids" not in k}
    config = {
        "unet": UNET,
        "vae": vae_config,
        "clip": clip.config.to_dict() | {"vocab_size": vocabulary},
        "scheduler": SCHEDULER,
    }
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_tensors(WEIGHTS / "demo.safetensors", tensors, {"retune.config": json.dumps(config, default=str)})
