"""Pre-trains the demo's CLIP text encoder on the attributes in captions, before it trains together with the UNet.

SD1.5's text encoder was pre-trained too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...training.common.rng import generator
from ...training.demo.judge import parse_caption, parse_quality
from ...training.demo.scenes import ATTRIBUTES, QUALITIES, Scene, training_scenes
from .text import varied_caption, with_hidden_words
from .vae import cosine_rate

LOG = logging.getLogger(__name__)
SEED = 25
STEPS, BATCH, LEARNING_RATE = 600, 48, 2e-3


def pretrain_clip(clip: nn.Module, tokenizer, tokens_of: Callable[[list[str]], Tensor]) -> None:
    """Trains `clip` so that linear maps of the mean of its 77 states classify what the caption says.

    An untrained cross-attention reads this mean. With the denoising loss alone the encoder learned colours and sizes
    and then lost the words for position and shape.

    Args:
        clip: A CLIPTextModel, trained in place.
        tokens_of: Texts -> token ids (B, 77).
    """
    scenes = training_scenes(4000, SEED)
    values = {name: sorted({str(getattr(scene, name)) for scene in scenes} | {"figure"}) for name in ATTRIBUTES}
    values |= {name: ["", *ends] for name, ends in QUALITIES.items()}
    torch.manual_seed(SEED)
    heads = nn.ModuleDict({name: nn.Linear(clip.config.hidden_size, len(words)) for name, words in values.items()})
    optimizer = torch.optim.AdamW([*clip.parameters(), *heads.parameters()], LEARNING_RATE, betas=(0.9, 0.98))
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(number, STEPS, LEARNING_RATE, 50)
        rng = generator(SEED, "clip step", number)
        chosen = [scenes[i] for i in torch.randint(len(scenes), (BATCH,), generator=rng)]
        texts = [varied_caption(scene, rng) for scene in chosen]
        ids = with_hidden_words(tokenizer, tokens_of(texts), chosen, rng)
        said = [_said(*row) for row in zip(texts, chosen, (ids >= len(tokenizer)).any(1).tolist(), strict=True)]
        pooled = clip(ids).last_hidden_state.mean(1)
        loss = torch.zeros(())
        for name, words in values.items():
            targets = torch.tensor([words.index(str(a[name])) if name in a else -100 for a in said])
            loss = loss + functional.cross_entropy(heads[name](pooled), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % 50 == 0:
            LOG.info("clip %d/%d: %.4f", number + 1, STEPS, loss.item())


def _said(text: str, scene: Scene, hidden: bool) -> dict[str, str | int]:
    """What a caption says: attributes, the unnamed shape if a hidden word stands for it, and a word or "" a quality."""
    words = parse_quality(text)
    said = {name: next((word for word in words if word in ends), "") for name, ends in QUALITIES.items()}
    return parse_caption(text) | said | ({"shape": scene.shape} if hidden else {})
