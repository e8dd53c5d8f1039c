"""The demo model and its data."""

from comfy_api.latest import io

from .common import types
from .common.inputs import seed_input
from .common.paths import files, listed_file

BUILT_IN = "built in"
PLACES = ("checkpoints", "diffusion_models")


class RetuneLoadDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneLoadDemoModel",
            display_name="Load Demo Model",
            category="retune/demo",
            description="A complete small text-to-image model (128x128 pixels, fp32) that ships with Retune. "
            "Every workflow can be tried on it, without a download and without a GPU.",
            search_aliases=["retune demo", "tiny model"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=["clip", "none"],
                    default="clip",
                    tooltip="clip: the model's own CLIP; none: no text encoder, for graphs that bring another one.",
                ),
                io.Combo.Input(
                    "file",
                    options=files(*PLACES, first=BUILT_IN),
                    default=BUILT_IN,
                    optional=True,
                    tooltip="The built-in model, or one that ModelSave or CheckpointSave wrote after training.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The UNet."),
                io.Clip.Output(tooltip="The CLIP text encoder; empty when text_encoder is none."),
                io.Vae.Output(tooltip="The autoencoder."),
            ],
        )

    @classmethod
    def execute(cls, text_encoder, file=BUILT_IN):
        from .common.demo_model import load_demo

        path = None if file == BUILT_IN else listed_file(file, *PLACES)
        return io.NodeOutput(*load_demo(path, with_clip=text_encoder == "clip"))


class RetuneDemoDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneDemoDataset",
            display_name="Demo Dataset",
            category="retune/demo",
            description="Drawn, captioned pictures of coloured shapes: what the demo model is trained on.",
            search_aliases=["shapes dataset"],
            inputs=[
                io.Int.Input("count", default=256, min=1, max=20000, tooltip="How many pictures to draw."),
                seed_input("Seed of the drawn pictures."),
                io.String.Input(
                    "subset",
                    default="",
                    tooltip="Whole words that every caption must contain; empty allows all.",
                ),
                io.Combo.Input(
                    "look",
                    options=["plain", "warm edges"],
                    default="plain",
                    optional=True,
                    tooltip="plain: as the demo model draws them. warm edges: orange towards the corners, a style "
                    "that a LoRA can learn.",
                ),
            ],
            outputs=[
                types.Dataset.Output(display_name="dataset", tooltip="The pictures with their captions."),
                io.Image.Output(tooltip="The pictures as one batch."),
                io.String.Output(display_name="captions", tooltip="One caption a line."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, count, seed, subset="", look="plain"):
        from ..training.data.dataset import from_images
        from ..training.demo.scenes import demo_examples
        from .ui.progress import reporting

        with reporting(cls, f"drawing {count} pictures"):
            images, captions = demo_examples(count, seed, subset, look)
        return io.NodeOutput(from_images([images], captions), images.movedim(1, -1), "\n".join(captions))
