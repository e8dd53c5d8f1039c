"""Names of the kinds of model files that are no Stable Diffusion checkpoint, for messages: what a file is, by what its
tensors are called, and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..common.signatures import DOWNLOADS, GGUF
from . import ldm

SUPPORTED = "SD1.x, SD2.x or SDXL in the original layout"
_OTHER_MODEL = f"Use a checkpoint of {SUPPORTED}; other models train through ComfyUI's nodes where those offer it."
_CHECKPOINT = "Give the checkpoint itself."
_BASE = "Use the base model's checkpoint."
TENSOR_KINDS = (
    (r"lora_(unet|te\d?|transformer)_|.*\.(lora_[AB]|lora_down|lora_up|hada_w1_a|lokr_w1)\b", "a LoRA", _CHECKPOINT),
    (r"(.*\.)?(motion_modules|time_stack|temporal_transformer_blocks)\.", "a video model or motion module", _BASE),
    (r"(control_model|controlnet_[\w]+)\.|(.*\.)?(input_hint_block|zero_convs)\.", "a ControlNet", _BASE),
    (r"(.*\.)?clip_txt_mapper\.", "Stable Cascade", _OTHER_MODEL),
    (r"(.*\.)?joint_blocks\.", "SD3, a transformer", _OTHER_MODEL),
    (r"(.*\.)?double_blocks\.|(.*\.)?single_transformer_blocks\.", "Flux or of its kind, a transformer", _OTHER_MODEL),
    (r"(.*\.)?(joint_transformer_blocks|double_layers|double_stream_blocks)\.", "a transformer", _OTHER_MODEL),
    (r"(model\.diffusion_model\.|net\.)?(blocks|layers|transformer_blocks)\.\d+\.", "a transformer", _OTHER_MODEL),
    (r"(unet\.)?down_blocks\.\d+\.", "a UNet with diffusers' names", "Give the diffusers folder that it is part of."),
    (r"encoder\.block\.\d+\.layer\.|shared\.weight$", "a T5 text encoder", f"{_CHECKPOINT} A T5 goes into --t5."),
    (r"text_model\.|(clip_[lgh]\.)", "a text encoder", _CHECKPOINT),
    (r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|up|down|layers)\b", "a VAE", _CHECKPOINT),
    (r"(emp_params|string_to_param|clip_g|clip_l)$", "an embedding", _CHECKPOINT),
)
"""(pattern at the beginning of a tensor's name, what such a file is, what to use)."""
MOST_NAMES = 20_000
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_CONVERT = "Load it in ComfyUI and save it with Save Checkpoint, which writes .safetensors."
FILE_KINDS = {
    ".gguf": DOWNLOADS[GGUF],
    ".json": ("a JSON file", "Give the folder that it is in, or the .safetensors file."),
} | dict.fromkeys(_PICKLES, ("a pickled checkpoint, which may hold code", _CONVERT))
"""Ending of a file's name -> what it is, what to use."""


def kind_of_tensors(names: Iterable[str]) -> tuple[str, str] | None:
    """(what a file is, what to use instead) by its tensors' names; None for a UNet in the original layout or for names
    of nothing known."""
    names = list(names)
    bare = [name.removeprefix(ldm.UNET_PREFIX) for name in names]
    if "input_blocks.0.0.weight" in bare and not any(
        name.startswith(("control_model.", "zero_convs.")) for name in bare
    ):
        names = [name for name in bare if name.startswith(("input_blocks.", "middle_block.", "output_blocks."))]
        return _kind(names, TENSOR_KINDS[1:2])
    return _kind(names, TENSOR_KINDS)


def _kind(names: list[str], kinds: Sequence[tuple[str, str, str]]) -> tuple[str, str] | None:
    """The first kind that one of the names is of; of a file of very many names, the first ones decide."""
    for pattern, kind, instead in kinds:
        matches = re.compile(pattern).match
        if any(matches(name[:300]) for name in names[:MOST_NAMES]):
            return kind, instead
    return None


def expect_unet(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, which says what the file is, for one without a UNet of Stable Diffusion; shapes: by name."""
    found = kind_of_tensors(shapes)
    if found is not None:
        kind, instead = found
        raise ValueError(
            f"checkpoint holds no UNet with cross-attention, but the tensors of {kind}; expected {SUPPORTED}. {instead}"
        )


def expect_plain_unet(shapes: Mapping[str, tuple[int, ...]], context_width: int) -> None:
    """Raises ValueError for UNets that read more than a text: SDXL's refiner, unCLIP, few-step guidance.

    Args:
        shapes: of the UNet, by canonical name.
        context_width: of its cross-attention.
    """
    added = shapes.get("label_emb.0.0.weight", (0, 0))[-1]
    if context_width == 1280 and added == 2560:
        raise ValueError(f"it is SDXL's refiner, which reads an aesthetic score; expected {SUPPORTED}. {_BASE}")
    if context_width == 1024 and added:
        raise ValueError(f"it is SD2.x unCLIP, which reads a picture; expected {SUPPORTED}. {_BASE}")
    if "time_embed.cond_proj.weight" in shapes:
        raise ValueError(
            f"it is distilled for few steps and reads the guidance scale (time_embed.cond_proj); expected {SUPPORTED}. "
            f"{_BASE}"
        )


def expect_checkpoint_file(path: Path) -> None:
    """Raises ValueError for a path that is neither a folder nor a .safetensors file, with what it is."""
    if path.is_dir() or (path.suffix.lower() == ".safetensors" and path.exists()):
        return
    expected = f"model is {path}; expected a diffusers folder or a .safetensors checkpoint."
    if not path.exists():
        raise ValueError(f"{expected} Nothing is there.")
    kind, instead = FILE_KINDS.get(path.suffix.lower(), ("a file of another kind", _CHECKPOINT))
    raise ValueError(f"{expected} It is {kind}. {instead}")
