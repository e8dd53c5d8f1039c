"""What a single-file checkpoint predicts, and at which noise levels: read from all that says it, and written again.

The file's weights do not say it. In this order, the first that speaks decides:

1. `retune.config` in the metadata, which this package writes,
2. marker tensors, which ComfyUI and others read and write: v_pred, ztsnr, edm_vpred.sigma_max and .sigma_min,
3. the metadata of ModelSpec and of sd-scripts,
4. a YAML file of the same name beside the checkpoint, as the original repositories ship them,
5. of SD2.x the std of one bias, by which ComfyUI tells its v models,
6. eps at Stable Diffusion's noise levels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.foreign import MB, finite_number, is_file, label, read_text, reading, short
from .noise_levels import (
    EDM_RANGE,
    SD1_SCHEDULER,
    has_zero_terminal_snr,
    is_edm,
    is_flow,
    is_log_spaced,
    prediction_type_of,
    training_sigmas,
)

log = logging.getLogger(__name__)

SIGMA_MAX, SIGMA_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
MARKERS = ("v_pred", "ztsnr", SIGMA_MAX, SIGMA_MIN, "edm_mean", "edm_std")
"""Names of tensors that are no weights."""
NAMES = {
    "epsilon": ("eps", "epsilon"),
    "v_prediction": ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "velocity"),
    "flow_prediction": ("flow", "flow_prediction", "flow_matching", "rectified_flow"),
}
"""diffusers' name of a prediction -> names of it in metadata and YAML files, in lower case."""
SGM_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction", "VScalingWithEDMcNoise": "edm"}
"""Class in an SDXL YAML file -> the prediction."""
_YAML_MODEL = re.compile(r"^model[ \t]*:", re.MULTILINE)
_YAML_LINE = re.compile(
    r"^[ \t]*(parameterization|linear_start|linear_end|timesteps|target)[ \t]*:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE
)
V_SCHEDULER = SD1_SCHEDULER | {"prediction_type": "v_prediction"}
EDM_SCHEDULER = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0}
SD2_V_STD = 0.09
"""Std of a bias above which ComfyUI takes an SD2.x UNet for one of v prediction (comfy/supported_models.py)."""
NOISE_LEVELS = {"scaled linear": {}, "zero terminal SNR": {"rescale_betas_zero_snr": True}}
"""Choice -> values of a scheduler beside SD1's."""


@dataclass(frozen=True)
class Correction:
    """What a user knows better than the file; see `ModelConfig`."""

    prediction: str = "auto"
    """auto, eps, v or flow."""
    noise_levels: str = "auto"
    """auto or a key of NOISE_LEVELS."""

    def __post_init__(self) -> None:
        if self.prediction == "flow" and self.noise_levels != "auto":
            raise ValueError(
                f"noise_levels is {self.noise_levels!r} with prediction flow; expected auto. Flow matching has its own."
            )


AS_READ = Correction()


@dataclass(frozen=True)
class Finding:
    """A scheduler's values, and where they come from, as a phrase."""

    scheduler: Mapping[str, Any]
    source: str


def file_scheduler(
    path: Path,
    markers: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    sd2_bias: Tensor | None = None,
    correction: Correction = AS_READ,
) -> Finding:
    """The scheduler's values of a single file; logs what they are and why, and warns where the file contradicts itself.

    Args:
        path: The file, for its YAML and for messages.
        markers: Those of MARKERS that it has.
        metadata: Its metadata.
        config: `retune.config` in it, or what is known of such a file.
        sd2_bias: `output_blocks.11.1.transformer_blocks.0.norm1.bias` of an SD2.x text-to-image UNet.
        correction: The user's.

    Raises:
        ValueError: Values that are no such numbers, or a model that is trained as EDM describes it.
    """
    with reading(path):
        findings = list(_findings(path, markers, metadata, config, sd2_bias))
    first = findings[0]
    for other in findings[1:]:
        if prediction_type_of(other.scheduler) != prediction_type_of(first.scheduler):
            log.warning(
                "%s: %s says %s and %s says %s; %s counts. Correct it with --prediction where it is wrong.",
                label(path),
                first.source,
                prediction_type_of(first.scheduler),
                other.source,
                prediction_type_of(other.scheduler),
                first.source,
            )
    return corrected(label(path), first, correction)


