"""Prompts that are longer than what a text encoder reads at a time: named before a run begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from ..models.protocols import TextEncoder
from .prompts import Prompt

log = logging.getLogger(__name__)

LOOKED_AT = 10_000
"""Prompts that are looked at, the first ones: tokenizing a million takes minutes."""
SHOWN = 3


def long_prompts(encoder: TextEncoder, prompts: Sequence[Prompt]) -> list[tuple[int, int, str]]:
    """(number from 1, tokens, text) of the prompts that are read in several windows or cut, the longest first."""
    numbered = enumerate((prompt.text for prompt in islice(prompts, LOOKED_AT)), start=1)
    may_be = [
        (number, text) for number, text in numbered if len(text.encode()) > encoder.max_prompt_tokens
    ]  # a token has a byte
    if not may_be:
        return []
    words = encoder.vocabularies
    name = next((name for name in words if name.startswith("t5") != encoder.chunks_long_prompts), next(iter(words)))
    counted = [(number, len(words[name].ids(text)), text) for number, text in may_be]
    return sorted((one for one in counted if one[1] > encoder.max_prompt_tokens), key=lambda one: (-one[1], one[0]))


def warn_of_long_prompts(encoder: TextEncoder, prompts: Sequence[Prompt]) -> None:
    """Logs which prompts do not fit into one window, how long they are and what happens to them, in one warning."""
    found = long_prompts(encoder, prompts)
    if not found:
        return
    shown = "; ".join(f"prompt {number} has {tokens} ({text:.60}...)" for number, tokens, text in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    most = encoder.max_prompt_tokens
    happens = (
        f"the text encoder reads them in windows of {most}, as ComfyUI does; diffusers would cut them"
        if encoder.chunks_long_prompts
        else f"the text encoder cuts them to {most}: raise max_tokens to keep more"
    )
    log.warning(
        "%d prompts have more than %d tokens, the longest first: %s%s. What happens: %s. Rewards that read prompts cut "
        "them to their own windows, 75 tokens of a CLIP, in any case. Shorten what should count.",
        len(found),
        encoder.max_prompt_tokens,
        shown,
        more,
        happens,
    )
