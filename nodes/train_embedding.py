"""Training new words of a text encoder."""

from comfy_api.latest import io

from ..training.config.embedding import LORA_TARGETS, EmbeddingConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import TrainingSettings
from .common import types
from .common.inputs import alpha_input, data_inputs, made_by, name_inputs, rank_input, rate_input, run_inputs, run_ui
from .common.types import LoraModel

LEARNING_RATE = 5e-3


class RetuneTrainEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = EmbeddingConfig(run_name="my embedding", token="<my-thing>")
        return io.Schema(
            node_id="RetuneTrainEmbedding",
            display_name="Train Embedding",
            category="retune/embedding",
            description="Trains new words of a text encoder on a few images (textual inversion), and a LoRA beside "
            "them if you like. The model and its vocabulary stay as they are. The run is a folder in output/retune: it "
            "can be stopped, killed and queued again, and goes on where it was.",
            search_aliases=["textual inversion", "embedding training", "learn a word", "pivotal tuning", "concept"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model whose pictures teach the word; it is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder that gets the word; a clone that knows it comes out."),
                *data_inputs(),
                io.String.Input(
                    "token",
                    default=d.token,
                    tooltip="The new word for prompts, such as <my-cat>. Several with commas between them, told apart "
                    "by the captions.",
                ),
                io.Int.Input(
                    "vectors",
                    default=d.vectors,
                    min=1,
                    max=75,
                    tooltip="Vectors behind the word; more hold more and take more places of a prompt's 77.",
                ),
                io.String.Input(
                    "initial_text",
                    default="",
                    tooltip="What to start from: a word or two for the thing, or a word from Load Embedding. Empty "
                    "starts from random vectors.",
                ),
                rate_input("learning_rate", LEARNING_RATE, "Peak learning rate of the vectors."),
                *name_inputs(d.run_name),
                io.Combo.Input(
                    "template",
                    options=["auto", "captions", "object", "style", "own"],
                    default=d.template,
                    optional=True,
                    tooltip="captions: those of the images, which hold the word. object, style: sentences such as a "
                    "photo of a ... own: those of lines. auto: captions if any holds the word, else object.",
                ),
                *run_inputs(),
                io.String.Input(
                    "lines",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For template own, one a line: {} is the word, {caption} the image's caption.",
                ),
                io.String.Input(
                    "caption_word",
                    default="",
                    optional=True,
                    tooltip="A word of the captions, such as cat, whose place the new word takes; several with commas.",
                ),
                io.Combo.Input(
                    "norm",
                    options=["vocabulary", "free"],
                    default=d.norm,
                    optional=True,
                    tooltip="vocabulary: vectors stay as long as usual words, so that they mix with others. free: they "
                    "may grow.",
                ),
                rank_input(
                    "lora_rank",
                    0,
                    "Rank of a LoRA on the model that trains in the same run (pivotal tuning); 0: none.",
                    low=0,
                    optional=True,
                ),
                alpha_input(
                    "lora_alpha", d.lora_alpha, "Scale of that LoRA: alpha / rank multiplies it.", optional=True
                ),
                io.Combo.Input(
                    "lora_targets",
                    options=list(LORA_TARGETS),
                    default=d.lora_targets,
                    optional=True,
                    tooltip="Layers of the model that get an adapter of that LoRA.",
                ),
                rate_input(
                    "lora_learning_rate", d.lora_learning_rate, "Peak learning rate of that LoRA.", optional=True
                ),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoder, whose prompts know the word."),
                types.Embedding.Output(display_name="embedding", tooltip="For Save Embedding."),
                types.Run.Output(display_name="run", tooltip="The run, for charts and saving."),
                io.Model.Output(tooltip="The model, with the LoRA if one trained."),
                LoraModel.Output(display_name="lora", tooltip="The LoRA that trained beside the word; else empty."),
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

        values["lines"] = tuple(line.strip() for line in lines.splitlines() if line.strip())
        config = EmbeddingConfig(settings=settings or TrainingSettings(), samples=samples or SamplePrompts(), **values)
        progress = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        with progress as callbacks, text_to_image(model, clip, vae) as view:
            callbacks.reserve_for_dataset(view, dataset, config.batch_size)
            details = made_by(cls.hidden)
            trained = train_embedding(view, dataset, config, runs_folder(), callbacks, details)
        clip = with_concepts(clip, trained.embedding.concepts)
        if trained.lora:
            model, _, _ = apply_loras(model, None, [Row(lora_of(config.run_name, trained.lora), 1.0, 1.0)])
        run, ui = trained.path.parent, run_ui(config.run_name)
        return io.NodeOutput(clip, trained.embedding, run, model, trained.lora, ui=ui)
