"""A CLIP as files that stock loaders read, and Save Text Encoder's files back as CLIPs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...training.text_encoder.stock_file import CLIPS, encoder_names, write_stock_files
from ..common.paths import output_path
from ..common.weights import patched_weight
from .blend_weights import has_hooks, is_bypassed
from .concept_tokens import concepts_of


def save_clip(clip, prefix: str, about: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """Writes each CLIP of a text encoder to output/clip, its patches (tuned weights, LoRA) applied, as
    `<prefix>_<number>_clip_l.safetensors` and the like; the paths, and warnings of what the files lack.

    about: for the metadata. Raises ValueError, before anything is written, for a text encoder that is no CLIP, and for
    what weights cannot hold.
    """
    names = [name for name, _ in clip.cond_stage_model.named_parameters()]
    parts = [part for part in encoder_names(names) if part in CLIPS]
    _expect_writable(clip, parts)
    paths = {part: output_path("clip", prefix, f"{part}.safetensors") for part in parts}
    for part, path in paths.items():  # one at a time in memory
        weights = {name: patched_weight(clip.patcher, name) for name in names if name.startswith(f"{part}.")}
        write_stock_files({part: path}, weights, about)
    return list(paths.values()), _warnings(clip, parts)


def _expect_writable(clip, parts: list[str]) -> None:
    if not parts:
        raise ValueError(
            f"the CLIP is {type(clip.cond_stage_model).__name__}; expected a T5 from Load T5, or one with a CLIP-L, "
            "CLIP-G or CLIP-H. Use ComfyUI's CLIPSave for others."
        )
    if has_hooks(clip):
        raise ValueError("the CLIP has hooks (Set CLIP Hooks), which no weight holds; expected none. Save it without.")
    if is_bypassed(clip):
        raise ValueError("a LoRA was put on without merging (bypass), so it is not in the weights. Use Load LoRA.")


def _warnings(clip, parts: list[str]) -> list[str]:
    found = []
    others = {name.split(".")[0] for name in clip.cond_stage_model.state_dict() if "." in name} - set(parts)
    if others:
        found.append(f"The files lack {', '.join(sorted(others))}: only the CLIPs are written.")
    if clip.layer_idx is not None:
        found.append("CLIP Set Last Layer is not in the file, which is whole: set it again after loading.")
    if concepts_of(clip):
        words = ", ".join(concept.token for concept in concepts_of(clip))
        found.append(f"The file lacks the words of Load Embedding ({words}): load them again after loading.")
    return found


def open_text_encoder(path: Path, keep_clip=None):
    """The CLIP of a file that Save Text Encoder wrote: a T5 with its projection, or the demo model's CLIP.

    Errors: ValueError for other files, which names the stock loader of theirs; those of `load_saved_text_encoder`.
    """
    import folder_paths

    from ...training.common.files import read_tensors
    from ...training.text_encoder.file import METADATA, PREFIX, read_text_encoder
    from ..common.demo_model import load_demo_clip
    from .t5_clip import load_saved_text_encoder

    if METADATA in read_tensors(path, PREFIX)[1]:
        folders = folder_paths.get_folder_paths("text_encoders")
        return load_saved_text_encoder(read_text_encoder(path), folders, keep_clip)
    if keep_clip is not None:
        raise ValueError(f"{path.name} is a CLIP, beside which none can be kept; expected keep_clip unconnected.")
    return load_demo_clip(path)
