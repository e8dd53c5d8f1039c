"""Captioned images: from a folder, or from the graph."""

from pathlib import Path

from comfy_api.latest import io

from ..training.common.text import text_lines
from ..training.config.folder import FolderConfig
from .common import types
from .common.inputs import input_of, inputs_of


class RetuneLoadDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneLoadDataset",
            display_name="Load Dataset",
            category="retune/data",
            description="Images of a folder (and its sub-folders) with their captions, sorted into buckets of equal "
            "aspect ratio. Pixels stay on disk until they are needed.",
            search_aliases=["training images", "captions", "dataset folder"],
            inputs=[
                input_of(
                    FolderConfig,
                    "folder",
                    default="",
                    tooltip="A folder on this machine; a relative one is searched for in input/.",
                ),
                input_of(FolderConfig, "resolution", min=64, max=4096),
                *inputs_of(FolderConfig, "captions", "caption", optional=True),
                input_of(FolderConfig, "repeats", max=10000, optional=True),
                *inputs_of(FolderConfig, "buckets", "crop", "flip", "on_bad_image", optional=True),
                input_of(FolderConfig, "on_missing_caption", options=["stop", "skip"], optional=True),
                *inputs_of(FolderConfig, "masks", "weight", "trigger_word", optional=True),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                types.Dataset.Output(display_name="dataset", tooltip="Goes into a training node."),
                io.String.Output(display_name="report", tooltip="Counts, sizes, captions, and what was left out."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **options):
        """Files may change while the path stays: names, sizes and times of the folder's files."""
        from ..training.common.foreign import is_file
        from ..training.data.listing import visible_files

        root = resolved(folder)
        if not root.is_dir():
            return folder
        stats = {name: (root / name).stat() for name in visible_files(root)[0] if is_file(root / name)}
        return repr((folder, options, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]))

    @classmethod
    def execute(cls, folder, resolution, **options):
        from ..training.data.folder import load_folder
        from .ui.progress import NodeCallbacks

        config = FolderConfig(folder=resolved(folder), resolution=resolution, **options)
        callbacks = NodeCallbacks(cls.hidden.unique_id if cls.hidden else None, "", 1)
        dataset = load_folder(config, lambda done, total, text: callbacks.on_text(f"{text} ({done}/{total})"))
        return io.NodeOutput(dataset, dataset.report, ui={"text": [dataset.report]})


class RetuneDatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneDatasetFromImages",
            display_name="Dataset From Images",
            category="retune/data",
            description="Images and captions from the graph as a training dataset. Images keep their size, cut to "
            "multiples of 8.",
            search_aliases=["images to dataset"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Images or batches of images, also as a list."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One caption for all, or one per image: as a list, or one a line.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where an image counts: one for all, or one per image, also as a list.",
                ),
            ],
            outputs=[types.Dataset.Output(display_name="dataset", tooltip="Goes into a training node.")],
        )

    @classmethod
    def execute(cls, images, captions, masks=None):
        from ..training.data.dataset import from_images

        lines = text_lines(captions[0].removesuffix("\n")) if len(captions) == 1 and captions[0].strip() else captions
        captions = [line.strip() for line in lines]
        return io.NodeOutput(from_images([image.clone() for image in images], captions, masks=masks))


class RetuneJoinDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneJoinDatasets",
            display_name="Join Datasets",
            category="retune/data",
            description="Two datasets as one. As regularisation images, an epoch shows as many of the second as of the "
            "first.",
            search_aliases=["regularisation images", "regularization", "prior preservation", "merge datasets"],
            inputs=[
                types.Dataset.Input("first", tooltip="The images to learn."),
                types.Dataset.Input("second", tooltip="More images, or regularisation images."),
                io.Combo.Input(
                    "second_is",
                    options=["regularisation images", "more images"],
                    default="regularisation images",
                    optional=True,
                    tooltip="Regularisation images: repeated or thinned out to as many as the first, never held out "
                    "for validation. More images: as often as their repeats.",
                ),
            ],
            outputs=[
                types.Dataset.Output(display_name="dataset", tooltip="Goes into a training node."),
                io.String.Output(display_name="report", tooltip="What is in it."),
            ],
        )

    @classmethod
    def execute(cls, first, second, second_is="regularisation images"):
        from ..training.data.dataset import join_datasets

        dataset = join_datasets(first, second, regularisation=second_is == "regularisation images")
        return io.NodeOutput(dataset, dataset.report)


def resolved(folder: str) -> Path:
    """The folder's path; a relative one below ComfyUI's input folder. Raises ValueError when nothing is given."""
    import folder_paths

    if not folder.strip():
        raise ValueError("folder is empty; expected the path of a folder with images.")
    path = Path(folder.strip()).expanduser()
    return path if path.is_absolute() else Path(folder_paths.get_input_directory()) / path
