"""Exports a model as a diffusers folder that runs without this package.

A model with a CLIP becomes a StableDiffusionPipeline. For a model with a T5 diffusers has no Stable
Diffusion pipeline: it becomes a folder of its parts, with a README.md of the few lines of code that load and run them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.files import check_free_disk, replace, temporary_name, write_json, write_tensors, write_text, writing
from ..config.checks import check_run_name
from ..models import ldm
from ..models.clip import ClipTextEncoder
from ..models.diffusers import SD1_SCHEDULER
from ..runs.folder import next_name
from ..text_encoder.t5 import T5TextEncoder
from ..text_encoder.t5_file import embedded_sentencepiece
from ..text_encoder.tokenizers import FILES, load_tokenizer

BYT5 = "byt5"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
PROJECTION_TENSORS = {"linear.weight", "linear.bias", "scale", "hidden.weight", "hidden.bias", "output.weight"}
CLIP_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json")
WINDOW = 77


@dataclass(frozen=True, kw_only=True)
class ImageParts:
    """UNet and VAE to export, fp32, under LDM names without their prefixes."""

    unet: Mapping[str, Tensor]
    num_heads: int | None
    """Attention heads of every layer; None for 64 channels a head."""
    prediction_type: str
    """eps or v."""
    vae: Mapping[str, Tensor]
    scaling_factor: float
    """Factor from the VAE's latents to the UNet's."""


@dataclass(frozen=True, kw_only=True)
class ClipPart:
    """Stable Diffusion's CLIP to export.

    Attributes:
        state: `text_model.*` tensors.
        config: Values of its CLIPTextConfig.
        tokenizer: Folder with vocab.json and merges.txt.
    """

    state: Mapping[str, Tensor]
    config: Mapping
    tokenizer: Path

    @property
    def width(self) -> int:
        return self.config["hidden_size"]

    @property
    def size(self) -> int:
        """Bytes of the tensors in fp32."""
        return sum(4 * value.numel() for value in self.state.values())

    def write(self, folder: Path) -> None:
        from transformers import CLIPTextConfig

        _write_clip_tokenizer(self.tokenizer, folder / "tokenizer")
        encoder = ClipTextEncoder.from_state(self.state, self.config, folder / "tokenizer")
        state = {"text_model." + n.removeprefix("text_model."): t for n, t in encoder.network.state_dict().items()}
        config = CLIPTextConfig(**self.config, architectures=["CLIPTextModel"])
        _write_transformer(folder / "text_encoder", config, state)
        write_json(folder / "model_index.json", _model_index())


@dataclass(frozen=True, kw_only=True)
class T5Part:
    """A T5 with its projection to export.

    Attributes:
        tokenizer: (file name, content); ("byt5", b"") where bytes are the tokens.
    """

    encoder: T5TextEncoder
    tokenizer: tuple[str, bytes]

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def size(self) -> int:
        """Bytes of the tensors in fp32."""
        return sum(4 * value.numel() for value in self.encoder.model.parameters())

    def write(self, folder: Path) -> None:
        model, projection = self.encoder.model, self.encoder.projection.state_dict()
        _check_projection(projection)
        state = {n: t for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
        model.config.architectures = [type(model).__name__]
        _write_transformer(folder / "text_encoder", model.config, state)
        write_tensors(folder / "projection" / "projection.safetensors", projection)
        _write_t5_tokenizer(*self.tokenizer, folder / "tokenizer")
        write_text(folder / "README.md", readme(self.encoder, self.tokenizer[0]))


def export_pipeline(root: Path, name: str, images: ImageParts, text: ClipPart | T5Part) -> Path:
    """Writes a folder with the model's parts, complete or not at all.

    Args:
        root: Where to make the folder.
        name: Its name; if it exists, the first free one of `name 2`, `name 3`, ...
        text: Must have the width that the UNet reads.

    Returns:
        The path of the folder.

    Raises:
        ValueError: For a name that is no plain folder name, a text encoder that does not fit the UNet, parts of an
            unknown layout, or too little disk.
    """
    check_run_name(name, "folder_name")
    unet, vae = build_unet(images), build_vae(images)
    if text.width != unet.config.cross_attention_dim:
        raise ValueError(
            f"text encoder's width is {text.width}; the UNet reads {unet.config.cross_attention_dim}. Connect the text "
            "encoder that this model samples with."
        )
    size = text.size + sum(4 * p.numel() for module in (unet, vae) for p in module.parameters())
    check_free_disk(root, size + 2**26)
    target = root / name if not (root / name).exists() else (root / name).with_name(next_name(root / name))
    temporary = temporary_name(root)
    try:
        with writing(target, size):
            temporary.mkdir(parents=True)
            unet.save_pretrained(temporary / "unet")
            vae.save_pretrained(temporary / "vae")
            scheduler(images.prediction_type).save_pretrained(temporary / "scheduler")
            text.write(temporary)
            replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def scheduler(prediction_type: str):
    """Stable Diffusion's DDIMScheduler; prediction_type: eps or v."""
    from diffusers import DDIMScheduler

    kind = PREDICTIONS.get(prediction_type)
    if kind is None:
        raise ValueError(f"MODEL predicts {prediction_type}; expected one of {', '.join(PREDICTIONS)}.")
    fixed = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**SD1_SCHEDULER, **fixed, prediction_type=kind)


