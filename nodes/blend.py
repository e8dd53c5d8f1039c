"""Blends of text encoders and of encoded prompts: how much of a tuned encoder, and at which steps."""

from comfy_api.latest import io

MAX_ENCODERS = 100


class RetuneBlendTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        clip = io.Clip.Input("clip", tooltip="A text encoder to blend; the inputs are not changed.")
        return io.Schema(
            node_id="RetuneBlendTextEncoders",
            display_name="Blend Text Encoders",
            category="retune/text encoder",
            description="A weighted sum of text encoders, such as the original and tuned ones: of their weights, or of "
            "their outputs. A tuned CLIP-L also goes into SDXL's pair.",
            search_aliases=["merge clip", "interpolate text encoders", "mix clip", "textcraftor", "clip merge"],
            inputs=[
                io.Autogrow.Input(
                    "clips",
                    template=io.Autogrow.TemplatePrefix(clip, prefix="clip", min=2, max=MAX_ENCODERS),
                    tooltip="The text encoders, as many as you like; a new input appears for each. The first one sets "
                    "the structure.",
                ),
                io.String.Input(
                    "weights",
                    default="0.5, 0.5",
                    tooltip="One number for each text encoder, in their order; they should sum to 1.",
                ),
                io.Combo.Input(
                    "space",
                    options=["weights", "embeddings"],
                    default="weights",
                    tooltip="weights: one encoder with blended weights, as fast as one, for encoders of one "
                    "architecture. embeddings: each prompt is encoded by every encoder and the results are blended, "
                    "for any encoders of one width.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The blend; use it like any CLIP.")],
        )

    @classmethod
    def execute(cls, clips, weights, space) -> io.NodeOutput:
        from ..training.text_encoder.blend import parse_weights
        from .clips.blend_weights import blend_weights
        from .clips.blended_clip import blend_embeddings

        given = [clips[name] for name in sorted(clips, key=lambda name: int(name.removeprefix("clip")))]
        blend = blend_weights if space == "weights" else blend_embeddings
        return io.NodeOutput(blend(given, parse_weights(weights, len(given))))


class RetuneBlendConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneBlendConditioning",
            display_name="Blend Conditioning",
            category="retune/text encoder",
            description="(1 - amount) a + amount b of two encoded prompts, such as one prompt through the original and "
            "the tuned text encoder.",
            search_aliases=["conditioning average", "interpolate prompts", "mix conditioning"],
            inputs=[
                io.Conditioning.Input("a", tooltip="The result at amount 0."),
                io.Conditioning.Input("b", tooltip="The result at amount 1; as many entries as a."),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=-1.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Share of b. Below 0 and above 1 the blend extrapolates past a or b, with a warning.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The blend, with area, mask and range of a.")],
        )

    @classmethod
    def execute(cls, a, b, amount) -> io.NodeOutput:
        from .clips.conditioning import blend_conditionings

        return io.NodeOutput(blend_conditionings(a, b, amount))


class RetuneStepWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneStepWindow",
            display_name="Step Window",
            category="retune/text encoder",
            description="The original text encoder begins the picture and the tuned one finishes it: keeps the variety "
            "of the first and most of the gain of the second.",
            search_aliases=["textcraftor", "prompt scheduling", "timestep range", "switch conditioning"],
            inputs=[
                io.Conditioning.Input("original", tooltip="The prompt through the original text encoder."),
                io.Conditioning.Input("tuned", tooltip="The same prompt through the tuned text encoder."),
                io.Float.Input(
                    "start_percent",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where tuned takes over, as a share of the noise schedule (not of the sampler's steps): 0 "
                    "is tuned only, 1 original only, 0.4 is 10 + 15 of 25 steps of DDIM.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Both, each in its range; for any sampler.")],
        )

    @classmethod
    def execute(cls, original, tuned, start_percent) -> io.NodeOutput:
        from .clips.conditioning import step_window

        return io.NodeOutput(step_window(original, tuned, start_percent))
