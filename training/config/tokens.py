"""The words that stand for learned vectors in prompts: how they may be spelled."""

from __future__ import annotations

import re

STOCK_MARK = "embedding:"
"""ComfyUI's own way to name an embedding's file in a prompt; what follows it is never one of our words."""


def check_token(token: str) -> str:
    """The token without blanks around it. Raises ValueError for one that cannot stand in a prompt."""
    word = token.strip()
    if not word or re.search(r"[\s,]", word) or word.lower().startswith(STOCK_MARK):
        raise ValueError(f"token is {token!r}; expected one word without blanks and commas, such as <cat-toy>.")
    return word
