"""The verbs that write LoRA files from other LoRA files or from two models: resize, extract, convert."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..common.foreign import read_tensors
from ..config.checks import check_fields
from ..config.fields import setting
from ..formats.lora import Lora, LoraModule, parse_lora, read_lora
from ..formats.lora_difference import LowRankFactors, kernel_of, lora_tensors, low_rank_delta, truncated_svd
from ..formats.lora_keys import BIAS
from ..formats.lora_metadata import LoraDescription
from ..formats.lora_names import TEXT, UNET, Naming, detect_naming
from ..formats.lora_report import layout_of, missing_alpha
from ..formats.lora_save import save_lora
from ..models import ldm
from ..models.open_clip import to_transformers
from ..models.quantised import unfolded
from ..trainables.lora import TARGETS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResizeLoraConfig:
    """Bring a LoRA to a smaller rank by SVD; LoHa, LoKr and full differences become plain LoRA."""

    lora: Path
    """The LoRA file."""
    output: Path
    """The .safetensors file to write; kohya or diffusers like the one that is read."""
    rank: int | None = None
    """Highest rank of a layer; a layer of a lower one keeps it."""
    energy: float = setting(1.0, low=1e-6, high=1)
    """Share of each layer's squared Frobenius norm to keep, with as low a rank as that takes; 1 leaves it to rank."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Numbers in the file."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_rank("rank", self.rank if self.rank is not None else 1, least=1)
        if self.rank is None and self.energy == 1:
            raise ValueError("neither rank nor energy is given; expected --rank 8, --energy 0.95, or both.")


@dataclass(frozen=True, kw_only=True)
class ExtractLoraConfig:
    """Make a LoRA of the difference between two models of one kind by SVD."""

    base: str
    """The model it was tuned from: diffusers folder, .safetensors checkpoint, or "demo"."""
    tuned: str
    """The tuned model."""
    output: Path
    """The .safetensors file to write."""
    rank: int = 16
    """Rank of linear layers and 1x1 convolutions."""
    conv_rank: int = 0
    """Rank of the 3x3 convolutions, with which the other layers of residual blocks come too; 0 leaves all of them."""
    format: Literal["kohya", "diffusers"] = "kohya"
    """Whose names and metadata."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Numbers in the file."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_rank("rank", self.rank, least=1)
        _check_rank("conv_rank", self.conv_rank, least=0)


@dataclass(frozen=True, kw_only=True)
class ConvertLoraConfig:
    """Write a LoRA of any layout as kohya's or diffusers'."""

    lora: Path
    """The LoRA file."""
    output: Path
    """The .safetensors file to write."""
    format: Literal["kohya", "diffusers"] = "kohya"
    """Whose names and metadata."""
    base: Literal["auto", "SD1.x", "SD2.x", "SDXL"] = "auto"
    """Model family it is for, where neither metadata nor widths nor blocks tell."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Numbers in the file."""

    def __post_init__(self) -> None:
        check_fields(self)


def resize_lora(config: ResizeLoraConfig) -> dict:
    """Writes a LoRA of a smaller rank.

    Biases and one-dimensional differences stay as they are.

    Returns:
        {"file", "layers", "rank": [lowest, highest], "energy_kept", "least_kept", "least_layer"}: the shares of the
        squared Frobenius norm that the new file keeps, of all layers together and of the layer that keeps least.

    Raises:
        ValueError: For DoRA, OFT and other kinds whose difference depends on the weight.
    """
    lora = _read(config.lora)
    modules, factors = _resize_modules(lora, config)
    new = Lora(lora.name, modules, lora.other_keys, lora.metadata)
    format = "diffusers" if layout_of(lora) in ("diffusers", "peft") else "kohya"
    save_lora(config.output, new, format, config.dtype, LoraDescription(file_metadata=lora.metadata))
    return {"file": str(config.output), **_figures(lora.name, factors)}


def _read(path: Path) -> Lora:
    """The LoRA in a file; logs a warning where nothing in it tells its strength."""
    lora = read_lora(path)
    if line := missing_alpha(lora):
        log.warning("%s", line)
    return lora


