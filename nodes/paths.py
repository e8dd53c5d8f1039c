"""Where files come from and go to in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path


def runs_folder() -> Path:
    """output/retune, which holds one folder per run."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "retune"


def listed_file(name: str, *categories: str) -> Path:
    """The path of a file that a combo offered; ValueError when no category lists it (any more)."""
    import folder_paths

    for category in categories:
        if name in folder_paths.get_filename_list(category):
            return Path(folder_paths.get_full_path_or_raise(category, name))
    places = " or ".join(f"models/{category}" for category in categories)
    raise ValueError(f"file is {name!r}; expected one of the files in {places}. Refresh the node.")


def output_path(category: str, prefix: str, suffix: str) -> Path:
    """The next free `prefix_00001_suffix` below output/<category>; ValueError when prefix leaves that folder."""
    import folder_paths

    if Path(prefix).is_absolute() or ".." in Path(prefix.replace("\\", "/")).parts:
        raise ValueError(f"filename_prefix is {prefix!r}; expected a name below output/{category}, without '..'.")
    root = Path(folder_paths.get_output_directory()) / category
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(folder) / f"{name}_{number:05}_{suffix}"


def files(*categories: str, first: str | None = None) -> list[str]:
    """Combo values: `first`, then ComfyUI's files of some categories."""
    import folder_paths

    names = [name for category in categories for name in folder_paths.get_filename_list(category)]
    return ([] if first is None else [first]) + list(dict.fromkeys(names))
