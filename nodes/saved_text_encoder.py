"""Saving a text encoder, and loading a saved one."""

import logging

from comfy_api.latest import io

from ..training.demo.files import weights_path
from .common import types
from .common.paths import files, listed_file
from .text_encoder import DEMO_CLIPS, ENCODERS, keep_clip_input, save_t5

log = logging.getLogger(__name__)


class RetuneSaveTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneSaveTextEncoder",
            display_name="Save Text Encoder",
            category="retune/text encoder",
            description="Saves a tuned CLIP as files that ComfyUI's own loaders, diffusers and others read; of a T5 "
            "its projection, scale and padding with a reference (name and hash) to the T5 file. Into output/clip.",
            search_aliases=["save t5", "save projection", "save clip", "export text encoder"],
            is_output_node=True,
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="A CLIP of SD1.x, SD2, SDXL or the demo model, tuned or blended; or a T5."
                ),
                io.String.Input(
                    "filename_prefix", default="retune/text_encoder", tooltip="Name of the file; may hold a sub-folder."
                ),
                types.Run.Input(
                    "run", optional=True, tooltip="The run it comes from: rewards and settings go into the file."
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file written; of SDXL's pair two, one a line.")
            ],
        )

    @classmethod
    def execute(cls, clip, filename_prefix, run=None):
        from ..training.runs.provenance import about_folder
        from .clips.saved_clip import save_clip
        from .clips.t5_clip import is_t5_clip

        about = about_folder(run) if run is not None else {}
        save = save_clip if clip is not None and not is_t5_clip(clip) else save_t5
        paths, warnings = save(clip, filename_prefix, about)
        for warning in warnings:
            log.warning("%s", warning)
        text = [str(path) for path in paths]
        return io.NodeOutput("\n".join(text), ui={"text": text + warnings})


class RetuneLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneLoadTextEncoder",
            display_name="Load Text Encoder",
            category="retune/text encoder",
            description="Loads what Save Text Encoder wrote of a T5 or of the demo model's CLIP. A T5 needs the same "
            "T5 file or folder in models/text_encoders; its hash is checked.",
            search_aliases=["load projection", "load t5", "load demo clip"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*files(ENCODERS), *DEMO_CLIPS],
                    tooltip="A file written by Save Text Encoder. The demo one is for the demo model: its CLIP, tuned "
                    "for the demo aesthetic. Other CLIPs go into ComfyUI's Load CLIP.",
                ),
                keep_clip_input(
                    "The CLIP that the text encoder was used with, if there was one; it is not in the file."
                ),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoder as it was saved."),
                io.String.Output(
                    display_name="report", tooltip="What was loaded, and whether it was made for another demo model."
                ),
            ],
        )

    @classmethod
    def execute(cls, file, keep_clip=None):
        from .clips.saved_clip import open_text_encoder

        path = weights_path(DEMO_CLIPS[file]) if file in DEMO_CLIPS else listed_file(file, ENCODERS)
        clip, note = open_text_encoder(path, keep_clip)
        if note:
            log.warning("%s", note)
        report = "\n".join([path.name, *([f"  warning: {note}"] if note else [])])
        return io.NodeOutput(clip, report, ui={"text": [report]})
