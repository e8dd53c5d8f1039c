"""Resetting attention layers that were trained for another text encoder."""

from comfy_api.latest import io


class RetuneResetAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneResetAttention",
            display_name="Reset Attention",
            category="retune/model",
            description="Re-initialises chosen attention projections of a UNet, so that retraining does not start from "
            "what they learned about another text encoder. Everything else stays bit-identical.",
            search_aliases=["reinit cross attention", "reset unet"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it is not changed, a patched clone comes out."),
                io.Combo.Input(
                    "layers",
                    options=["cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention"],
                    default="cross-attention",
                    tooltip="cross-attention reads the text; K/V are the two maps that see it; QK are queries and keys "
                    "of both kinds; self-attention looks at the picture only.",
                ),
                io.Combo.Input(
                    "init",
                    options=["default", "normal", "zero output", "perturb"],
                    default="default",
                    tooltip="default: as a fresh nn.Linear; normal: noise at the tensor's own std; zero output: as "
                    "default, and zeros in the output projection; perturb: old weights plus noise.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Blend between old (0) and new (1) weights; for perturb, noise in units of each tensor's "
                    "std, up to 10.",
                ),
                io.Boolean.Input(
                    "include_output",
                    default=False,
                    tooltip="Reset the output projections of whole-attention choices too; no effect for K/V and QK. "
                    "'zero output' zeroes them in any case.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Regular expression searched in parameter names, such as middle|output_blocks; empty means "
                    "everywhere.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Names the random weights.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with reset layers."),
                io.String.Output(display_name="report", tooltip="Every changed tensor with its std before and after."),
            ],
        )

    @classmethod
    def execute(cls, model, layers, init, strength, include_output, blocks, seed):
        from ..training.models.layers import ResetConfig, reset_weights
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
