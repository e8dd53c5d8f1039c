"""The command line: its flags are the config classes, its verbs write what they say."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from retune.benchmarks.__main__ import parser as bench_parser
from retune.training.__main__ import main, parser
from retune.training.commands.evaluate import EvaluateConfig
from retune.training.commands.lora_files import VERBS as LORA_VERBS
from retune.training.commands.open_model import ModelConfig, build_model, save_unet, unet_parameters
from retune.training.commands.train import read_run_flags, regularisation_folder
from retune.training.common.distributed import World
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.fields import config_fields, field_docs
from retune.training.config.flags import add_flags, read_flags
from retune.training.config.lora import LoraConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import (
    CARD_RETRAINING,
    CARD_REWARDS,
    CARD_RUNS,
    CARD_WORDS,
    CARDS,
    TrainingSettings,
)
from retune.training.data.folder import FolderConfig
from retune.training.loop.fused_backward import check_fused_backward
from retune.training.models import ldm
from retune.training.models.layers import ResetConfig

CONFIGS = {
    "train": [
        (ModelConfig, ""),
        (FolderConfig, ""),
        (TrainModelConfig, ""),
        (TrainingSettings, ""),
        (SamplePrompts, "sample_"),
    ],
    "reset": [(ResetConfig, "")],
    "evaluate": [(ModelConfig, ""), (EvaluateConfig, "")],
    **{verb: [(config, "")] for verb, (config, _) in LORA_VERBS.items()},
}
FLAGS_OF_OTHER_PROGRAMS = {"--all", "--no-comfyui", "--port", "--torch-index", "--num_processes", "--verbose"}
"""Of run.py and accelerate; --verbose stands before the verb."""
REQUIRED = ["train", "--model", "m", "--folder", "f", "--run-name", "r"]


def options(verb):
    """dest -> argparse action of a verb."""
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in verbs.choices[verb]._actions}


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_field_is_a_flag_with_its_default_choices_and_help(verb):
    found = options(verb)
    for config, prefix in CONFIGS[verb]:
        hints, docs = get_type_hints(config), field_docs(config)
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(hints[field.name]):
                continue
            action = found[prefix + field.name]
            assert "--" + (prefix + field.name).replace("_", "-") in action.option_strings
            assert action.required == (field.default is dataclasses.MISSING)
            if not action.required:
                assert action.default == field.default
            if get_origin(hints[field.name]) is Literal:
                assert action.choices == get_args(hints[field.name])
            assert docs.get(field.name, "") in action.help.replace("%%", "%")
            assert config_fields(config)[field.name].range in action.help


def test_the_documentation_names_flags_that_exist():
    text = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    parsers = [*verbs.choices.values(), bench_parser()]
    flags = {flag for each in parsers for action in each._actions for flag in action.option_strings}
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - flags - FLAGS_OF_OTHER_PROGRAMS
    assert not unknown


def test_plain_flags_give_the_default_configs():
    arguments = parser().parse_args(REQUIRED)
    assert read_flags(arguments, TrainingSettings) == TrainingSettings()
    assert read_flags(arguments, SamplePrompts, "sample_") == SamplePrompts()
    nested = {"settings": TrainingSettings(), "samples": SamplePrompts()}
    assert read_flags(arguments, TrainModelConfig, **nested) == TrainModelConfig(run_name="r")
    assert read_flags(arguments, ModelConfig) == ModelConfig(model="m")


def test_flags_are_converted_to_their_fields_types():
    more = ["--no-train-projection", "--sample-prompts", "one", "two words", "--target-std", "0.3", "--steps", "7"]
    arguments = parser().parse_args([*REQUIRED, *more, "--train", "QK", "--seed", "5", "--sample-seed", "6"])
    samples = read_flags(arguments, SamplePrompts, "sample_")
    assert samples == SamplePrompts(prompts=("one", "two words"), seed=6)
    config = read_flags(arguments, TrainModelConfig, settings=TrainingSettings(), samples=samples)
    assert (config.steps, config.train, config.train_projection, config.seed) == (7, "QK", False, 5)
    assert read_flags(arguments, ModelConfig).target_std == 0.3


@pytest.mark.parametrize("verb", ["train", "reset", "demo"])
def test_help_of_every_verb_prints(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0 and "--json" in capsys.readouterr().out


def test_percent_signs_in_docs_are_printed_as_they_are():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        share: str = "5%"
        """100% of it."""

    top = argparse.ArgumentParser()
    add_flags(top, Config)
    assert "100% of it. (default: '5%')" in " ".join(top.format_help().split())


def test_bad_choices_stop_before_anything(capsys):
    with pytest.raises(SystemExit):
        main([*REQUIRED, "--train", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
    assert main([*REQUIRED, "--steps", "0"]) == 2
    assert capsys.readouterr().err == "error: steps is 0; expected 1 to 100000000.\n"


def test_a_preset_changes_defaults_and_flags_win():
    flags = [*REQUIRED, "--preset", "T5 swap, source notes", "--steps", "7"]
    found = parser("T5 swap, source notes").parse_args(flags)
    assert (found.learning_rate, found.steps, found.total_batch, found.loss_weighting) == (4e-5, 7, 64, "min-SNR")
    assert parser().parse_args(REQUIRED).total_batch == 0


def test_presets_by_card_set_everything_that_memory_depends_on():
    fields = ("precision", "optimizer", "gradient_checkpointing", "block_swap", "fused_backward")
    fields += ("gradient_accumulation", "total_batch", "ema_decay", "batch_size", "resolution", "sample_width")
    own = {"train": CARD_RETRAINING, "lora": {}, "embedding": CARD_WORDS, "reward": CARD_REWARDS}
    needed = {"train": [], "lora": [], "embedding": ["--token", "<x>"], "reward": ["--rewards", "demo aesthetic"]}
    for card in CARDS:
        for verb, more in needed.items():
            arguments = [verb, *REQUIRED[1:], *more]
            found = parser(card).parse_args([*arguments, "--preset", card])
            assert all(name in CARDS[card] | CARD_RUNS[card] for name in fields)
            expected = CARDS[card] | CARD_RUNS[card] | own[verb].get(card, {})
            assert {name: getattr(found, name) for name in fields} == {name: expected[name] for name in fields}
            kind = {"train": TrainModelConfig, "lora": LoraConfig, "embedding": EmbeddingConfig}.get(verb)
            if kind:
                check_fused_backward(read_run_flags(found, kind))
    lora = parser("SDXL 8 GB").parse_args(["lora", *REQUIRED[1:], "--preset", "SDXL 8 GB", "--block-swap", "87"])
    assert (lora.rank, lora.block_swap, lora.resolution) == (32, 87, 1024)


def test_what_auto_became_is_said_once_by_the_main_process(train_arguments, tmp_path, capsys, monkeypatch):
    assert main(train_arguments(tmp_path / "out", "--precision", "auto", "--steps", "1")) == 0
    line = "precision auto is fp32, by the device (cpu)\n"
    assert capsys.readouterr().err.count(line) == 1
    assert main(train_arguments(tmp_path / "out", "--precision", "auto", "--steps", "2")) == 0
    assert capsys.readouterr().err.count("precision auto is fp32, as the run was begun\n") == 1
    flags = train_arguments(tmp_path / "new", "--precision", "auto")
    for module in ("train", "terminal"):
        monkeypatch.setattr(f"retune.training.commands.{module}.world", lambda: World(rank=1, size=2))
    read_run_flags(parser().parse_args(flags), TrainModelConfig)
    assert "precision" not in capsys.readouterr().err


def test_a_written_result_is_not_read_back_into_ram(train_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("retune.training.recipes.unet.read_tensors", None)
    assert main(train_arguments(tmp_path / "out", "--steps", "1")) == 0


def test_the_preset_reaches_the_run(train_arguments, tmp_path):
    flags = ("--preset", "T5 swap, source notes", "--batch-size", "2", "--total-batch", "4", "--steps", "1")
    assert main(train_arguments(tmp_path / "out", *flags)) == 0
    config = json.loads((tmp_path / "out" / "r" / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["settings"]["loss_weighting"] == "min-SNR" and config["settings"]["lr_schedule"] == "cosine"
    assert config["settings"]["total_batch"] == 4 and config["steps"] == 1


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("verb, artifact", [("lora", "lora.safetensors"), ("train", "model.safetensors")])
def test_all_that_saves_memory_goes_together(train_arguments, tmp_path, capsys, verb, artifact, precision):
    """Blocks in RAM that are recomputed, frozen weights in the arithmetic's dtype, gradients used as they come: with
    and without the first two, of which a result has no bit."""
    common = ("--precision", precision, "--fused-backward", "--gradient-accumulation", "1", "--steps", "2")
    found = []
    for name, more in (("plain", ()), ("lean", ("--gradient-checkpointing", "--block-swap", "5"))):
        arguments = train_arguments(tmp_path / name, *common, *more)
        assert main([verb, *arguments[1:]]) == 0
        assert "memory: at most about" in capsys.readouterr().err
        found.append((tmp_path / name / "r" / artifact).read_bytes())
    assert found[0] == found[1]
    settings = json.loads((tmp_path / "lean" / "r" / "config.json").read_text(encoding="utf-8"))["config"]["settings"]
    assert settings["precision"] == ("fp32" if precision == "auto" else precision) and settings["block_swap"] == 5


def test_errors_are_one_line_and_code_two(tmp_path, capsys):
    output = str(tmp_path / "out.safetensors")
    assert main(["reset", "--model", str(tmp_path / "no"), "--layers", "QK", "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model is ") and error.count("\n") == 1


def test_reset_changes_the_chosen_tensors_only(single_file, tmp_path, capsys):
    output = tmp_path / "new" / "reset.safetensors"
    arguments = ["--model", str(single_file), "--output", str(output), "--seed", "3"]
    assert main(["reset", *arguments, "--layers", "cross-attention K/V", "--json"]) == 0
    printed = capsys.readouterr()
    old, new = read_tensors(single_file)[0], read_tensors(output)[0]
    assert new.keys() == {name for name in old if name.startswith(ldm.UNET_PREFIX)}
    changed = {name for name in new if not torch.equal(old[name], new[name])}
    assert changed == {name for name in new if "attn2.to_k." in name or "attn2.to_v." in name}
    result = json.loads(printed.out.splitlines()[-1])
    assert result == {"file": str(output), "tensors": len(changed)}
    assert printed.err.startswith(f"{len(changed)} tensors reset")


def test_reset_reads_the_unet_alone(single_file, tmp_path):
    """Without a tokenizer, and from a file with nothing but the UNet: the same bytes as from the whole model."""
    tokenizer = single_file.parent / "clip_tokenizer"
    config = ModelConfig(model=str(single_file), tokenizer=tokenizer, reset="cross-attention", reset_seed=3)
    denoiser = build_model(config).denoiser
    save_unet(tmp_path / "expected.safetensors", unet_parameters(denoiser), denoiser)
    tensors, metadata = read_tensors(single_file, ldm.UNET_PREFIX)
    write_tensors(tmp_path / "unet.safetensors", tensors, metadata)
    flags = ["--layers", "cross-attention", "--seed", "3", "--output", str(tmp_path / "out.safetensors")]
    for model in (single_file, tmp_path / "unet.safetensors"):
        assert main(["reset", "--model", str(model), *flags]) == 0
        assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_train_writes_a_run(train_arguments, tmp_path, capsys):
    assert main(train_arguments(tmp_path / "out", "--json", "--train", "cross-attention K/V")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = tmp_path / "out" / "r"
    assert result == {"run": str(run), "result": str(run / "model.safetensors")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, 9))
    tensors, _ = read_tensors(run / "model.safetensors")
    assert tensors and all("attn2.to_k." in name or "attn2.to_v." in name for name in tensors)
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]["train"] == "cross-attention K/V"
    assert {p.name for p in (run / "samples").iterdir()} == {
        f"{step:06d}_{what}.png" for step in (0, 4, 8) for what in ("00", "grid")
    }


def test_regularisation_images_from_the_command_line(train_arguments, tmp_path, capsys):
    from retune.training.data.images import save_png

    for i in range(3):
        save_png(torch.full((3, 32, 32), i / 4), tmp_path / "class" / f"{i}.png")
    flags = ["--reg-folder", str(tmp_path / "class"), "--reg-weight", "0.5", "--reg-caption", "a figure"]
    arguments = parser().parse_args(train_arguments(tmp_path, *flags, "--masks", "alpha"))
    read = regularisation_folder(arguments)
    assert (read.weight, read.masks, read.resolution) == (0.5, "none", 32)
    assert (read.captions, read.caption) == ("one caption", "a figure")
    assert main(train_arguments(tmp_path / "out", *flags, "--steps", "2", "--sample-prompts")) == 0
    assert "regularisation images: 3 of 3 images, 4 shown per epoch" in capsys.readouterr().err
