"""Inputs of Training Settings by topic: one optional input for each field, with the dataclass's default."""

from functools import partial

from comfy_api.latest import io

from ..training.config.training_settings import TrainingSettings


def number(default: TrainingSettings, kind, name: str, low: float, high: float, step: float | None, tooltip: str):
    """An Int or Float input; step: None leaves it to ComfyUI."""
    more = ({} if step is None else {"step": step}) | ({"round": False} if kind is io.Float else {})
    ends = {"default": getattr(default, name), "min": low, "max": high}
    return kind.Input(name, **ends, **more, optional=True, advanced=True, tooltip=tooltip)


def schedule_inputs(default: TrainingSettings) -> list:
    """What only some schedules of the learning rate read."""
    cycles = "Times that lr_schedule 'cosine with restarts' goes from the peak to zero."
    power = "Exponent of lr_schedule 'polynomial'; 1 is a line, more falls faster at first."
    share = "Share of the steps after the warm-up in which lr_schedule 'warm-up-stable-decay' goes down to zero."
    return [
        number(default, io.Int, "lr_cycles", 1, 1000, None, cycles),
        number(default, io.Float, "lr_power", 0.01, 100.0, 0.1, power),
        number(default, io.Float, "lr_decay_share", 0.001, 1.0, 0.01, share),
    ]


def ending_inputs(default: TrainingSettings) -> list:
    """When to stop, and which weights to keep."""
    return [
        io.Int.Input(
            "early_stop_after",
            default=default.early_stop_after,
            min=0,
            max=100000,
            optional=True,
            tooltip="Validations in a row without a lower loss that end the run, with its best weights as the result; "
            "0 trains all steps.",
        ),
        io.Combo.Input(
            "result",
            options=["last", "best"],
            default=default.result,
            optional=True,
            tooltip="The last weights, or those of the lowest validation loss.",
        ),
    ]


def stage_inputs(default: TrainingSettings) -> list:
    """Learning rate and first step of each part of a model."""
    parts = {
        "projection": "the text encoder's projection",
        "cross_attention": "cross-attention (attn2)",
        "self_attention": "self-attention (attn1)",
        "rest": "everything else in the UNet",
    }
    rate = "Learning rate of {}, as a multiple of the run's; 0 keeps it as it is."
    step = "Step at which {} begins to train."
    rates = [number(default, io.Float, f"lr_{p}", 0.0, 1000.0, 0.01, rate.format(w)) for p, w in parts.items()]
    return rates + [number(default, io.Int, f"unfreeze_{p}", 0, 10**7, None, step.format(w)) for p, w in parts.items()]


def objective_inputs(default: TrainingSettings) -> list:
    """The finer points of loss, noise, masks and captions."""

    value = partial(number, default)

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
        number(
            default, io.Float, "huber_c", 1e-6, 1.0, 0.01, "Knee of the Huber losses: smaller errors count squared."
        ),
        number(
            default,
            io.Int,
            "multires_iterations",
            0,
            20,
            1,
            "Layers of coarser (pyramid) noise; 0 is off, 6 to 10 usual.",
        ),
        number(
            default,
            io.Float,
            "multires_discount",
            0.0,
            1.0,
            0.05,
            "Strength of each coarser layer beside the one before.",
        ),
        switch(
            "zero_terminal_snr",
            "Make the last noise level pure noise (arXiv 2305.08891). For v-prediction models only; sample with "
            "ModelSamplingDiscrete, zsnr on.",
        ),
        number(
            default,
            io.Float,
            "timestep_mean",
            -10.0,
            10.0,
            0.1,
            "Centre of logit-normal timesteps; above 0 more noise.",
        ),
        value(io.Float, "timestep_std", 0.01, 10.0, 0.1, "Spread of logit-normal timesteps."),
        value(io.Float, "mask_weight", 0.0, 1.0, 0.05, "Weight of the area outside an image's mask."),
        switch("mask_normalize", "Divide a masked loss by the mask's mean, so that small areas count as much."),
        switch("caption_shuffle", "Put a caption's comma-separated tags in a new order each time it is shown."),
        value(io.Int, "keep_tokens", 0, 1000, 1, "First tags that are neither shuffled nor left out."),
        number(
            default,
            io.Float,
            "tag_dropout",
            0.0,
            1.0,
            0.01,
            "Share of a caption's tags left out each time it is shown.",
        ),
    ]


def log_inputs(default: TrainingSettings) -> list:
    """Where figures go besides the run's own files."""
    return [
        io.Boolean.Input(
            "tensorboard",
            default=default.tensorboard,
            optional=True,
            advanced=True,
            tooltip="Write events for TensorBoard into the run's folder; needs the package tensorboard.",
        )
    ]
