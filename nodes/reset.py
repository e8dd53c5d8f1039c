"""Re-initialising attention layers that were trained with another text encoder."""

from comfy_api.latest import io

from ..training.config.reset import ResetConfig
from .common.inputs import input_of, inputs_of, seed_input


class RetuneResetAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneResetAttention",
            display_name="Reset Attention",
            category="retune/model",
            description="Re-initialises chosen attention projections of a UNet, so that retraining does not start from "
            "the weights that another text encoder was used with. Everything else stays bit-identical.",
            search_aliases=["reinit cross attention", "reset unet"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it is not changed, a patched clone comes out."),
                input_of(ResetConfig, "layers", default="cross-attention"),
                input_of(ResetConfig, "init"),
                input_of(ResetConfig, "strength", min=0.0, max=10.0),
                *inputs_of(ResetConfig, "include_output", "blocks"),
                seed_input("Seed of the random weights."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with reset layers."),
                io.String.Output(display_name="report", tooltip="Every changed tensor with its std before and after."),
            ],
        )

    @classmethod
    def execute(cls, model, layers, init, strength, include_output, blocks, seed):
        from ..training.models.layers import reset_weights
        from .common.weights import attention_weights, with_unet_weights

        config = ResetConfig(
            layers=layers,
            init=init,
            strength=strength,
            include_output=include_output,
            blocks=blocks.strip(),
            seed=seed,
        )
        weights, report = reset_weights(attention_weights(model), config)
        return io.NodeOutput(with_unet_weights(model, weights), str(report))
