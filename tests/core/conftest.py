"""Tiny models of the real classes, with fixed random weights."""

import json
import shutil

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
    from retune.training.models.clip import ClipTextEncoder
    from retune.training.models.diffusers import SD1_SCHEDULER, DiffusersAutoencoder, DiffusersDenoiser
    from retune.training.models.protocols import TextToImage
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


@pytest.fixture
def single_file(tiny_model, tmp_path):
    """The tiny model as one checkpoint in the original layout, its shapes described in the metadata."""
    from retune.training.common.files import write_tensors
    from retune.training.models import ldm

    unet, vae, text = (part.network for part in (tiny_model.denoiser, tiny_model.autoencoder, tiny_model.text_encoder))
    words = {"text_model." + name.removeprefix("text_model."): t for name, t in text.state_dict().items()}
    parts = {
        ldm.UNET_PREFIX: ldm.to_ldm(unet.state_dict(), ldm.unet_names(unet.config)),
        ldm.VAE_PREFIX: ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config)),
        ldm.CLIP_PREFIX: words,
    }
    config = {"unet": dict(unet.config), "vae": dict(vae.config), "clip": text.config.to_dict()}
    tensors = {prefix + name: t for prefix, part in parts.items() for name, t in part.items()}
    write_tensors(tmp_path / "tiny.safetensors", tensors, {"retune.config": json.dumps(config)})
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def picture_folder(tmp_path):
    """Four captioned 32x32 PNG files."""
    from retune.training.data.images import save_png

    random = torch.Generator().manual_seed(2)
    for i, words in enumerate(["a red circle", "two small blue squares", "a green star", "a white background"]):
        save_png(torch.rand(3, 32, 32, generator=random), tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(words, encoding="utf-8")
    return tmp_path / "pictures"


@pytest.fixture
def train_arguments(single_file, picture_folder):
    """output folder -> arguments of a short training run on the command line that uses every kind of event."""

    def arguments(output, *more):
        flags = {
            "--model": single_file,
            "--tokenizer": single_file.parent / "clip_tokenizer",
            "--folder": picture_folder,
            "--resolution": 32,
            "--run-name": "r",
            "--steps": 8,
            "--batch-size": 2,
            "--learning-rate": 1e-3,
            "--warmup-steps": 2,
            "--gradient-accumulation": 2,
            "--ema-decay": 0.9,
            "--validation-fraction": 0.3,
            "--validate-every": 4,
            "--save-every": 3,
            "--sample-prompts": "a red circle",
            "--sample-every": 4,
            "--sample-steps": 2,
            "--sample-width": 32,
            "--sample-height": 32,
            "--output": output,
            "--device": "cpu",
        }
        listed = [str(part) for pair in flags.items() for part in pair]
        return ["train", *listed, "--no-buckets", *more]

    return arguments


@pytest.fixture
def diffusers_folder(tiny_model, tmp_path):
    """The tiny model as a diffusers folder."""
    from diffusers import DDIMScheduler
    from retune.training.models.diffusers import SD1_SCHEDULER

    folder = tmp_path / "diffusers"
    tiny_model.denoiser.network.save_pretrained(folder / "unet")
    tiny_model.autoencoder.network.save_pretrained(folder / "vae")
    tiny_model.text_encoder.network.save_pretrained(folder / "text_encoder")
    DDIMScheduler(**SD1_SCHEDULER).save_pretrained(folder / "scheduler")
    shutil.copytree(tmp_path / "clip_tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def open_clip_tensors():
    """`open_clip_tensors(vocabulary, width, hidden, projected, layers)`: a random text encoder in OpenCLIP's layout."""

    def make(vocabulary, width, hidden, projected, layers=3):
        shapes = {"token_embedding.weight": (vocabulary, width), "positional_embedding": (77, width)}
        shapes |= {"text_projection": (width, projected), "ln_final.weight": (width,), "ln_final.bias": (width,)}
        linear = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
        linear |= {"mlp.c_fc.": (hidden, width), "mlp.c_proj.": (width, hidden)}
        for block in (f"transformer.resblocks.{i}." for i in range(layers)):
            shapes |= {block + name + "weight": shape for name, shape in linear.items()}
            shapes |= {block + name + "bias": shape[:1] for name, shape in linear.items()}
            shapes |= {f"{block}ln_{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
        random = torch.Generator().manual_seed(3)
        return {name: 0.2 * torch.randn(shape, generator=random) for name, shape in shapes.items()}

    return make
