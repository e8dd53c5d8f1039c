"""Presets by card: what their runs are computed to take fits the card with a tenth to spare, without any values."""

import json

import pytest
from retune.benchmarks import preset_memory
from retune.benchmarks.__main__ import main
from retune.benchmarks.preset_memory import KINDS, SPARE, card_bytes, preset_config, preset_estimate
from retune.training.__main__ import parser
from retune.training.config.training_settings import CARDS
from retune.training.loop.estimate import MemoryEstimate
from retune.training.loop.optimizers import PACKAGES

PEAKS = {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CARDS)
def test_a_presets_run_fits_its_card(name, kind):
    """With peaks of one picture as a bound of a batch's, which presets share."""
    estimate, besides = preset_estimate(name, kind, PEAKS)
    assert estimate.peak + besides <= (1 - SPARE) * card_bytes(name), (estimate.text(None), besides)


@pytest.mark.parametrize("name", CARDS)
def test_presets_by_card_name_settings_that_there_are(name):
    for kind in KINDS:
        config, side = preset_config(name, kind)
        assert config.settings.optimizer not in PACKAGES  # every preset needs torch alone
        assert config.settings.gradient_checkpointing and side == config.samples.width == config.samples.height


@pytest.mark.parametrize("name", CARDS)
def test_presets_for_rewards_set_what_trains_and_the_pictures_size(name):
    config, side = preset_config(name, "reward")
    assert (config.train, config.width, config.height, config.stop_gradient) == ("UNet LoRA", side, side, True)
    assert config.learning_rate == 1e-4  # the default is one for whole encoders


def test_the_command_line_reads_them():
    words = ["reward", "--preset", "SDXL 8 GB", "--rewards", "demo aesthetic", "--run-name", "r", "--width", "512"]
    arguments = parser("SDXL 8 GB").parse_args([*words, "--model", "m"])
    assert (arguments.train, arguments.width, arguments.height, arguments.block_swap) == ("UNet LoRA", 512, 768, 87)


def test_the_benchmark_has_a_line_for_each_preset_and_says_which_does_not_fit(tmp_path, capsys, monkeypatch):
    parts = dict.fromkeys(("masters", "average", "optimizer", "update", "gradients", "activations"), 0)
    estimate = MemoryEstimate(weights=5 * 10**9, **parts)
    monkeypatch.setattr(preset_memory, "preset_estimate", lambda name, kind: (estimate, 5 * 10**8))
    monkeypatch.setattr(preset_memory, "missing", lambda name, kind: "none" if kind == "train" else "")
    assert main(["memory", "--memory-presets", "--memory-output", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["table"].splitlines()[2] == "| SD1.5 6 GB | 512 | 5.5 |  | 5.5 | 5.5 |"
    assert found["claims"][0] == "lora, SD1.5 6 GB: 0.917 of the card; at most 0.9: missed by 1.9 %."
    assert found["claims"][-1].endswith("0.229 of the card; at most 0.9: holds.")
    assert (
        found["skipped"]["train, SDXL 8 GB"] == "none is not installed" and (tmp_path / "memory presets.png").is_file()
    )
