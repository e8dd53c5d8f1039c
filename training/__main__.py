"""The command line: `python -m retune.training <verb>`; `accelerate launch -m retune.training <verb>` on many GPUs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .commands import evaluate as prompt_set_run
from .commands.evaluate import EvaluateConfig
from .commands.lora_files import VERBS as LORA_VERBS
from .commands.open_model import ModelConfig, build_model
from .commands.score import VERBS as SCORE_VERBS
from .commands.terminal import Terminal, run_verb
from .common.distributed import local_device
from .config.embedding import EmbeddingConfig
from .config.flags import add_flags, read_flags
from .config.lora import LORA_PRESETS, LoraConfig
from .config.reward import RewardTuneConfig
from .config.run import RunConfig, TrainModelConfig
from .config.sample_prompts import SamplePrompts
from .config.training_settings import PRESET_RUNS, PRESETS, TrainingSettings
from .data.examples import Dataset
from .data.folder import FolderConfig
from .evaluation.prompt_set_report import table
from .models.layers import ResetConfig, reset_weights

STOPPING = (
    "Ctrl-C stops the run, and the same command goes on where it was. A file named finish in the run's folder ends it "
    "after the step in progress, with its result: the same command then gives that, and more --steps go on from there."
)
"""Said in the help of every training."""


def open_model(arguments: argparse.Namespace):
    """The model the flags describe: loaded, its text encoder swapped and scaled, its layers reset."""
    return build_model(model_flags(arguments))


def model_flags(arguments: argparse.Namespace) -> ModelConfig:
    """The model's flags, with the device that accelerate gives where none is asked for."""
    config = read_flags(arguments, ModelConfig)
    return config if config.device else replace(config, device=str(local_device()))


def open_dataset(arguments: argparse.Namespace, terminal: Terminal) -> Dataset:
    """The training folder, joined with the regularisation images if there are any; prints what it holds."""
    from .data.dataset import join_datasets
    from .data.folder import load_folder

    def progress(done: int, total: int, text: str) -> None:
        terminal.on_text(text)

    dataset = load_folder(read_flags(arguments, FolderConfig), progress)
    if arguments.reg_folder:
        dataset = join_datasets(dataset, load_folder(regularisation_folder(arguments), progress), regularisation=True)
    print(dataset.report, file=sys.stderr)
    return dataset


def open_run(arguments: argparse.Namespace, kind: type[RunConfig]) -> tuple[RunConfig, Dataset, Terminal]:
    """What the flags of a training describe, the model aside."""
    settings, samples = read_flags(arguments, TrainingSettings), read_flags(arguments, SamplePrompts, "sample_")
    config, terminal = read_flags(arguments, kind, settings=settings, samples=samples), Terminal()
    return config, open_dataset(arguments, terminal), terminal


def train(arguments: argparse.Namespace) -> dict:
    from .recipes.unet import train_model

    config, dataset, terminal = open_run(arguments, TrainModelConfig)
    trained = train_model(open_model(arguments), dataset, config, arguments.output, terminal)
    return {"run": str(trained.path.parent), "result": str(trained.path)}


def lora(arguments: argparse.Namespace) -> dict:
    from .formats.lora import read_lora
    from .recipes.lora import train_lora

    config, dataset, terminal = open_run(arguments, LoraConfig)
    start = read_lora(arguments.start_lora) if arguments.start_lora else None
    trained = train_lora(open_model(arguments), dataset, config, arguments.output, terminal, start=start)
    return {"run": str(trained.path.parent), "result": str(trained.path)}


def embedding(arguments: argparse.Namespace) -> dict:
    from .recipes.textual_inversion import known_concepts, train_embedding

    config, dataset, terminal = open_run(arguments, EmbeddingConfig)
    model = open_model(arguments)
    known = known_concepts(arguments.known_embeddings, model.text_encoder)
    model = replace(model, text_encoder=model.text_encoder.with_concepts(known))
    trained = train_embedding(model, dataset, config, arguments.output, terminal)
    return {"run": str(trained.path.parent), "result": str(trained.path)}


