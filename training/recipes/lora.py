"""Training of low-rank adapters of a UNet, and of its text encoder, on captioned images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.callbacks import Callbacks
from ..common.files import write_tensors
from ..common.fingerprint import tensors_fingerprint
from ..common.foreign import read_tensors
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
from .apply_results import warn_of_another_demo
from .checks import check_fit, with_precision
from .denoising import train_on_images
from .run import TrainingJob

ARTIFACT = "lora.safetensors"


@dataclass(frozen=True)
class TrainedLora:
    """The result of a run.

    Attributes:
        path: its file.
        tensors: ComfyUI's LORA_MODEL, fp32, alphas included.
    """

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
    """Trains a LoRA, resumes such a run, or reads a finished one. The model is left bit-identical.

    Args:
        model: the base model.
        dataset: captioned images.
        config: settings; `config.resume` decides what happens to an earlier run of this name.
        root: folder of all runs.
        callbacks: progress display and cancelling.
        details: JSON for config.json besides the settings, such as the workflow.
        start: another LoRA, with whose values the adapters begin; see `start_from`.

    Raises:
        ValueError: before any training: targets that match nothing, a text encoder that does not fit the UNet, a rate
            for a second text encoder that is not there, a start that does not fit, or a run of other settings under
            this name.
    """
    config, callbacks = with_precision(config, model.denoiser.device, Path(root)), callbacks or Callbacks()
    check_fit(model, config)
    check_second_text(model, config)
    selected, about = select_layers(trainable_layers(model, config), config), describe_training(model, dataset)
    with model.text_encoder.training() if config.trains_text else nullcontext():
        callbacks.after_load()  # a text encoder that was asked for its width may have pushed the UNet out
        adapters = Adapters(selected, networks_of(model, selected), config, config.seed, model.denoiser.device)
        if start is not None:
            warn_of_another_demo(start.name, start.metadata, model.denoiser)
            start_from(adapters, start, about["unet"])
        job = TrainingJob(
            name="lora",
            artifact=ARTIFACT,
            trainable=lambda: adapters,
            write=partial(_write, adapters, config),
            identity={"start": lora_fingerprint(start)},
            details=about | (details or {}),
            text_trains=config.trains_text,
        )
        return read_trained_lora(train_on_images(job, model, dataset, config, Path(root), callbacks))


def check_second_text(model: TextToImage, config: LoraConfig) -> None:
    """Raises ValueError when a learning rate is set for the second text encoder and there is none."""
    rate = config.text_encoder_2_learning_rate
    if rate != -1 and len({name.startswith(SECOND_TEXT) for name in model.text_encoder.layers}) < 2:
        raise ValueError(
            f"text_encoder_2_learning_rate is {rate:g}, but the model has one text encoder; expected -1. Only SDXL "
            "with both its CLIPs has a second."
        )


def trainable_layers(model: TextToImage, config: LoraConfig) -> dict[str, nn.Module]:
    """Every layer that may get an adapter, by its name in ComfyUI's LoRA files; a text encoder's if it trains."""
    layers = unet_layers(model.denoiser)
    if not config.trains_text:
        return layers
    return layers | {name: layer for name, layer in model.text_encoder.layers.items() if text_rate(config, name)}


def unet_layers(denoiser: Denoiser) -> dict[str, nn.Module]:
    """Linear and convolution layers of the UNet by `diffusion_model.` and their canonical names."""
    return layers_of(
        denoiser.network, lambda path: UNET + denoiser.canonical_name(f"{path}.weight").removesuffix(".weight")
    )


def networks_of(model: TextToImage, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules to freeze while adapters train: the UNet, and the chosen layers of the text encoder."""
    return [model.denoiser.network, *(layer for name, layer in layers.items() if not name.startswith(UNET))]


def describe_model(model: TextToImage) -> dict:
    """The UNet's shape and prediction type, for a LoRA file's metadata."""
    network = model.denoiser.network
    shapes = {model.denoiser.canonical_name(name): value.shape for name, value in network.named_parameters()}
    return {"unet": ldm.unet_config(shapes), "prediction_type": model.denoiser.prediction_type}


def describe_training(model: TextToImage, dataset: Dataset) -> dict:
    """`describe_model`, and the images' usual size, number and tags."""
    sizes = Counter((example.width, example.height) for example in dataset.examples)
    return describe_model(model) | {
        "resolution": list(sizes.most_common(1)[0][0]),
        "images": len(dataset.examples),
        "tag_frequency": tag_frequency(example.caption for example in dataset.examples),
    }


def lora_fingerprint(lora: Lora | None) -> str:
    """A hash of a LoRA's tensors; empty for none."""
    if lora is None:
        return ""
    return tensors_fingerprint((f"{m.name}.{role}", t) for m in lora.modules.values() for role, t in m.tensors.items())


def _write(
    adapters: Adapters, config: LoraConfig, folder: RunFolder, values: Mapping[str, Tensor], ending: Mapping[str, Any]
) -> None:
    write_lora(folder, adapters.lora_model(values), config, ending)


def write_lora(folder: RunFolder, tensors: Mapping[str, Tensor], config: LoraConfig, ending: Mapping[str, Any]) -> None:
    """Writes a LoRA twice: as the run's result, under the names of ComfyUI's own LoRA files, and as
    `<run name>.safetensors` in kohya's layout with all metadata, for other programs.

    Args:
        folder: the run's.
        tensors: ComfyUI's LORA_MODEL.
        config: of the adapters.
        ending: how the run ended.
    """
    about = {"run": config.run_name, "algorithm": config.algorithm, **ending}
    write_tensors(folder.path / ARTIFACT, dict(tensors), {"retune.run": json.dumps(about)} | folder.base())
    picture = last_sample(folder.path)
    metadata = LoraDescription(run=folder.config(), thumbnail=thumbnail_uri(picture) if picture else "")
    save_lora(folder.path / f"{config.run_name}.safetensors", tensors, description=metadata)


def read_trained_lora(folder: Path) -> TrainedLora:
    """The result of a run from its folder."""
    file = Path(folder) / ARTIFACT
    return TrainedLora(file, read_tensors(file)[0])
