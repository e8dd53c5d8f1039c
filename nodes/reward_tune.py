"""Tuning a model by the reward of its pictures."""

from comfy_api.latest import io

from ..training.config.reward import RewardTuneConfig
from .common import types
from .common.inputs import (
    MAX_ALPHA,
    MAX_BATCH,
    MAX_RATE,
    MAX_STEPS,
    MIN_ALPHA,
    input_of,
    inputs_of,
    made_by,
    name_inputs,
    run_config,
    run_inputs,
    run_ui,
)
from .common.types import LoraModel

STEPS, BATCH = 100, 4
"""Defaults of the node, whose tuning takes fewer and larger steps than a training on images."""


def model_inputs() -> list:
    """What is tuned, and what judges it."""
    return [
        io.Model.Input("model", tooltip="The model that draws; a patched clone comes out."),
        io.Clip.Input("clip", tooltip="The text encoder that the prompts are read with."),
        io.Vae.Input("vae", tooltip="Decodes the pictures for the reward."),
        types.Reward.Input("reward", tooltip="From Load Reward or Combine Rewards."),
        io.String.Input("prompts", multiline=True, default="", tooltip="Prompts to draw, one a line."),
    ]


def tuning_inputs() -> list:
    """How the pictures are drawn, and which steps of the sampler train."""
    return [
        input_of(RewardTuneConfig, "steps", default=STEPS, max=MAX_STEPS),
        input_of(RewardTuneConfig, "batch_size", default=BATCH, max=MAX_BATCH),
        input_of(RewardTuneConfig, "learning_rate", max=MAX_RATE),
        *inputs_of(RewardTuneConfig, "train", "method", "gradient_steps", "sampling_steps", "cfg"),
        io.Float.Input(
            "clip_constraint",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.05,
            advanced=True,
            tooltip="Weight of the constraint, added to the rewards; 0: none. Above 0 it keeps pictures true to their "
            "prompts.",
        ),
        *inputs_of(RewardTuneConfig, "width", "height", min=64),
    ]


def judge_inputs() -> list:
    """More rewards and prompts, and how a LoRA is tuned."""
    return [
        types.Reward.Input("constraint", optional=True, tooltip="A reward of kind CLIP, for clip_constraint above 0."),
        types.Reward.Input(
            "held_out", optional=True, tooltip="A reward that is logged and never trained on: a honest judge."
        ),
        io.String.Input(
            "prompt_file",
            default="",
            optional=True,
            advanced=True,
            tooltip="A .txt file with a prompt a line, or .jsonl with prompt and weight; added to prompts.",
        ),
        *inputs_of(RewardTuneConfig, "stop_gradient", "lora_rank", optional=True),
        input_of(RewardTuneConfig, "lora_alpha", min=MIN_ALPHA, max=MAX_ALPHA, optional=True),
    ]


def guard_inputs() -> list:
    """When a loss of diversity ends a tuning, and how it is measured."""
    return [
        *inputs_of(RewardTuneConfig, "guard_diversity", "guard_action", optional=True),
        *inputs_of(RewardTuneConfig, "guard_prompts", "guard_images", max=64, optional=True),
    ]


class RetuneRewardTune(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneRewardTune",
            display_name="Reward Tune",
            category="retune/reward",
            description="Tunes a text encoder, a UNet or a LoRA so that pictures of your prompts score higher "
            "(TextCraftor): prompts become pictures, pictures a reward, and its gradient flows back through the last "
            "sampler steps. The run is a folder in output/retune: it can be stopped, killed and queued again, and "
            "resumes where it was.",
            search_aliases=["textcraftor", "reward", "rlhf", "draft", "alignprop", "refl", "aesthetic tuning"],
            is_output_node=True,
            inputs=[
                *model_inputs(),
                *tuning_inputs(),
                *name_inputs("my reward tuning"),
                *judge_inputs(),
                *run_inputs(),
                *guard_inputs(),
                types.Dataset.Input(
                    "dataset", optional=True, tooltip="Captioned images, for method direct, which reads no prompts."
                ),
                *inputs_of(RewardTuneConfig, "eps_constraint", "drift_constraint", optional=True),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, tuned if its UNet was."),
                io.Clip.Output(tooltip="The text encoder, tuned if it was."),
                LoraModel.Output(display_name="lora", tooltip="The tuned LoRA, at strength 1 in the two; else empty."),
                types.Run.Output(display_name="run", tooltip="The run, for charts and saving."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        reward,
        prompts,
        settings=None,
        samples=None,
        constraint=None,
        held_out=None,
        dataset=None,
        **values,
    ):
        from comfy.model_management import get_torch_device

        from ..training.recipes.checks import with_precision
        from ..training.recipes.reward import tune
        from .bridge.reward_tuning import apply_result, prompt_list, ready_to_tune, reward_with_constraint
        from .common.paths import runs_folder
        from .ui.progress import NodeCallbacks

        weight, file = values.pop("clip_constraint"), values.pop("prompt_file", "")
        config = run_config(RewardTuneConfig, settings, samples, values)
        config = with_precision(config, get_torch_device(), runs_folder())
        judge = reward_with_constraint(reward, weight, constraint, held_out)
        wanted = prompt_list(prompts, file)
        progress = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        tuning = ready_to_tune(model, clip, vae, judge, config.settings.precision)
        with progress as callbacks, tuning as (view, rewards):
            memory = rewards.activation_bytes(config.batch_size)
            callbacks.reserve(view, config.batch_size, config.height, config.width, memory)
            if config.method == "direct" and dataset is not None:
                callbacks.reserve_for_dataset(view, dataset, config.batch_size, memory)
            details = made_by(cls.hidden)
            found = tune(view, rewards, wanted, config, runs_folder(), callbacks, details, dataset)
        model, clip = apply_result(model, clip, found, config.run_name)
        return io.NodeOutput(model, clip, found.lora, found.path.parent, ui=run_ui(config.run_name))
