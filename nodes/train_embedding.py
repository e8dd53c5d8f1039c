"""Training new words of a text encoder."""

from comfy_api.latest import io

from ..training.common.text import filled_lines
from ..training.config.embedding import EmbeddingConfig
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
    run_config,
    run_inputs,
    run_ui,
)
from .common.types import LoraModel

LEARNING_RATE = 5e-3
"""Default of the node; token embeddings take a far higher rate than weights, which the command line's is for."""


def word_inputs() -> list:
    """The new token, and what its vectors start from."""
    return [
        input_of(EmbeddingConfig, "token", default="<my-thing>"),
        *inputs_of(EmbeddingConfig, "vectors", "initial_text"),
        input_of(EmbeddingConfig, "learning_rate", default=LEARNING_RATE, max=MAX_RATE),
    ]


def lora_inputs() -> list:
    """A LoRA that trains in the same run."""
    return [
        input_of(EmbeddingConfig, "lora_rank", optional=True),
        input_of(EmbeddingConfig, "lora_alpha", min=MIN_ALPHA, max=MAX_ALPHA, optional=True),
        input_of(EmbeddingConfig, "lora_targets", optional=True),
        input_of(EmbeddingConfig, "lora_learning_rate", max=MAX_RATE, optional=True),
    ]


class RetuneTrainEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneTrainEmbedding",
            display_name="Train Embedding",
            category="retune/embedding",
            description="Trains new words of a text encoder on a few images (textual inversion), and a LoRA with "
            "them if you like. The model and its vocabulary stay as they are. The run is a folder in output/retune: it "
            "can be stopped, killed and queued again, and resumes where it was.",
            search_aliases=["textual inversion", "embedding training", "learn a word", "pivotal tuning", "concept"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model whose pictures teach the word; it is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that gets the word; a clone that has it comes out."),
                *data_inputs(),
                *word_inputs(),
                *name_inputs("my embedding"),
                input_of(EmbeddingConfig, "template", optional=True),
                *run_inputs(),
                *inputs_of(EmbeddingConfig, "lines", "caption_word", "norm", optional=True),
                *lora_inputs(),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoder, which reads the word in prompts."),
                types.Embedding.Output(display_name="embedding", tooltip="For Save Embedding."),
                types.Run.Output(display_name="run", tooltip="The run, for charts and saving."),
                io.Model.Output(tooltip="The model, with the LoRA if one trained."),
                LoraModel.Output(display_name="lora", tooltip="The LoRA that trained in the same run; else empty."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, clip, vae, dataset, settings=None, samples=None, lines="", **values):
        from ..training.recipes.textual_inversion import train_embedding
        from .bridge.lora_patches import Row, apply_loras, lora_of
        from .bridge.view import text_to_image
        from .clips.concept_tokens import with_concepts
        from .common.paths import runs_folder
        from .ui.progress import NodeCallbacks

        values["lines"] = tuple(filled_lines(lines))
        config = run_config(EmbeddingConfig, settings, samples, values)
        progress = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        with progress as callbacks, text_to_image(model, clip, vae) as view:
            callbacks.reserve_for_dataset(view, dataset, config.batch_size)
            trained = train_embedding(view, dataset, config, runs_folder(), callbacks, made_by(cls.hidden))
        clip = with_concepts(clip, trained.embedding.concepts)
        if trained.lora:
            model, _, _ = apply_loras(model, None, [Row(lora_of(config.run_name, trained.lora), 1.0, 1.0)])
        run, ui = trained.path.parent, run_ui(config.run_name)
        return io.NodeOutput(clip, trained.embedding, run, model, trained.lora, ui=ui)
