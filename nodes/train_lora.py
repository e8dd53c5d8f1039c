"""Training a LoRA."""

from comfy_api.latest import io

from ..training.config.lora import ALGORITHMS, LORA_PRESETS, TARGET_CHOICES, LoraConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import TrainingSettings
from .common import types
from .common.inputs import alpha_input, data_inputs, made_by, name_inputs, rank_input, rate_input, run_inputs, run_ui
from .common.types import LoraModel

LEARNING_RATE = 1e-4


def share_input(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=0.0, min=0.0, max=0.99, step=0.01, optional=True, tooltip=tooltip)


class RetuneTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = LoraConfig(run_name="my LoRA")
        return io.Schema(
            node_id="RetuneTrainLora",
            display_name="Train LoRA",
            category="retune/lora",
            description="Trains low-rank adapters of a UNet, and of its text encoder if you like, on captioned images. "
            "The run is a folder in output/retune: it can be stopped, killed and queued again, and goes on where it "
            "was.",
            search_aliases=["lora training", "locon", "lokr", "loha", "dora", "dreambooth", "finetune"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on; a patched clone comes out."),
                io.Clip.Input("clip", tooltip="The text encoder that the captions are read with."),
                *data_inputs(),
                rate_input("learning_rate", LEARNING_RATE, "Peak learning rate of the UNet's adapters."),
                rank_input("rank", d.rank, "Rank of the adapters."),
                alpha_input(
                    "alpha", d.alpha, "Scale of the adapters: alpha / rank multiplies them. It does not train."
                ),
                io.Combo.Input(
                    "algorithm",
                    options=list(ALGORITHMS),
                    default=d.algorithm,
                    tooltip="LoRA; LoCon adapts 3x3 convolutions too; LoHa and LoKr (LyCORIS); DoRA learns magnitudes.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGET_CHOICES),
                    default=d.targets,
                    tooltip="Layers that get an adapter; all adds the residual blocks. regex: see target_regex.",
                ),
                rate_input(
                    "text_encoder_learning_rate",
                    d.text_encoder_learning_rate,
                    "Peak learning rate of the text encoder's adapters; 0 leaves the text encoder alone.",
                ),
                *name_inputs(d.run_name),
                io.String.Input(
                    "target_regex",
                    default="",
                    optional=True,
                    tooltip="For targets regex: found in names such as diffusion_model.input_blocks.1.1.proj_in.",
                ),
                *run_inputs(),
                io.Combo.Input(
                    "preset",
                    options=list(LORA_PRESETS),
                    default="custom",
                    optional=True,
                    tooltip="A named group of values wins over those above that it names; see the help page.",
                ),
                rank_input("conv_rank", 0, "Rank for 3x3 convolutions; 0: rank.", low=0, optional=True),
                alpha_input("conv_alpha", 0.0, "Scale for 3x3 convolutions; 0: alpha.", low=0.0, optional=True),
                io.Int.Input(
                    "lokr_factor",
                    default=-1,
                    min=-1,
                    max=4096,
                    optional=True,
                    tooltip="LoKr: size of the smaller factor; -1: near the square root.",
                ),
                share_input("dropout", "Share of each adapter's inputs set to zero while training."),
                share_input("rank_dropout", "Share of the ranks left out while training."),
                share_input("module_dropout", "Share of the adapters left out while training."),
                io.Float.Input(
                    "lora_plus_ratio",
                    default=1.0,
                    min=0.001,
                    max=1000.0,
                    step=0.5,
                    round=False,
                    optional=True,
                    tooltip="LoRA+ (arXiv 2402.12354): how much faster the matrix that starts at zero learns; the "
                    "paper has 16.",
                ),
                LoraModel.Input(
                    "start",
                    optional=True,
                    tooltip="A LoRA whose values the adapters begin with; to go on with a run use its name instead.",
                ),
                io.Float.Input(
                    "text_encoder_2_learning_rate",
                    default=d.text_encoder_2_learning_rate,
                    min=-1.0,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    optional=True,
                    tooltip="Peak learning rate of SDXL's second text encoder; -1: as of the first, 0 leaves it alone.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the trained LoRA at strength 1."),
                io.Clip.Output(tooltip="The text encoder with the trained LoRA, or as it came if it did not train."),
                LoraModel.Output(display_name="lora", tooltip="For Save LoRA, Apply LoRA and ComfyUI's LoRA nodes."),
                types.Run.Output(display_name="run", tooltip="The run, for charts and saving."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, clip, vae, dataset, settings=None, samples=None, preset="custom", start=None, **values):
        from ..training.recipes.lora import train_lora
        from .bridge.lora_patches import Row, apply_loras, lora_of
        from .bridge.view import text_to_image
        from .common.paths import runs_folder
        from .ui.progress import NodeCallbacks

        values |= LORA_PRESETS[preset]
        config = LoraConfig(settings=settings or TrainingSettings(), samples=samples or SamplePrompts(), **values)
        progress = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        with progress as callbacks, text_to_image(model, clip, vae) as view:
            callbacks.reserve_for_dataset(view, dataset, config.batch_size)
            first = None if start is None else lora_of("start", start)
            details = made_by(cls.hidden)
            trained = train_lora(view, dataset, config, runs_folder(), callbacks, details, first)
        row = Row(lora_of(config.run_name, trained.tensors), 1.0, 1.0)
        model, patched, _ = apply_loras(model, clip, [row])
        clip, run = patched if config.trains_text else clip, trained.path.parent
        return io.NodeOutput(model, clip, trained.tensors, run, ui=run_ui(config.run_name))
