"""A diffusers folder, part by part, as modules of diffusers and transformers in fp32 or in the files' own dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.foreign import count_numbered, is_file, open_tensors, read_json, reading, short, whole_number
from .noise_levels import SD1_SCHEDULER
from .parameters import expect_finite
from .prediction import AS_READ, Correction, Finding, corrected
from .recast import hold

PIPELINES = "Stable Diffusion 1.x, 2.x or XL"
DENOISER_FOLDERS = ("transformer", "prior", "unet_2", "decoder")
"""Folders in place of `unet` in those of other models."""
MOST_LAYERS, MOST_WIDTH = 200, 1 << 17
_UNET_SIZES = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
_UNET_WIDTHS = ("block_out_channels", "cross_attention_dim", "in_channels", "out_channels", "norm_num_groups")
_VAE_WIDTHS = ("block_out_channels", "latent_channels", "in_channels", "out_channels", "norm_num_groups")


def expect_parts(path: Path, *parts: str) -> None:
    """Raises ValueError, with what the folder is instead, for a diffusers folder without one of these parts."""
    missing = [part for part in parts if not (path / part).is_dir()]
    if missing:
        hint = _what_it_is(path)
        raise ValueError(
            f"diffusers folder {path} lacks {', '.join(missing)}; expected {', '.join(parts)}.{hint and ' ' + hint}"
        )


def _what_it_is(path: Path) -> str:
    """A sentence on a folder without a Stable Diffusion model; empty where nothing is known of it."""
    if is_file(path / "model_index.json"):
        name = read_json(path / "model_index.json", dict).get("_class_name")
        other = next((folder for folder in DENOISER_FOLDERS if (path / folder).is_dir()), None)
        if other or not str(name).startswith("StableDiffusion"):
            return f"It is a {short(name)}, without a UNet that reads text; use {PIPELINES}."
    if is_file(path / "config.json"):
        name = read_json(path / "config.json", dict).get("_class_name")
        if name:
            return f"It is a {short(name)} alone, one part of a model: give the folder that holds it."
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if len(files) == 1:
        return f"It holds {files[0]}: give that file."
    return f"It holds {len(files)} .safetensors files: give one of them." if files else ""


def folder_scheduler(path: Path, correction: Correction = AS_READ) -> Finding:
    """The scheduler's values; SD1's where the folder has none. Logs what they describe."""
    file = path / "scheduler" / "scheduler_config.json"
    if not is_file(file):
        return corrected(
            path.name, Finding(SD1_SCHEDULER, "the default, since the folder has no scheduler"), correction
        )
    scheduler = read_json(file, dict)
    return corrected(f"{path.name}/scheduler", Finding(scheduler, "scheduler_config.json"), correction)


def folder_unet(path: Path, *, own_dtype: bool = False) -> nn.Module:
    """The UNet2DConditionModel, in fp32 or, where one file of half precision holds it, in that dtype."""
    from diffusers import UNet2DConditionModel

    dtype = _half_precision(path / "unet") if own_dtype else torch.float32
    return _load(UNet2DConditionModel, path / "unet", _UNET_SIZES, _UNET_WIDTHS, dtype)


def empty_folder_unet(path: Path) -> nn.Module:
    """The UNet2DConditionModel of meta tensors, by its config.json."""
    from diffusers import UNet2DConditionModel

    return _empty(UNet2DConditionModel, path / "unet", _UNET_SIZES, _UNET_WIDTHS)


def _half_precision(folder: Path) -> torch.dtype:
    """fp16 or bf16 where a folder's one safetensors file has nothing else; fp32 otherwise."""
    files = list(folder.glob("*.safetensors"))
    if len(files) != 1:
        return torch.float32
    with open_tensors(files[0]) as weights:
        dtypes = set(weights.dtypes.values())
    found = {"F16": torch.float16, "BF16": torch.bfloat16}.get(next(iter(dtypes))) if len(dtypes) == 1 else None
    return found or torch.float32


def folder_vae(path: Path, *, own_dtype: bool = False) -> nn.Module:
    """The AutoencoderKL, in fp32 or held as in its file (`recast.hold`)."""
    from diffusers import AutoencoderKL

    dtype = _half_precision(path / "vae") if own_dtype else torch.float32
    vae = _load(AutoencoderKL, path / "vae", ("layers_per_block",), _VAE_WIDTHS, dtype)
    return hold(vae) if own_dtype else vae