def corrected(name: str, finding: Finding, correction: Correction) -> Finding:
    """The scheduler's values after a correction; logs what they describe and why.

    Raises ValueError for values that describe no noise levels or another prediction.
    """
    scheduler, source = dict(finding.scheduler), finding.source
    if correction != AS_READ:
        scheduler, source = _with_correction(scheduler, correction), "the flags"
    with reading(name):
        log.info("%s: %s (by %s)", name, describe(prediction_type_of(scheduler), training_sigmas(scheduler)), source)
    return Finding(scheduler, source)


def _with_correction(scheduler: dict[str, Any], correction: Correction) -> dict[str, Any]:
    if correction.noise_levels != "auto" or (is_flow(scheduler) and correction.prediction in ("eps", "v")):
        known = {} if is_flow(scheduler) else {"prediction_type": scheduler.get("prediction_type", "epsilon")}
        scheduler = SD1_SCHEDULER | known | NOISE_LEVELS.get(correction.noise_levels, {})
    if correction.prediction == "flow":
        return scheduler if is_flow(scheduler) else {"prediction_type": "flow_prediction"}
    if correction.prediction != "auto":
        scheduler["prediction_type"] = _known_name(correction.prediction)
    return scheduler


def describe(prediction_type: str, sigmas: Tensor) -> str:
    """A prediction type and noise levels in words."""
    levels = f"noise levels {sigmas[0].item():.3g} to {sigmas[-1].item():.5g}"
    if prediction_type == "flow":
        return f"flow prediction, {levels}"
    if is_log_spaced(sigmas):
        levels += ", continuous (EDM)"
    elif has_zero_terminal_snr(sigmas):
        levels += ", zero terminal SNR"
    return f"{prediction_type} prediction, {levels}"


def _findings(
    path: Path,
    markers: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    sd2_bias: Tensor | None,
) -> Iterator[Finding]:
    """All that says something, the most trusted first; where nothing does, the default."""
    described = config.get("scheduler")
    if described is not None and not isinstance(described, dict):
        raise ValueError(f"the scheduler in its metadata is {short(described)}; expected an object. Save it again.")
    sources = [
        (described, "its description (retune.config)"),
        _from_markers(markers),
        _from_metadata(path, metadata),
        _from_yaml(path),
    ]
    found = [Finding(scheduler, source) for scheduler, source in sources if scheduler]
    if not found and sd2_bias is not None:
        is_v = torch.std(sd2_bias.float(), unbiased=False) > SD2_V_STD
        found = [Finding(V_SCHEDULER if is_v else SD1_SCHEDULER, "the std of a bias, as in ComfyUI")]
    yield from found or [Finding(SD1_SCHEDULER, "nothing in the file, which leaves the default")]


