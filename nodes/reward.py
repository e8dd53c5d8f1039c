"""Rewards: loading, combining, scores of images and their diversity."""

import json

from comfy_api.latest import io

from .common import types
from .common.paths import REWARDS, files, listed_file, reward_files

NONE = "none"
TOWERS = "clip_vision"


def model_inputs() -> list:
    """Which model scores, its files, and its weight in a sum."""
    return [
        io.Combo.Input(
            "kind",
            options=["aesthetic", "PickScore", "HPSv2", "CLIP", "demo aesthetic", "demo CLIP"],
            default="demo aesthetic",
            tooltip="aesthetic: how good it looks, without the prompt. PickScore, HPSv2: which image people prefer "
            "for a prompt. CLIP: fits the prompt. The demo ones need no file and are for the demo model's images.",
        ),
        io.Combo.Input(
            "file",
            options=reward_files(NONE),
            default=NONE,
            tooltip="A file of models/retune_rewards: the head of aesthetic, or PickScore's, HPSv2's or a "
            "CLIP's weights, in safetensors or a pickle of tensors.",
        ),
        io.Float.Input(
            "weight",
            default=1.0,
            min=-1000.0,
            max=1000.0,
            step=0.05,
            tooltip="Its share in a sum of rewards, each of which is divided by its running scale. 0 logs it only.",
        ),
        io.Combo.Input(
            "image_tower",
            options=files(TOWERS, first=NONE),
            default=NONE,
            optional=True,
            tooltip="A file of models/clip_vision. Needed by aesthetic: OpenAI's ViT-L/14. For a CLIP whose "
            "image tower is a file of its own.",
        ),
        io.Combo.Input(
            "activation",
            options=["auto", "gelu", "quick_gelu"],
            default="auto",
            optional=True,
            tooltip="auto is right for OpenAI's models and for ViT-H and larger. LAION's ViT-B and ViT-L need "
            "gelu; it is not in the files.",
        ),
    ]


def target_inputs() -> list:
    """Which score is aimed at, where higher is not always better."""
    return [
        io.Combo.Input(
            "limit",
            options=[NONE, "hinge", "distance"],
            default=NONE,
            optional=True,
            tooltip="hinge: a score above the target is as good as the target. distance: the nearer to the "
            "target, the better.",
        ),
        io.Float.Input(
            "target",
            default=0.0,
            min=-1000.0,
            max=1000.0,
            step=0.01,
            optional=True,
            tooltip="The raw score aimed at, where there is a limit.",
        ),
    ]


class RetuneLoadReward(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneLoadReward",
            display_name="Load Reward",
            category="retune/reward",
            description="A model that scores images: LAION's aesthetic, PickScore, HPSv2, any CLIP, or the demo "
            "model's own. Its gradient reaches the pixels, so models can be tuned on it.",
            search_aliases=["aesthetic score", "pickscore", "hps", "clip score", "preference model", "scorer"],
            inputs=[
                *model_inputs(),
                *target_inputs(),
            ],
            outputs=[types.Reward.Output(display_name="reward", tooltip="For scoring, diversity and tuning.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, kind, file, weight, image_tower=NONE, activation="auto", limit=NONE, target=0.0):
        from pathlib import Path

        import comfy.sd

        from ..training.rewards.load import RewardConfig
        from .bridge.rewards import ManagedReward

        config = RewardConfig(
            kind=kind,
            file=None if file == NONE else listed_file(file, REWARDS),
            image_tower=None if image_tower == NONE else listed_file(image_tower, TOWERS),
            comfyui=Path(comfy.sd.__file__).parents[1],
            activation=activation,
        )
        shape = {} if limit == NONE else {"form": limit, "target": target}
        reward = ManagedReward.open(config, weight=weight, **shape)
        return io.NodeOutput(reward, ui={"text": [reward.describe()]})


class RetuneCombineRewards(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        one = types.Reward.Input("reward", tooltip="A reward with its weight; the next input appears when connected.")
        return io.Schema(
            node_id="RetuneCombineRewards",
            display_name="Combine Rewards",
            category="retune/reward",
            description="Several rewards as one: the weighted sum of their scores, each divided by its running scale.",
            search_aliases=["sum rewards", "mix rewards"],
            inputs=[
                io.Autogrow.Input(
                    "rewards",
                    template=io.Autogrow.TemplatePrefix(one, prefix="reward", min=1, max=8),
                    tooltip="Up to eight rewards.",
                ),
                io.Float.Input(
                    "smallest_crop",
                    default=1.0,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Below 1, the rewards get random crops while tuning, down to this share of the side. A "
                    "pattern that fools them in one place then gains less.",
                ),
                io.Float.Input(
                    "smallest_resize",
                    default=1.0,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Below 1, they get images that are scaled down at random, to this share at least, and "
                    "back up.",
                ),
            ],
            outputs=[types.Reward.Output(display_name="reward", tooltip="For scoring, diversity and tuning.")],
        )

    @classmethod
    def execute(cls, rewards: io.Autogrow.Type, smallest_crop=1.0, smallest_resize=1.0):
        from ..training.rewards.augment import Augmentation
        from .bridge.rewards import ManagedReward, expect_reward

        given = [reward for reward in rewards.values() if reward is not None]
        for reward in given or [None]:
            expect_reward(reward)
        augments = min(smallest_crop, smallest_resize) < 1
        augmentation = Augmentation(smallest_crop=smallest_crop, smallest_resize=smallest_resize) if augments else None
        return io.NodeOutput(ManagedReward.joined(given, augmentation))


class RetuneScoreImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneScoreImages",
            display_name="Score Images",
            category="retune/reward",
            description="Scores of images by a reward: of each, their mean and standard deviation, and a histogram.",
            search_aliases=["aesthetic score", "clip score", "pickscore", "evaluate images"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="One or more images."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="What the images were made from: one line for all, or one a line for each image. aesthetic "
                    "needs none.",
                ),
                types.Reward.Input("reward", tooltip="From Load Reward or Combine Rewards."),
            ],
            outputs=[
                io.String.Output(display_name="scores", tooltip="JSON: scores, mean, std; of several rewards, each."),
                io.Float.Output(display_name="mean", tooltip="Mean score."),
                io.Image.Output(display_name="chart", tooltip="Histogram of the scores."),
            ],
        )

    @classmethod
    def execute(cls, images, prompts, reward):
        from comfy_api.latest import ui

        from ..training.plots.score_histogram import score_histogram
        from .bridge.score import score

        table = score(reward, images, prompts)
        chart = score_histogram(table.name, table.scores, table.mean, table.std)[None]
        return io.NodeOutput(json.dumps(table.as_dict()), table.mean, chart, ui=ui.PreviewImage(chart, cls=cls))


class RetuneDiversity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneDiversity",
            display_name="Diversity",
            category="retune/reward",
            description="How different images are from each other: Vendi score and mean pairwise distance on a "
            "reward's image tower, and LPIPS where it is installed. A tuned model that lost it has collapsed.",
            search_aliases=["vendi score", "mode collapse", "lpips", "variety"],
            inputs=[
                io.Image.Input("images", tooltip="Two or more images of one prompt with different seeds."),
                types.Reward.Input("reward", tooltip="Its image tower measures how similar two images are."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="diversity", tooltip="Vendi score: 1 when all are equal, up to the number of images."
                ),
                io.String.Output(display_name="report", tooltip="Vendi score, mean pairwise distance, LPIPS."),
            ],
        )

    @classmethod
    def execute(cls, images, reward):
        from .bridge.score import diversity_of

        result = diversity_of(reward, images)
        return io.NodeOutput(result.vendi, result.text())
