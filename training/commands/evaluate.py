"""Compares a tuned model with its base: both draw the same prompts from the same noise, rewards score the pictures."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.files import append_text, write_json, write_text
from ..common.fingerprint import tensors_sketch
from ..common.foreign import parse_json, reading
from ..common.rng import derive_seed
from ..config.checks import check_fields, check_run_name, check_size
from ..config.fields import setting, side_setting
from ..config.flags import add_flags, read_flags
from ..config.model import ModelConfig
from ..data.images import save_png
from ..data.prompt_lengths import warn_of_long_prompts
from ..data.prompts import Prompt, expect_prompts, prompts_fingerprint
from ..evaluation.prompt_set_report import BASE, TUNED, PromptScores, as_csv, report, table
from ..evaluation.prompt_sets import choose, read_prompt_set
from ..models.protocols import TextToImage
from ..recipes.apply_results import tuned_identity
from ..recipes.checks import check_pooled, check_width
from ..rewards.combined import CombinedReward
from ..rewards.diversity import diversity
from ..rewards.parse import read_rewards
from ..rewards.score import score_images
from ..runs.folder import RunFolder
from ..sampling.generate import draw
from .open_model import build_model
from .terminal import Terminal
from .verb import Verb, add_output_flag, read_model_flags

log = logging.getLogger(__name__)

SCORES, TABLE, RESULT = "scores.jsonl", "scores.csv", "result.json"
FREE_FIELDS = ("run_name", "resume", "batch_size", "save_images", "prompts", "rewards", "baseline_tuned")
"""Settings that may differ when a measurement resumes; of the last three, the content is compared instead."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Draw a set of prompts with a tuned model and its base, and compare their scores."""

    run_name: str
    """Folder name of the measurement; the same command resumes one that was stopped."""
    prompts: Path
    """The set: PartiPrompts.tsv, a folder of HPS v2's .json files or one of them, .txt with a prompt a line, or .jsonl
    with prompt and category. Every prompt counts once, whatever its weight."""
    rewards: tuple[str, ...]
    """Rewards as kind,name=value,... (see `score --help`); each is reported by its raw score."""
    baseline_tuned: tuple[str, ...] = ()
    """Results put into the model to compare with, as --tuned; by default it is the model without --tuned."""
    limit: int = setting(0, low=0, high=10**8)
    """Highest number of prompts, spread evenly over the categories; 0 for all."""
    limit_seed: int = 0
    """Seed of the choice of prompts."""
    seeds: int = setting(4, low=1, high=1000)
    """Pictures of each prompt, each from different noise; both models start from the same."""
    seed: int = setting(0, low=0, high=2**64 - 1)
    """Seed of the noise."""
    sampling_steps: int = setting(25, low=1, high=1000)
    """Steps of the sampler (DDIM)."""
    cfg: float = setting(7.5, low=0, high=100)
    """Classifier-free guidance."""
    width: int = side_setting(512)
    """Picture width in pixels, a multiple of 8."""
    height: int = side_setting(512)
    """Picture height in pixels, a multiple of 8."""
    batch_size: int = setting(4, low=1, high=10**4)
    """Pictures drawn at a time."""
    save_images: bool = False
    """Keep the pictures, in the folder's `images`."""
    resume: Literal["auto", "restart"] = "auto"
    """auto: resume the measurement of this name if its settings are equal; restart: move the old folder aside."""

    def __post_init__(self) -> None:
        check_run_name(self.run_name)
        check_fields(self)
        check_size(self, "picture size")


