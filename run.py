"""Retune without installing anything first: `python run.py demo | test | bench | comfyui`.

Needs only Python 3.10 or newer. Everything is installed into `.venv` beside this file; no other Python is touched.
"""

from __future__ import annotations

import configparser
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# ComfyUI
# ---------------------------------------------------------------------------------------------------------------------


def is_comfyui(folder: Path) -> bool:
    """True when `folder` is a ComfyUI checkout."""
    return (folder / "comfyui_version.py").is_file() and (folder / "main.py").is_file()


def comfy_cli_folders() -> list[Path]:
    """Where comfy-cli keeps ComfyUI: its configured workspaces, then its default one."""
    home = Path(os.path.expanduser("~"))
    config_folder, default = {
        "win32": (home / "AppData" / "Local", home / "Documents" / "comfy" / "ComfyUI"),
        "darwin": (home / "Library" / "Application Support", home / "Documents" / "comfy" / "ComfyUI"),
    }.get(sys.platform, (home / ".config", home / "comfy" / "ComfyUI"))
    config = configparser.ConfigParser(interpolation=None)
    config.read(config_folder / "comfy-cli" / "config.ini", encoding="utf-8")
    configured = [config["DEFAULT"].get(key) for key in ("default_workspace", "recent_workspace")]
    return [Path(folder) for folder in configured if folder] + [default, home / "comfy" / "ComfyUI"]


def find_comfyui() -> Path | None:
    """The ComfyUI checkout to use: `COMFYUI_PATH`, the one this folder is installed in, then comfy-cli's workspace.

    `COMFYUI_PATH=none` looks for none. Raises ValueError when `COMFYUI_PATH` names a folder that is not a checkout.
    """
    wanted = os.environ.get("COMFYUI_PATH", "").strip()
    if wanted.lower() == "none":
        return None
    if wanted:
        folder = Path(wanted).expanduser().resolve()
        if not is_comfyui(folder):
            raise ValueError(
                f"COMFYUI_PATH is {wanted!r}; expected a folder with ComfyUI's main.py. Correct or unset it."
            )
        return folder
    parents = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    return next((folder.resolve() for folder in [*parents, *comfy_cli_folders()] if is_comfyui(folder)), None)
