"""The verbs that train: `train`, `lora`, `embedding` and `reward`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common.distributed import world
from ..config.embedding import EmbeddingConfig
from ..config.flags import add_flags, read_flags
from ..config.folder import FolderConfig
from ..config.lora import LORA_PRESETS, LoraConfig
from ..config.model import ModelConfig
from ..config.reward import RewardTuneConfig
from ..config.run import RunConfig, TrainModelConfig
from ..config.sample_prompts import SamplePrompts
from ..config.training_settings import (
    CARD_RETRAINING,
    CARD_REWARDS,
    CARD_RUNS,
    CARD_WORDS,
    CARDS,
    PRESET_RUNS,
    PRESETS,
    TrainingSettings,
)
from ..data.examples import Dataset
from ..models.layers import is_selected
from ..models.prediction import describe
from ..models.protocols import TextToImage
from .open_model import TEXT_ENCODER, VAE, build_model, open_outline
from .terminal import Terminal, say
from .verb import Verb, add_output_flag, read_model_flags

STOPPING = (
    "Ctrl-C stops the run, and the same command resumes it where it was. A file named finish in the run's folder ends "
    "it after the step in progress, with its result: the same command then returns that, and more --steps continue it. "
    "Under `accelerate launch` all processes train one run: --batch-size counts the samples of all of them together."
)
"""Below the help of every training."""
CARD_PRESETS = {name: values | CARD_RUNS[name] for name, values in CARDS.items()}
TRAIN_PRESETS = {
    name: values | PRESET_RUNS.get(name, {}) | CARD_RUNS.get(name, {}) | CARD_RETRAINING.get(name, {})
    for name, values in PRESETS.items()
}
ADAPTER_PRESETS = LORA_PRESETS | {name: values | LORA_PRESETS[name.split()[0]] for name, values in CARD_PRESETS.items()}
WORD_PRESETS = {"custom": {}} | {name: values | CARD_WORDS[name] for name, values in CARD_PRESETS.items()}
REWARD_PRESETS = {"custom": {}} | {name: values | CARD_REWARDS[name] for name, values in CARD_PRESETS.items()}


def run_train(arguments: argparse.Namespace) -> dict:
    from ..recipes.unet import train_model_file

    config, dataset = read_run(arguments, TrainModelConfig), open_dataset(arguments)
    model = open_model(arguments, config, visitors_of(config, dataset))
    return result_of(train_model_file(model, dataset, config, arguments.output, Terminal()))


def run_lora(arguments: argparse.Namespace) -> dict:
    from ..formats.lora import read_lora
    from ..recipes.lora import train_lora

    config, dataset = read_run(arguments, LoraConfig), open_dataset(arguments)
    start = read_lora(arguments.start_lora) if arguments.start_lora else None
    model = open_model(arguments, config, visitors_of(config, dataset))
    trained = train_lora(model, dataset, config, arguments.output, Terminal(), start=start)
    return result_of(trained.path)


def run_embedding(arguments: argparse.Namespace) -> dict:
    from ..recipes.textual_inversion import read_concepts, train_embedding

    config, dataset = read_run(arguments, EmbeddingConfig), open_dataset(arguments)
    model = open_model(arguments, config, visitors_of(config, dataset))
    concepts = read_concepts(arguments.known_embeddings, model.text_encoder)
    model = replace(model, text_encoder=model.text_encoder.with_concepts(concepts))
    trained = train_embedding(model, dataset, config, arguments.output, Terminal())
    return result_of(trained.path)


def run_reward(arguments: argparse.Namespace) -> dict:
    from ..data.prompts import read_prompts
    from ..loop.precision import DTYPES
    from ..recipes.reward import check_data, tune_file
    from ..rewards.parse import read_rewards

    config = read_run(arguments, RewardTuneConfig)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else []
    dataset = open_dataset(arguments) if arguments.folder else None
    check_data(config, prompts, dataset)
    held_out = [f"{text},weight=0" for text in arguments.held_out]
    rewards = read_rewards(
        [*arguments.rewards, *held_out], arguments.tokenizer, arguments.comfyui, DTYPES[config.settings.precision]
    )
    model = open_model(arguments, config, visitors_of(config, dataset))
    rewards.network.to(model.denoiser.device)
    return result_of(tune_file(model, rewards, prompts, config, arguments.output, Terminal(), dataset=dataset))


def result_of(path: Path) -> dict:
    """What a training prints: its run's folder, and the file in it."""
    return {"run": str(path.parent), "result": str(path)}


