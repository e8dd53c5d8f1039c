"""CLIPs to files and back: a CLIP as files that stock loaders read, and the files of Save Text Encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...training.common.foreign import metadata_json, read_tensors, reading
from ...training.demo.editions import EDITIONS, edition_of_tokens, made_for_another
from ...training.demo.files import WEIGHTS
from ...training.text_encoder.file import RUN, SavedTextEncoder
from ...training.text_encoder.stock_file import CLIPS, encoder_names, write_stock_files
from ..common.paths import output_path
from ..common.weights import patched_weight
from .blend_weights import has_hooks, is_bypassed
from .concept_tokens import concepts_of, vocabularies_of
from .t5_clip import load_t5_clip, t5_parts


def save_clip(clip, prefix: str, about: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """Writes each CLIP of a text encoder to output/clip, one file each, its patches (tuned weights, LoRA) applied.

    Args:
        clip: a CLIP with a CLIP-L, CLIP-G or CLIP-H.
        prefix: file name below output/clip, as in `<prefix>_<number>_clip_l.safetensors`.
        about: goes into the metadata.

    Returns:
        The paths, and warnings of what the files lack.

    Raises:
        ValueError: before anything is written, for other text encoders, hooks, and a LoRA that is not merged.
    """
    names = [name for name, _ in clip.cond_stage_model.named_parameters()]
    parts = [part for part in encoder_names(names) if part in CLIPS]
    _expect_writable(clip, parts)
    paths = {part: output_path("clip", prefix, f"{part}.safetensors") for part in parts}
    for part, path in paths.items():  # one after the other, to hold only one in memory
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
    warnings = []
    others = {name.split(".")[0] for name in clip.cond_stage_model.state_dict() if "." in name} - set(parts)
    if others:
        warnings.append(f"The files lack {', '.join(sorted(others))}: only the CLIPs are written.")
    if clip.layer_idx is not None:
        warnings.append("CLIP Set Last Layer is not in the file, which is whole: set it again after loading.")
    if concepts_of(clip):
        tokens = ", ".join(concept.token for concept in concepts_of(clip))
        warnings.append(f"The file lacks the words of Load Embedding ({tokens}): load them again after loading.")
    return warnings


def saved_text_encoder(clip) -> SavedTextEncoder:
    """All that `save_text_encoder` writes of a T5 CLIP."""
    parts = t5_parts(clip)
    source = parts.source
    return SavedTextEncoder(
        projection=parts.projection,
        padding=source.padding,
        t5_file=source.path.name,
        t5_sha256=source.file_hash,
        t5_config=source.config,
        tokenizer=source.tokenizer.fingerprint,
        target_std=parts.target_std,
        dtype=source.dtype,
        keeps_clip=parts.keeps_clip,
    )


def load_saved_text_encoder(saved: SavedTextEncoder, folders: Iterable[str | Path], keep_clip=None, **options):
    """The T5 CLIP of a saved text encoder.

    Args:
        saved: what the file holds.
        folders: where its T5 is searched, in addition to the demo's weights.
        keep_clip: the CLIP it was made with, if any.
        options: further arguments of `load_t5_clip`.

    Raises:
        ValueError: for another T5 or tokenizer than the recorded one, and for a missing keep_clip.
        FileNotFoundError: when the T5 is not found.
    """
    saved.check_keep_clip(keep_clip is not None)
    path = saved.find_t5([*folders, WEIGHTS])
    padding = {"max_tokens": saved.padding.max_tokens, "pad": saved.padding.pad}
    recorded = padding | {"dtype": saved.dtype, "target_std": saved.target_std}
    clip = load_t5_clip(path, saved.projection, keep_clip=keep_clip, **recorded, **options)
    saved.check_tokenizer(clip.cond_stage_model.retune_source.tokenizer.fingerprint)
    return clip


def open_text_encoder(path: Path, keep_clip=None) -> tuple[Any, str]:
    """A file that Save Text Encoder wrote: a T5 with its projection, or the demo model's CLIP.

    Returns:
        The CLIP, and a sentence that says that it was made for an earlier demo model, or "".

    Raises:
        ValueError: for another file; the message names the stock loader for it.
        ValueError, FileNotFoundError: as `load_saved_text_encoder`.
    """
    import folder_paths

    from ...training.text_encoder.file import METADATA, PREFIX, read_text_encoder
    from ..common.demo_model import load_demo_clip

    metadata = read_tensors(path, PREFIX)[1]
    with reading(path):
        base = metadata_json(metadata, RUN, default={}).get("base")
    base = str(base.get("model", "")) if isinstance(base, dict) else ""
    if METADATA in metadata:
        folders = folder_paths.get_folder_paths("text_encoders")
        clip = load_saved_text_encoder(read_text_encoder(path), folders, keep_clip)
        return clip, _another_demo_of_t5(path.name, base, clip.cond_stage_model.retune_source.path)
    if keep_clip is not None:
        raise ValueError(f"{path.name} is a CLIP, beside which none can be kept; expected keep_clip unconnected.")
    clip = load_demo_clip(path)
    (vocabulary,) = vocabularies_of(clip).values()
    return clip, _another_demo(path.name, base, edition_of_tokens(vocabulary.table))


def _another_demo(name: str, base: str, edition: str = "") -> str:
    """A sentence about a file for another demo model. edition: Whose token embeddings it has, if that is known."""
    known = next((other.unet for other in EDITIONS if other.name == edition), base)
    line = made_for_another(known, EDITIONS[-1].name)
    return f"{name} {line}" if line else ""


def _another_demo_of_t5(name: str, base: str, t5: Path) -> str:
    """`_another_demo` of a projection for one of the demo's T5s, whose file tells where the run does not."""
    if WEIGHTS not in t5.parents:
        return ""
    if t5.parent != WEIGHTS:
        return _another_demo(name, EDITIONS[0].unet)
    return _another_demo(name, base) if base else ""
