"""Tuning a model by the reward of its pictures."""

from comfy_api.latest import io

from ..training.config.guard import ACTIONS
from ..training.config.reward import METHODS, TUNE_TARGETS, RewardTuneConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import TrainingSettings
from .common import types
from .common.inputs import alpha_input, made_by, name_inputs, rank_input, rate_input, run_inputs, run_ui
from .common.types import LoraModel

STEPS, BATCH = 100, 4


def size_input(name: str, default: int) -> io.Input:
    tooltip = f"Picture {name} in pixels, while tuning."
    return io.Int.Input(name, default=default, min=64, max=8192, step=8, tooltip=tooltip)


def constraint_input(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=0.0, min=0.0, max=1e6, step=0.05, round=False, optional=True, tooltip=tooltip)


def guard_inputs(default: RewardTuneConfig) -> list:
    """When too alike pictures end a tuning, and what tells."""
    count = {"min": 1, "max": 64, "optional": True}
    return [
        io.Float.Input(
            "guard_diversity",
            default=default.guard_diversity,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Lowest diversity of a prompt's pictures, as a share of the untuned model's; 0.8 is a good start. "
            "Looked at every validate_every steps of Training Settings, on pictures drawn for it. 0: no guard.",
        ),
        io.Combo.Input(
            "guard_action",
            options=list(ACTIONS),
            default=default.guard_action,
            optional=True,
            tooltip="stop: below it the run ends, with the best weights before. keep best: the run goes on, and the "
            "best weights not below it are the result. Best by the reward of the guard's pictures.",
        ),
        io.Int.Input(
            "guard_prompts",
            default=default.guard_prompts,
            tooltip="Prompts that the guard draws, the held-out ones first.",
            **count,
        ),
        io.Int.Input(
            "guard_images",
            default=default.guard_images,
            tooltip="Pictures of each, always from the same noise.",
            **(count | {"min": 2}),
        ),
    ]


class RetuneRewardTune(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = RewardTuneConfig(run_name="my reward tuning")
        return io.Schema(
            node_id="RetuneRewardTune",
            display_name="Reward Tune",
            category="retune/reward",
            description="Tunes a text encoder, a UNet or a LoRA so that pictures of your prompts score higher "
            "(TextCraftor): prompts become pictures, pictures a reward, and its gradient goes back through the last "
            "sampler steps. The run is a folder in output/retune: it can be stopped, killed and queued again, and goes "
            "on where it was.",
            search_aliases=["textcraftor", "reward", "rlhf", "draft", "alignprop", "refl", "aesthetic tuning"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that draws; a patched clone comes out."),
                io.Clip.Input("clip", tooltip="The text encoder that the prompts are read with."),
                io.Vae.Input("vae", tooltip="Decodes the pictures for the reward."),
                types.Reward.Input("reward", tooltip="From Load Reward or Combine Rewards."),
                io.String.Input("prompts", multiline=True, default="", tooltip="Prompts to draw, one a line."),
                io.Int.Input("steps", default=STEPS, min=1, max=10**7, tooltip="Optimiser steps in all."),
                io.Int.Input("batch_size", default=BATCH, min=1, max=4096, tooltip="Pictures per batch."),
                rate_input("learning_rate", d.learning_rate, "Peak learning rate; a LoRA wants about 100 times more."),
                io.Combo.Input("train", options=list(TUNE_TARGETS), default=d.train, tooltip="What is tuned."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=d.method,
                    tooltip="last K: through the last gradient_steps. random K: through a random number of the last, "
                    "up to it. one step: by the clean picture seen from one of them, the cheapest. direct: no sampler, "
                    "by the clean picture seen from noised images of a dataset.",
                ),
                io.Int.Input(
                    "gradient_steps",
                    default=d.gradient_steps,
                    min=1,
                    max=1000,
                    tooltip="K: sampler steps, counted from the end, that gradients go through.",
                ),
                io.Int.Input(
                    "sampling_steps", default=d.sampling_steps, min=1, max=1000, tooltip="Steps of the sampler (DDIM)."
                ),
                io.Float.Input(
                    "cfg", default=d.cfg, min=0.0, max=100.0, step=0.1, tooltip="Guidance while tuning, as in use."
                ),
                io.Float.Input(
                    "clip_constraint",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="Weight of the constraint beside the rewards; 0: none. Above 0 it keeps pictures true to "
                    "their prompts.",
                ),
                size_input("width", d.width),
                size_input("height", d.height),
                *name_inputs(d.run_name),
                types.Reward.Input(
                    "constraint", optional=True, tooltip="A reward of kind CLIP, for clip_constraint above 0."
                ),
                types.Reward.Input(
                    "held_out", optional=True, tooltip="A reward that is logged and never trained on: a honest judge."
                ),
                io.String.Input(
                    "prompt_file",
                    default="",
                    optional=True,
                    tooltip="A .txt file with a prompt a line, or .jsonl with prompt and weight; beside prompts.",
                ),
                io.Boolean.Input(
                    "stop_gradient",
                    default=d.stop_gradient,
                    optional=True,
                    tooltip="Steps are gone through one by one, and memory does not grow with their number.",
                ),
                rank_input("lora_rank", d.lora_rank, "Rank of a tuned LoRA.", optional=True),
                alpha_input(
                    "lora_alpha", d.lora_alpha, "Scale of a tuned LoRA: alpha / rank multiplies it.", optional=True
                ),
                *run_inputs(),
                *guard_inputs(d),
                types.Dataset.Input(
                    "dataset", optional=True, tooltip="Captioned images, for method direct, which reads no prompts."
                ),
                constraint_input(
                    "eps_constraint",
                    "Weight of the squared difference between the tuned and the original model's outputs; 0: none.",
                ),
                constraint_input(
                    "drift_constraint",
                    "Weight of how far the prompts' encodings move, as a share of their squared length; 0: none.",
                ),
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
        from ..training.recipes.reward import tune
        from .bridge.reward_tuning import apply_result, prompt_list, ready_to_tune, reward_with_constraint
        from .common.paths import runs_folder
        from .ui.progress import NodeCallbacks

        judge = reward_with_constraint(reward, values.pop("clip_constraint"), constraint, held_out)
        wanted = prompt_list(prompts, values.pop("prompt_file", ""))
        config = RewardTuneConfig(settings=settings or TrainingSettings(), samples=samples or SamplePrompts(), **values)
        progress = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        with progress as callbacks, ready_to_tune(model, clip, vae, judge) as (view, rewards):
            memory = rewards.activation_bytes(config.batch_size)
            callbacks.reserve(view, config.batch_size, config.height, config.width, memory)
            if config.method == "direct" and dataset is not None:
                callbacks.reserve_for_dataset(view, dataset, config.batch_size, memory)
            details = made_by(cls.hidden)
            found = tune(view, rewards, wanted, config, runs_folder(), callbacks, details, dataset)
        model, clip = apply_result(model, clip, found, config.run_name)
        return io.NodeOutput(model, clip, found.lora, found.path.parent, ui=run_ui(config.run_name))
