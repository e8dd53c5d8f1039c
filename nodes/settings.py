"""What training nodes take besides a model and data: settings, and prompts to draw meanwhile."""

from comfy_api.latest import io

from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import PRESET_RUNS, PRESETS, TrainingSettings
from .common import types
from .common.inputs import STEPS, seed_input
from .setting_inputs import ending_inputs, log_inputs, objective_inputs, schedule_inputs, stage_inputs

LEARNING_RATE = 1e-5
"""What Train Model starts with."""


class RetuneTrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = TrainingSettings()
        number = {"optional": True}
        return io.Schema(
            node_id="RetuneTrainingSettings",
            display_name="Training Settings",
            category="retune/training",
            description="Optimiser, schedule, loss and noise for any training node. Leave it out to train with these "
            "defaults.",
            search_aliases=["optimizer settings", "min snr", "lr schedule"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="custom",
                    optional=True,
                    tooltip="A named group of settings wins over the values below that it names.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=["AdamW", "Adafactor", "SGD", "AdamW8bit", "Prodigy", "AdamWScheduleFree", "Lion", "CAME"],
                    default=d.optimizer,
                    optional=True,
                    tooltip="AdamW; Adafactor needs less memory; SGD with momentum 0.9. The others need a package of "
                    "their own, which an error names: see the help page.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=[
                        "constant",
                        "linear",
                        "cosine",
                        "cosine with restarts",
                        "polynomial",
                        "REX",
                        "warm-up-stable-decay",
                    ],
                    default=d.lr_schedule,
                    optional=True,
                    tooltip="Learning rate after the warm-up: kept, or down towards zero at the end.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=d.warmup_steps,
                    min=0,
                    max=100000,
                    tooltip="Steps in which the learning rate rises from zero.",
                    **number,
                ),
                io.Float.Input(
                    "weight_decay",
                    default=d.weight_decay,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    round=False,
                    tooltip="Weight decay; decoupled for AdamW.",
                    **number,
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=d.max_grad_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Longer gradients are scaled down to this norm; 0 leaves them alone.",
                    **number,
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=d.gradient_accumulation,
                    min=1,
                    max=10000,
                    tooltip="Batches per optimiser step: a larger batch without more memory.",
                    **number,
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp32", "bf16", "fp16"],
                    default=d.precision,
                    optional=True,
                    tooltip="Arithmetic of the forward pass. Trained weights are always kept in fp32.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=d.ema_decay,
                    min=0.0,
                    max=0.999999,
                    step=0.0001,
                    round=False,
                    tooltip="Average of the trained weights over time, used for samples and result; 0 is off, 0.999 "
                    "is usual.",
                    **number,
                ),
                io.Combo.Input(
                    "loss",
                    options=["mse", "huber", "l1", "pseudo-huber", "smooth-l1"],
                    default=d.loss,
                    optional=True,
                    tooltip="Distance between prediction and target; pseudo-huber and smooth-l1 are sd-scripts' huber "
                    "and smooth_l1.",
                ),
                io.Combo.Input(
                    "loss_weighting",
                    options=["none", "min-SNR", "debiased"],
                    default=d.loss_weighting,
                    optional=True,
                    tooltip="Weight of the noise levels: min-SNR (arXiv 2303.09556), debiased (arXiv 2310.08442), or "
                    "none, which flow models need.",
                ),
                io.Float.Input(
                    "snr_gamma",
                    default=d.snr_gamma,
                    min=0.01,
                    max=1000.0,
                    step=0.5,
                    tooltip="Cap of the signal-to-noise ratio for min-SNR.",
                    **number,
                ),
                io.Combo.Input(
                    "timestep_sampling",
                    options=["uniform", "logit-normal", "high noise", "low noise"],
                    default=d.timestep_sampling,
                    optional=True,
                    tooltip="Draw all noise levels alike, mostly the middle ones (arXiv 2403.03206), or mostly high or "
                    "low ones (arXiv 2302.08453).",
                ),
                io.Int.Input(
                    "min_timestep",
                    default=d.min_timestep,
                    min=0,
                    max=999,
                    tooltip="Lowest noise level drawn.",
                    **number,
                ),
                io.Int.Input(
                    "max_timestep",
                    default=d.max_timestep,
                    min=0,
                    max=999,
                    tooltip="Highest noise level drawn; 999 is nearly pure noise.",
                    **number,
                ),
                io.Float.Input(
                    "noise_offset",
                    default=d.noise_offset,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Per-channel offset of the noise, for very dark or bright pictures; 0.05 is usual.",
                    **number,
                ),
                io.Float.Input(
                    "input_perturbation",
                    default=d.input_perturbation,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Extra noise on the network's input (arXiv 2301.11706); 0.1 is usual.",
                    **number,
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=d.caption_dropout,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of captions replaced by an empty one; keeps CFG working.",
                    **number,
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=d.gradient_checkpointing,
                    optional=True,
                    tooltip="Less memory, about a third slower.",
                ),
                io.Float.Input(
                    "validation_fraction",
                    default=d.validation_fraction,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Share of the images held out to measure the validation loss.",
                    **number,
                ),
                io.Int.Input(
                    "validate_every",
                    default=d.validate_every,
                    min=1,
                    max=100000,
                    tooltip="Steps between two validation losses.",
                    **number,
                ),
                io.Int.Input(
                    "save_every",
                    default=d.save_every,
                    min=1,
                    max=100000,
                    tooltip="Steps between two saved states; a killed run goes on from the last one.",
                    **number,
                ),
                *stage_inputs(d),
                io.Int.Input(
                    "total_batch",
                    default=d.total_batch,
                    min=0,
                    max=10**6,
                    advanced=True,
                    tooltip="Images per optimiser step, a multiple of batch_size: batches are summed up to it; 0 "
                    "leaves it to gradient_accumulation.",
                    **number,
                ),
                *schedule_inputs(d),
                *ending_inputs(d),
                *objective_inputs(d),
                *log_inputs(d),
            ],
            outputs=[
                types.Settings.Output(display_name="settings", tooltip="Goes into a training node."),
                io.Float.Output(
                    display_name="learning_rate",
                    tooltip="That of the preset, to connect to the training node; its usual one when the preset has "
                    "none.",
                ),
                io.Int.Output(
                    display_name="steps",
                    tooltip="Those of the preset, to connect to the training node; its usual ones when the preset has "
                    "none.",
                ),
            ],
        )

    @classmethod
    def execute(cls, preset="custom", **values):
        run = {"learning_rate": LEARNING_RATE, "steps": STEPS} | PRESET_RUNS.get(preset, {})
        return io.NodeOutput(TrainingSettings(**(values | PRESETS[preset])), run["learning_rate"], run["steps"])


class RetuneSamplePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = SamplePrompts()
        return io.Schema(
            node_id="RetuneSamplePrompts",
            display_name="Sample Prompts",
            category="retune/training",
            description="Prompts that a training node draws before the first step, every few steps and at the end, "
            "always from the same noise.",
            search_aliases=["validation prompts", "preview while training"],
            inputs=[
                io.String.Input("prompts", multiline=True, default="", tooltip="One prompt a line."),
                io.Int.Input(
                    "every",
                    default=d.every,
                    min=0,
                    max=100000,
                    tooltip="Steps between two sets of samples; 0 is once per epoch.",
                ),
                io.Int.Input("steps", default=d.steps, min=1, max=1000, tooltip="Sampler steps (DDIM)."),
                io.Float.Input("cfg", default=d.cfg, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale."),
                seed_input("Seed of the starting noise."),
                io.Int.Input(
                    "width",
                    default=d.width,
                    min=64,
                    max=8192,
                    step=8,
                    tooltip="Pixels; 128 for the demo model.",
                ),
                io.Int.Input(
                    "height",
                    default=d.height,
                    min=64,
                    max=8192,
                    step=8,
                    tooltip="Pixels; 128 for the demo model.",
                ),
            ],
            outputs=[types.Samples.Output(display_name="samples", tooltip="Goes into a training node.")],
        )

    @classmethod
    def execute(cls, prompts, **values):
        lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
        return io.NodeOutput(SamplePrompts(prompts=lines, **values))
