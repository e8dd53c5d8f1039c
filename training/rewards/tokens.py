"""Tokens of prompts for a reward's text tower; tokenizers are read from a local folder, never downloaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..common.foreign import read_bytes, reading
from ..common.text import expect_whole_characters, plain_text
from ..models.clip_tokenizer import load_clip_tokenizer

log = logging.getLogger(__name__)
FILES = ("vocab.json", "merges.txt", "tokenizer.json")


class ClipTokens:
    """A CLIP tokenizer: one window for each prompt, of start, tokens, end and pads; longer prompts are cut, with a
    warning.

    Args:
        folder: of the tokenizer.
        vocabulary: number of tokens of the text tower.
        window: length of the window.
        pad: id that fills the window: 0 for OpenCLIP; None, the end token, for OpenAI's CLIP. The text tower is causal
            and read at the first end token, so pads do not change the embedding.

    Raises:
        ValueError: the folder has no tokenizer, or one of another vocabulary.
    """

    def __init__(self, folder: Path, vocabulary: int, window: int = 77, pad: int | None = None):
        self._folder = folder = Path(folder)
        files = _tokenizer_files(folder)
        self._tokenizer = load_clip_tokenizer(folder, vocabulary)
        self._begin, self._end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if self._end != vocabulary - 1:
            raise ValueError(
                f"the tokenizer in {folder} ends prompts with id {self._end}; expected {vocabulary - 1}, the last word "
                "of the reward's text tower. Use the tokenizer that belongs to it."
            )
        self.window, self.pad = window, self._end if pad is None else pad
        self.fingerprint = hashlib.sha256(b"".join(map(read_bytes, files))).hexdigest()
        self._warned = False

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, window) ids."""
        return torch.tensor([self._row(prompt) for prompt in prompts])

    def _row(self, prompt: str) -> list[int]:
        prompt = plain_text(expect_whole_characters(prompt, "a prompt"))
        with reading(self._folder, "no CLIP tokenizer", "Use the tokenizer that belongs to the reward."):
            ids = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [token for token in ids if token not in (self._begin, self._end)]
        most = self.window - 2
        if len(tokens) > most and not self._warned:
            self._warned = True
            log.warning("a prompt of %d tokens is cut to %d for the reward: %.80s", len(tokens), most, prompt)
        tokens = tokens[:most]
        return [self._begin, *tokens, self._end] + [self.pad] * (most - len(tokens))


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a CLIP tokenizer in a folder; ValueError if there are none."""
    present = [folder / name for name in FILES if (folder / name).is_file()]
    if not present:
        raise ValueError(
            f"the reward's tokenizer folder is {folder}, without {FILES[0]} or {FILES[2]}; expected a CLIP "
            "tokenizer, such as comfy/sd1_tokenizer of an installed ComfyUI."
        )
    return present
