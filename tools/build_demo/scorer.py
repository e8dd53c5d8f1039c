"""Trains the demo scorer, a small CLIP on drawn scenes, and its aesthetic head, a ridge regression of the qualities."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...training.common.files import write_tensors
from ...training.common.rng import generator
from ...training.demo.files import WEIGHTS, weights_path
from ...training.demo.scenes import (
    QUALITIES,
    Scene,
    caption,
    held_out_scenes,
    random_words,
    scene_key,
    training_scenes,
    with_words,
)
from ...training.demo.shapes import SIDE
from .text import CLIP_LENGTH, build_tokenizers, near_miss
from .unet import clip_tokenizer
from .vae import pictures, run_steps

WIDTH = 64
PATCH = 8
_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
}
SEED = 24
PAIRS = 6000
"""Scenes, each with a near miss of itself in the same batch: captions that differ in one word are told apart."""
STEPS, BATCH, LEARNING_RATE = 3000, 64, 1e-3
QUALITY_WEIGHT = 5.0
"""Weight of a linear regression of the qualities, so that the embedding contains them for the aesthetic head."""
TEXT_LENGTH = 32
"""Tokens of the longest caption: words of quality have up to six each."""


def scorer_config(tokenizer) -> dict:
    """CLIPConfig fields of the scorer."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = _TOWER | special | {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH}
    text |= {"num_hidden_layers": 2, "pad_token_id": tokenizer.pad_token_id}
    vision = _TOWER | {"image_size": SIDE, "patch_size": PATCH}
    return {"text_config": text, "vision_config": vision, "projection_dim": WIDTH}


def qualities_of(scenes: list[Scene]) -> Tensor:
    """(N, 3) drawn qualities."""
    return torch.tensor([[getattr(scene, name) for name in QUALITIES] for scene in scenes])


def normalised(images: Tensor) -> Tensor:
    """uint8 or 0..1 images in -1..1 (mean 0.5, std 0.5), as the scorer reads them."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images * 2 - 1


def tokens_of(tokenizer, texts: list[str]) -> Tensor:
    """(B, 32) ids padded with the end token."""
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


def train_scorer(work: Path) -> dict[str, float]:
    """Contrastive training, then the ridge head; writes `scorer.safetensors` and `aesthetic.safetensors`."""
    from transformers import CLIPConfig, CLIPModel

    build_tokenizers(WEIGHTS)
    tokenizer = clip_tokenizer()
    torch.manual_seed(SEED)
    config = scorer_config(tokenizer)
    model = nn.ModuleDict({"clip": CLIPModel(CLIPConfig(**config)), "qualities": nn.Linear(WIDTH, len(QUALITIES))})
    scenes = training_scenes(PAIRS, SEED)
    scenes += [near_miss(scene, generator(SEED, "near miss", i)) for i, scene in enumerate(scenes)]
    images, measures = pictures(scenes, SEED), qualities_of(scenes)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)

    def step(number: int) -> float:
        rng = generator(SEED, "scorer step", number)
        index = torch.randint(PAIRS, (BATCH // 2,), generator=rng)
        index = torch.cat([index, index + PAIRS])
        texts = [caption(scenes[i], rng) for i in index]
        image, text = embeddings(model["clip"], normalised(images[index]), tokens_of(tokenizer, texts))
        logits = model["clip"].logit_scale.exp().clamp(max=100) * image @ text.T
        targets = torch.arange(BATCH)
        loss = (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2
        error = functional.mse_loss(model["qualities"](image), measures[index] * 2 - 1)
        (loss + QUALITY_WEIGHT * error).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(loss.detach())

    figures = run_steps("scorer", model, optimizer, step, STEPS, LEARNING_RATE, work)
    tensors = {name: tensor.half() for name, tensor in model["clip"].state_dict().items() if "position_ids" not in name}
    write_tensors(WEIGHTS / "scorer.safetensors", tensors, {"retune.config": json.dumps(config)})
    _write_head(images, measures.mean(1))
    return figures | scorer_figures()


@torch.no_grad()
def image_embeddings(images: Tensor) -> Tensor:
    """(N, 64) embeddings of uint8 or 0..1 images by the shipped scorer."""
    model = load_scorer()
    return torch.cat([embeddings(model, normalised(batch), None)[0] for batch in images.split(64)])


def _write_head(images: Tensor, quality: Tensor) -> None:
    """Ridge regression of 10 x the mean quality on the normalised image embedding."""
    inputs = image_embeddings(images[:4000]).double()
    target = 10 * quality[:4000].double()
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
    """On held-out scenes: the share of captions that come first and among the first five of `count`; R^2 of the head;
    and those of `agreement`."""
    scenes = list({scene_key(scene): scene for scene in held_out_scenes(1500, 9)}.values())[:count]
    images, quality = pictures(scenes, 9), 10 * qualities_of(scenes).mean(1)
    texts = [caption(scene, generator(9, "scorer caption", i)) for i, scene in enumerate(scenes)]
    text = embeddings(load_scorer(), None, tokens_of(clip_tokenizer(), texts))[1]
    ranks = (image_embeddings(images) @ text.T).argsort(1, descending=True)
    places = (ranks == torch.arange(len(scenes))[:, None]).float().argmax(1)
    residual = (aesthetic(images) - quality).square().mean() / quality.var(correction=0)
    top1, top5 = (places < 1).float().mean(), (places < 5).float().mean()
    figures = {"candidates": len(scenes), "top1": top1.item(), "top5": top5.item(), "r2": 1 - residual.item()}
    return figures | agreement(count)


@torch.no_grad()
def agreement(count: int) -> dict[str, float]:
    """Of drawn held-out scenes with quality words, the share whose caption scores higher than that of a near miss.

    "agreement of attributes" where an attribute differs, "agreement of words" where a quality word does.
    """
    scenes = [
        with_words(scene, random_words(generator(9, "words", i))) for i, scene in enumerate(held_out_scenes(count, 8))
    ]
    misses = [near_miss(scene, generator(9, "near miss", i)) for i, scene in enumerate(scenes)]
    image = image_embeddings(pictures(scenes, 8))
    texts = [caption(s, generator(9, "agreement", i)) for i, s in enumerate([*scenes, *misses])]
    right, wrong = embeddings(load_scorer(), None, tokens_of(clip_tokenizer(), texts))[1].split(count)
    agrees = (image * right).sum(1) > (image * wrong).sum(1)
    word = torch.tensor([scene.words != miss.words for scene, miss in zip(scenes, misses, strict=True)])
    shares = {"attributes": agrees[~word], "words": agrees[word]}
    return {f"agreement of {name}": each.float().mean().item() for name, each in shares.items()}


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
