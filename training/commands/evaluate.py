"""A set of prompts drawn by a tuned model and by the one it came from, from the same noise, scored and compared."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.distributed import world
from ..common.files import write_json, write_text
from ..common.fingerprint import tensors_sketch
from ..common.rng import derive_seed
from ..config.checks import check_fields, check_run_name, check_size
from ..config.fields import setting, side_setting
from ..config.flags import add_flags, read_flags
from ..config.model import ModelConfig
from ..data.images import save_png
from ..data.prompt_lengths import warn_of_long_prompts
from ..data.prompts import Prompt, expect_prompts, fingerprint_of
from ..evaluation.prompt_set_report import BASE, TUNED, Drawn, as_csv, report, table
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
GOES_ON = ("run_name", "resume", "batch_size", "save_images", "prompts", "rewards", "baseline_tuned")
"""Fields that may differ when a run goes on, or that count by what they stand for."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Draw a set of prompts with a tuned model and its base, and compare their scores."""

    run_name: str
    """Folder name of the measurement; the same command goes on with one that was stopped."""
    prompts: Path
    """The set: PartiPrompts.tsv, a folder of HPS v2's .json files or one of them, .txt with a prompt a line, or .jsonl
    with prompt and category. Every prompt counts once, whatever its weight."""
    rewards: tuple[str, ...]
    """Rewards as kind,name=value,... (see `score --help`); each is reported by its raw score."""
    baseline_tuned: tuple[str, ...] = ()
    """Results put into the model that is compared with, as --tuned; by default it is the model without --tuned."""
    limit: int = setting(0, low=0, high=10**8)
    """Prompts to take, as many of each category as far as it has them; 0 takes all."""
    limit_seed: int = 0
    """Names the prompts that are taken."""
    seeds: int = setting(4, low=1, high=1000)
    """Pictures of each prompt, each from noise of its own; both models begin from the same."""
    seed: int = setting(0, low=0, high=2**64 - 1)
    """Names the noise."""
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
    """auto: go on with the measurement of this name if its settings are equal; restart: move the old folder aside."""

    def __post_init__(self) -> None:
        check_run_name(self.run_name)
        check_fields(self)
        check_size(self, "picture size")


def evaluate(model: ModelConfig, config: EvaluateConfig, root: Path, callbacks: Callbacks | None = None) -> dict:
    """Draws and scores what is not yet in the folder root/run name, and writes its result.json and scores.csv.

    Returns result.json's content: figures of all prompts and of each category (see `report`). Errors: ValueError before
    anything is drawn for prompts, rewards and models as their readers have it, and for other settings under this name.
    """
    if world().size > 1:
        raise ValueError(f"number of processes is {world().size}; expected 1: evaluate draws in one process.")
    callbacks = callbacks or Callbacks()
    prompts = choose(read_prompt_set(config.prompts), config.limit, config.limit_seed)
    expect_prompts(prompts, str(config.prompts))
    reward = read_rewards(config.rewards, model.tokenizer, model.comfyui)
    plain = build_model(replace(model, tuned=()))
    check_width(plain)
    check_pooled(plain)
    warn_of_long_prompts(plain.text_encoder, prompts)
    variants = {BASE: config.baseline_tuned, TUNED: model.tuned} if model.tuned or config.baseline_tuned else {BASE: ()}
    for tuned in filter(None, variants.values()):
        build_model(replace(model, tuned=tuned, device="cpu"))  # what does not fit shall not fail after hours
    opened, holds = plain, ()
    with RunFolder.open(Path(root), config.run_name, resume=config.resume) as folder:
        folder.claim(_identity(plain, variants, prompts, reward, config), {"config": _shown(model, config)})
        del plain  # one model at a time
        rows = Rows(folder.path / SCORES)
        for name, tuned in variants.items():
            missing = [prompt for prompt in prompts if (name, prompt.text) not in rows.known]
            if missing:
                if tuned != holds:
                    opened = None
                    opened, holds = build_model(replace(model, tuned=tuned)), tuned
                places = {prompt.text: number for number, prompt in enumerate(prompts)}
                pictures = folder.path / "images" / name if config.save_images else None
                for one in _drawn(name, opened, reward, missing, config, callbacks, pictures, places):
                    rows.add(one)
        result = report([rows.known[name, prompt.text] for name in variants for prompt in prompts], prompts)
        write_text(folder.path / TABLE, as_csv(rows.known, variants, prompts))
        write_json(folder.path / RESULT, result)
        folder.set_status("finished", len(prompts))
    return {"run": str(folder.path), **result}


