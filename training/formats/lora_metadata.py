"""What a LoRA file says of itself: kohya's `ss_*` keys, ModelSpec 1.0.1 and the hashes that programs look it up by.

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
from .lora import DOWN, MID, Lora
from .lora_names import Naming

THUMBNAIL_SIDE = 256
THUMBNAIL_BYTES = 64 * 1024
"""Longest data URI of a thumbnail."""

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


@dataclass(frozen=True)
class LoraDescription:
    """What is known of a LoRA besides its tensors.

    run: what its run's config.json holds; read are `config` and, where the run recorded them, `unet` (the UNet's
    config), `prediction_type`, `resolution` (pixels), `images` (their number), `tag_frequency` and `rewards`, what a
    reward tuning maximised. date: ISO 8601.
    thumbnail: a data URI. file_metadata: a file's own metadata, of which everything that is not written anew stays.
    """

    run: Mapping = field(default_factory=dict)
    trigger_words: str = ""
    title: str = ""
    date: str = ""
    thumbnail: str = ""
    file_metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def unet_config(self) -> Mapping | None:
        return self.run.get("unet")


def build_metadata(
    tensors: Mapping[str, Tensor], lora: Lora, naming: Naming, description: LoraDescription, format: str
) -> dict[str, str]:
    """All metadata of a file with these tensors (as they are stored), sorted by key, values text.

    Every value is a function of the arguments: there is no clock in it. Keys for which nothing is known are left out.
    """
    kept = {k: v for k, v in description.file_metadata.items() if k not in ("format", "lora_adapter_metadata")}
    found = _base(naming) | kept | _network(lora, naming) | _training(description.run)
    found |= _base(naming) if naming.family else {}
    model_hash, legacy_hash = model_hashes(tensors, found)
    found |= {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
    found |= _modelspec(naming, description, format) | {"modelspec.hash_sha256": f"0x{model_hash}"}
    return dict(sorted(found.items()))


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash) as sd-webui-additional-networks works them out.

    Of the file with the `ss_*` metadata alone: SHA-256 of all after the header, which ModelSpec's hash_sha256 is too;
    and the first 8 digits of that of the 64 KiB from 1 MiB on.
    """
    from safetensors.torch import save

    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = save(ready, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    model_hash = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    return model_hash, hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def tag_frequency(captions: Iterable[str], folder: str = "images") -> dict[str, dict[str, int]]:
    """How many captions hold each comma-separated tag, as kohya counts them: {folder: {tag: count}}."""
    counts = Counter(tag.strip().lower() for caption in captions for tag in caption.split(",") if tag.strip())
    return {folder: dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))}


def thumbnail_uri(picture: str | Path) -> str:
    """A picture at most 256 pixels wide and high as a JPEG data URI of at most 64 KiB."""
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
    """The first picture of a run's last samples; None when it drew none."""
    pictures = [p for p in (Path(run) / "samples").glob("*.png") if re.fullmatch(r"\d+_\d+", p.stem)]
    return min(pictures, key=lambda p: (-int(p.stem.split("_")[0]), int(p.stem.split("_")[1])), default=None)


def _network(lora: Lora, naming: Naming) -> dict[str, str]:
    """kohya's minimum beside the base: module, dim, alpha and args of the commonest kind of layer."""
    ranked = [module for module in lora.modules.values() if module.rank is not None]
    kinds = {module.kind for module in lora.modules.values()}
    plain = kinds <= {"LoRA", "LoCon"}
    kind = Counter(module.kind for module in ranked or lora.modules.values()).most_common(1)[0][0]
    args: dict[str, object] = {} if plain else {"algo": _ALGORITHMS.get(kind.split(" with ")[0], kind.lower())}
    if axes := {naming.dora_axis(module) for module in lora.modules.values()} - {None}:
        args |= {"dora_wd": True, "wd_on_output": axes == {0}}
    found = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    convolutions = [m for m in ranked if (m.tensors.get(MID, m.tensors.get(DOWN, Tensor())).shape[2:]).numel() > 1]
    linear = [m for m in ranked if m not in convolutions] if convolutions else ranked
    if linear:
        found["ss_network_dim"], found["ss_network_alpha"] = _commonest(linear)
    if convolutions:
        args["conv_dim"], args["conv_alpha"] = _commonest(convolutions)
    return found | {"ss_network_args": json.dumps(args)}


