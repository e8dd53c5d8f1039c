"""Tokens that stand for learned vectors in prompts: how they may be spelled."""

from __future__ import annotations

import re

STOCK_MARK = "embedding:"
"""ComfyUI's prefix of an embedding's file name in a prompt; a text that begins with it is never such a token."""


def check_token(token: str) -> str:
    """The token without blanks around it. Raises ValueError where it cannot stand in a prompt."""
    word = token.strip()
    if not word or re.search(r"[\s,]", word) or word.lower().startswith(STOCK_MARK):
        raise ValueError(f"token is {token!r}; expected one word without blanks and commas, such as <cat-toy>.")
    return word
