"""What settings cannot do is said by the command line before data and model are read."""

import pytest
from retune.training.__main__ import parser
from retune.training.commands import train
from retune.training.common.distributed import World
from retune.training.loop import optimizers
from retune.training.recipes import checks

WHOLE = ("--train", "whole UNet")
WRONG = {
    "more blocks than there are": ("lora", ("--block-swap", "99"), "block_swap is 99; expected at most"),
    "blocks of a whole UNet": ("train", (*WHOLE, "--block-swap", "2"), "block_swap is 2 with train = whole UNet"),
    "fp16 with rewards": ("reward", ("--precision", "fp16"), "precision is 'fp16' for a reward tuning"),
    "fp16 on a CPU": ("lora", ("--precision", "fp16"), "precision is 'fp16' without a CUDA device"),
    "a missing package": ("embedding", ("--optimizer", "Prodigy"), "package prodigyopt of optimizer 'Prodigy'"),
    "no rate": ("lora", ("--learning-rate", "0"), "learning_rate is 0"),
    "fused sums": (
        "train",
        ("--fused-backward", "--gradient-accumulation", "2"),
        "fused_backward is on with 2 batches",
    ),
    "masters of a LoRA": ("lora", ("--master-weights", "bf16"), "master_weights is 'bf16' in a training of something"),
    "one process": ("train", ("--shard-weights",), "shard_weights is on with one process"),
    "no file's name": ("embedding", ("--token", "<con>"), "token "),
    "no prompts": ("reward", (), "prompts hold no prompts"),
    "no pictures": ("reward", ("--method", "direct"), "dataset is empty with method 'direct'"),
    "compiled blocks": ("lora", ("--compile-blocks", "--block-swap", "1"), "compile_blocks is on with block_swap 1"),
}
NEEDED = {"embedding": ("--token", "<it>"), "reward": ("--rewards", "demo aesthetic")}


@pytest.fixture
def nothing_is_read(monkeypatch):
    def fails(*arguments, **options):
        raise AssertionError("data or a model are read")

    for name in ("open_dataset", "build_model"):
        monkeypatch.setattr(train, name, fails)
    monkeypatch.setattr("retune.training.rewards.parse.read_rewards", fails)


def run(verb, folder, *flags):
    given = ["--model", "demo", "--run-name", "r", "--output", str(folder), *NEEDED.get(verb, ())]
    data = [] if verb == "reward" else ["--folder", str(folder)]
    train.VERBS[verb].run(parser().parse_args([verb, *given, *data, *flags]))


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, monkeypatch, nothing_is_read, name):
    verb, flags, message = WRONG[name]
    monkeypatch.setitem(optimizers.PACKAGES, "Prodigy", ("there_is_none", "prodigyopt"))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(verb, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_read(tmp_path, monkeypatch, nothing_is_read):
    for module in (train, checks):
        monkeypatch.setattr(module, "world", lambda: World(rank=0, size=2))
    with pytest.raises(ValueError, match="batch_size is 3 on 2 processes; expected a multiple of 2"):
        run("lora", tmp_path, "--batch-size", "3")


def test_blocks_of_a_folder_are_counted_by_its_config(tmp_path, nothing_is_read, sd15_unet):
    (tmp_path / "unet").mkdir()
    sd15_unet.save_config(tmp_path / "unet")
    with pytest.raises(ValueError, match="block_swap is 99; expected at most 38"):
        run("lora", tmp_path, "--model", str(tmp_path), "--block-swap", "99")


def test_settings_that_suit_reach_the_data(tmp_path, nothing_is_read):
    with pytest.raises(AssertionError, match="are read"):
        run("lora", tmp_path, "--block-swap", "1")
