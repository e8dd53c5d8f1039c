"""Other ways to take the same steps, over the same files: the loops of diffusers' example scripts, and the limit.

The scripts (examples/text_to_image/train_text_to_image.py and train_text_to_image_lora.py, examples/textual_inversion/
textual_inversion.py of diffusers 0.42) are stated again without their command lines: they encode pictures and captions
in every step, and read the loss after it. "cached" leaves the encoding out. The limit is the network's forward and
backward pass to its text context, with frozen weights, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training.common.rng import generator
from ..training.loop.precision import DTYPES
from .processes import Case
from .recorder import CAPTION, LOADING, TRAINING, Recorder, captions_of, noise_images

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
"""Layers that the LoRA script adapts."""
RATE, LONGEST_NORM = 1e-4, 1.0
TEXT_FOLDERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Parts:
    """A diffusers folder's parts as the scripts load them: in fp32, then the frozen ones in the arithmetic's dtype."""

    case: Case
    dtype: torch.dtype
    unet: nn.Module
    vae: nn.Module
    text: list[nn.Module]

    @classmethod
    def load(cls, case: Case, precision: str, trained: str = "") -> Parts:
        """trained: a part that stays in fp32, "unet" or "text"."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        dtype, kinds = DTYPES[precision], (CLIPTextModel, CLIPTextModelWithProjection)
        folders = [name for name in TEXT_FOLDERS if (Path(case.model) / name).is_dir()]
        unet = UNet2DConditionModel.from_pretrained(case.model, subfolder="unet", torch_dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(case.model, subfolder="vae", torch_dtype=torch.float32)
        text = [
            kind.from_pretrained(case.model, subfolder=name, dtype=torch.float32)
            for kind, name in zip(kinds, folders, strict=False)
        ]
        for part in (unet, vae, *text):
            part.requires_grad_(False)
        unet.to(case.device, torch.float32 if trained == "unet" else dtype)
        vae.to(case.device, dtype)
        for encoder in text:
            encoder.to(case.device, torch.float32 if trained == "text" else dtype)
        return cls(case, dtype, unet, vae, text)

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.case.device, self.dtype)

    @torch.no_grad()
    def latents(self) -> Tensor:
        images = noise_images(self.case).to(self.case.device, self.dtype) * 2 - 1
        return self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor

    def prompt(self) -> tuple[Tensor, Tensor | None]:
        """Context, and SDXL's pooled output, of the batch's caption."""
        ids = token_ids(self.case, [CAPTION] * self.case.batch_size)
        if len(self.text) == 1:
            return self.text[0](ids).last_hidden_state, None
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.text]
        return torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1].text_embeds

    def loss(self, latents: Tensor, context: Tensor, pooled: Tensor | None) -> Tensor:
        """The squared error of the noise at a random level of each picture."""
        noise, count = torch.randn_like(latents), len(latents)
        times = torch.randint(0, 1000, (count,), device=latents.device)
        alphas = self.alphas.to(latents)[times].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        added = self.added(pooled)
        return F.mse_loss(self.unet(noisy, times, context, added_cond_kwargs=added).sample.float(), noise.float())

    @property
    def alphas(self) -> Tensor:
        """Products of 1 - beta of the scaled linear schedule."""
        return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)

    def added(self, pooled: Tensor | None) -> dict[str, Tensor] | None:
        """SDXL's conditioning on text and sizes."""
        if pooled is None:
            return None
        side = self.case.pixels
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=pooled.device, dtype=pooled.dtype)
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}