def read_run_flags(arguments: argparse.Namespace, config: type[RunConfig]) -> RunConfig:
    """A run's config with its settings and sample prompts; its precision is what "auto" is here.

    Raises ValueError for settings that cannot be used here, before data and model are read.
    """
    from ..recipes.checks import check_settings, with_precision

    settings, samples = read_flags(arguments, TrainingSettings), read_flags(arguments, SamplePrompts, "sample_")
    run = read_flags(arguments, config, settings=settings, samples=samples)
    _say_share(run)
    model = read_model_flags(arguments)
    run = with_precision(run, torch.device(model.device), arguments.output, say=say)
    check_settings(run, torch.device(model.device))
    return run


def read_run(arguments: argparse.Namespace, config: type[RunConfig]) -> RunConfig:
    """`read_run_flags`, which must suit the model too as far as its file's header tells."""
    from ..models.block_swap import check_block_swap

    run = read_run_flags(arguments, config)
    if run.settings.block_swap:
        check_block_swap(open_outline(read_model_flags(arguments)), run.settings.block_swap)
    return run


def _say_share(run: RunConfig) -> None:
    """Prints how a batch divides among several processes; ValueError where it does not."""
    here = world()
    share = here.share(run.batch_size)
    if here.size > 1:
        in_all = run.batch_size * run.gradient_accumulation
        say(
            f"batch_size {run.batch_size} is that of all {here.size} processes together, {share} each; a step has "
            f"{in_all} images"
        )


def open_model(arguments: argparse.Namespace, config: RunConfig, visiting: Collection[str]) -> TextToImage:
    """The model that the flags describe: loaded, its text encoder swapped and scaled, its layers reset.

    Weights are held in as few bytes as `build_model` can. Prints what the UNet is taken to predict and why, which
    --prediction corrects. visiting: see there.
    """
    model = build_model(read_model_flags(arguments), **holding(config), visiting=visiting)
    denoiser = model.denoiser
    say(f"model: {describe(denoiser.prediction_type, denoiser.sigmas)} (by {denoiser.source})")
    return model


def holding(config: RunConfig) -> dict[str, Any]:
    """How `build_model` holds the weights of a run's model."""
    from ..loop.precision import DTYPES

    retrains = isinstance(config, TrainModelConfig) and not config.settings.shard_weights
    return {
        "dtype": DTYPES[config.settings.precision],
        "trains": trained_weights(config),
        "text_trains": isinstance(config, RewardTuneConfig) and config.train == "text encoder",
        "replaced": retrains,
    }


def _text_trains(config: RunConfig) -> bool:
    """Whether a run trains the text encoder or something in it, its projection apart."""
    if isinstance(config, LoraConfig):
        return config.trains_text
    return config.text_trains if isinstance(config, RewardTuneConfig) else isinstance(config, EmbeddingConfig)


def visitors_of(config: RunConfig, dataset: Dataset | None) -> set[str]:
    """The parts of a model that no training step computes with, for `build_model`: they are on the device only while
    caches are filled and samples drawn.

    Args:
        config: the run's.
        dataset: its images, if it has any.
    """
    tunes = isinstance(config, RewardTuneConfig)  # which decodes pictures in every step
    crops = dataset is not None and dataset.crop == "random"  # whose latents are not cached
    encodes = _text_trains(config) or (not tunes and config.settings.varies_captions)
    return {part for part, stays in ((VAE, tunes or crops), (TEXT_ENCODER, encodes)) if not stays}


def trained_weights(config: RunConfig) -> Callable[[str], bool]:
    """Whether a run trains a weight of the UNet itself, by its canonical name, from all its digits."""
    if config.settings.master_weights == "bf16":
        return lambda name: False
    if isinstance(config, TrainModelConfig):
        return lambda name: is_selected(name, config.train)
    whole = isinstance(config, RewardTuneConfig) and config.train == "UNet"
    return lambda name: whole


