"""Training low-rank adapters of a UNet, and of its text encoder, on captioned images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..common.callbacks import Callbacks
from ..common.files import read_tensors, write_tensors
from ..common.fingerprint import tensors_fingerprint
from ..config.lora import LoraConfig
from ..data.examples import Dataset
from ..formats.lora import Lora
from ..formats.lora_metadata import LoraDescription, last_sample, tag_frequency, thumbnail_uri
from ..formats.lora_names import SECOND_TEXT, UNET
from ..formats.lora_save import save_lora
from ..models import ldm
from ..models.protocols import Denoiser, TextToImage
from ..runs.folder import RunFolder
from ..trainables.lora import Adapters, layers_of, select_layers, text_rate
from ..trainables.lora_init import start_from
from .checks import check_fit
from .denoising import train_on_images
from .run import TrainingJob

ARTIFACT = "lora.safetensors"


@dataclass(frozen=True)
class TrainedLora:
    """What a run made: its file, and ComfyUI's LORA_MODEL (fp32 tensors, alphas included)."""

    path: Path
    tensors: dict[str, Tensor]


def train_lora(
    model: TextToImage,
    dataset: Dataset,
    config: LoraConfig,
    root: Path,
    callbacks: Callbacks | None = None,
    details: dict | None = None,
    start: Lora | None = None,
) -> TrainedLora:
    """Trains, or goes on, or returns a finished run of this name and config from disk; see `config.resume`.

    root: the folder that holds all runs. details: anything JSON that should stand in config.json beside the settings.
    start: another LoRA, whose values the adapters begin with, see `start_from`. The model is left bit-identical. Raises
    ValueError before any training for targets that match nothing, a text encoder that does not fit the UNet, a rate for
    a second one that is not there, a start that does not fit, or a run of other settings under this name.
    """
    check_fit(model, config)
    check_second_text(model, config)
    chosen = select_layers(trainable_layers(model, config), config)
    about = describe_training(model, dataset)
    with model.text_encoder.training() if config.trains_text else nullcontext():
        adapters = Adapters(chosen, networks_of(model, chosen), config, config.seed)
        if start is not None:
            start_from(adapters, start, about["unet"])
        job = TrainingJob(
            name="lora",
            artifact=ARTIFACT,
            trainable=lambda: adapters,
            write=lambda folder, values, ending: write_lora(folder, adapters.lora_model(values), config, ending),
            identity={"start": lora_fingerprint(start)},
            details=about | (details or {}),
            text_trains=config.trains_text,
        )
        return read_trained_lora(train_on_images(job, model, dataset, config, Path(root), callbacks or Callbacks()))


def lora_fingerprint(lora: Lora | None) -> str:
    """Changes with the tensors of a LoRA; empty for none."""
    if lora is None:
        return ""
    return tensors_fingerprint((f"{m.name}.{role}", t) for m in lora.modules.values() for role, t in m.tensors.items())


def check_second_text(model: TextToImage, config: LoraConfig) -> None:
    """Raises ValueError when the second text encoder has a rate of its own and there is none."""
    rate = config.text_encoder_2_learning_rate
    if rate != -1 and len({name.startswith(SECOND_TEXT) for name in model.text_encoder.layers}) < 2:
        raise ValueError(
            f"text_encoder_2_learning_rate is {rate:g}, but the model has one text encoder; expected -1. Only SDXL "
            "with both its CLIPs has a second."
        )


def trainable_layers(model: TextToImage, config: LoraConfig) -> dict[str, nn.Module]:
    """Every layer that may get an adapter, by its name in ComfyUI's LoRA files; a text encoder's if it trains."""
    found = unet_layers(model.denoiser)
    if not config.trains_text:
        return found
    return found | {name: layer for name, layer in model.text_encoder.layers.items() if text_rate(config, name)}


def unet_layers(denoiser: Denoiser) -> dict[str, nn.Module]:
    """Linear and convolution layers of the UNet, `diffusion_model.` before their canonical names."""
    return layers_of(
        denoiser.network, lambda path: UNET + denoiser.canonical_name(f"{path}.weight").removesuffix(".weight")
    )


def networks_of(model: TextToImage, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """What is frozen while adapters train: the UNet, and the chosen layers of the text encoder."""
    return [model.denoiser.network, *(layer for name, layer in layers.items() if not name.startswith(UNET))]


def describe_model(model: TextToImage) -> dict:
    """What a LoRA file's metadata says of the model, for config.json."""
    network = model.denoiser.network
    shapes = {model.denoiser.canonical_name(name): value.shape for name, value in network.named_parameters()}
    return {"unet": ldm.unet_config(shapes), "prediction_type": model.denoiser.prediction_type}


def describe_training(model: TextToImage, dataset: Dataset) -> dict:
    """What it says of the model and the images."""
    sizes = Counter((example.width, example.height) for example in dataset.examples)
    return describe_model(model) | {
        "resolution": list(sizes.most_common(1)[0][0]),
        "images": len(dataset.examples),
        "tag_frequency": tag_frequency(example.caption for example in dataset.examples),
    }


def write_lora(folder: RunFolder, tensors: Mapping[str, Tensor], config: LoraConfig, ending: Mapping) -> None:
    """The run's result, under the names that ComfyUI's own LoRA files have, and a copy in kohya's layout with all
    metadata, `<run name>.safetensors`, for other programs. ending: how the run ended."""
    about = {"run": config.run_name, "algorithm": config.algorithm, **ending}
    write_tensors(folder.path / ARTIFACT, dict(tensors), {"retune.run": json.dumps(about)})
    picture = last_sample(folder.path)
    shown = LoraDescription(run=folder.config(), thumbnail=thumbnail_uri(picture) if picture else "")
    save_lora(folder.path / f"{config.run_name}.safetensors", tensors, description=shown)


def read_trained_lora(path: Path) -> TrainedLora:
    """The result of a run from its folder."""
    file = Path(path) / ARTIFACT
    return TrainedLora(file, read_tensors(file)[0])
