"""Tiny models of the real classes, with fixed random weights."""

import json

import pytest
import torch

torch.set_num_threads(1)

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
VAE = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 32,
}


def write_clip_tokenizer(folder):
    """A byte-level BPE tokenizer in CLIP's files, learned from a few words; returns its vocabulary size."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer(lowercase=True, end_of_word_suffix="</w>")
    words = ["a red circle on the left", "two small blue squares", "a green star, white background"]
    tokenizer.train_from_iterator(words * 4, vocab_size=700, min_frequency=1, special_tokens=[])
    tokenizer.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for character in [*vocabulary]:
        if len(character) == 1:
            vocabulary.setdefault(character + "</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return len(vocabulary)


def seeded(build, seed=0):
    """A module with weights drawn under a seed, the global generator left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


@pytest.fixture
def tiny_model(tmp_path):
    """TextToImage of random weights: 64x64 pixels are 32x32 latents, context width 32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from retune.training.clip_text import ClipTextEncoder
    from retune.training.diffusers_model import SD1_SCHEDULER, DiffusersAutoencoder, DiffusersDenoiser
    from retune.training.model import TextToImage
    from transformers import CLIPTextConfig, CLIPTextModel

    size = write_clip_tokenizer(tmp_path / "clip_tokenizer")
    special = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = seeded(lambda: CLIPTextModel(CLIPTextConfig(**CLIP, **special)))
    unet = seeded(lambda: UNet2DConditionModel(**UNET))
    vae = seeded(lambda: AutoencoderKL(**VAE))
    encoder = ClipTextEncoder(text, tmp_path / "clip_tokenizer")
    return TextToImage(DiffusersDenoiser(unet, SD1_SCHEDULER), encoder, DiffusersAutoencoder(vae))


@pytest.fixture
def pictures():
    """Six captioned 32x32 pictures."""
    from retune.training.data.dataset import from_images

    random = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 32, 32, generator=random) for _ in range(6)]
    words = ["a red circle", "two small blue squares", "a green star, white background"]
    return from_images(images, [words[i % 3] for i in range(6)], resolution=None)
