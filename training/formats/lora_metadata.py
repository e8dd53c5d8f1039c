"""Metadata of LoRA files: kohya's `ss_*` keys, ModelSpec 1.0.1 and the hashes by which programs identify a file.

ModelSpec: https://github.com/Stability-AI/ModelSpec. Hashes: those of sd-webui-additional-networks, which kohya's
trainers write as `sshs_model_hash` and `sshs_legacy_hash`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..config.provenance import about_run
from ..demo.editions import BASE
from .lora import Lora, LoraModule
from .lora_keys import DOWN, MID
from .lora_names import Naming

THUMBNAIL_SIDE = 256
THUMBNAIL_BYTES = 64 * 1024
"""Size limit of a thumbnail's data URI."""

_VERSIONS = {"SD1.x": "sd_v1", "SD2.x": "sd_v2", "SDXL": "sdxl_base_v1-0"}
ARCHITECTURES = {
    "SD1.x": "stable-diffusion-v1",
    "SD2.x": "stable-diffusion-v2-512",
    "SD2.x v": "stable-diffusion-v2-768-v",
    "SDXL": "stable-diffusion-xl-v1-base",
}
SIDES = {"SD1.x": 512, "SD2.x": 512, "SD2.x v": 768, "SDXL": 1024}
STABILITY = "https://github.com/Stability-AI/generative-models"
_ALGORITHMS = {"LoHa": "loha", "LoKr": "lokr", "full diff": "full"} | dict.fromkeys(("LoRA", "LoCon", "DoRA"), "locon")
_PREDICTION = {"epsilon": "epsilon", "eps": "epsilon", "v_prediction": "v", "v": "v"}
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_DENOISING_ENTRIES = (
    "ss_loss_type",
    "ss_min_snr_gamma",
    "ss_debiased_estimation",
    "ss_noise_offset",
    "ss_caption_dropout_rate",
)
"""Settings of the denoising loss, which a reward tuning does not have."""


@dataclass(frozen=True)
class LoraDescription:
    """Facts about a LoRA that become metadata of its file.

    Args:
        run: The config.json of its run. Used are `config` and, if present, `identity`, `unet` (the UNet's config),
            `prediction_type`, `resolution` (pixels), `images` (their number), `tag_frequency` and `rewards` (the terms
            that a reward tuning maximised).
        trigger_words: Words that activate it in a prompt.
        title: Title; by default the run's name.
        date: ISO 8601.
        thumbnail: A data URI.
        file_metadata: Metadata of the file that it was read from; its entries stay unless they are computed anew.
    """

    run: Mapping = field(default_factory=dict)
    trigger_words: str = ""
    title: str = ""
    date: str = ""
    thumbnail: str = ""
    file_metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def unet_config(self) -> Mapping | None:
        """The UNet2DConditionModel's config recorded by the run, or None."""
        return self.run.get("unet")


def build_metadata(
    tensors: Mapping[str, Tensor], lora: Lora, naming: Naming, description: LoraDescription, format: str
) -> dict[str, str]:
    """The metadata of a LoRA file, sorted by key. It depends on the arguments alone, not on the date.

    Args:
        tensors: The tensors as they are stored in the file.
        description: Facts about the LoRA; keys without a known value are left out.
        format: "kohya" or "diffusers".
    """
    inherited = {k: v for k, v in description.file_metadata.items() if k not in ("format", "lora_adapter_metadata")}
    entries = _base_entries(naming) | inherited | _network_entries(lora, naming) | _training_entries(description.run)
    entries |= _base_entries(naming) if naming.family else {}
    if base := description.run.get("identity", {}).get("model"):
        entries[BASE] = str(base)
    model_hash, legacy_hash = model_hashes(tensors, entries)
    entries |= {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
    entries |= _modelspec_entries(naming, description, format) | {"modelspec.hash_sha256": f"0x{model_hash}"}
    return dict(sorted(entries.items()))


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Computes (sshs_model_hash, sshs_legacy_hash) as sd-webui-additional-networks does.

    Both are of a safetensors file with the `ss_*` metadata only. The first is the SHA-256 of everything after the
    header, like ModelSpec's hash_sha256. The second is the first 8 digits of the SHA-256 of the 64 KiB at offset 1 MiB.
    """
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    model_hash = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    window = data[0x100000:0x110000]
    if start > 0x100000:  # the header, whose entries safetensors writes in another order each time, reaches into it
        header = json.loads(data[8:start])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(start - 8)
        window = (data[:8] + text + data[start:0x110000])[0x100000:0x110000]
    return model_hash, hashlib.sha256(window).hexdigest()[:8]


def tag_frequency(captions: Iterable[str], folder: str = "images") -> dict[str, dict[str, int]]:
    """Number of captions with each comma-separated tag, as in kohya's `ss_tag_frequency`: {folder: {tag: count}}."""
    counts = Counter(tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip())
    return {folder: dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))}


