"""Retraining a model."""

from comfy_api.latest import io

from ..training.config.run import TrainModelConfig
from .common import types
from .common.inputs import (
    MAX_RATE,
    data_inputs,
    input_of,
    inputs_of,
    made_by,
    name_inputs,
    run_config,
    run_inputs,
    run_ui,
)


class RetuneTrainModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneTrainModel",
            display_name="Train Model",
            category="retune/training",
            description="Retrains layers of a UNet (and the text encoder's projection) on captioned images. The run is "
            "a folder in output/retune: it can be stopped, killed and queued again, and resumes where it was.",
            search_aliases=["finetune unet", "train cross attention", "retrain"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to retrain; a patched clone comes out."),
                io.Clip.Input("clip", tooltip="The text encoder whose output the model learns to follow."),
                *data_inputs(),
                input_of(TrainModelConfig, "learning_rate", max=MAX_RATE),
                *inputs_of(TrainModelConfig, "train", "train_projection"),
                *name_inputs("my run"),
                *run_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The trained model."),
                io.Clip.Output(tooltip="The text encoder with its trained projection."),
                types.Run.Output(display_name="run", tooltip="The run, for charts and saving."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, clip, vae, dataset, settings=None, samples=None, **values):
        from ..training.recipes.unet import train_model
        from .bridge.text_encoder import with_projection
        from .bridge.view import text_to_image
        from .common.paths import runs_folder
        from .common.weights import with_unet_weights
        from .ui.progress import NodeCallbacks

        config = run_config(TrainModelConfig, settings, samples, values)
        progress = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        with progress as callbacks, text_to_image(model, clip, vae) as view:
            callbacks.reserve_for_dataset(view, dataset, config.batch_size)
            trained = train_model(view, dataset, config, runs_folder(), callbacks, made_by(cls.hidden))
        new_model = with_unet_weights(model, trained.unet)
        new_clip = with_projection(clip, trained.projection)
        return io.NodeOutput(new_model, new_clip, trained.path.parent, ui=run_ui(config.run_name))