def evaluate(model: ModelConfig, config: EvaluateConfig, root: Path, callbacks: Callbacks | None = None) -> dict:
    """Draws and scores the prompts that have no scores in the folder root/run name yet, and compares the models.

    Args:
        model: The tuned model; without its `tuned` it is the base.
        root: Folder of all runs.

    Returns:
        {"run": folder} and the content of result.json: figures of all prompts and of each category (`report`).

    Raises:
        ValueError: Before anything is drawn, for prompts, rewards or models that cannot be read, and for a measurement
            of this name with other settings.
    """
    if world().size > 1:
        raise ValueError(f"number of processes is {world().size}; expected 1: evaluate draws in one process.")
    callbacks = callbacks or Callbacks()
    prompts = choose(read_prompt_set(config.prompts), config.limit, config.limit_seed)
    expect_prompts(prompts, str(config.prompts))
    reward = read_rewards(config.rewards, model.tokenizer, model.comfyui)
    variants = {BASE: config.baseline_tuned, TUNED: model.tuned} if model.tuned or config.baseline_tuned else {BASE: ()}
    models = Models(model)
    _check_models(models, variants, prompts)
    with RunFolder.open(Path(root), config.run_name, resume=config.resume) as folder:
        identity = _identity(models.open(()), variants, prompts, reward, config)
        folder.claim(identity, {"config": _readable_settings(model, config)})
        scores = ScoresFile(folder.path / SCORES)
        for name, tuned in variants.items():
            missing = [prompt for prompt in prompts if (name, prompt.text) not in scores.by_prompt]
            if missing:
                save = _image_writer(folder.path / "images" / name, prompts) if config.save_images else None
                for row in _score_prompts(name, models.open(tuned), reward, missing, config, callbacks, save):
                    scores.add(row)
        result = report([scores.by_prompt[name, prompt.text] for name in variants for prompt in prompts], prompts)
        write_text(folder.path / TABLE, as_csv(scores.by_prompt, variants, prompts))
        write_json(folder.path / RESULT, result)
        folder.set_status("finished", len(prompts))
    return {"run": str(folder.path), **result}


class Models:
    """Variants of one model by the results put into it, with one of them in memory at a time."""

    def __init__(self, config: ModelConfig):
        self._config, self._tuned = config, ()
        self._model: TextToImage | None = build_model(replace(config, tuned=()))

    def open(self, tuned: Sequence[str]) -> TextToImage:
        """The model with these results; replaces the variant in memory."""
        if tuned != self._tuned:
            self._model = None
            self._model, self._tuned = build_model(replace(self._config, tuned=tuned)), tuned
        return self._model

    def check(self, tuned: Sequence[str]) -> None:
        """Raises ValueError where these results do not fit the model."""
        build_model(replace(self._config, tuned=tuned, device="cpu"))


def _check_models(models: Models, variants: Mapping[str, Sequence[str]], prompts: Sequence[Prompt]) -> None:
    """Finds before the first picture what would otherwise fail after hours."""
    plain = models.open(())
    check_width(plain)
    check_pooled(plain)
    warn_of_long_prompts(plain.text_encoder, prompts)
    for tuned in filter(None, variants.values()):
        models.check(tuned)