def _resize_modules(lora: Lora, config: ResizeLoraConfig) -> tuple[dict[str, LoraModule], dict]:
    """The layers of smaller rank, and the factors of those that have a rank, by name."""
    naming = detect_naming(lora)
    modules, factors = {}, {}
    for name, module in lora.modules.items():
        rest = {role: value for role, value in module.tensors.items() if role in BIAS}
        if _is_vector(module):
            modules[name] = module
            continue
        factors[name] = low_rank_delta(module, config.rank, config.energy)
        modules[name] = LoraModule(name, lora_tensors(factors[name], _kernel(module, naming)) | rest, module.keys)
    return modules, factors


def extract_lora(config: ExtractLoraConfig) -> dict:
    """Writes the difference of two models as a LoRA; layers without a difference are not in the file.

    Returns:
        The figures of `resize_lora`, and "left_out": the share of the difference's squared Frobenius norm in parameters
        that the LoRA does not cover (norms, biases, embeddings, convolutions without conv_rank).

    Raises:
        ValueError: For models of different layouts, or without any difference.
    """
    about, base = _open(config.base)
    other, tuned = _open(config.tuned)
    if about["prediction_type"] != other["prediction_type"]:
        log.warning(
            "base predicts %s and tuned %s: the LoRA draws noise on base unless it is sampled as tuned is",
            about["prediction_type"],
            other["prediction_type"],
        )
    if differing := base.keys() ^ tuned.keys():
        raise ValueError(
            f"base and tuned have different parts: {len(differing)} tensors such as {min(differing)!r} are in one "
            "alone. Expected two models of one kind."
        )
    tensors, factors, outside = {}, {}, 0.0
    for name in sorted(base):
        change = _change(name, base[name], tuned[name])
        rank = _rank_for(name, change, config)
        if not rank and change is not None:
            outside += change.double().square().sum().item()
        elif rank:
            layer = name.removesuffix(".weight")
            factors[layer] = truncated_svd(change.flatten(1), rank)
            tensors |= {
                f"{layer}.{role}": v for role, v in lora_tensors(factors[layer], tuple(change.shape[2:])).items()
            }
    if not tensors:
        raise ValueError("base and tuned do not differ in any layer that a LoRA covers; expected a tuned model.")
    lora = parse_lora("the difference", tensors)
    run = {**other, "identity": about["identity"]}  # made with base, and to be sampled as tuned is
    save_lora(config.output, lora, config.format, config.dtype, LoraDescription(run=run))
    covered = sum(each.energy for each in factors.values())
    figures = {"left_out": outside / (covered + outside)}
    if figures["left_out"] > 0.01:
        log.warning("%.1f %% of the difference is in layers outside of the LoRA", 100 * figures["left_out"])
    return {"file": str(config.output), **_figures("the difference", factors), **figures}


def convert_lora(config: ConvertLoraConfig) -> dict:
    """Writes the LoRA in the other layout; returns {"file", "layers", "warnings"}. Errors: those of `save_lora`."""
    lora = _read(config.lora)
    about = LoraDescription(file_metadata=lora.metadata)
    warnings = save_lora(config.output, lora, config.format, config.dtype, about, base=config.base)
    return {"file": str(config.output), "layers": len(lora.modules), "warnings": warnings}


VERBS = {
    "resize-lora": (ResizeLoraConfig, resize_lora),
    "extract-lora": (ExtractLoraConfig, extract_lora),
    "convert-lora": (ConvertLoraConfig, convert_lora),
}
"""Verb -> its config and its function."""


def open_text_encoders(model: str) -> dict[str, Tensor]:
    """ComfyUI's name -> fp32 weight of a model's text encoders; empty where it has none. model: as in ModelConfig."""
    from ..demo.files import weights_path

    path = weights_path("demo.safetensors") if model == "demo" else Path(model)
    parts = _folder_text_encoders(path) if path.is_dir() else _file_text_encoders(path)
    return {f"{TEXT}{encoder}.transformer.{name}": value.float() for encoder, name, value in parts}


def _folder_text_encoders(path: Path) -> Iterator[tuple[str, str, Tensor]]:
    for folder, encoder in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        for file in sorted((path / folder).glob("model*.safetensors")):
            for name, value in read_tensors(file)[0].items():
                yield "t5" if name.startswith("encoder.block.") else encoder, _hugging_face(name), value


