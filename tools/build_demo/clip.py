"""Pre-trains the demo's CLIP text encoder on the attributes in captions, before it trains together with the UNet.

SD1.5's text encoder was pre-trained too.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn import functional

from ...training.common.rng import generator
from ...training.demo.judge import parse_caption
from ...training.demo.scenes import ATTRIBUTES, training_scenes
from .text import varied_caption
from .vae import cosine_rate

LOG = logging.getLogger(__name__)
SEED = 25
STEPS, BATCH, LEARNING_RATE = 400, 48, 2e-3


def pretrain_clip(clip: nn.Module, tokens_of) -> None:
    """Trains `clip` so that linear maps of the mean of its 77 states classify every attribute of the caption.

    An untrained cross-attention reads this mean. With the denoising loss alone the encoder learned colours and sizes
    and then lost the words for position and shape.

    Args:
        clip: A CLIPTextModel, trained in place.
        tokens_of: Texts -> token ids (B, 77).
    """
    scenes = training_scenes(4000, SEED)
    values = {name: sorted({str(getattr(scene, name)) for scene in scenes} | {"figure"}) for name in ATTRIBUTES}
    torch.manual_seed(SEED)
    heads = nn.ModuleDict({name: nn.Linear(clip.config.hidden_size, len(values[name])) for name in ATTRIBUTES})
    optimizer = torch.optim.AdamW([*clip.parameters(), *heads.parameters()], LEARNING_RATE, betas=(0.9, 0.98))
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(number, STEPS, LEARNING_RATE, 50)
        rng = generator(SEED, "clip step", number)
        texts = [varied_caption(scenes[i], rng) for i in torch.randint(len(scenes), (BATCH,), generator=rng)]
        attributes = [parse_caption(text) for text in texts]
        pooled = clip(tokens_of(texts)).last_hidden_state.mean(1)
        loss = torch.zeros(())
        for name in ATTRIBUTES:
            targets = torch.tensor([values[name].index(str(a[name])) if name in a else -100 for a in attributes])
            loss = loss + functional.cross_entropy(heads[name](pooled), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % 50 == 0:
            LOG.info("clip %d/%d: %.4f", number + 1, STEPS, loss.item())
