"""CLIP's tokenizer from a local folder: of text encoders and of rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.foreign import read_json, read_text, reading

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files that decide which ids a text has."""


def load_clip_tokenizer(folder: Path, vocabulary: int) -> CLIPTokenizer:
    """The tokenizer in a local folder; nothing is downloaded.

    Args:
        folder: with vocab.json and merges.txt, or with tokenizer.json.
        vocabulary: number of rows of the token embedding that reads its ids.

    Raises:
        ValueError: the folder has no tokenizer, a damaged one, one with larger ids, or one without start and end.
    """
    from transformers import CLIPTokenizer

    if not any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):  # transformers 5 writes one
        raise ValueError(
            f"CLIP tokenizer folder is {folder}, without vocab.json; expected vocab.json and merges.txt. "
            "Give one with --tokenizer, for example comfy/sd1_tokenizer of an installed ComfyUI."
        )
    _expect_readable(folder)
    with reading(folder, "no CLIP tokenizer", "Use the tokenizer that belongs to the model."):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        words = tokenizer.get_vocab()
        if max(words.values(), default=vocabulary) >= vocabulary:
            raise ValueError(f"the tokenizer has {len(words)} words; expected ids below the model's {vocabulary}")
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise ValueError("the tokenizer has no start or end token; expected a CLIP's, such as <|endoftext|>")
        tokenizer("a", add_special_tokens=False)
    return tokenizer


def _expect_readable(folder: Path) -> None:
    """Raises ValueError for the first of a tokenizer's files that is damaged, and names it."""
    for name in TOKENIZER_FILES:
        file = folder / name
        if file.exists() and file.suffix == ".json":
            read_json(file, dict)
        elif file.exists():
            read_text(file)