def thumbnail_uri(picture: str | Path) -> str:
    """A picture file, scaled down to at most 256 x 256 pixels, as a JPEG data URI of at most 64 KiB."""
    from PIL import Image

    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    for quality in (90, 80, 65, 50, 35, 20, 5):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(uri) <= THUMBNAIL_BYTES:
            break
    return uri


def last_sample(run: Path) -> Path | None:
    """The first picture of a run's last samples; None without samples. run: the run's folder."""
    pictures = [p for p in (Path(run) / "samples").glob("*.png") if re.fullmatch(r"\d+_\d+", p.stem)]
    return min(pictures, key=lambda p: (-int(p.stem.split("_")[0]), int(p.stem.split("_")[1])), default=None)


def _network_entries(lora: Lora, naming: Naming) -> dict[str, str]:
    """kohya's `ss_network_*` keys: module, dim, alpha and args, from the most frequent kind and rank of layer."""
    ranked = [module for module in lora.modules.values() if module.rank is not None]
    kinds = {module.kind for module in lora.modules.values()}
    plain = kinds <= {"LoRA", "LoCon"}
    kind = Counter(module.kind for module in ranked or lora.modules.values()).most_common(1)[0][0]
    args: dict[str, object] = {} if plain else {"algo": _ALGORITHMS.get(kind.split(" with ")[0], kind.lower())}
    if axes := {naming.dora_axis(module) for module in lora.modules.values()} - {None}:
        args |= {"dora_wd": True, "wd_on_output": axes == {0}}
    entries = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    convolutions = [m for m in ranked if (m.tensors.get(MID, m.tensors.get(DOWN, Tensor())).shape[2:]).numel() > 1]
    linear = [m for m in ranked if m not in convolutions] if convolutions else ranked
    if linear:
        entries["ss_network_dim"], entries["ss_network_alpha"] = _most_common_rank(linear)
    if convolutions:
        args["conv_dim"], args["conv_alpha"] = _most_common_rank(convolutions)
    return entries | {"ss_network_args": json.dumps(args)}


def _most_common_rank(modules: list[LoraModule]) -> tuple[str, str]:
    """The most frequent pair of rank and alpha, as text; a missing alpha equals the rank."""
    pairs = Counter((m.rank, float(m.rank if m.alpha is None else m.alpha)) for m in modules)
    rank, alpha = pairs.most_common(1)[0][0]
    return str(rank), f"{alpha:.8g}"


def _base_entries(naming: Naming) -> dict[str, str]:
    """kohya's keys for the model family."""
    version = _VERSIONS.get(naming.family, "unknown")
    return {"ss_v2": str(naming.family == "SD2.x"), "ss_base_model_version": version}


