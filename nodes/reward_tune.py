"""Tuning a model by the reward of its pictures."""

from comfy_api.latest import io

from ..training.config import SamplePrompts, TrainingSettings
from ..training.reward_config import METHODS, WHAT, RewardTuneConfig
from . import types
from .run_inputs import alpha_input, made_by, name_inputs, rank_input, rate_input, run_inputs, shown
from .types import LoraModel

STEPS, BATCH = 100, 4


def size_input(name: str, default: int) -> io.Input:
    tooltip = f"Picture {name} in pixels, while tuning."
    return io.Int.Input(name, default=default, min=64, max=8192, step=8, tooltip=tooltip)


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
                io.Combo.Input("train", options=list(WHAT), default=d.train, tooltip="What is tuned."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=d.method,
                    tooltip="last K: through the last gradient_steps. random K: through a random number of the last, "
                    "up to it. one step: by the clean picture seen from one of them, the cheapest.",
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
        cls, model, clip, vae, reward, prompts, settings=None, samples=None, constraint=None, held_out=None, **values
    ):
        from ..training.tune_rewards import tune
        from .paths import runs_folder
        from .progress import NodeCallbacks
        from .tuned import applied, prompt_list, tuned_by, tuning

        judge = tuned_by(reward, values.pop("clip_constraint"), constraint, held_out)
        wanted = prompt_list(prompts, values.pop("prompt_file", ""))
        config = RewardTuneConfig(settings=settings or TrainingSettings(), samples=samples or SamplePrompts(), **values)
        callbacks = NodeCallbacks(cls.hidden.unique_id, config.run_name, config.steps)
        with tuning(model, clip, vae, judge) as (view, rewards):
            memory = rewards.activation_bytes(config.batch_size)
            callbacks.keep_ready(view, config.batch_size, config.height, config.width, memory)
            details = made_by(cls.hidden)
            found = tune(view, rewards, wanted, config, runs_folder(), callbacks, details)
        model, clip = applied(model, clip, found, config.run_name)
        return io.NodeOutput(model, clip, found.lora, found.path.parent, ui=shown(config.run_name))