def reward(arguments: argparse.Namespace) -> dict:
    from .data.prompts import read_prompts
    from .recipes.reward import tune
    from .rewards.parse import read_rewards

    settings, samples = read_flags(arguments, TrainingSettings), read_flags(arguments, SamplePrompts, "sample_")
    config = read_flags(arguments, RewardTuneConfig, settings=settings, samples=samples)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else []
    dataset = open_dataset(arguments, Terminal()) if arguments.folder else None
    held_out = [f"{text},weight=0" for text in arguments.held_out]
    rewards = read_rewards([*arguments.rewards, *held_out], arguments.tokenizer, arguments.comfyui)
    model = open_model(arguments)
    rewards.network.to(model.denoiser.device)
    tuned = tune(model, rewards, prompts, config, arguments.output, Terminal(), dataset=dataset)
    return {"run": str(tuned.path.parent), "result": str(tuned.path)}


def evaluate(arguments: argparse.Namespace) -> dict:
    config = read_flags(arguments, EvaluateConfig)
    result = prompt_set_run.evaluate(model_flags(arguments), config, arguments.output, Terminal())
    return result if arguments.json else {"run": result["run"], "table": f"\n{table(result)}"}


def regularisation_folder(arguments: argparse.Namespace) -> FolderConfig:
    """Read as the training folder is, but for its own flags, and without masks."""
    changes = {"folder": arguments.reg_folder, "weight": arguments.reg_weight, "repeats": arguments.reg_repeats}
    if arguments.reg_caption:
        changes |= {"captions": "one caption", "caption": arguments.reg_caption}
    return replace(read_flags(arguments, FolderConfig), masks="none", **changes)


def reset(arguments: argparse.Namespace) -> dict:
    from .commands.open_model import open_unet, save_unet

    weights = open_unet(arguments.model)
    new, report = reset_weights(weights, read_flags(arguments, ResetConfig))
    print(report, file=sys.stderr)
    save_unet(arguments.output, weights | new)
    return {"file": str(arguments.output), "tensors": len(new)}


def report(arguments: argparse.Namespace) -> dict:
    from .runs.folder import RunFolder
    from .runs.report import write_report

    folder = RunFolder(arguments.run_folder)
    if folder.config() is None:
        raise ValueError(f"{folder.path} has no config.json; expected a run's folder, such as output/retune/my run.")
    return {"report": str(write_report(folder))}


def demo(arguments: argparse.Namespace) -> dict:
    from .commands.demo import DemoConfig, run_demo

    config = read_flags(arguments, DemoConfig)
    if arguments.comfyui:
        from .commands.demo_in_comfyui import run_demo_in_comfyui

        return run_demo_in_comfyui(config, arguments.comfyui, Terminal())
    return run_demo(config, Terminal())