def _training_entries(run: Mapping) -> dict[str, str]:
    """kohya's keys for the settings and data of a run; empty without its config."""
    config, settings = run.get("config", {}), run.get("config", {}).get("settings", {})
    weighting = settings.get("loss_weighting")
    values = {
        "ss_output_name": config.get("run_name"),
        "ss_learning_rate": config.get("learning_rate"),
        "ss_unet_lr": config.get("learning_rate"),
        "ss_text_encoder_lr": _text_learning_rates(config),
        "ss_steps": config.get("steps"),
        "ss_max_train_steps": config.get("steps"),
        "ss_batch_size_per_device": config.get("batch_size"),
        "ss_seed": config.get("seed"),
        "ss_optimizer": settings.get("optimizer"),
        "ss_lr_scheduler": settings.get("lr_schedule"),
        "ss_lr_warmup_steps": settings.get("warmup_steps"),
        "ss_gradient_accumulation_steps": settings.get("gradient_accumulation"),
        "ss_gradient_checkpointing": settings.get("gradient_checkpointing"),
        "ss_mixed_precision": _PRECISION.get(settings.get("precision")),
        "ss_max_grad_norm": settings.get("max_grad_norm"),
        "ss_caption_dropout_rate": settings.get("caption_dropout"),
        "ss_noise_offset": settings.get("noise_offset") or None,
        "ss_loss_type": {"mse": "l2"}.get(settings.get("loss"), settings.get("loss")),
        "ss_min_snr_gamma": settings.get("snr_gamma") if weighting == "min-SNR" else None,
        "ss_debiased_estimation": True if weighting == "debiased" else None,
        "ss_num_train_images": run.get("images"),
        "ss_resolution": _format_size(run.get("resolution"), "({}, {})"),
        "ss_tag_frequency": json.dumps(run["tag_frequency"]) if run.get("tag_frequency") else None,
    }
    values |= _reward_entries(run, config) if run.get("rewards") else {}
    return {key: str(value) for key, value in values.items() if value is not None}


def _reward_entries(run: Mapping, config: Mapping) -> dict[str, object]:
    """Changes to `_training_entries` for a reward tuning: there is no denoising loss, and only one part has a rate.

    `ss_training_comment` names method and rewards; `retune.run` has all settings (see `about_run`).
    """
    rate, trains_text = config["learning_rate"], config["train"].startswith("text encoder")
    terms = ", ".join(f"{term['weight']:g} x {term['reward']}" for term in run["rewards"])
    method = f"{config['method']}, K {config['gradient_steps']} of {config['sampling_steps']}, cfg {config['cfg']:g}"
    return dict.fromkeys(_DENOISING_ENTRIES) | {
        "ss_unet_lr": None if trains_text else rate,
        "ss_text_encoder_lr": rate if trains_text else None,
        "ss_training_comment": f"reward tuning ({method}): {terms}",
        "retune.run": json.dumps(about_run(run, {})),
    }


def _text_learning_rates(config: Mapping) -> str | None:
    """The text encoder's learning rate, or a list of two if the second encoder has its own, as sd-scripts writes it."""
    first, second = config.get("text_encoder_learning_rate"), config.get("text_encoder_2_learning_rate", -1)
    if first is None:
        return None
    return str(first or None) if second == -1 else str([first, second])


def _modelspec_entries(naming: Naming, description: LoraDescription, format: str) -> dict[str, str]:
    """ModelSpec's keys except the hash: all required ones, and those optional ones whose value is known."""
    prediction = _PREDICTION.get(description.run.get("prediction_type", ""))
    settings = description.run.get("config", {}).get("settings", {})
    family = naming.family + " v" * (naming.family == "SD2.x" and prediction == "v")
    side = SIDES.get(family, 512)
    original_names = format == "kohya" and naming.family == "SDXL"
    low, high = settings.get("min_timestep", 0), settings.get("max_timestep", 999)
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": ARCHITECTURES.get(family, "unknown") + "/lora",
        "implementation": STABILITY if original_names else "diffusers",
        "title": description.title or description.run.get("config", {}).get("run_name") or "LoRA",
        "resolution": _format_size(description.run.get("resolution"), "{}x{}") or f"{side}x{side}",
        "date": description.date,
        "trigger_phrase": description.trigger_words,
        "usage_hint": f"Trigger words: {description.trigger_words}" if description.trigger_words else "",
        "thumbnail": description.thumbnail,
        "prediction_type": prediction,
        "timestep_range": f"{low},{high}" if (low, high) != (0, 999) else "",
    }
    guessed = {
        "title": values["title"] == "LoRA",
        "architecture": not family,
        "resolution": "resolution" not in description.run,
    }
    inherited = {
        key for key, is_guess in guessed.items() if is_guess and f"modelspec.{key}" in description.file_metadata
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value and key not in inherited}


def _format_size(resolution: int | list | tuple | None, template: str) -> str | None:
    """A side length, or (width, height), formatted by a template with two fields; None if unknown."""
    if not resolution:
        return None
    return template.format(*((resolution, resolution) if isinstance(resolution, int) else resolution))
