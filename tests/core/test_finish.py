"""Ends that nobody planned: asked to finish, cancelled, out of memory. What was done is kept each time."""

import dataclasses
import json

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.prompts import Prompt
from retune.training.loop.memory import OutOfMemory, memory_hints
from retune.training.recipes.reward import tune
from retune.training.recipes.unet import train_model
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward

STEADY = {"lr_schedule": "constant", "warmup_steps": 0, "caption_dropout": 0.0}


def config(**changes):
    settings = TrainingSettings(save_every=100, validation_fraction=0.3, validate_every=100, **STEADY)
    samples = SamplePrompts(prompts=("a red circle",), every=100, steps=2, cfg=2.0, width=32, height=32)
    values = {"run_name": "r", "steps": 8, "batch_size": 4, "learning_rate": 1e-3}
    return TrainModelConfig(**(values | {"settings": settings, "samples": samples} | changes))


def status_of(root):
    return json.loads((root / "r" / "status.json").read_text(encoding="utf-8"))


def rows_of(root):
    return [json.loads(line) for line in (root / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_of(root):
    return [row["step"] for row in rows_of(root) if "event" not in row]


class Wishes(Callbacks):
    """Wants the run to finish from a step on, and counts steps."""

    def __init__(self, step=None):
        self.wanted, self.done = step, []

    def on_step(self, info):
        self.done.append(info.step)

    def wants_finish(self):
        return self.wanted is not None and self.done != [] and self.done[-1] >= self.wanted


def test_a_run_that_is_asked_to_finish_ends_as_at_its_end(tiny_model, pictures, tmp_path):
    asked = Wishes(3)
    train_model(tiny_model, pictures, config(), tmp_path, asked)
    status = status_of(tmp_path)
    assert status["state"] == "finished" and status["step"] == 3 and status["finished_on_request"] is True
    assert asked.done == steps_of(tmp_path) == [1, 2, 3]
    ends = [(row["event"], row["step"]) for row in rows_of(tmp_path) if row.get("event") in ("validation", "sample")]
    assert ends == [("validation", 0), ("sample", 0), ("validation", 3), ("sample", 3)]
    result = (tmp_path / "r" / "model.safetensors").read_bytes()
    for steps in (8, 5):
        again = Wishes()
        train_model(tiny_model, pictures, config(steps=steps), tmp_path, again)
        assert again.done == [] and (tmp_path / "r" / "model.safetensors").read_bytes() == result
    more = Wishes()
    train_model(tiny_model, pictures, config(steps=9), tmp_path, more)
    assert more.done == [4, 5, 6, 7, 8, 9] and "finished_on_request" not in status_of(tmp_path)
    train_model(tiny_model, pictures, config(steps=9), tmp_path / "whole")
    one, other = (root / "r" / "model.safetensors" for root in (tmp_path, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()  # at a constant rate the break leaves no trace


def test_a_file_in_the_folder_asks_too_and_goes(tiny_model, pictures, tmp_path):
    class Puts(Wishes):
        def on_step(self, info):
            super().on_step(info)
            if info.step == 2:
                (tmp_path / "r" / "finish").touch()

    puts = Puts()
    train_model(tiny_model, pictures, config(), tmp_path, puts)
    assert puts.done == [1, 2] and status_of(tmp_path)["steps_asked"] == 8
    assert not (tmp_path / "r" / "finish").exists()
    (tmp_path / "r" / "finish").touch()  # before a run goes on: it ends with what it has
    train_model(tiny_model, pictures, config(steps=9), tmp_path, later := Wishes())
    assert later.done == [] and status_of(tmp_path)["step"] == 2 and status_of(tmp_path)["steps_asked"] == 9


def test_a_wish_at_the_last_step_changes_nothing(tiny_model, pictures, tmp_path):
    train_model(tiny_model, pictures, config(steps=3), tmp_path, Wishes(3))
    assert "finished_on_request" not in status_of(tmp_path) and status_of(tmp_path)["state"] == "finished"


def test_a_cancel_in_any_phase_is_written_down_and_gone_on_from(tiny_model, pictures, tmp_path):
    class Cancels(Callbacks):
        def __init__(self, words):
            self.words = words

        def on_text(self, text):
            if text.startswith(self.words):
                raise KeyboardInterrupt

    train_model(tiny_model, pictures, config(steps=2), tmp_path / "whole")
    for words in ("caching", "validating", "drawing", "saving", "writing"):
        with pytest.raises(KeyboardInterrupt):
            train_model(tiny_model, pictures, config(steps=2), tmp_path, Cancels(words))
        assert status_of(tmp_path)["state"] == "interrupted", words
    train_model(tiny_model, pictures, config(steps=2), tmp_path)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / "r" / name).read_bytes()


def full_at(network, call):
    """Makes a network run out of memory in its so-manieth call, and no other; returns the hook's handle."""
    calls = [0]

    def count(*_):
        calls[0] += 1
        if calls[0] == call:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return network.register_forward_pre_hook(count)


def test_out_of_memory_keeps_the_state_and_says_what_to_lower(tiny_model, pictures, tmp_path):
    plain = config(samples=SamplePrompts(), settings=TrainingSettings(gradient_accumulation=2, **STEADY))
    train_model(tiny_model, pictures, plain, tmp_path / "whole")
    hook = full_at(tiny_model.denoiser.network, 6)  # two batches a step: in the second of step 3
    with pytest.raises(OutOfMemory) as caught:
        train_model(tiny_model, pictures, plain, tmp_path)
    hook.remove()
    assert type(caught.value.__cause__) is torch.cuda.OutOfMemoryError
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError)  # ComfyUI unloads its models for this kind
    text = str(caught.value)
    assert "after step 2; the state after step 2 is kept" in text and "gradient_checkpointing on" in text
    assert "batch_size 2 in place of 4, with gradient_accumulation 4 in place of 2" in text
    assert "bf16" in text and "AdamW8bit" in text and "rank" not in text
    assert status_of(tmp_path) == {"state": "failed", "step": 2, "message": text}
    lighter = dataclasses.replace(plain, settings=dataclasses.replace(plain.settings, gradient_checkpointing=True))
    train_model(tiny_model, pictures, lighter, tmp_path)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / "r" / name).read_bytes()


def test_scores_of_a_step_that_did_not_end_are_not_counted(tiny_model, tmp_path):
    """Running scales of rewards: the first of two batches is scored, the second runs out of memory."""

    def rewards():
        return CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])

    settings = TrainingSettings(gradient_accumulation=2, validation_fraction=0.3, validate_every=1, **STEADY)
    values = {"run_name": "r", "steps": 3, "batch_size": 1, "learning_rate": 1e-3, "gradient_steps": 1, "cfg": 1.0}
    run = RewardTuneConfig(**values, sampling_steps=2, width=32, height=32, settings=settings)
    prompts = [Prompt("a red circle"), Prompt("two small blue squares"), Prompt("a green star")]
    tune(tiny_model, rewards(), prompts, run, tmp_path / "whole")
    calls = 2 + 2 * (2 + 1) + 2  # validation, two batches, validation
    hook = full_at(tiny_model.denoiser.network, calls + 3 + 2)  # in the second batch of step 2
    with pytest.raises(OutOfMemory, match="after step 1; the state after step 1 is kept"):
        tune(tiny_model, rewards(), prompts, run, tmp_path)
    hook.remove()
    tune(tiny_model, rewards(), prompts, run, tmp_path)
    for name in ("metrics.jsonl", "tuned.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / "r" / name).read_bytes()


LEAN = TrainingSettings(precision="bf16", optimizer="Adafactor", gradient_checkpointing=True, block_swap=38)


def test_hints_name_only_what_applies():
    base = {"run_name": "r", "learning_rate": 1e-4}
    nothing = memory_hints(LoraConfig(**base, rank=1, settings=LEAN), (64, 64))
    assert nothing == "Other programs that use the device may be closed too, and the same run queued again."
    lora = memory_hints(LoraConfig(**base, batch_size=6, rank=16, settings=LEAN), (1024, 768))
    assert "batch_size 3 in place of 6, with gradient_accumulation 2 in place of 1" in lora
    assert "rank 8 in place of 16" in lora and "pictures of 768x576 in place of 1024x768" in lora
    assert lora.startswith("Under another run name: ") and "bf16" not in lora and "optimizer" not in lora
    total = dataclasses.replace(LEAN, total_batch=9, ema_decay=0.99)
    whole = memory_hints(TrainModelConfig(**base, batch_size=9, train="whole UNet", settings=total), (64, 64))
    assert "batch_size 3 in place of 9, with total_batch 9 as it is" in whole and "train = whole UNet" in whole
    assert "ema_decay 0 in place of 0.99" in whole and "pictures of" not in whole
    assert "fused_backward on" in whole and "block_swap" not in whole
    summed = memory_hints(TrainModelConfig(**base, batch_size=3, train="whole UNet", settings=total), (64, 64))
    assert "fused_backward on" not in summed
    kept = memory_hints(LoraConfig(**base, settings=dataclasses.replace(LEAN, block_swap=0)), (64, 64))
    assert kept.startswith("Set block_swap above 0 (slower, frozen weights stay in RAM): this run then goes on")
    word = EmbeddingConfig(**base, token="<x>", lora_rank=4, settings=LEAN)
    assert "lora_rank 2 in place of 4" in memory_hints(word, (64, 64))
    text = RewardTuneConfig(**base, stop_gradient=False, settings=LEAN)
    assert "stop_gradient on" in memory_hints(text, (512, 512)) and "lora_rank" not in memory_hints(text, (512, 512))
    drawn = SamplePrompts(prompts=("x",), width=1024, height=1024)
    assert "samples of 512x512 in place of 1024x1024" in memory_hints(LoraConfig(**base, samples=drawn), (512, 512))
