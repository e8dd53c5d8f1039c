"""Warns of prompts that are longer than one window of a text encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from ..common.text import plain_text
from ..models.protocols import TextEncoder
from .prompts import Prompt

log = logging.getLogger(__name__)

MAX_CHECKED = 10_000
"""Number of prompts that are checked, from the start: tokenizing a million takes minutes."""
MAX_LISTED = 3
"""Number of prompts that the warning lists."""


def long_prompts(encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[tuple[int, int, str]]:
    """Prompts with more tokens than one window of the text encoder.

    Returns:
        (number from 1, number of tokens, text) of each, the longest first.
    """
    limit = encoder.max_prompt_tokens
    numbered = enumerate((prompt.text for prompt in islice(prompts, MAX_CHECKED)), start=1)
    candidates = [(number, text) for number, text in numbered if len(text.encode()) > limit]  # a token is >= 1 byte
    if not candidates:
        return []
    vocabularies = encoder.vocabularies
    suitable = (name for name in vocabularies if name.startswith("t5") != encoder.chunks_long_prompts)
    vocabulary = vocabularies[next(suitable, next(iter(vocabularies)))]
    counted = [(number, len(vocabulary.ids(plain_text(text))), text) for number, text in candidates]
    return sorted((row for row in counted if row[1] > limit), key=lambda row: (-row[1], row[0]))


def warn_of_long_prompts(encoder: TextEncoder, prompts: Sequence[Prompt]) -> None:
    """Logs one warning about prompts that do not fit into one window: which, how long, and whether they are cut."""
    rows = long_prompts(encoder, prompts)
    if not rows:
        return
    examples = "; ".join(f"prompt {number} has {tokens} ({text:.60}...)" for number, tokens, text in rows[:MAX_LISTED])
    more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    log.warning(
        "%d prompts have more than %d tokens, the longest first: %s%s. What happens: %s. Rewards that read prompts cut "
        "them to their own windows, 75 tokens of a CLIP, in any case. Shorten what should count.",
        len(rows),
        encoder.max_prompt_tokens,
        examples,
        more,
        _effect(encoder),
    )


def _effect(encoder: TextEncoder) -> str:
    """What the text encoder does with a prompt that does not fit into one window."""
    limit = encoder.max_prompt_tokens
    if encoder.chunks_long_prompts:
        return f"the text encoder reads them in windows of {limit}, as ComfyUI does; diffusers would cut them"
    return f"the text encoder cuts them to {limit}: raise max_tokens to keep more"