def token_ids(case: Case, captions: list[str]) -> Tensor:
    """(B, 77), on the device."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(case.model, subfolder="tokenizer")
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options)["input_ids"].to(case.device)


def train(
    parts: Parts,
    recorder: Recorder,
    trained: list[nn.Parameter],
    cached: bool = False,
    after: Callable[[], None] = lambda: None,
    text_trains: bool = False,
) -> None:
    """The scripts' loop: AdamW over `trained`, clipped gradients, the loss read after each step.

    Args:
        cached: whether pictures and captions are encoded once, before the first step.
        after: called after each optimizer step.
        text_trains: whether captions are encoded with gradients.
    """
    recorder.trained = sum(parameter.numel() for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    kept = (parts.latents(), *_prompt(parts, text_trains)) if cached else None
    if cached:
        parts.vae.to("meta")
        for encoder in parts.text:
            encoder.to("meta")
    recorder.begin(TRAINING)
    for _ in range(parts.case.rounds + 1):
        latents, context, pooled = kept or (parts.latents(), *_prompt(parts, text_trains))
        with parts.autocast():
            loss = parts.loss(latents, context, pooled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, LONGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        after()
        loss.item()
        recorder.step()


def _prompt(parts: Parts, text_trains: bool) -> tuple[Tensor, Tensor | None]:
    with torch.set_grad_enabled(text_trains), parts.autocast():
        context, pooled = parts.prompt()
    dtype = context.dtype if text_trains else parts.dtype
    return context.to(dtype), None if pooled is None else pooled.to(dtype)


def run_lora(case: Case, recorder: Recorder, precision: str, cached: bool = False) -> None:
    """train_text_to_image_lora.py."""
    from peft import LoraConfig

    recorder.begin(LOADING)
    parts = Parts.load(case, precision)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, init_lora_weights="gaussian", target_modules=ATTENTION)
    parts.unet.add_adapter(config)
    train(parts, recorder, [p for p in parts.unet.parameters() if p.requires_grad], cached)


def run_finetune(case: Case, recorder: Recorder, precision: str, cached: bool = False) -> None:
    """train_text_to_image.py."""
    recorder.begin(LOADING)
    parts = Parts.load(case, precision, trained="unet")
    parts.unet.requires_grad_(True).train()
    train(parts, recorder, list(parts.unet.parameters()), cached)


def run_embedding(case: Case, recorder: Recorder, precision: str) -> None:
    """textual_inversion.py: the whole table of embeddings trains, and all rows but one are put back after each step."""
    recorder.begin(LOADING)
    parts = Parts.load(case, precision, trained="text")
    tables = [encoder.get_input_embeddings().weight.requires_grad_(True) for encoder in parts.text]
    originals = [table.detach().clone() for table in tables]

    @torch.no_grad()
    def put_back() -> None:
        for table, original in zip(tables, originals, strict=True):
            table[1:] = original[1:]

    train(parts, recorder, tables, after=put_back, text_trains=True)


def run_limit(case: Case, recorder: Recorder, precision: str, weights: bool = False) -> None:
    """Forward and backward of the bare network; weights: to them too, each gradient dropped as soon as it is there."""
    from diffusers import UNet2DConditionModel

    recorder.begin(LOADING)
    unet = UNet2DConditionModel.from_pretrained(case.model, subfolder="unet", torch_dtype=DTYPES[precision])
    unet = unet.to(case.device).requires_grad_(weights)
    inputs = bare_inputs(unet, case.batch_size, case.pixels)
    recorder.begin(TRAINING)
    for _ in range(case.rounds + 1):
        bare_step(unet, inputs)
        recorder.step()


Inputs = tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]


def bare_step(unet: nn.Module, inputs: Inputs) -> None:
    unet(*inputs[:3], added_cond_kwargs=inputs[3]).sample.float().square().mean().backward()
    unet.zero_grad(set_to_none=True)
    inputs[2].grad = None


def bare_inputs(unet: nn.Module, count: int, pixels: int) -> Inputs:
    """Random latents, times, context that needs a gradient, and SDXL's further conditioning."""
    config, device = unet.config, unet.device
    random = generator(0, "bench inputs")

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=random).to(device, unet.dtype)

    cells = pixels // 8
    context = draw(77, config.cross_attention_dim).requires_grad_(True)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": draw(pooled), "time_ids": torch.full_like(draw(6), pixels)}
    return draw(config.in_channels, cells, cells), torch.full((count,), 500, device=device), context, added


@torch.no_grad()
def run_encoding(case: Case, recorder: Recorder, part: str, one_by_one: bool) -> None:
    """Encoding without a cache: "latents" by the VAE or "texts" by CLIP, as a batch or one by one."""
    recorder.begin(LOADING)
    parts = Parts.load(case, "fp32")
    ids, images = token_ids(case, captions_of(case)), noise_images(case).to(case.device) * 2 - 1
    encode = parts.vae.encode if part == "latents" else lambda batch: [encoder(batch) for encoder in parts.text]
    batch = images if part == "latents" else ids
    recorder.begin(TRAINING)
    for _ in range(case.rounds + 1):
        for piece in pieces(batch, one_by_one):
            encode(piece)
        recorder.step()


def pieces(batch: Tensor, one_by_one: bool) -> Iterator[Tensor]:
    yield from batch.split(1) if one_by_one else [batch]
