"""Scaling a text encoder's output, or one encoded prompt."""

import logging

from comfy_api.latest import io

from .text_encoder import FITTED_ELSEWHERE, prompt_lines

log = logging.getLogger(__name__)


class RetuneScaleTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneScaleTextEncoder",
            display_name="Scale Text Encoder",
            category="retune/text encoder",
            description="Multiplies a T5's output so that its standard deviation is a given one, or that of the "
            "model's original CLIP. A UNet expects the standard deviation that it was trained with.",
            search_aliases=["embedding std", "normalize embeddings"],
            inputs=[
                io.Clip.Input("clip", tooltip="A T5 from Load T5 or Load Text Encoder."),
                io.Combo.Input(
                    "mode",
                    options=["target std", "match reference", "off"],
                    default="target std",
                    tooltip="target std: to the number below; match reference: to the reference CLIP's, measured on "
                    "the same prompts; off: measure only.",
                ),
                io.Float.Input(
                    "target_std",
                    default=0.2,
                    min=0.001,
                    max=100.0,
                    step=0.01,
                    tooltip="Standard deviation over all elements of real tokens. 0.2 is the figure of published "
                    "retraining notes; SD1.5's own CLIP is near 0.9.",
                ),
                io.Clip.Input(
                    "reference",
                    optional=True,
                    tooltip="The original CLIP, for 'match reference'; with the other modes it is only measured.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Prompts to measure on, one a line; empty uses a built-in list of varied ones. After Fit "
                    "Projection give those of the fit.",
                ),
            ],
            outputs=[
                io.Clip.Output(tooltip="The scaled text encoder."),
                io.Float.Output(display_name="std", tooltip="Standard deviation afterwards."),
                io.String.Output(display_name="report", tooltip="Figures before and after, and of the reference."),
                io.Image.Output(
                    display_name="histogram", tooltip="RMS of the tokens before, after and of the reference."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, mode, target_std, reference=None, prompts=""):
        from ..training.plots.token_histogram import Distribution, token_histogram
        from .bridge.measure import is_fitted, scaled_or_measured
        from .ui.progress import reporting

        with reporting(cls, "measuring the text encoder"):
            clip, figures, text = scaled_or_measured(clip, mode, target_std, reference, prompt_lines(prompts))
        if not prompts.strip() and is_fitted(clip):
            text += "\n" + FITTED_ELSEWHERE
            log.warning("%s", FITTED_ELSEWHERE)
        std = figures["measured" if mode == "off" else "after"].std
        distributions = {name: Distribution(f.token_rms, f.std, f.rms_quantiles()) for name, f in figures.items()}
        return io.NodeOutput(clip, std, text, token_histogram(distributions)[None])


class RetuneScaleConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneScaleConditioning",
            display_name="Scale Conditioning",
            category="retune/text encoder",
            description="Scales an encoded prompt to a standard deviation over all its elements.",
            search_aliases=["conditioning std"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From any text encoding node."),
                io.Float.Input(
                    "target_std", default=0.2, min=0.001, max=100.0, step=0.01, tooltip="Standard deviation wanted."
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The scaled conditioning; the pooled output is left alone."),
                io.Float.Output(display_name="std", tooltip="Standard deviation of the first entry afterwards."),
            ],
        )

    @classmethod
    def execute(cls, conditioning, target_std):
        from ..training.text_encoder.scale import scale_context

        scaled = [[scale_context(context, target_std), dict(options)] for context, options in conditioning]
        return io.NodeOutput(scaled, scaled[0][0].float().std(correction=0).item())
