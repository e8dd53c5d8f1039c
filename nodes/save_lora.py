"""A trained LoRA as a file that other programs read."""

from datetime import UTC, datetime
from pathlib import Path

from comfy_api.latest import io

from .common import types
from .common.paths import named_after, output_path, size_of

PREFIX = "retune/lora"


class RetuneSaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneSaveLora",
            display_name="Save LoRA",
            category="retune/lora",
            description="Writes a trained LoRA into output/loras: kohya's layout for ComfyUI, A1111, Forge and "
            "sd-scripts, or diffusers' for load_lora_weights. With a run, its settings, a picture and hashes are in "
            "the file's metadata.",
            search_aliases=["export lora", "save lora", "kohya", "safetensors"],
            is_output_node=True,
            inputs=[
                types.LoraModel.Input("lora", tooltip="From Train LoRA, or from any other node that trains one."),
                io.Combo.Input(
                    "format",
                    options=["kohya", "diffusers"],
                    tooltip="kohya: every kind, read by nearly every program. diffusers: LoRA, LoCon and DoRA with a "
                    "magnitude per output.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=PREFIX,
                    tooltip="Name of the file; may hold a sub-folder. Left as it is, or empty, a connected run gives "
                    "its name.",
                ),
                types.Run.Input(
                    "run", optional=True, tooltip="The run it comes from: settings and last sample go into the file."
                ),
                io.Combo.Input(
                    "dtype",
                    options=["fp32", "fp16", "bf16"],
                    default="fp32",
                    optional=True,
                    tooltip="Numbers in the file. fp16 halves it and fails on numbers above 65504.",
                ),
                io.String.Input(
                    "trigger_words", default="", optional=True, tooltip="Words that call up what was trained."
                ),
                io.String.Input("title", default="", optional=True, tooltip="Empty: the run's name."),
                io.Combo.Input(
                    "base",
                    options=["auto", "SD1.x", "SD2.x", "SDXL"],
                    default="auto",
                    optional=True,
                    tooltip="Model family, where neither the run nor the layers show it.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file written.")],
        )

    @classmethod
    def execute(
        cls, lora, format, filename_prefix, run=None, dtype="fp32", trigger_words="", title="", base="auto"
    ) -> io.NodeOutput:
        from ..training.formats.lora_metadata import LoraDescription, last_sample, thumbnail_uri
        from ..training.formats.lora_save import save_lora
        from ..training.runs.folder import RunFolder

        picture = last_sample(Path(run)) if run is not None else None
        about = LoraDescription(
            run=(RunFolder(Path(run)).config() or {}) if run is not None else {},
            trigger_words=trigger_words.strip(),
            title=title.strip(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            thumbnail=thumbnail_uri(picture) if picture else "",
        )
        path = output_path("loras", named_after(run, filename_prefix, PREFIX, "retune/"), ".safetensors")
        warnings = save_lora(path, lora, format, dtype, about, base=base)
        return io.NodeOutput(str(path), ui={"text": [str(path), size_of(path), *warnings]})