def open_dataset(arguments: argparse.Namespace) -> Dataset:
    """The training folder, joined with the regularisation images if there are any; prints its report."""
    from ..data.dataset import join_datasets
    from ..data.folder import load_folder

    terminal = Terminal()

    def progress(done: int, total: int, text: str) -> None:
        terminal.on_text(text)

    dataset = load_folder(read_flags(arguments, FolderConfig), progress)
    if arguments.reg_folder:
        dataset = join_datasets(dataset, load_folder(regularisation_folder(arguments), progress), regularisation=True)
    say(dataset.report)
    return dataset


def regularisation_folder(arguments: argparse.Namespace) -> FolderConfig:
    """The regularisation images: read like the training folder, except for their own flags, and without masks."""
    changes = {"folder": arguments.reg_folder, "weight": arguments.reg_weight, "repeats": arguments.reg_repeats}
    if arguments.reg_caption:
        changes |= {"captions": "one caption", "caption": arguments.reg_caption}
    return replace(read_flags(arguments, FolderConfig), masks="none", **changes)


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ModelConfig)
    _add_data_flags(parser)
    _add_config_flags(parser, TrainModelConfig)
    _add_run_flags(parser, TRAIN_PRESETS)


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ModelConfig)
    _add_data_flags(parser)
    _add_config_flags(parser, LoraConfig)
    parser.add_argument(
        "--start-lora", type=Path, help="a LoRA file of any trainer whose values the adapters begin with"
    )
    _add_run_flags(parser, ADAPTER_PRESETS)


def add_embedding_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ModelConfig)
    _add_data_flags(parser)
    _add_config_flags(parser, EmbeddingConfig)
    parser.add_argument(
        "--known-embeddings",
        nargs="*",
        default=(),
        metavar="TOKEN=FILE",
        help="tokens that prompts and --initial-text may use",
    )
    _add_run_flags(parser, WORD_PRESETS)


def add_reward_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ModelConfig)
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line, or .jsonl with weights")
    group = parser.add_argument_group("rewards, each as kind,name=value,... (see `score --help`)")
    group.add_argument(
        "--rewards", nargs="+", required=True, metavar="REWARD", help="what is maximised, summed by weight"
    )
    group.add_argument("--held-out", nargs="*", default=(), metavar="REWARD", help="rewards logged and not trained on")
    add_flags(parser, RewardTuneConfig, skip=("settings", "samples"))
    parser.add_argument("--folder", type=Path, help="folder of captioned images, for --method direct")
    _add_data_flags(parser, skip=("folder",))
    add_flags(parser, TrainingSettings)
    _add_run_flags(parser, REWARD_PRESETS)


def _add_config_flags(parser: argparse.ArgumentParser, config: type[RunConfig]) -> None:
    add_flags(parser, config)
    add_flags(parser, TrainingSettings)


def _add_data_flags(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    add_flags(parser, FolderConfig, skip=tuple(skip))
    group = parser.add_argument_group("regularisation images")
    group.add_argument(
        "--reg-folder", type=Path, help="images that keep the model close to what it was; an epoch shows as many"
    )
    group.add_argument("--reg-weight", type=float, default=1.0, help="factor of their loss (default: 1.0)")
    group.add_argument(
        "--reg-repeats", type=int, default=1, help="repeats of each, before they are balanced (default: 1)"
    )
    group.add_argument("--reg-caption", default="", help="one caption for all of them (default: by --captions)")


def _add_run_flags(parser: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    parser.add_argument("--preset", choices=list(presets), default="custom", help="other defaults for some flags")
    add_flags(parser, SamplePrompts, "sample_")
    add_output_flag(parser)


VERBS = {
    "train": Verb("retrain layers of a UNet on captioned images", add_train_flags, run_train, STOPPING, TRAIN_PRESETS),
    "lora": Verb("train a LoRA on captioned images", add_lora_flags, run_lora, STOPPING, ADAPTER_PRESETS),
    "embedding": Verb(
        "train new words of a text encoder (textual inversion)",
        add_embedding_flags,
        run_embedding,
        STOPPING,
        WORD_PRESETS,
    ),
    "reward": Verb(
        "tune a text encoder or UNet so that pictures score higher",
        add_reward_flags,
        run_reward,
        STOPPING,
        REWARD_PRESETS,
    ),
}
