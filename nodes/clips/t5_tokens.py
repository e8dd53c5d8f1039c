"""What a T5 CLIP reads: the file it came from, and prompts as ComfyUI's tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...training.text_encoder.t5 import Padding, comfyui_name, truncate_tokens
from ...training.text_encoder.tokenizers import T5Tokenizer

log = logging.getLogger(__name__)

SDXL_KEYS = ("g", "l")
"""What CLIPTextEncodeSDXL asks for beside the encoder's own tokens."""


@dataclass(frozen=True, kw_only=True)
class T5Source:
    """Where the T5 of a CLIP came from and how it is read."""

    path: Path
    file_hash: str
    config: dict
    tokenizer: T5Tokenizer
    padding: Padding
    dtype: str

    @property
    def name(self) -> str:
        """ComfyUI's name of this encoder: prefix of its weights, key of its embeddings and tokenizer options."""
        return comfyui_name(self.config["d_model"])


def t5_tokenizer(source: T5Source, embedding_directory, *, sdxl: bool, keep_clip=None):
    """ComfyUI's tokenizer of a T5 CLIP; its tokens hold those of `keep_clip` too.

    sdxl: the T5's tokens also stand under the names that CLIPTextEncodeSDXL reads, where no kept CLIP uses them.
    """
    from comfy import sd1_clip

    class Tokenizer(sd1_clip.SD1Tokenizer):
        def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
            tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
            if sdxl:
                tokens |= {key: list(tokens[source.name]) for key in SDXL_KEYS}
            return tokens if keep_clip is None else tokens | keep_clip.tokenize(text, return_word_ids, **kwargs)

    segments = _segment_tokenizer(source, embedding_directory)
    return Tokenizer(tokenizer_data={f"{source.name}_tokenizer_class": segments}, name=source.name)


def warn_of_second_text(tokens: dict, source: T5Source) -> None:
    """CLIPTextEncodeSDXL has two texts and a T5 reads one: says so when the second differs."""
    texts = [_ids(tokens[name]) for name in (source.name, "l") if name in tokens]
    if texts[1:] and texts[0] != texts[1]:
        log.warning("text_l differs from text_g; a T5 reads one text, text_g. Put everything there.")


def _ids(sections: list[list]) -> list[int]:
    return [entry[0] for section in sections for entry in section if not isinstance(entry[0], Tensor)]


def real_tokens(sections: list[list], source: T5Source) -> Tensor:
    """(L,) bool over T5's states: words and end tokens, without pads and without what ComfyUI drops.

    Vectors of another width (an `embedding:` of another encoder) are dropped, and as many pads come last.
    """
    return torch.tensor([real for section in sections for real in _real(section, source)])


def _real(section: list, source: T5Source) -> list[bool]:
    width, end_token = source.config["d_model"], source.config["eos_token_id"]
    kept = [entry[0] for entry in section if not (isinstance(entry[0], Tensor) and entry[0].shape[-1] != width)]
    end = next((i for i, token in enumerate(kept) if is_token(token, end_token)), len(kept) - 1)
    return [i <= end for i in range(len(section))]


def _segment_tokenizer(source: T5Source, embedding_directory):
    """Builds ComfyUI's tokenizer (prompt weights, `embedding:`) around ours, cut or padded as the encoder says."""
    from comfy import sd1_clip

    padding = source.padding

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, **_):
            super().__init__(
                "",
                embedding_directory=embedding_directory,
                embedding_size=source.config["d_model"],
                embedding_key=source.name,
                tokenizer_class=SimpleNamespace(from_pretrained=lambda _: source.tokenizer),
                has_start_token=False,
                pad_with_end=False,
                pad_to_max_length=False,
                pad_token=source.config["pad_token_id"],
                max_length=99999999,
                min_length=1,
            )

        def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
            (batch,) = super().tokenize_with_weights(text, return_word_ids=True, **kwargs)
            end = next(i for i, entry in enumerate(batch) if is_token(entry[0], self.end_token))
            batch = (truncate_tokens(batch[: end + 1], padding.max_tokens, text) + batch[end + 1 :])[
                : padding.max_tokens
            ]
            if padding.pad == "max_tokens":
                self.pad_tokens(batch, padding.max_tokens - len(batch))
            return [batch if return_word_ids else [entry[:2] for entry in batch]]

    return Tokenizer


def is_token(entry: Any, token: int) -> bool:
    """Entries are ids, or the vectors of an `embedding:`."""
    return not isinstance(entry, Tensor) and entry == token