def parser(preset: str = "custom") -> argparse.ArgumentParser:
    """All verbs and their flags; a preset changes defaults of `train` and `lora`."""
    top = argparse.ArgumentParser(prog="retune", description="Change how a text-to-image model listens to text.")
    top.add_argument("--verbose", action="store_true")
    verbs = top.add_subparsers(dest="verb", required=True)
    t = verbs.add_parser("train", help="retrain layers of a UNet on captioned images", epilog=STOPPING)
    add_flags(t, ModelConfig)
    _add_data_flags(t)
    add_flags(t, TrainModelConfig, skip=("settings", "samples"))
    add_flags(t, TrainingSettings)
    _add_run_flags(t, PRESETS)
    t.set_defaults(**PRESETS.get(preset, {}), **PRESET_RUNS.get(preset, {}), function=train)
    o = verbs.add_parser("lora", help="train a LoRA on captioned images", epilog=STOPPING)
    add_flags(o, ModelConfig)
    _add_data_flags(o)
    add_flags(o, LoraConfig, skip=("settings", "samples"))
    add_flags(o, TrainingSettings)
    o.add_argument("--start-lora", type=Path, help="a LoRA file of any trainer whose values the adapters begin with")
    _add_run_flags(o, LORA_PRESETS)
    o.set_defaults(**LORA_PRESETS.get(preset, {}), function=lora)
    e = verbs.add_parser("embedding", help="train new words of a text encoder (textual inversion)", epilog=STOPPING)
    add_flags(e, ModelConfig)
    _add_data_flags(e)
    add_flags(e, EmbeddingConfig, skip=("settings", "samples"))
    add_flags(e, TrainingSettings)
    e.add_argument(
        "--known-embeddings",
        nargs="*",
        default=(),
        metavar="TOKEN=FILE",
        help="words that prompts and --initial-text may hold",
    )
    _add_run_flags(e, ("custom",))
    e.set_defaults(function=embedding)
    w = verbs.add_parser("reward", help="tune a text encoder or UNet so that pictures score higher", epilog=STOPPING)
    add_flags(w, ModelConfig)
    w.add_argument("--prompts", type=Path, help="text file, a prompt a line, or .jsonl with weights")
    g = w.add_argument_group("rewards, each as kind,name=value,... (see `score --help`)")
    g.add_argument("--rewards", nargs="+", required=True, metavar="REWARD", help="what is maximised, summed by weight")
    g.add_argument("--held-out", nargs="*", default=(), metavar="REWARD", help="rewards logged and not trained on")
    add_flags(w, RewardTuneConfig, skip=("settings", "samples"))
    w.add_argument("--folder", type=Path, help="folder of captioned images, for --method direct")
    _add_data_flags(w, skip=("folder",))
    add_flags(w, TrainingSettings)
    _add_run_flags(w, ("custom",))
    w.set_defaults(function=reward)
    v = verbs.add_parser("evaluate", help="draw a set of prompts with a tuned model and its base, score and compare")
    add_flags(v, ModelConfig)
    add_flags(v, EvaluateConfig)
    v.add_argument("--output", type=Path, default=Path("output") / "retune", help="folder of all runs")
    v.set_defaults(function=evaluate)
    n = verbs.add_parser("report", help="write a run's report.html anew, also of one that goes on or was stopped")
    n.add_argument("run_folder", type=Path, help="the run's folder, such as 'output/retune/my run'")
    n.set_defaults(function=report)
    r = verbs.add_parser("reset", help="re-initialise attention layers and write the UNet")
    r.add_argument("--model", required=True, help="diffusers folder, .safetensors checkpoint, or 'demo'")
    r.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    add_flags(r, ResetConfig)
    r.set_defaults(function=reset)
    for name, (config, function) in (LORA_VERBS | SCORE_VERBS).items():
        tool = verbs.add_parser(name, help=config.__doc__[0].lower() + config.__doc__.rstrip(".")[1:])
        add_flags(tool, config)
        tool.set_defaults(function=lambda arguments, c=config, f=function: f(read_flags(arguments, c)))
    from .commands.demo import DemoConfig

    d = verbs.add_parser("demo", help="the T5 swap on the demo model, judged before and after")
    add_flags(d, DemoConfig)
    d.add_argument("--comfyui", type=Path, help="run it as a workflow in this ComfyUI, without a browser")
    d.set_defaults(function=demo)
    for verb in verbs.choices.values():
        verb.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return top


def _add_data_flags(verb: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    add_flags(verb, FolderConfig, skip=skip)
    g = verb.add_argument_group("regularisation images")
    g.add_argument("--reg-folder", type=Path, help="images that keep the model what it was; an epoch shows as many")
    g.add_argument("--reg-weight", type=float, default=1.0, help="factor of their loss (default: 1.0)")
    g.add_argument("--reg-repeats", type=int, default=1, help="repeats of each, before they are balanced (default: 1)")
    g.add_argument("--reg-caption", default="", help="one caption for all of them (default: as --captions says)")


def _add_run_flags(verb: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    verb.add_argument("--preset", choices=presets, default="custom", help="other defaults for the flags it names")
    add_flags(verb, SamplePrompts, "sample_")
    verb.add_argument("--output", type=Path, default=Path("output") / "retune", help="folder of all runs")


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if getattr(arguments, "preset", "custom") != "custom":
        arguments = parser(arguments.preset).parse_args(argv)
    return run_verb(arguments.function, arguments)


if __name__ == "__main__":
    sys.exit(main())
