"""LoRA files on a model and its text encoder."""

import logging
from pathlib import Path

from comfy_api.latest import io

from ..training.demo.files import LORAS, weights_path
from .common.paths import files, listed_file
from .common.types import LoraModel

log = logging.getLogger(__name__)

MAX_LORAS = 8
NONE = "none"
DEMO = {f"demo: {name}": f"loras/{name}.safetensors" for name in LORAS}
"""Combo value -> LoRA of the demo model."""


def strength_input(name: str, tooltip: str, **more) -> io.Input:
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip, **more)


def row_inputs(number: int, options: list[str]) -> list[io.Input]:
    """The inputs of one row of the node."""
    return [
        io.Combo.Input(
            f"lora_{number}",
            options=options,
            default=NONE,
            tooltip="A file of models/loras, from any trainer: kohya, diffusers, LyCORIS, ComfyUI, OneTrainer. The "
            "demo ones are for the demo model.",
        ),
        strength_input(f"strength_model_{number}", "Strength on the model; 0 has no effect, below 0 is opposite."),
        strength_input(f"strength_clip_{number}", "Strength on the text encoder."),
        io.Boolean.Input(
            f"enabled_{number}", default=True, optional=True, tooltip="Off: as if this row were not there."
        ),
        io.String.Input(
            f"blocks_{number}",
            default="",
            optional=True,
            multiline=True,
            tooltip="Weights per block: numbers, text encoder first (17 or 26 for SD1.x, 12 or 20 for SDXL), or lines "
            "such as output_blocks=0.5. Empty is 1 everywhere.",
        ),
    ]


def count_input() -> io.Input:
    options = [*files("loras", first=NONE), *DEMO]
    rows = [row_inputs(number, options) for number in range(1, MAX_LORAS + 1)]
    return io.DynamicCombo.Input(
        "count",
        options=[io.DynamicCombo.Option(str(n), sum(rows[:n], [])) for n in range(1, MAX_LORAS + 1)],
        tooltip="How many files.",
    )


class RetuneApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneApplyLora",
            display_name="Apply LoRA",
            category="retune/lora",
            description="Puts LoRA files of any trainer on a model and its text encoder, also a T5 of this package: "
            "the weights become W + the sum of strength x alpha / rank x B A. The report lists each file's kind "
            "and which of its keys were used.",
            search_aliases=[
                "lora loader",
                "load lora",
                "lora stack",
                "multi lora",
                "lora block weight",
                "lycoris",
                "dora",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model; it is not changed, a patched clone comes out."),
                count_input(),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder; without it only the model is patched."),
                LoraModel.Input("trained", optional=True, tooltip="A LoRA from a training node, added to the files."),
                strength_input("trained_strength_model", "Strength of the trained LoRA on the model.", optional=True),
                strength_input(
                    "trained_strength_clip", "Strength of the trained LoRA on the text encoder.", optional=True
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with all LoRAs."),
                io.Clip.Output(tooltip="The text encoder with all LoRAs; empty when none was connected."),
                io.String.Output(
                    display_name="report",
                    tooltip="For each file: format, rank, alpha, base model, how many keys were used and which not.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, count=None, **_):
        paths = [path_of(row["lora"]) for row in chosen_rows(count or {})]
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]

    @classmethod
    def execute(cls, model, count, clip=None, trained=None, trained_strength_model=1.0, trained_strength_clip=1.0):
        from .bridge.lora_patches import Row, apply_loras, lora_of

        rows = [file_row(row) for row in chosen_rows(count)]
        if trained is not None:
            strengths = trained_strength_model, trained_strength_clip
            rows.append(Row(lora_of("trained", trained), *strengths, is_file=False))
        model, clip, uses = apply_loras(model, clip, rows)
        for line in (line for use in uses for line in use.warnings()):
            log.warning("%s", line)
        report = "\n\n".join(use.text() for use in uses) or "no LoRA chosen"
        return io.NodeOutput(model, clip, report, ui={"text": [report]})


def chosen_rows(count: dict) -> list[dict]:
    """The rows that are on and have a file: lora, strength_model, strength_clip, blocks."""
    rows = []
    for number in range(1, int(count.get("count", 0)) + 1):
        names = ("lora", "strength_model", "strength_clip", "blocks")
        row = {name: count[f"{name}_{number}"] for name in names if f"{name}_{number}" in count}
        if count.get(f"enabled_{number}", True) and row.get("lora", NONE) != NONE:
            rows.append(row)
    return rows


def path_of(name: str) -> Path:
    """The file of a combo value."""
    return weights_path(DEMO[name]) if name in DEMO else listed_file(name, "loras")


def file_row(row: dict):
    """A row with its file read. Errors: ValueError for a file that is not listed, damaged, or no LoRA."""
    from ..training.formats.lora import read_lora_tensors
    from .bridge.lora_patches import Row, lora_of

    lora = lora_of(row["lora"], *read_lora_tensors(path_of(row["lora"])))
    return Row(lora, row["strength_model"], row["strength_clip"], row.get("blocks", ""))
