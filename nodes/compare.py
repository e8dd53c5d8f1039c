"""Before and after: pictures of prompts by several models in one labelled table."""

import logging

from comfy_api.latest import io

from ..training.common.text import filled_lines, parse_numbers
from .common.inputs import expect_given, seed_input
from .common.paths import files
from .common.types import LoraModel
from .lora import DEMO, NONE, path_of

log = logging.getLogger(__name__)

MAX_MODELS, STRENGTHS = 8, "0, 0.5, 1, 1.5"


def growing(name: str, kind: type, tooltip: str, every: str) -> io.Input:
    """An optional input that grows with its connections: <name>s of <name>0, <name>1 and so on."""
    one = kind.Input(name, optional=True, tooltip=every)
    template = io.Autogrow.TemplatePrefix(one, prefix=name, min=0, max=MAX_MODELS)
    return io.Autogrow.Input(f"{name}s", template=template, optional=True, tooltip=tooltip)


def sampling_inputs() -> list[io.Input]:
    """The inputs of KSampler and Empty Latent Image, with usual values."""
    import comfy.samplers

    names, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
    return [
        io.Int.Input("width", default=512, min=64, max=16384, step=8, tooltip="Pixels; 128 for the demo model."),
        io.Int.Input("height", default=512, min=64, max=16384, step=8, tooltip="Pixels; 128 for the demo model."),
        seed_input("Seed of the noise that every picture starts from."),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the sampler."),
        io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="Scale of classifier-free guidance."),
        io.Combo.Input("sampler_name", options=names, default="euler", tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=schedulers, default="normal", tooltip="As in KSampler."),
        io.String.Input("negative", multiline=True, default="", tooltip="Negative prompt of every picture."),
    ]


class RetuneCompareGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneCompareGrid",
            display_name="Compare Grid",
            category="retune/training",
            description="Draws each prompt with several strengths of a LoRA, or with several models and text "
            "encoders, always from the same noise, in one table with labels: before and after at one glance.",
            search_aliases=["xy plot", "before after", "lora strength test", "compare models", "image grid"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to compare with: without the LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder, without the LoRA."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.String.Input(
                    "prompts", multiline=True, default="a photo of a dog", tooltip="One a line; a row of pictures each."
                ),
                *sampling_inputs(),
                LoraModel.Input("lora", optional=True, tooltip="A trained LoRA: a column for each of the strengths."),
                io.Combo.Input(
                    "lora_file",
                    options=[*files("loras", first=NONE), *DEMO],
                    default=NONE,
                    optional=True,
                    tooltip="A LoRA file instead; with lora connected both add up.",
                ),
                io.String.Input(
                    "strengths",
                    default=STRENGTHS,
                    optional=True,
                    tooltip="Strengths of the LoRA on model and text encoder; 0 is the model without it.",
                ),
                growing("model", io.Model, "More models, a column each, after the others.", "A model to compare."),
                growing("clip", io.Clip, "Text encoders of these models; clip without one.", "A text encoder."),
                io.String.Input(
                    "titles",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Own titles of the columns, one a line. Empty: strengths, or names of the inputs.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The table as one picture."),
                io.Image.Output(display_name="pictures", tooltip="The single pictures, row after row, as one batch."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_file=NONE, **_):
        return None if lora_file == NONE else path_of(lora_file).stat().st_mtime_ns

    @classmethod
    def execute(cls, model, clip, vae, prompts, lora=None, lora_file=NONE, strengths=STRENGTHS, titles="", **options):
        import torch
        from comfy_api.latest import ui

        from ..training.plots.picture_grid import picture_grid
        from .bridge.compare import Sampling, draw_column, titled
        from .ui.progress import reporting

        expect_given(model=model, clip=clip, vae=vae)
        rows = filled_lines(prompts)
        if not rows:
            raise ValueError("prompts is empty; expected one prompt a line.")
        models, clips = (options.pop(name, None) or {} for name in ("models", "clips"))
        found = columns_of(model, clip, loras_of(lora, lora_file), strengths, models, clips)
        columns, sampling, drawn = titled(found, filled_lines(titles)), Sampling(**options), []
        for number, column in enumerate(columns, 1):
            with reporting(cls, f"drawing column {number} of {len(columns)}: {column.title}"):
                drawn.append(draw_column(column, vae, rows, sampling))
        pictures = torch.stack(drawn, dim=1).flatten(0, 1)
        grid = picture_grid(pictures, rows, [column.title for column in columns])[None]
        return io.NodeOutput(grid, pictures, ui=ui.PreviewImage(grid, cls=cls))


def loras_of(lora, file: str) -> list:
    """The LoRAs of a LORA_MODEL and of a combo value, where there are such."""
    from ..training.formats.lora import read_lora_tensors
    from .bridge.lora_patches import Row, lora_of

    rows = [] if lora is None else [Row(lora_of("lora", lora), 1.0, 1.0, is_file=False)]
    if file != NONE:
        rows.append(Row(lora_of(file, *read_lora_tensors(path_of(file))), 1.0, 1.0))
    return rows


def columns_of(model, clip, loras: list, strengths: str, models: dict, clips: dict) -> list:
    """Columns of the strengths of LoRAs, or of the model itself without one; then those of other models."""
    from .bridge.compare import Column, lora_columns, model_columns

    others = model_columns(model, clip, models, clips)
    if not loras:
        return [Column("base", model, clip), *others]
    numbers = parse_numbers(strengths, "strengths")
    if not numbers:
        raise ValueError("strengths is empty; expected numbers such as 0, 0.5, 1, 1.5.")
    columns, warnings = lora_columns(model, clip, loras, numbers)
    for warning in warnings:
        log.warning("%s", warning)
    return columns + others