def _load(
    kind: type[nn.Module],
    folder: Path,
    counts: Iterable[str],
    widths: Iterable[str],
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A module of diffusers with all of its weights."""
    empty = _empty(kind, folder, counts, widths)
    with reading(folder, f"no {kind.__name__}"):
        options = {"local_files_only": True, "torch_dtype": dtype, "output_loading_info": True}
        _expect_weights(folder, empty)
        module, report = kind.from_pretrained(folder, variant=_variant(folder, "diffusion_pytorch_model"), **options)
        _expect_complete(report)
        return _finite(module)


def _empty(kind: type[nn.Module], folder: Path, counts: Iterable[str], widths: Iterable[str]) -> nn.Module:
    """A module of diffusers without values, as its config.json describes it."""
    config = read_json(folder / "config.json", dict)
    with reading(folder, f"no {kind.__name__}"):
        found = config.get("_class_name", kind.__name__)
        if found != kind.__name__:
            raise ValueError(f"it is a {short(found)}; expected {kind.__name__}, as in {PIPELINES}")
        _expect_numbers(config, counts, 0, MOST_LAYERS)
        _expect_numbers(config, widths, 1, MOST_WIDTH)
        with torch.device("meta"):
            return kind.from_config(config)


def folder_clip(kind: type[nn.Module], folder: Path, *, own_dtype: bool = False) -> nn.Module:
    """A CLIPTextModel of transformers with all of its weights, in fp32 or held as in its file (`recast.hold`).

    kind: with or without projection.
    """
    config = read_json(folder / "config.json", dict)
    with reading(folder, f"no {kind.__name__}"):
        if config.get("model_type", "clip_text_model") not in ("clip_text_model", "clip"):
            raise ValueError(f"its model_type is {short(config['model_type'])}; expected a CLIP text encoder")
        _expect_layers(folder, config)
        dtype = _half_precision(folder) if own_dtype else torch.float32
        options = {"local_files_only": True, "dtype": dtype, "output_loading_info": True}
        with torch.device("meta"):
            _expect_weights(folder, kind(kind.config_class.from_pretrained(folder, local_files_only=True)))
        module, report = kind.from_pretrained(folder, variant=_variant(folder, "model"), **options)
        _expect_complete(report)
        _finite(module)
        return hold(module) if own_dtype else module


def _expect_weights(folder: Path, network: nn.Module) -> None:
    """Raises ValueError for a network, on the meta device, that is larger than the weights' files: libraries would make
    up the rest."""
    needed = sum(value.numel() for value in network.parameters())
    files = [file for ending in ("safetensors", "bin") for file in folder.glob(f"*.{ending}") if is_file(file)]
    stored = sum(file.stat().st_size for file in files)  # a parameter has a byte at least, in fp8
    if needed > stored:
        raise ValueError(
            f"config.json describes {needed} parameters, and its {len(files)} weight files have {stored} bytes; "
            "expected the weights of that model. Download the whole folder again"
        )


def _expect_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config of more layers than the weights' file has, before any of them is made."""
    layers = whole_number(config.get("num_hidden_layers", 12), "num_hidden_layers", 1, MOST_LAYERS)
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "projection_dim",
        "max_position_embeddings",
    ):
        whole_number(config.get(name, 1), name, 1, MOST_WIDTH)
    file = folder / "model.safetensors"
    if not is_file(file):
        return
    with open_tensors(file) as weights:
        names = [name.removeprefix("text_model.") for name in weights.shapes]
    if (count := count_numbered(names, "encoder.layers.")) < layers:
        raise ValueError(f"its weights have {count} layers; expected {layers}, as config.json has it")


def _expect_numbers(config: Mapping[str, Any], names: Iterable[str], least: int, most: int) -> None:
    """Raises ValueError for sizes in a config that are no numbers or of no model: modules are made by them."""
    for name in names:
        waiting = [config.get(name)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting += value[:MOST_LAYERS]
            elif value is not None:
                whole_number(value, name, least, most)


def _variant(folder: Path, name: str) -> str | None:
    """ "fp16" for a folder that has its weights as fp16 alone, as many downloads do."""
    endings = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
    names = (name, "pytorch_model") if name == "model" else (name,)
    if any((folder / f"{stem}{ending}").exists() for stem in names for ending in endings):
        return None
    half = any(any(folder.glob(f"{stem}*.fp16*")) for stem in names)
    return "fp16" if half else None


def _expect_complete(report: Mapping[str, Any]) -> None:
    """Raises ValueError where a library filled in weights that the files lack, which it only warns of."""
    missing = sorted(name for name in report.get("missing_keys", ()) if not name.endswith("position_ids"))
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors such as {missing[0]!r}. Download the whole folder again")
    wrong = list(report.get("mismatched_keys", ()))
    if wrong:
        raise ValueError(f"{len(wrong)} of its tensors have another shape than config.json says, such as {wrong[0]}")


def _finite(module: nn.Module) -> nn.Module:
    for name, value in module.named_parameters():
        expect_finite(name, value.float(), "it")
    return module
