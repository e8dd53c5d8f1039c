"""How a training node trains, and the prompts that it samples meanwhile."""

from comfy_api.latest import io

from ..training.common.text import filled_lines
from ..training.config.run import RunConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import PRESET_RUNS, PRESETS, TrainingSettings
from .common import types
from .common.inputs import input_of, inputs_of, preset_input, seed_input, with_preset

STEP_INPUTS = ("optimizer", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "gradient_accumulation")
STEP_INPUTS += ("precision", "ema_decay")
LOSS_INPUTS = ("loss", "loss_weighting", "snr_gamma", "timestep_sampling", "min_timestep", "max_timestep")
LOSS_INPUTS += ("noise_offset", "input_perturbation", "caption_dropout", "gradient_checkpointing")
SAVE_INPUTS = ("validation_fraction", "validate_every", "save_every")
STAGE_INPUTS = ("lr_projection", "lr_cross_attention", "lr_self_attention", "lr_rest")
STAGE_INPUTS += ("unfreeze_projection", "unfreeze_cross_attention", "unfreeze_self_attention", "unfreeze_rest")
SCHEDULE_INPUTS = ("total_batch", "lr_cycles", "lr_power", "lr_decay_share", "early_stop_after", "result")
NOISE_INPUTS = ("huber_schedule", "huber_c", "multires_iterations", "multires_discount", "zero_terminal_snr")
NOISE_INPUTS += ("timestep_mean", "timestep_std")
DATA_INPUTS = ("mask_weight", "mask_normalize", "caption_shuffle", "keep_tokens", "tag_dropout", "tensorboard")
MEMORY_INPUTS = ("block_swap", "fused_backward", "shard_weights")
SPEED_INPUTS = ("compile_blocks", "channels_last")
SETTING_INPUTS = STEP_INPUTS + LOSS_INPUTS + SAVE_INPUTS + STAGE_INPUTS + SCHEDULE_INPUTS + NOISE_INPUTS + DATA_INPUTS
SETTING_INPUTS += MEMORY_INPUTS + SPEED_INPUTS + ("master_weights",)
"""Fields of TrainingSettings in the order of the node's inputs: workflows rely on it, a new one goes to the end."""
MAXIMA = {
    "warmup_steps": 10**5,
    "max_grad_norm": 1000.0,
    "gradient_accumulation": 10**4,
    "validate_every": 10**5,
    "save_every": 10**5,
    "total_batch": 10**6,
    "lr_cycles": 1000,
    "early_stop_after": 10**5,
}
MAXIMA |= {name: 10**7 for name in STAGE_INPUTS if name.startswith("unfreeze_")}
"""Field -> highest value of its widget, where that is lower than the config's."""


def setting_inputs() -> list:
    """An optional input for every field of TrainingSettings."""
    ends = {name: {"max": MAXIMA[name]} if name in MAXIMA else {} for name in SETTING_INPUTS}
    return [input_of(TrainingSettings, name, optional=True, **ends[name]) for name in SETTING_INPUTS]


class RetuneTrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneTrainingSettings",
            display_name="Training Settings",
            category="retune/training",
            description="Optimiser, schedule, loss and noise for any training node. Leave it out to train with these "
            "defaults.",
            search_aliases=["optimizer settings", "min snr", "lr schedule"],
            inputs=[
                preset_input(
                    PRESETS,
                    "Choosing one sets the values that it names; changing one of them afterwards makes it custom. "
                    "Through the API a preset wins over them. Those by card are for a LoRA; what words, rewards and "
                    "retraining need besides is on the help page.",
                ),
                *setting_inputs(),
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
        usual = {"learning_rate": RunConfig.learning_rate, "steps": RunConfig.steps}
        run = usual | PRESET_RUNS.get(preset, {})
        return io.NodeOutput(
            TrainingSettings(**with_preset(preset, PRESETS, values)), run["learning_rate"], run["steps"]
        )


class RetuneSamplePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneSamplePrompts",
            display_name="Sample Prompts",
            category="retune/training",
            description="Prompts that a training node draws before the first step, every few steps and at the end, "
            "always from the same noise.",
            search_aliases=["validation prompts", "preview while training"],
            inputs=[
                input_of(SamplePrompts, "prompts"),
                input_of(SamplePrompts, "every", max=10**5),
                *inputs_of(SamplePrompts, "steps", "cfg"),
                seed_input("Seed of the starting noise."),
                *inputs_of(SamplePrompts, "width", "height", min=64),
            ],
            outputs=[types.Samples.Output(display_name="samples", tooltip="Goes into a training node.")],
        )

    @classmethod
    def execute(cls, prompts, **values):
        lines = tuple(filled_lines(prompts))
        return io.NodeOutput(SamplePrompts(prompts=lines, **values))