def build_unet(images: ImageParts) -> nn.Module:
    """The UNet2DConditionModel with these weights; ValueError for SDXL, inpainting and other layouts."""
    from diffusers import UNet2DConditionModel

    shapes = {name: value.shape for name, value in images.unet.items()}
    config = ldm.unet_config(shapes, images.num_heads)
    if config["in_channels"] != 4 or "addition_embed_type" in config:
        kind = "SDXL" if "addition_embed_type" in config else f"{config['in_channels']} input channels"
        raise ValueError(f"MODEL is one of {kind}; expected a plain text-to-image model of the SD1.x or SD2 kind.")
    config["sample_size"] = 64 if config["cross_attention_dim"] >= 768 else 16  # the demo model draws 128 pixels
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return _load_weights(unet, ldm.to_diffusers(images.unet, ldm.unet_names(config)), "UNet")


def build_vae(images: ImageParts) -> nn.Module:
    """The AutoencoderKL with these weights and scaling factor; ValueError for other layouts."""
    from diffusers import AutoencoderKL

    config = ldm.vae_config({name: value.shape for name, value in images.vae.items()})
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config | {"scaling_factor": images.scaling_factor})
    return _load_weights(vae, ldm.to_diffusers(images.vae, ldm.vae_names(config)), "VAE")


def _load_weights(module: nn.Module, state: Mapping[str, Tensor], name: str) -> nn.Module:
    try:
        module.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name} is of another layout than SD1.x or SD2: {error}") from error
    return module.eval()


def _write_transformer(folder: Path, config, state: Mapping[str, Tensor]) -> None:
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", {n: t.float() for n, t in state.items()}, {"format": "pt"})


def _write_clip_tokenizer(source: Path, folder: Path) -> None:
    if not (source / "vocab.json").is_file():
        raise ValueError(
            f"CLIP's tokenizer folder is {source}, without vocab.json; expected vocab.json and merges.txt."
        )
    folder.mkdir()
    for name in CLIP_TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    special = {"bos_token": "<|startoftext|>"}
    special |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", config | special)


