"""Loading a T5 as a text encoder, and fitting its projection."""

import logging
from pathlib import Path

from comfy_api.latest import io

from ..training.common.text import filled_lines
from ..training.config.model import ModelConfig
from ..training.demo.files import TEXT_ENCODERS, weights_path
from .common.inputs import input_of, inputs_of, seed_input
from .common.paths import files, listed_file, listed_model, output_path

log = logging.getLogger(__name__)
ENCODERS = "text_encoders"
DEMO = "demo"
DEMO_CLIPS = {f"demo: {name}": f"text_encoders/{name}.safetensors" for name in TEXT_ENCODERS}
"""Combo value -> tuned text encoder of the demo model."""
SDXL = "sdxl"
SDXL_WIDTHS = (2048, 1280)
FITTED_ELSEWHERE = (
    "measured on the built-in prompts; the projection was fitted, and other prompts than those of the fit may have a "
    "far larger or smaller std. Give the prompts of the fit."
)


class RetuneLoadT5(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneLoadT5",
            display_name="Load T5",
            category="retune/text encoder",
            description="A T5 encoder with a projection to the width that the model reads, as a CLIP for any node.",
            search_aliases=["t5 encoder", "swap clip", "flan t5"],
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=files(ENCODERS, first=DEMO, folders=True),
                    default=DEMO,
                    tooltip="A T5 in models/text_encoders, a file or a Hugging Face folder with config.json, or the "
                    "demo's small T5.",
                ),
                io.Combo.Input(
                    "context_width",
                    options=["auto", "768", "1024", SDXL],
                    default="auto",
                    tooltip="Width that the model's cross-attention reads: 768 for SD1.x, 1024 for SD2, sdxl for SDXL "
                    "(2048, and a pooled output of 1280); auto asks the connected model, as the demo model needs.",
                ),
                io.Model.Input("model", optional=True, tooltip="The model to fit; needed for context_width auto."),
                input_of(ModelConfig, "max_tokens", min=2, max=4096, optional=True),
                *inputs_of(ModelConfig, "pad", "projection", optional=True),
                io.Combo.Input(
                    "projection_file",
                    options=files(ENCODERS, first="none"),
                    default="none",
                    optional=True,
                    tooltip="A saved text encoder whose projection is used instead of a new one.",
                ),
                keep_clip_input("A CLIP to use with the T5: its tokens come first, in sampling and in training."),
                io.Combo.Input(
                    "dtype",
                    options=["default", "fp32", "fp16", "bf16"],
                    default="default",
                    optional=True,
                    tooltip="Number format of the T5 weights in memory; default is ComfyUI's choice.",
                ),
                seed_input("Seed of the random projection.", optional=True),
            ],
            outputs=[io.Clip.Output(tooltip="The T5 with its projection; use it like any CLIP.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, encoder, context_width, model=None, **options):
        from ..training.text_encoder.projection import Projection
        from ..training.text_encoder.t5_file import read_t5_config
        from .clips.kept_clip import KeptClip
        from .clips.t5_clip import load_t5_clip
        from .ui.progress import reporting

        path = demo_t5() if encoder == DEMO else listed_model(encoder, ENCODERS)
        width, pooled_width = widths(context_width, model)
        keep_clip = options.get("keep_clip")
        if keep_clip is not None and KeptClip.of(keep_clip, width).gives_pooled(pooled_width):
            pooled_width = 0
        kind, seed = options.pop("projection", "orthogonal"), options.pop("seed", 0)
        file = options.pop("projection_file", "none")
        if file == "none":
            in_width = read_t5_config(path)["d_model"]
            projection = Projection(in_width, width, kind, seed=seed, pooled_width=pooled_width)
        else:
            saved = saved_of_width(listed_file(file, ENCODERS), width)
            saved.check_pooled(pooled_width)
            projection, options["target_std"] = saved.projection, saved.target_std
        with reporting(cls, "loading the T5"):
            clip = load_t5_clip(DEMO if encoder == DEMO else path, projection, **options)
        return io.NodeOutput(clip, ui={"text": [found_t5(path.name, projection)]})


class RetuneFitProjection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneFitProjection",
            display_name="Fit Projection",
            category="retune/text encoder",
            description="Gives a T5 the linear projection that comes nearest to another CLIP's output on your "
            "prompts, in closed form: close to the model's old encoder before any training.",
            search_aliases=["align t5", "ridge projection", "whitening", "covariance"],
            inputs=[
                io.Clip.Input("clip", tooltip="A T5 from Load T5; its projection is replaced."),
                io.Clip.Input("reference", tooltip="The CLIP to come near to: the one the model was trained with."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="Prompts to fit on, one a line: the more and the more like your own the better, ten at "
                    "least. Empty uses a built-in list of varied ones.",
                ),
                input_of(ModelConfig, "fit_method", id="method", optional=True),
            ],
            outputs=[
                io.Clip.Output(tooltip="The T5 with the fitted projection."),
                io.String.Output(
                    display_name="report",
                    tooltip="How much of the variance is explained on held-out prompts, and how near std and "
                    "covariance come.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, reference, prompts, method="ridge"):
        from .bridge.measure import fit_clip
        from .ui.progress import reporting

        with reporting(cls, "fitting the projection"):
            fitted, report = fit_clip(clip, reference, prompt_lines(prompts), method)
        return io.NodeOutput(fitted, report.text())


def save_t5(clip, prefix: str, about: dict) -> tuple[list[Path], list[str]]:
    """Writes what a T5 CLIP has of its own; the path, and warnings of what the file lacks."""
    from ..training.text_encoder.file import save_text_encoder
    from .clips.saved_clip import saved_text_encoder
    from .clips.t5_clip import t5_parts

    saved = saved_text_encoder(clip)
    path = output_path("clip", prefix, ".safetensors")
    save_text_encoder(path, saved, about)
    return [path], _missing_from_file(path.name, t5_parts(clip).patched, saved.keeps_clip)


def _missing_from_file(name: str, patched: bool, keeps_clip: bool) -> list[str]:
    """Warnings of what the file of a T5 CLIP lacks: its patches and its kept CLIP."""
    warnings = []
    if patched:
        warnings.append(
            f"{name} lacks the LoRA (or other patches) that this CLIP has on its T5: only projection, scale and "
            "padding are saved. Apply the LoRA again after Load Text Encoder; a tuned T5 lies in its run's folder."
        )
    if keeps_clip:
        warnings.append(
            f"{name} lacks the kept CLIP. Save or keep it elsewhere, and connect it to keep_clip of Load Text Encoder."
        )
    return warnings


def keep_clip_input(tooltip: str):
    """The input of both loaders."""
    return io.Clip.Input("keep_clip", optional=True, tooltip=tooltip)


def widths(context_width: str, model) -> tuple[int, int]:
    """Context and pooled width for a choice of Load T5; the latter is 0 where the model reads no pooled output."""
    from .bridge.denoiser import context_width_of, pooled_width_of

    if context_width == "auto":
        return context_width_of(model), pooled_width_of(model)
    return SDXL_WIDTHS if context_width == SDXL else (int(context_width), 0)


def prompt_lines(prompts: str) -> list[str]:
    """The lines of a text that hold something; the built-in list when none does."""
    from ..training.text_encoder.prompts import PROMPTS

    return filled_lines(prompts) or list(PROMPTS)


def found_t5(name: str, projection) -> str:
    """What Load T5 found in a file, and what it puts behind it, in a sentence."""
    return f"{name}: a T5 of width {projection.in_width}; its projection ({projection.kind}) gives {projection.width}."


def demo_t5() -> Path:
    """The demo's T5 file."""
    return weights_path("t5.safetensors")


def saved_of_width(path: Path, width: int):
    """A saved text encoder from its file; ValueError when its width is another."""
    from ..training.text_encoder.file import read_text_encoder

    saved = read_text_encoder(path)
    saved.check_width(width)
    return saved