def _from_markers(markers: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """As comfy/supported_models.py reads them for SDXL."""
    if "edm_mean" in markers and "edm_std" in markers:
        raise ValueError(
            "it is a model as Playground v2.5 (edm_mean, edm_std), whose latents and preconditioning differ; expected "
            "SD1.x, SD2.x or SDXL of eps or v prediction. Use another checkpoint."
        )
    if SIGMA_MAX in markers:
        low = _number(markers[SIGMA_MIN], SIGMA_MIN) if SIGMA_MIN in markers else EDM_RANGE[0]
        values = {"sigma_min": low, "sigma_max": _number(markers[SIGMA_MAX], SIGMA_MAX)}
        return EDM_SCHEDULER | values, f"its key {SIGMA_MAX}"
    if "v_pred" not in markers:
        return {}, ""
    if "ztsnr" in markers:
        return V_SCHEDULER | {"rescale_betas_zero_snr": True}, "its keys v_pred and ztsnr"
    return V_SCHEDULER, "its key v_pred"


def _number(tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"its tensor {name} has {tensor.numel()} values; expected one number. Save it again.")
    return float(tensor.item())


def _from_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        text = metadata.get(key, "")
        if text and (name := _known_name(text)) is None:
            log.warning("%s: %s is %s in its metadata, which is not known here", label(path), key, short(text))
        elif text:
            return _plain_scheduler(name, metadata.get("ss_zero_terminal_snr") == "True"), f"{key} in its metadata"
    if metadata.get("ss_v_parameterization") in ("True", "true"):
        zero = metadata.get("ss_zero_terminal_snr") == "True"
        return _plain_scheduler("v_prediction", zero), "ss_v_parameterization in its metadata"
    return {}, ""


def _known_name(text: str) -> str | None:
    """diffusers' name of a prediction."""
    return next((name for name, others in NAMES.items() if text.strip().lower() in others), None)


def _plain_scheduler(name: str, zero_terminal_snr: bool = False) -> dict[str, Any]:
    if name == "flow_prediction":
        return {"prediction_type": name}
    zero = {"rescale_betas_zero_snr": True} if zero_terminal_snr else {}
    return SD1_SCHEDULER | {"prediction_type": name} | zero


def _from_yaml(path: Path) -> tuple[dict[str, Any], str]:
    """The settings of a YAML file beside the checkpoint; nothing of one that describes something else."""
    file = next((file for ending in (".yaml", ".yml") if is_file(file := path.with_suffix(ending))), None)
    if file is None:
        return {}, ""
    text = read_text(file, MB)
    with reading(file):
        return (_yaml_scheduler(text) if _YAML_MODEL.search(text) else {}), f"{file.name} beside it"


def _yaml_scheduler(text: str) -> dict[str, Any]:
    """Of the original repository of SD1 and SD2, or of SDXL's (sgm).

    Their few lines are looked up one by one: a YAML parser needs minutes for a small file that is made to stop it.
    """
    entries: dict[str, str] = {}
    kind = None
    for name, value in _YAML_LINE.findall(text):
        entries.setdefault(name, value)
        kind = kind or SGM_SCALINGS.get(value.rpartition(".")[2])
    kind = kind or entries.get("parameterization")
    if kind is None:
        return {}
    if kind == "edm":
        return dict(EDM_SCHEDULER)
    name = _known_name(kind)
    if name is None:
        raise ValueError(f"parameterization is {short(kind)}; expected eps or v. Correct it, or remove the file.")
    names = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
    return _plain_scheduler(name) | {
        there: finite_number(entries[here], here) for here, there in names.items() if here in entries
    }


def split_markers(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, markers by their bare name) of a file's tensors; markers may stand with or without the UNet's prefix,
    where ComfyUI's Load Checkpoint and Load Diffusion Model read them."""
    weights, markers = {}, {}
    for name, value in tensors.items():
        bare = name.removeprefix(prefix)
        if bare in MARKERS:
            markers[bare] = value
        else:
            weights[name] = value
    return weights, markers


def markers_of(prediction_type: str, sigmas: Tensor) -> dict[str, Tensor]:
    """The marker tensors by which others recognise a UNet of v prediction; none for eps and flow, which have none.

    sigmas: (T,) training noise levels.
    """
    if prediction_type != "v":
        return {}
    if is_log_spaced(sigmas):
        return {SIGMA_MAX: sigmas[-1].float().clone(), SIGMA_MIN: sigmas[0].float().clone()}
    return {name: torch.zeros(0) for name in ("v_pred", "ztsnr") if name == "v_pred" or has_zero_terminal_snr(sigmas)}


def metadata_of(prediction_type: str) -> dict[str, str]:
    """ModelSpec's entries for a prediction type, under both of the names in use."""
    name = {"eps": "epsilon"}.get(prediction_type, prediction_type)
    return {"modelspec.prediction_type": name, "modelspec.predict_key": name}


def unet_description(prediction_type: str, sigmas: Tensor, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) by which the file of a whole UNet tells what it predicts and at which noise levels.

    The markers stand with and without the prefix: ComfyUI's Load Diffusion Model looks for them there, Load Checkpoint
    here.

    Args:
        prediction_type: eps, v or flow.
        sigmas: (T,) training noise levels.
        prefix: of the UNet's names in the file.
    """
    markers = markers_of(prediction_type, sigmas)
    tensors = markers | {prefix + name: value.clone() for name, value in markers.items()}
    return tensors, metadata_of(prediction_type)


def plain_values(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a scheduler on which prediction and noise levels depend, for `retune.config`."""
    names = ["prediction_type"]
    if is_flow(scheduler):
        names += ["_class_name", "use_flow_sigmas", "shift", "flow_shift", "num_train_timesteps"]
    elif is_edm(scheduler):
        names += ["_class_name", "sigma_min", "sigma_max", "sigma_data"]
    else:
        names += [*SD1_SCHEDULER, "num_train_timesteps", "rescale_betas_zero_snr"]
    return {name: scheduler[name] for name in names if name in scheduler}
