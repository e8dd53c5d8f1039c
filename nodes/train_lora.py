"""Training a LoRA."""

from comfy_api.latest import io

from ..training.config.lora import LORA_PRESETS, LoraConfig
from .common import types
from .common.inputs import (
    MAX_ALPHA,
    MAX_RATE,
    MIN_ALPHA,
    data_inputs,
    input_of,
    inputs_of,
    made_by,
    name_inputs,
    preset_input,
    run_config,
    run_inputs,
    run_ui,
    with_preset,
)
from .common.types import LoraModel

LEARNING_RATE = 1e-4
"""Default of the node; adapters take a higher rate than the weights of a model, which the command line's is for."""

PRESET_TEXT = (
    "Choosing one sets rank, alpha, algorithm and targets; changing one of them afterwards makes it custom. Through "
    "the API a preset wins over the values that it names. It changes nothing of Training Settings, whose presets for "
    "a card go with it."
)


def adapter_inputs() -> list:
    """What the adapters are, and how fast they train."""
    return [
        input_of(LoraConfig, "learning_rate", default=LEARNING_RATE, max=MAX_RATE),
        input_of(LoraConfig, "rank"),
        input_of(LoraConfig, "alpha", min=MIN_ALPHA, max=MAX_ALPHA),
        *inputs_of(LoraConfig, "algorithm", "targets"),
        input_of(LoraConfig, "text_encoder_learning_rate", max=MAX_RATE),
    ]


def variant_inputs() -> list:
    """Choices of single algorithms, and regularisation of the adapters."""
    return [
        input_of(LoraConfig, "conv_rank", optional=True),
        input_of(LoraConfig, "conv_alpha", max=MAX_ALPHA, optional=True),
        input_of(LoraConfig, "lokr_factor", min=-1, max=4096, optional=True),
        *inputs_of(LoraConfig, "dropout", "rank_dropout", "module_dropout", "lora_plus_ratio", optional=True),
    ]


class RetuneTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneTrainLora",
            display_name="Train LoRA (Retune)",
            category="retune/lora",
            description="Trains low-rank adapters of a UNet, and of its text encoder if you like, on captioned images. "
            "The run is a folder in output/retune: it can be stopped, killed and queued again, and resumes where it "
            "was.",
            search_aliases=["lora training", "locon", "lokr", "loha", "dora", "dreambooth", "finetune"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on; a patched clone comes out."),
                io.Clip.Input("clip", tooltip="The text encoder that the captions are read with."),
                *data_inputs(),
                *adapter_inputs(),
                *name_inputs("my LoRA"),
                input_of(LoraConfig, "target_regex", optional=True),
                *run_inputs(),
                preset_input(LORA_PRESETS, PRESET_TEXT),
                *variant_inputs(),
                LoraModel.Input(
                    "start",
                    optional=True,
                    tooltip="A LoRA whose values the adapters begin with; to resume a run use its name instead.",
                ),
                input_of(LoraConfig, "text_encoder_2_learning_rate", min=-1.0, max=MAX_RATE, optional=True),
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
        values = with_preset(preset, LORA_PRESETS, values)
        config = run_config(LoraConfig, settings, samples, values)
        results = train(cls.hidden, model, clip, vae, dataset, config, start)
        return io.NodeOutput(*results, ui=run_ui(config.run_name))


def train(hidden, model, clip, vae, dataset, config: LoraConfig, start=None) -> tuple:
    """Trains a LoRA as a node with these hidden inputs does.

    Returns:
        MODEL and CLIP with the LoRA, its tensors, and the run's folder.
    """
    from ..training.recipes.lora import train_lora
    from .bridge.lora_patches import Row, apply_loras, lora_of
    from .bridge.view import text_to_image
    from .common.paths import runs_folder
    from .ui.progress import NodeCallbacks

    progress = NodeCallbacks(hidden.unique_id, config.run_name, config.steps)
    with progress as callbacks, text_to_image(model, clip, vae) as view:
        callbacks.reserve_for_dataset(view, dataset, config.batch_size)
        first = None if start is None else lora_of("start", start)
        trained = train_lora(view, dataset, config, runs_folder(), callbacks, made_by(hidden), first)
    row = Row(lora_of(config.run_name, trained.tensors), 1.0, 1.0)
    model, patched, _ = apply_loras(model, clip, [row])
    return model, patched if config.trains_text else clip, trained.tensors, trained.path.parent