def _file_text_encoders(path: Path) -> Iterator[tuple[str, str, Tensor]]:
    first, second = ldm.SDXL_CLIP_PREFIXES
    for prefix, encoder in ((ldm.CLIP_PREFIX, "clip_l"), (first, "clip_l")):
        for name, value in unfolded(*read_tensors(path, prefix)).items():
            yield encoder, _hugging_face(name.removeprefix(prefix)), value
    for prefix, encoder in ((second, "clip_g"), *((prefix, "clip_h") for prefix in ldm.SD2_CLIP_PREFIXES)):
        tensors = unfolded(*read_tensors(path, prefix))
        state = {name.removeprefix(prefix): value for name, value in tensors.items()}
        for name, value in to_transformers(state).items():
            yield encoder, _hugging_face(name), value


def _hugging_face(name: str) -> str:
    """The name with the `text_model.` prefix that transformers 5 dropped."""
    return f"text_model.{name}" if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\.", name) else name


def _open(model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The UNet's config, prediction type and fingerprint, and ComfyUI's name -> weight of UNet and text encoders."""
    from .open_model import open_denoiser, unet_parameters

    denoiser = open_denoiser(model)
    unet = {UNET + name: value.detach() for name, value in unet_parameters(denoiser).items()}
    about = {"unet": denoiser.network.config, "prediction_type": denoiser.prediction_type}
    about["identity"] = {"model": denoiser.fingerprint}
    return about, unet | open_text_encoders(model)


def _change(name: str, base: Tensor, tuned: Tensor) -> Tensor | None:
    """tuned - base in fp32; None where they are equal. Raises ValueError for other shapes and for NaN."""
    if base.shape != tuned.shape:
        raise ValueError(f"{name} is {tuple(base.shape)} and {tuple(tuned.shape)}; expected two models of one kind.")
    change = tuned.float() - base.float() if tuned.is_floating_point() else None
    if change is not None and not change.isfinite().all():
        raise ValueError(f"{name} is NaN or infinite in base or tuned; expected numbers. Use an earlier save.")
    return change if change is not None and change.any() else None


def _rank_for(name: str, change: Tensor | None, config: ExtractLoraConfig) -> int:
    """The rank of a parameter's difference; 0 for one that the LoRA does not cover."""
    layer = name.removesuffix(".weight")
    if change is None or change.ndim < 2 or layer == name:
        return 0
    if re.search(TARGETS["attention + feed-forward"], layer):
        return config.rank
    if not config.conv_rank or not re.search(TARGETS["all"], layer):
        return 0
    return config.conv_rank if math.prod(change.shape[2:]) > 1 else config.rank


def _is_vector(module: LoraModule) -> bool:
    """Whether the module changes a vector, a bias or a norm's scale, which has no rank to reduce."""
    main = [value for role, value in module.tensors.items() if role in ("diff", "w_norm", "set_weight")]
    return module.rank is None and all(value.ndim < 2 for value in main) and "lokr_w1" not in module.tensors


def _kernel(module: LoraModule, naming: Naming) -> tuple[int, ...]:
    kernel = kernel_of(module)
    if kernel is not None:
        return kernel
    layer = naming.comfyui_name(module.name)
    return (layer and naming.kernel_size(layer)) or ()


def _figures(name: str, factors: Mapping[str, LowRankFactors]) -> dict:
    """Ranks and kept energies of the layers, for people to judge the rank by."""
    if not factors:
        raise ValueError(f"{name} has no layer with a rank; expected LoRA, LoCon, LoHa, LoKr or a full difference.")
    ranks = [len(each.down) for each in factors.values()]
    shares = {layer: each.kept_energy / each.energy if each.energy else 1.0 for layer, each in factors.items()}
    worst = min(shares, key=shares.get)
    return {
        "layers": len(factors),
        "rank": [min(ranks), max(ranks)],
        "energy_kept": _energy_kept(factors.values()),
        "least_kept": shares[worst],
        "least_layer": worst,
    }


def _energy_kept(factors: Iterable[LowRankFactors]) -> float:
    """The share of the squared Frobenius norm of all layers together that the factors keep."""
    factors = list(factors)
    energy = sum(each.energy for each in factors)
    return sum(each.kept_energy for each in factors) / energy if energy else 1.0


def _check_rank(name: str, rank: int, least: int) -> None:
    if not least <= rank <= 10**5:
        raise ValueError(f"{name} is {rank}; expected {least} to 100000.")
