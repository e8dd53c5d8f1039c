"""Where files come from and go to in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path


def runs_folder() -> Path:
    """output/retune, which holds one folder per run."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "retune"


def listed_file(category: str, name: str) -> Path:
    """The path of a file that a combo offered; ValueError when the listing does not have it (any more)."""
    import folder_paths

    if name not in folder_paths.get_filename_list(category):
        raise ValueError(f"file is {name!r}; expected one of the files in models/{category}. Refresh the node.")
    return Path(folder_paths.get_full_path_or_raise(category, name))


def output_path(category: str, prefix: str, suffix: str) -> Path:
    """The next free `prefix_00001_suffix` below output/<category>; ValueError when prefix leaves that folder."""
    import folder_paths

    root = Path(folder_paths.get_output_directory()) / category
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(folder) / f"{name}_{number:05}_{suffix}"


def files(category: str, *more: str) -> list[str]:
    """Combo values: `more` first, then ComfyUI's files of a category."""
    import folder_paths

    return [*more, *folder_paths.get_filename_list(category)]
