"""Trains the demo scorer, a small CLIP on drawn scenes, and its aesthetic head, a ridge regression of the polish."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...training.common.files import write_tensors
from ...training.common.rng import generator
from ...training.demo.files import WEIGHTS, weights_path
from ...training.demo.scenes import caption, held_out_scenes, training_scenes
from ...training.demo.shapes import SIDE
from .text import CLIP_LENGTH, build_tokenizers
from .unet import clip_tokenizer
from .vae import pictures, run_steps

LOG = logging.getLogger(__name__)
WIDTH = 64
_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
}
SEED = 24
SCENES = 8000
STEPS, BATCH, LEARNING_RATE = 2000, 64, 1e-3
POLISH_WEIGHT = 5.0
"""Weight of a linear regression of the polish, so that the embedding contains it for the aesthetic head."""
TEXT_LENGTH = 24


def scorer_config(tokenizer) -> dict:
    """CLIPConfig fields of the scorer."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = _TOWER | special | {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH}
    text |= {"num_hidden_layers": 2, "pad_token_id": tokenizer.pad_token_id}
    vision = _TOWER | {"image_size": SIDE, "patch_size": 16}
    return {"text_config": text, "vision_config": vision, "projection_dim": WIDTH}


def normalised(images: Tensor) -> Tensor:
    """uint8 or 0..1 images in -1..1 (mean 0.5, std 0.5), as the scorer reads them."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images * 2 - 1


def tokens_of(tokenizer, texts: list[str]) -> Tensor:
    """(B, 24) ids padded with the end token; every caption is shorter."""
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    return tokenizer(texts, **options).input_ids


def embeddings(model: nn.Module, pixels: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """L2-normalised image and text embeddings (B, 64)."""
    image = text = None
    if pixels is not None:
        image = functional.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
    if tokens is not None:
        text = functional.normalize(model.text_projection(model.text_model(tokens).pooler_output), dim=-1)
    return image, text


def train_scorer(work: Path) -> None:
    """Contrastive training, then the ridge head; writes `scorer.safetensors` and `aesthetic.safetensors`."""
    from transformers import CLIPConfig, CLIPModel

    build_tokenizers(WEIGHTS)
    tokenizer = clip_tokenizer()
    torch.manual_seed(SEED)
    config = scorer_config(tokenizer)
    model = nn.ModuleDict({"clip": CLIPModel(CLIPConfig(**config)), "polish": nn.Linear(WIDTH, 1)}).train()
    scenes = training_scenes(SCENES, SEED)
    images, polish = pictures(scenes, SEED), torch.tensor([scene.polish for scene in scenes])
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)

    def step(number: int) -> float:
        rng = generator(SEED, "scorer step", number)
        index = torch.randint(len(scenes), (BATCH,), generator=rng)
        texts = [caption(scenes[i], rng) for i in index]
        with torch.autocast("cpu", torch.bfloat16):
            image, text = embeddings(model["clip"], normalised(images[index]), tokens_of(tokenizer, texts))
        image, text = image.float(), text.float()
        logits = model["clip"].logit_scale.exp().clamp(max=50) * image @ text.T
        targets = torch.arange(BATCH)
        loss = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
        error = functional.mse_loss(model["polish"](image)[:, 0], polish[index] * 2 - 1)
        (loss + POLISH_WEIGHT * error).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(loss.detach())

    run_steps("scorer", model, optimizer, step, STEPS, LEARNING_RATE, work)
    tensors = {name: tensor.half() for name, tensor in model["clip"].state_dict().items() if "position_ids" not in name}
    write_tensors(WEIGHTS / "scorer.safetensors", tensors, {"retune.config": json.dumps(config)})
    _write_head(images, polish)
    LOG.info("scorer: %s", scorer_figures())


@torch.no_grad()
def image_embeddings(images: Tensor) -> Tensor:
    """(N, 64) embeddings of uint8 or 0..1 images by the shipped scorer."""
    model = load_scorer()
    return torch.cat([embeddings(model, normalised(batch), None)[0] for batch in images.split(64)])


def _write_head(images: Tensor, polish: Tensor) -> None:
    """Ridge regression of 10 x polish on the normalised image embedding."""
    inputs = image_embeddings(images[:4000]).double()
    target = 10 * polish[:4000].double()
    centred = inputs - inputs.mean(0)
    gram = centred.T @ centred + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (target - target.mean()))
    bias = target.mean() - inputs.mean(0) @ weight
    tensors = {"weight": weight[None].half(), "bias": bias[None].half()}
    write_tensors(WEIGHTS / "aesthetic.safetensors", tensors)


def aesthetic(images: Tensor) -> Tensor:
    """(N,) aesthetic scores, about 0 to 10, of uint8 or 0..1 images."""
    from safetensors.torch import load_file

    head = load_file(weights_path("aesthetic.safetensors"))
    return (image_embeddings(images) @ head["weight"].float().T + head["bias"].float())[:, 0]


@torch.no_grad()
def scorer_figures(count: int = 300) -> dict[str, float]:
    """On held-out scenes: accuracy of picking the caption among `count` (top 1, top 5), R^2 of the aesthetic head."""
    scenes = list(
        {(s.shape, s.colour, s.size, s.count, s.position, s.background): s for s in held_out_scenes(1500, 9)}.values()
    )
    scenes = scenes[:count]
    images, polish = pictures(scenes, 9), torch.tensor([10 * scene.polish for scene in scenes])
    texts = [caption(scene, generator(9, "scorer caption", i)) for i, scene in enumerate(scenes)]
    text = embeddings(load_scorer(), None, tokens_of(clip_tokenizer(), texts))[1]
    ranks = (image_embeddings(images) @ text.T).argsort(1, descending=True)
    places = (ranks == torch.arange(len(scenes))[:, None]).float().argmax(1)
    residual = (aesthetic(images) - polish).square().mean() / polish.var(correction=0)
    top1, top5 = (places < 1).float().mean(), (places < 5).float().mean()
    return {"candidates": len(scenes), "top1": top1.item(), "top5": top5.item(), "r2": 1 - residual.item()}


def load_scorer() -> nn.Module:
    """The shipped scorer in fp32."""
    from safetensors import safe_open
    from transformers import CLIPConfig, CLIPModel

    with safe_open(weights_path("scorer.safetensors"), "pt") as file:
        config = CLIPConfig(**json.loads(file.metadata()["retune.config"]))
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = CLIPModel(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing), (missing, unexpected)
    return model.eval()