def _commonest(modules: list) -> tuple[str, str]:
    """Rank and alpha that most layers have; alpha is the rank where none is given."""
    pairs = Counter((m.rank, float(m.rank if m.alpha is None else m.alpha)) for m in modules)
    rank, alpha = pairs.most_common(1)[0][0]
    return str(rank), f"{alpha:.8g}"


def _base(naming: Naming) -> dict[str, str]:
    version = _VERSIONS.get(naming.family, "unknown")
    return {"ss_v2": str(naming.family == "SD2.x"), "ss_base_model_version": version}


def _training(run: Mapping) -> dict[str, str]:
    """kohya's keys for what a run's config says; nothing without one."""
    config, settings = run.get("config", {}), run.get("config", {}).get("settings", {})
    weighting = settings.get("loss_weighting")
    values = {
        "ss_output_name": config.get("run_name"),
        "ss_learning_rate": config.get("learning_rate"),
        "ss_unet_lr": config.get("learning_rate"),
        "ss_text_encoder_lr": _text_rates(config),
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
        "ss_resolution": _size(run.get("resolution"), "({}, {})"),
        "ss_tag_frequency": json.dumps(run["tag_frequency"]) if run.get("tag_frequency") else None,
    }
    values |= _reward_tuning(run, config) if run.get("rewards") else {}
    return {key: str(value) for key, value in values.items() if value is not None}


def _reward_tuning(run: Mapping, config: Mapping) -> dict[str, object]:
    """What is other where rewards were maximised: no noise is told from images, and one part alone has a rate.

    kohya's comment says how it was tuned, `retune.run` all of it (see `stock_file.about_run`).
    """
    idle = ("ss_loss_type", "ss_min_snr_gamma", "ss_debiased_estimation", "ss_noise_offset", "ss_caption_dropout_rate")
    rate, of_text = config["learning_rate"], config["train"].startswith("text encoder")
    terms = ", ".join(f"{term['weight']:g} x {term['reward']}" for term in run["rewards"])
    how = f"{config['method']}, K {config['gradient_steps']} of {config['sampling_steps']}, cfg {config['cfg']:g}"
    return dict.fromkeys(idle) | {
        "ss_unet_lr": None if of_text else rate,
        "ss_text_encoder_lr": rate if of_text else None,
        "ss_training_comment": f"reward tuning ({how}): {terms}",
        "retune.run": json.dumps(about_run(run, {})),
    }


def _text_rates(config: Mapping) -> str | None:
    """One rate, or a list of two where the second text encoder has its own, as sd-scripts writes them."""
    first, second = config.get("text_encoder_learning_rate"), config.get("text_encoder_2_learning_rate", -1)
    if first is None:
        return None
    return str(first or None) if second == -1 else str([first, second])


def _modelspec(naming: Naming, description: LoraDescription, format: str) -> dict[str, str]:
    """ModelSpec's keys but the hash: all that a file must have, and what is known of the others."""
    prediction = _PREDICTION.get(description.run.get("prediction_type", ""))
    settings = description.run.get("config", {}).get("settings", {})
    family = naming.family + " v" * (naming.family == "SD2.x" and prediction == "v")
    side = SIDES.get(family, 512)
    original = format == "kohya" and naming.family == "SDXL"
    low, high = settings.get("min_timestep", 0), settings.get("max_timestep", 999)
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": ARCHITECTURES.get(family, "unknown") + "/lora",
        "implementation": STABILITY if original else "diffusers",
        "title": description.title or description.run.get("config", {}).get("run_name") or "LoRA",
        "resolution": _size(description.run.get("resolution"), "{}x{}") or f"{side}x{side}",
        "date": description.date,
        "trigger_phrase": description.trigger_words,
        "usage_hint": f"Trigger words: {description.trigger_words}" if description.trigger_words else "",
        "thumbnail": description.thumbnail,
        "prediction_type": prediction,
        "timestep_range": f"{low},{high}" if (low, high) != (0, 999) else "",
    }
    unsure = {
        "title": values["title"] == "LoRA",
        "architecture": not family,
        "resolution": "resolution" not in description.run,
    }
    stays = {key for key, is_guess in unsure.items() if is_guess and f"modelspec.{key}" in description.file_metadata}
    return {f"modelspec.{key}": value for key, value in values.items() if value and key not in stays}


def _size(resolution: int | list | tuple | None, text: str) -> str | None:
    if not resolution:
        return None
    return text.format(*((resolution, resolution) if isinstance(resolution, int) else resolution))