def _identity(
    plain: TextToImage,
    variants: Mapping[str, Sequence[str]],
    prompts: Sequence[Prompt],
    reward: CombinedReward,
    config: EvaluateConfig,
) -> dict[str, Any]:
    """What must be equal for a measurement to go on."""
    projection = plain.text_encoder.projection
    return {
        "kind": "evaluate",
        **{name: value for name, value in vars(config).items() if name not in GOES_ON},
        "model": plain.denoiser.fingerprint,
        "text_encoder": plain.text_encoder.fingerprint,
        "projection": None if projection is None else tensors_sketch(projection.state_dict().items()),
        "vae": plain.autoencoder.fingerprint,
        "tuned": [[name, tuned_identity(tuned)] for name, tuned in variants.items()],
        "rewards": reward.fingerprint,
        "prompts": fingerprint_of(prompts),
    }


def _shown(model: ModelConfig, config: EvaluateConfig) -> dict[str, Any]:
    """What was asked for, for people to read in config.json."""
    given = vars(model) | vars(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


class Rows:
    """What is drawn and scored, a line each in a file; a line that a killed process left half is dropped.

    known: by (model, prompt).
    """

    def __init__(self, path: Path):
        self._path = path
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
        found = (Drawn(**json.loads(line)) for line in whole.decode("utf-8").splitlines())
        self.known = {(one.model, one.prompt): one for one in found}

    def add(self, one: Drawn) -> None:
        """Keeps it, in the file too."""
        with open(self._path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(vars(one)) + "\n")
        self.known[one.model, one.prompt] = one


def _drawn(
    name: str,
    model: TextToImage,
    reward: CombinedReward,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    callbacks: Callbacks,
    pictures: Path | None,
    places: Mapping[str, int],
) -> Iterator[Drawn]:
    """Prompt after prompt, all its seeds; as many prompts together as fit into a batch."""
    reward.network.to(model.denoiser.device)
    together = max(1, config.batch_size // config.seeds)
    for start in range(0, len(prompts), together):
        callbacks.on_text(f"drawing with the {name} model: {start} of {len(prompts)} prompts")
        texts = [prompt.text for prompt in prompts[start : start + together]]
        images = pictures_of(model, texts, config)
        scores = _scores(reward, images, texts)
        for number, text in enumerate(texts):
            if pictures is not None:
                for seed, image in enumerate(images[number]):
                    save_png(image, pictures / f"{places[text]:05d}_{seed}.png")
            own = {term: values[number].tolist() for term, values in scores.items()}
            several = diversity(images[number], reward, lpips=False) if config.seeds > 1 else None
            more = (several.vendi, several.distance) if several else ()
            yield Drawn(name, text, own, *more)


def pictures_of(model: TextToImage, texts: Sequence[str], config: EvaluateConfig) -> Tensor:
    """(P, S, 3, H, W) pictures in 0..1. The noise follows from the seed and the prompt's text, whatever else is drawn
    with it."""
    pairs = [(text, seed) for text in texts for seed in range(config.seeds)]
    drawn = draw(
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
    return torch.stack(drawn).unflatten(0, (len(texts), config.seeds))


def _scores(reward: CombinedReward, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """(P, S) raw scores by reward."""
    table = score_images(reward, images.flatten(0, 1), [text for text in texts for _ in range(images.shape[1])])
    found = table.terms or {table.name: table.scores}
    return {name: torch.tensor(values).unflatten(0, images.shape[:2]) for name, values in found.items()}


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
