"""Where files come from and go to in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path, PurePath

REWARDS = "retune_rewards"


def runs_folder() -> Path:
    """output/retune, which holds one folder per run."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "retune"


def listed_file(name: str, *categories: str) -> Path:
    """The path of a file that a combo offered; ValueError when no category lists it any longer."""
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
    listing = folder_paths.folder_names_and_paths
    listing[REWARDS] = (listing[REWARDS][0], set(folder_paths.supported_pt_extensions))
    return files(REWARDS, first=first)


def output_path(category: str, prefix: str, suffix: str) -> Path:
    """The next free `prefix_00001_suffix` below output/<category>; ValueError when prefix leaves that folder."""
    import folder_paths

    if Path(prefix).is_absolute() or ".." in Path(prefix.replace("\\", "/")).parts:
        raise ValueError(f"filename_prefix is {prefix!r}; expected a name below output/{category}, without '..'.")
    root = Path(folder_paths.get_output_directory()) / category
    folder, name, number, *_ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(folder) / f"{name}_{number:05}_{suffix}"


def files(*categories: str, first: str | None = None, folders: bool = False) -> list[str]:
    """Combo values: `first`, then ComfyUI's files of some categories, then (`folders`) their Hugging Face folders."""
    import folder_paths

    names = [] if first is None else [first]
    names += [name for category in categories for name in folder_paths.get_filename_list(category)]
    if folders:
        names += [name for category in categories for name in sorted(_model_folders(category))]
    return list(dict.fromkeys(names))


def listed_model(name: str, category: str) -> Path:
    """As `listed_file`, for combos that offer Hugging Face folders too."""
    return _model_folders(category).get(name) or listed_file(name, category)


def _model_folders(category: str) -> dict[str, Path]:
    """Folders with config.json and safetensors: path below the category's folder, with forward slashes -> folder."""
    import folder_paths

    folders = {}
    for name in folder_paths.get_filename_list(category):
        folder = PurePath(name).parent.as_posix()
        if folder == "." or folder in folders or not name.endswith(".safetensors"):
            continue
        file = folder_paths.get_full_path(category, name)  # None when it went away after ComfyUI listed it
        if file is not None and (Path(file).parent / "config.json").is_file():
            folders[folder] = Path(file).parent
    return folders
