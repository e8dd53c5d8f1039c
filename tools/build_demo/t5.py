"""Pre-trains the demo T5 on captions by span corruption (Raffel et al. 2020, arXiv 1910.10683); writes its encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ...training.common.files import write_tensors
from ...training.common.rng import generator
from ...training.demo.files import WEIGHTS, weights_path
from ...training.demo.scenes import ATTRIBUTES, caption, held_out_scenes, training_scenes
from .text import SENTINELS, build_tokenizers, corpus
from .vae import run_steps

CONFIG = {
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 256,
    "num_heads": 4,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
SEED = 23
STEPS, BATCH, LEARNING_RATE = 4000, 64, 3e-3
CORRUPTED, SPAN = 0.25, 3


def t5_tokenizer():
    """The demo's T5 tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(weights_path("t5_tokenizer") / "tokenizer.json"))


def padded(rows: list[list[int]], value: int = 0) -> Tensor:
    """(B, L) of the rows, padded at the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def corrupted(ids: list[int], first_sentinel: int, rng: torch.Generator) -> tuple[list[int], list[int]]:
    """Replaces spans of about three tokens by sentinels.

    Args:
        ids: A caption's token ids, the last one </s>.
        first_sentinel: Id of the first sentinel token.

    Returns:
        The corrupted ids, and the target: each sentinel followed by the tokens it replaced.
    """
    body = ids[:-1]
    spans = max(1, min(SENTINELS, round(len(body) * CORRUPTED / SPAN)))
    starts = sorted((torch.randperm(max(1, len(body) - 1), generator=rng)[:spans]).tolist())
    source, target, place = [], [], 0
    for number, start in enumerate(starts):
        if start < place:
            continue
        length = 1 + int(torch.randint(2 * SPAN - 1, (), generator=rng))
        source += [*body[place:start], first_sentinel + number]
        target += [first_sentinel + number, *body[start : start + length]]
        place = start + length
    return [*source, *body[place:], 1], [*target, 1]


def train_t5(work: Path) -> dict[str, float]:
    """Pre-trains encoder and decoder, writes `t5.safetensors` with the encoder alone, and logs the probe."""
    from transformers import T5Config, T5ForConditionalGeneration

    build_tokenizers(WEIGHTS)
    tokenizer = t5_tokenizer()
    torch.manual_seed(SEED)
    config = T5Config(**CONFIG, num_decoder_layers=2, vocab_size=tokenizer.get_vocab_size())
    model = T5ForConditionalGeneration(config).train()
    texts = [encoding.ids for encoding in tokenizer.encode_batch(corpus(20_000, SEED))]
    first_sentinel = tokenizer.token_to_id("<extra_id_0>")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def step(number: int) -> float:
        rng = generator(SEED, "t5 step", number)
        index = torch.randint(len(texts), (BATCH,), generator=rng)
        pairs = [corrupted(texts[i], first_sentinel, rng) for i in index]
        source = padded([pair[0] for pair in pairs])
        labels = padded([pair[1] for pair in pairs], -100)
        loss = model(input_ids=source, attention_mask=(source != 0).long(), labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return float(loss.detach())

    figures = run_steps("t5", model, optimizer, step, STEPS, LEARNING_RATE, work)
    tensors = {"shared.weight": model.shared.weight.detach()}
    tensors |= {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    tensors = {name: tensor.half() for name, tensor in tensors.items() if "embed_tokens" not in name}
    shipped = CONFIG | {"vocab_size": tokenizer.get_vocab_size(), "is_encoder_decoder": False, "use_cache": False}
    write_tensors(WEIGHTS / "t5.safetensors", tensors, {"retune.t5_config": json.dumps(shipped)})
    return figures | probe()


@torch.no_grad()
def probe(train: int = 2000, test: int = 500) -> dict[str, float]:
    """For each attribute, the share of held-out captions for which a linear map of the mean token state predicts it."""
    from .text import SEED as TEXT_SEED

    scenes = [scene for scene in training_scenes(2 * train, SEED) if not scene.words][:train]
    scenes += held_out_scenes(test, SEED)
    prompts = [caption(scene, generator(TEXT_SEED, "probe", i)) for i, scene in enumerate(scenes)]
    states = mean_states(prompts)
    states = torch.cat([states, torch.ones(len(states), 1)], 1)
    shares = {}
    for name in ATTRIBUTES:
        values = sorted({str(getattr(scene, name)) for scene in scenes})
        classes = torch.tensor([values.index(str(getattr(scene, name))) for scene in scenes])
        targets = nn.functional.one_hot(classes, len(values)).float()
        inputs = states[: len(scenes) - test]
        gram = inputs.T @ inputs + 1e-3 * torch.eye(states.shape[1])
        weight = torch.linalg.solve(gram, inputs.T @ targets[: len(inputs)])
        shares[name] = (states[-test:] @ weight).argmax(1).eq(classes[-test:]).float().mean().item()
    return shares


@torch.no_grad()
def mean_states(prompts: list[str]) -> Tensor:
    """(N, 96) mean of the shipped encoder's states over real tokens."""
    model, tokenizer = load_t5(), t5_tokenizer()
    ids = padded([encoding.ids for encoding in tokenizer.encode_batch(prompts)])
    mask = (ids != 0).long()
    states = [
        model(input_ids=i, attention_mask=m).last_hidden_state
        for i, m in zip(ids.split(64), mask.split(64), strict=True)
    ]
    return (torch.cat(states) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def load_t5() -> nn.Module:
    """The shipped encoder in fp32."""
    from safetensors import safe_open
    from transformers import T5Config, T5EncoderModel

    with safe_open(weights_path("t5.safetensors"), "pt") as file:
        config = T5Config(**json.loads(file.metadata()["retune.t5_config"]))
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = T5EncoderModel(config)
    model.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})
    return model.eval()