def _identity(
    plain: TextToImage,
    variants: Mapping[str, Sequence[str]],
    prompts: Sequence[Prompt],
    reward: CombinedReward,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Everything that must be equal for a measurement to resume."""
    projection = plain.text_encoder.projection
    return {
        "kind": "evaluate",
        **{name: value for name, value in vars(config).items() if name not in FREE_FIELDS},
        "model": plain.denoiser.fingerprint,
        "text_encoder": plain.text_encoder.fingerprint,
        "projection": None if projection is None else tensors_sketch(projection.state_dict().items()),
        "vae": plain.autoencoder.fingerprint,
        "tuned": [[name, tuned_identity(tuned)] for name, tuned in variants.items()],
        "rewards": reward.fingerprint,
        "prompts": prompts_fingerprint(prompts),
    }


def _readable_settings(model: ModelConfig, config: EvaluateConfig) -> dict[str, Any]:
    """The settings as JSON, for people who read config.json."""
    values = vars(model) | vars(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


class ScoresFile:
    """The scores of every prompt drawn so far, a JSON line each; drops a last line that a killed process left half.

    by_prompt: scores by (model, prompt).
    """

    def __init__(self, path: Path):
        self._path = path
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
        with reading(path, "no file of scores", "Put it back, or choose resume = restart."):
            rows = [PromptScores(**parse_json(line, dict)) for line in whole.decode("utf-8").split("\n") if line]
            self.by_prompt = {(row.model, row.prompt): row for row in rows}

    def add(self, row: PromptScores) -> None:
        """Appends the row to the file and to `by_prompt`."""
        append_text(self._path, json.dumps(vars(row)) + "\n")
        self.by_prompt[row.model, row.prompt] = row


SaveImages = Callable[[str, Tensor], None]
"""Saves the (S, 3, H, W) pictures of a prompt."""


def _image_writer(folder: Path, prompts: Sequence[Prompt]) -> SaveImages:
    """Saves pictures as `<number of the prompt>_<seed>.png`."""
    numbers = {prompt.text: number for number, prompt in enumerate(prompts)}

    def save(text: str, images: Tensor) -> None:
        for seed, image in enumerate(images):
            save_png(image, folder / f"{numbers[text]:05d}_{seed}.png")

    return save


def _score_prompts(
    name: str,
    model: TextToImage,
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    callbacks: Callbacks,
    save: SaveImages | None,
) -> Iterator[PromptScores]:
    """Draws and scores all seeds of each prompt; several prompts at a time where they fit into a batch."""
    reward.network.to(model.denoiser.device)
    count = max(1, config.batch_size // config.seeds)
    for start in range(0, len(prompts), count):
        callbacks.on_text(f"drawing with the {name} model: {start} of {len(prompts)} prompts")
        texts = [prompt.text for prompt in prompts[start : start + count]]
        images = draw_prompts(model, texts, config)
        scores = _scores(reward, images, texts)
        for number, text in enumerate(texts):
            if save is not None:
                save(text, images[number])
            by_reward = {term: values[number].tolist() for term, values in scores.items()}
            yield PromptScores(name, text, by_reward, *_diversity(images[number], reward))


def _diversity(images: Tensor, reward: CombinedReward) -> tuple[float, ...]:
    """Vendi score and mean distance of (S, 3, H, W) pictures of one prompt; empty for one picture."""
    if len(images) < 2:
        return ()
    figures = diversity(images, reward, lpips=False)
    return figures.vendi, figures.distance


def draw_prompts(model: TextToImage, texts: Sequence[str], config: EvaluateConfig) -> Tensor:
    """(P, S, 3, H, W) pictures in 0..1 of P prompts from S seeds.

    The noise depends on the seed and the prompt's text alone, not on the other prompts.
    """
    pairs = [(text, seed) for text in texts for seed in range(config.seeds)]
    images = draw(
        model,
        [text for text, _ in pairs],
        width=config.width,
        height=config.height,
        steps=config.sampling_steps,
        cfg=config.cfg,
        seed=config.seed,
        batch_size=config.batch_size,
        indices=[derive_seed(0, *pair) for pair in pairs],
    )
    return torch.stack(images).unflatten(0, (len(texts), config.seeds))


def _scores(reward: CombinedReward, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """Reward -> (P, S) unscaled scores of (P, S, 3, H, W) images."""
    scored = score_images(reward, images.flatten(0, 1), [text for text in texts for _ in range(images.shape[1])])
    terms = scored.terms or {scored.name: scored.scores}
    return {name: torch.tensor(values).unflatten(0, images.shape[:2]) for name, values in terms.items()}


def run_evaluate(arguments: argparse.Namespace) -> dict:
    """The verb: the whole result as JSON, or its table."""
    config = read_flags(arguments, EvaluateConfig)
    result = evaluate(read_model_flags(arguments), config, arguments.output, Terminal())
    return result if arguments.json else {"run": result["run"], "table": f"\n{table(result)}"}


def add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ModelConfig)
    add_flags(parser, EvaluateConfig)
    add_output_flag(parser)


VERBS = {
    "evaluate": Verb(
        "draw a set of prompts with a tuned model and its base, score and compare", add_evaluate_flags, run_evaluate
    )
}
