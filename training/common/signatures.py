"""What a file is by its first bytes, where it is not what its ending says: a web page, a pointer of Git LFS, ..."""

from __future__ import annotations

import stat
from pathlib import Path

GGUF = (b"GGUF",)
WEB_PAGE = (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML")
LFS_POINTER = (b"version https://git-lfs",)
DOWNLOADS = {
    GGUF: ("a GGUF file, whose weights are quantised", "Use the fp16 or fp8 .safetensors file of the same model."),
    LFS_POINTER: ("a pointer of Git LFS, not the file itself", "Run git lfs pull, or download the file itself."),
    WEB_PAGE: ("a web page", "Download the file itself; the site may want you to log in first."),
}
"""First bytes -> what the file is, and what to do."""


def downloaded_kind(path: str | Path) -> tuple[str, str] | None:
    """What a regular file is, and what to do, if it is one of `DOWNLOADS`; None for all others."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return None
        with Path(path).open("rb") as file:
            start = file.read(32)
    except (OSError, ValueError):
        return None
    return next((kind for begins, kind in DOWNLOADS.items() if start.startswith(begins)), None)
