"""Files in ComfyUI's folders: combo values, the paths of what a combo names, and paths of new files."""

from __future__ import annotations

from pathlib import Path, PurePath

REWARDS = "retune_rewards"


def runs_folder() -> Path:
    """output/retune, in which every run has a folder."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "retune"


def listed_file(name: str, *categories: str) -> Path:
    """The path of a file named in a combo. Raises ValueError when ComfyUI lists it in none of these categories."""
    import folder_paths

    for category in categories:
        if name in folder_paths.get_filename_list(category):
            return Path(folder_paths.get_full_path_or_raise(category, name))
    places = " or ".join(f"models/{category}" for category in categories)
    raise ValueError(f"file is {name!r}; expected one of the files in {places}. Refresh the node.")


def reward_files(first: str) -> list[str]:
    """Combo values: `first`, then the files of models/retune_rewards, which is registered with ComfyUI here."""
    import folder_paths

    folder_paths.add_model_folder_path(REWARDS, str(Path(folder_paths.models_dir) / REWARDS))
    registered = folder_paths.folder_names_and_paths
    registered[REWARDS] = (registered[REWARDS][0], set(folder_paths.supported_pt_extensions))
    return files(REWARDS, first=first)


def output_path(category: str, prefix: str, suffix: str) -> Path:
    """The path of a new file, with the next free number, in the manner of ComfyUI's savers.

    Args:
        category: folder below ComfyUI's output folder.
        prefix: file name, which may have folders before it.
        suffix: end of the file name, with its extension.

    Returns:
        output/<category>/<prefix>_<number>_<suffix>

    Raises:
        ValueError: for an absolute prefix, and for one with "..".
    """
    import folder_paths

    from ...training.common.files import is_reserved

    parts = Path(prefix.replace("\\", "/")).parts
    if Path(prefix).is_absolute() or ".." in parts:
        raise ValueError(f"filename_prefix is {prefix!r}; expected a name below output/{category}, without '..'.")
    if any(is_reserved(part) or part.endswith((".", " ")) for part in parts[:-1]):
        raise ValueError(
            f"filename_prefix is {prefix!r}; expected folders that Windows takes: no CON or LPT1, no dot or space at "
            "the end."
        )
    root = Path(folder_paths.get_output_directory()) / category
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(folder) / f"{name}_{number:05}_{suffix}"


def named_after(run: Path | str | None, prefix: str, default: str, folder: str = "") -> str:
    """The prefix of a file's name: with a run its name below `folder`, where the widget is empty or at its default."""
    return prefix if run is None or prefix.strip() not in ("", default) else folder + Path(run).name


def size_of(path: Path | str) -> str:
    """A file's name and size, for people to read."""
    path = Path(path)
    size = path.stat().st_size
    return f"{path.name}: {size / 2**20:.1f} MB" if size >= 10**5 else f"{path.name}: {size / 2**10:.1f} KB"


def files(*categories: str, first: str | None = None, folders: bool = False) -> list[str]:
    """Combo values from what ComfyUI lists, without repetitions.

    Args:
        categories: ComfyUI's folder names, such as "loras".
        first: a value before all files.
        folders: whether Hugging Face folders in these categories come after the files.
    """
    import folder_paths

    names = [] if first is None else [first]
    names += [name for category in categories for name in folder_paths.get_filename_list(category)]
    if folders:
        names += [name for category in categories for name in sorted(_model_folders(category))]
    return list(dict.fromkeys(names))


def listed_model(name: str, category: str) -> Path:
    """As `listed_file`, for combos that have Hugging Face folders too."""
    return _model_folders(category).get(name) or listed_file(name, category)


def _model_folders(category: str) -> dict[str, Path]:
    """Hugging Face folders, with a config.json and safetensors, in a category.

    Returns:
        Path below the category's folder, with forward slashes -> the folder.
    """
    import folder_paths

    model_folders = {}
    for name in folder_paths.get_filename_list(category):
        folder = PurePath(name).parent.as_posix()
        if folder == "." or folder in model_folders or not name.endswith(".safetensors"):
            continue
        file = folder_paths.get_full_path(category, name)  # None when it was deleted after ComfyUI listed it
        if file is not None and (Path(file).parent / "config.json").is_file():
            model_folders[folder] = Path(file).parent
    return model_folders
