"""Prompts as ComfyUI's tokens for a T5 CLIP, and the record of its T5 file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ...training.text_encoder.t5 import Padding, comfyui_name, truncate_tokens
from ...training.text_encoder.tokenizers import T5Tokenizer

log = logging.getLogger(__name__)

SDXL_KEYS = ("g", "l")
"""Names of the tokens that CLIPTextEncodeSDXL reads."""


@dataclass(frozen=True, kw_only=True)
class T5Source:
    """The T5 file of a CLIP, and how prompts and weights are read."""

    path: Path
    file_hash: str
    config: dict
    tokenizer: T5Tokenizer
    padding: Padding
    dtype: str
    """Name of the dtype in which the weights are stored, "default" included."""

    @property
    def name(self) -> str:
        """ComfyUI's name of this encoder: prefix of its weights, key of its embeddings, tokens and options."""
        return comfyui_name(self.config["d_model"])


def t5_tokenizer(source: T5Source, embedding_directory, *, sdxl: bool, keep_clip=None):
    """The tokenizer of a T5 CLIP, as ComfyUI expects it.

    Args:
        source: the T5's file.
        embedding_directory: where `embedding:` is searched.
        sdxl: whether the T5's tokens are also returned under the names that CLIPTextEncodeSDXL reads, unless
            `keep_clip` has tokens of these names.
        keep_clip: a CLIP whose tokens are returned too.
    """
    from comfy import sd1_clip

    class Tokenizer(sd1_clip.SD1Tokenizer):
        def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
            tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
            if sdxl:
                tokens |= {key: list(tokens[source.name]) for key in SDXL_KEYS}
            return tokens if keep_clip is None else tokens | keep_clip.tokenize(text, return_word_ids, **kwargs)

    window_tokenizer = _window_tokenizer_class(source, embedding_directory)
    return Tokenizer(tokenizer_data={f"{source.name}_tokenizer_class": window_tokenizer}, name=source.name)


def warn_of_second_text(tokens: dict, source: T5Source) -> None:
    """Warns when the two texts of CLIPTextEncodeSDXL differ: a T5 reads one."""
    texts = [_ids(tokens[name]) for name in (source.name, "l") if name in tokens]
    if texts[1:] and texts[0] != texts[1]:
        log.warning("text_l differs from text_g; a T5 reads one text, text_g. Put everything there.")


def _ids(windows: list[list]) -> list[int]:
    return [entry[0] for window in windows for entry in window if not isinstance(entry[0], Tensor)]


def real_tokens(windows: list[list], source: T5Source) -> Tensor:
    """(L,) bool over T5's states: True for prompt and end tokens, False for pads.

    ComfyUI drops vectors of another width (an `embedding:` of another encoder) and adds as many pads at the end.
    """
    return torch.tensor([real for window in windows for real in _real(window, source)])


def _real(window: list, source: T5Source) -> list[bool]:
    """`real_tokens` of one window, a list of (token, weight)."""
    width, end_token = source.config["d_model"], source.config["eos_token_id"]
    tokens = [entry[0] for entry in window if not (isinstance(entry[0], Tensor) and entry[0].shape[-1] != width)]
    end = end_index(tokens, end_token)
    return [i <= end for i in range(len(window))]


def _window_tokenizer_class(source: T5Source, embedding_directory):
    """The class of ComfyUI's tokenizer (prompt weights, `embedding:`) around the T5's, with its length and padding."""
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
            end = end_index([entry[0] for entry in batch], self.end_token)
            prompt = truncate_tokens(batch[: end + 1], padding.max_tokens, text)
            batch = (prompt + batch[end + 1 :])[: padding.max_tokens]
            if padding.pad == "max_tokens":
                self.pad_tokens(batch, padding.max_tokens - len(batch))
            return [batch if return_word_ids else [entry[:2] for entry in batch]]

    return Tokenizer


def end_index(tokens: Sequence[int | Tensor], end_token: int) -> int:
    """Index of the first end token, else of the last token; tokens are ids, or the vectors of an `embedding:`."""
    ends = (i for i, token in enumerate(tokens) if not isinstance(token, Tensor) and token == end_token)
    return next(ends, len(tokens) - 1)
