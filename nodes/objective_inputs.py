"""Inputs of Training Settings for the finer points of loss, noise, masks and captions."""

from comfy_api.latest import io

from ..training.config import TrainingSettings


def objective_inputs(default: TrainingSettings) -> list:
    """One optional input for each field, with the dataclass's default."""

    def number(kind, name: str, low: float, high: float, step: float, tooltip: str):
        more = {"round": False} if kind is io.Float else {}
        ends = {"default": getattr(default, name), "min": low, "max": high, "step": step}
        return kind.Input(name, **ends, **more, optional=True, advanced=True, tooltip=tooltip)

    def switch(name: str, tooltip: str):
        return io.Boolean.Input(name, default=getattr(default, name), optional=True, advanced=True, tooltip=tooltip)

    schedule = io.Combo.Input(
        "huber_schedule",
        options=["constant", "exponential", "snr"],
        default=default.huber_schedule,
        optional=True,
        advanced=True,
        tooltip="Knee of the Huber losses: huber_c at all noise levels, or down to it from 1 at clean images.",
    )
    return [
        schedule,
        number(io.Float, "huber_c", 1e-6, 1.0, 0.01, "Knee of the Huber losses: smaller errors count squared."),
        number(io.Int, "multires_iterations", 0, 20, 1, "Layers of coarser (pyramid) noise; 0 is off, 6 to 10 usual."),
        number(io.Float, "multires_discount", 0.0, 1.0, 0.05, "Strength of each coarser layer beside the one before."),
        switch(
            "zero_terminal_snr",
            "Make the last noise level pure noise (arXiv 2305.08891). For v-prediction models only; sample with "
            "ModelSamplingDiscrete, zsnr on.",
        ),
        number(io.Float, "timestep_mean", -10.0, 10.0, 0.1, "Centre of logit-normal timesteps; above 0 more noise."),
        number(io.Float, "timestep_std", 0.01, 10.0, 0.1, "Spread of logit-normal timesteps."),
        number(io.Float, "mask_weight", 0.0, 1.0, 0.05, "Weight of the area outside an image's mask."),
        switch("mask_normalize", "Divide a masked loss by the mask's mean, so that small areas count as much."),
        switch("caption_shuffle", "Put a caption's comma-separated tags in a new order each time it is shown."),
        number(io.Int, "keep_tokens", 0, 1000, 1, "First tags that are neither shuffled nor left out."),
        number(io.Float, "tag_dropout", 0.0, 1.0, 0.01, "Share of a caption's tags left out each time it is shown."),
    ]