def _model_index() -> dict:
    import diffusers

    libraries = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    absent = {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
    header = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    return header | libraries | absent | {"requires_safety_checker": False}


def _check_projection(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a projection that the code in README.md cannot compute."""
    unknown = sorted(state.keys() - PROJECTION_TENSORS)
    if unknown:
        raise ValueError(
            f"the projection has parts such as {unknown[0]!r}; expected a linear one or an mlp. Other kinds run in "
            "this package only: use Save Text Encoder."
        )


def find_tokenizer_file(t5: Path, fingerprint: str, comfyui: Path | None = None) -> tuple[str, bytes]:
    """Finds the tokenizer that a T5 was loaded with: inside its file, in the same folder, or in ComfyUI.

    Args:
        t5: File or folder of the T5.
        fingerprint: Of the tokenizer; "byt5" where bytes are the tokens.
        comfyui: An installed ComfyUI.

    Returns:
        (file name, content); ("byt5", b"") where bytes are the tokens.

    Raises:
        ValueError: When no tokenizer there has this fingerprint (any more).
    """
    if fingerprint == BYT5:
        return BYT5, b""
    inside = embedded_sentencepiece(t5)
    if inside is not None and hashlib.sha256(inside).hexdigest() == fingerprint:
        return "spiece.model", inside
    folder = t5 if t5.is_dir() else t5.parent
    places = [folder, *sorted(p for near in (folder, folder.parent) for p in near.glob("*token*") if p.is_dir())]
    places += [folder / t5.stem]
    if comfyui is not None:
        places += sorted((comfyui / "comfy" / "text_encoders").glob("*_tokenizer"))
    for file in (place / name for place in places for name in FILES):
        if file.is_file() and load_tokenizer(file).fingerprint == fingerprint:
            return file.name if file.suffix == ".json" else "spiece.model", file.read_bytes()
    raise ValueError(f"the tokenizer of {t5.name} is not beside it any more; expected {', '.join(FILES)}.")


def _write_t5_tokenizer(name: str, content: bytes, folder: Path) -> None:
    """Writes the tokenizer's file; tokenizer.json without truncation and padding, to encode as this package does."""
    if name == BYT5:
        return
    folder.mkdir()
    if name != "tokenizer.json":
        (folder / name).write_bytes(content)
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(folder / name))


README = """# A Stable Diffusion model that reads text through {t5}

`unet`, `vae` and `scheduler` are diffusers folders, `text_encoder` is a transformers `{t5}`, and
`projection/projection.safetensors` maps its states to the width that the UNet reads. Run this in the folder, with
`pip install {packages}`:

```python
import math
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import {t5}
{tokenizer}
t5, p = {t5}.from_pretrained("text_encoder"), load_file("projection/projection.safetensors")


@torch.no_grad()
def encode(prompt):
    ids = [i for i in {ids} if i not in ({pad}, {end})][:{max_prompt_tokens}] + [{end}]
    pads = [{pad}] * {pads}
    mask = torch.tensor([[1] * len(ids) + [0] * len(pads)])
    x = t5(input_ids=torch.tensor([ids + pads]), attention_mask=mask).last_hidden_state
    return {projected}


prompt, negative = encode("a red circle"), encode("")
length = math.lcm(prompt.shape[1], negative.shape[1])  # attention to a repeated context is the same
prompt, negative = (c.repeat(1, length // c.shape[1], 1) for c in (prompt, negative))
unet, vae = UNet2DConditionModel.from_pretrained("unet"), AutoencoderKL.from_pretrained("vae")
parts = (vae, None, None, unet, DDIMScheduler.from_pretrained("scheduler"), None, None)
pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
image = pipe(prompt_embeds=prompt, negative_prompt_embeds=negative).images[0]
image.save("image.png")
```

An empty negative prompt costs nothing; with a long one the repeated contexts can become long.
"""

# File name of the tokenizer -> code that loads it, code that encodes `prompt`, the package to install.
_TOKENIZERS = {
    "tokenizer.json": (
        "from tokenizers import Tokenizer\n\ntokenizer = Tokenizer.from_file('tokenizer/tokenizer.json')",
        "tokenizer.encode(prompt, add_special_tokens=False).ids",
        " tokenizers",
    ),
    "spiece.model": (
        "import sentencepiece\n\ntokenizer = sentencepiece.SentencePieceProcessor(model_file='tokenizer/spiece.model')",
        "tokenizer.encode(prompt)",
        " sentencepiece",
    ),
    BYT5: ("", "[byte + 3 for byte in prompt.encode()]", ""),
}


def readme(encoder: T5TextEncoder, tokenizer: str) -> str:
    """README.md of an exported folder with a T5: diffusers and torch code that loads and runs it.

    tokenizer: A key of `_TOKENIZERS`.
    """
    loading, ids, package = _TOKENIZERS[tokenizer]
    padding = encoder.padding
    return README.format(
        t5=type(encoder.model).__name__,
        packages="torch diffusers transformers safetensors" + package,
        tokenizer=loading,
        ids=ids,
        pad=encoder.tokenizer.pad_token,
        end=encoder.tokenizer.end_token,
        max_prompt_tokens=padding.max_tokens - 1,
        pads=f"({padding.max_tokens} - len(ids))" if padding.pad == "max_tokens" else "0",
        projected=_projection_code(encoder.projection.state_dict()),
    )


def _projection_code(state: Mapping[str, Tensor]) -> str:
    """A torch expression for the projection of states x, with the tensors of its state dict in p."""
    bias = 'p["linear.bias"]' if "linear.bias" in state else "None"
    projected = f'torch.nn.functional.linear(x, p["linear.weight"], {bias})'
    if "hidden.weight" in state:
        hidden = 'torch.nn.functional.gelu(torch.nn.functional.linear(x, p["hidden.weight"], p["hidden.bias"]))'
        projected = f'({projected} + {hidden} @ p["output.weight"].T)'
    return projected + ' * p["scale"]'
