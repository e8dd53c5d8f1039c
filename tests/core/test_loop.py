"""The loop on a quadratic whose every step can be computed by hand."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from retune.training.common.callbacks import Callbacks
from retune.training.common.files import WriteFailed
from retune.training.common.foreign import read_tensors
from retune.training.config.loop import LoopConfig, TrainingDiverged
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.checkpoint import load_state
from retune.training.loop.loop import Loop
from retune.training.models.parameters import parameter_refs
from retune.training.objectives.objective import Loss
from retune.training.runs.folder import RunFolder
from retune.training.runs.outcome import best_values
from retune.training.runs.samples import Sampler
from retune.training.trainables.weights import SelectedWeights
from torch import nn

PLAIN = {"optimizer": "SGD", "weight_decay": 0.0, "warmup_steps": 0, "lr_schedule": "constant", "max_grad_norm": 0.0}


class Quadratic:
    """Half the squared distance between a weight and each slot's number; the gradient is their mean difference."""

    def __init__(self, layer, gradient_factor=1.0):
        self.layer, self.gradient_factor, self.validated = layer, gradient_factor, []

    def load(self, slots):
        return [float(slot) for slot in slots]

    def __call__(self, batch, step):
        assert [index for index, _ in batch] == sorted({index for index, _ in batch})
        weight = self.layer.weight
        if self.gradient_factor != 1.0:
            weight.register_hook(lambda gradient: gradient * self.gradient_factor)
        wanted = torch.tensor([value for _, value in batch])
        return Loss(0.5 * (weight.flatten() - wanted) ** 2, {"wanted": wanted.mean()})

    def validation(self, loaded):
        return (self.layer.weight.item() - loaded[0]) ** 2

    def state(self):
        return {}

    def load_state(self, state):
        assert state == {}


class Counting:
    """Batch n holds the numbers (n - 1) * size .. n * size - 1."""

    def __init__(self, size):
        self.size = size

    def batch(self, number):
        return list(range((number - 1) * self.size, number * self.size))


class Weights(Callbacks):
    """The master and the average after every step; stops at a given one."""

    def __init__(self, stop=None):
        self.loop, self.stop, self.masters, self.averages = None, stop, [], []

    def on_step(self, info):
        self.masters.append(self.loop.trainable.values()["w.weight"].item())
        self.averages.append(self.loop.values()["w.weight"].item())
        if info.step == self.stop:
            raise KeyboardInterrupt


def built(path, *, steps=3, size=2, rate=0.1, stop=None, samples=(), validation=None, factor=1.0, **settings):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    folder = RunFolder(path)
    folder.samples.mkdir(parents=True, exist_ok=True)
    callbacks = Weights(stop)
    sampler = Sampler(
        lambda: [layer.weight.detach().clone()], lambda latents: [x.expand(3, 4, 4) / 10 for x in latents]
    )
    config = LoopConfig(
        steps=steps,
        batch_size=size,
        learning_rate=rate,
        settings=TrainingSettings(**(PLAIN | settings)),
        samples=SamplePrompts(prompts=samples, every=2),
    )
    loop = Loop(
        folder,
        SelectedWeights(parameter_refs(layer, "w."), [layer]),
        Quadratic(layer, factor),
        Counting(size),
        config,
        sampler=sampler if samples else None,
        validation=validation,
        callbacks=callbacks,
    )
    callbacks.loop = loop
    return loop


def by_hand(steps, size, rate, momentum=0.9):
    """Weights after each step of SGD with momentum, and each step's loss and gradient."""
    weight, velocity, found = 2.0, 0.0, []
    for step in range(steps):
        numbers = range(step * size, (step + 1) * size)
        loss = sum(0.5 * (weight - n) ** 2 for n in numbers) / size
        gradient = sum(weight - n for n in numbers) / size
        velocity = momentum * velocity + gradient
        weight -= rate * velocity
        found.append((weight, loss, gradient))
    return found


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulated_batches_are_one_big_batch(tmp_path, accumulation):
    loop = built(tmp_path, size=4 // accumulation, gradient_accumulation=accumulation)
    assert loop.run()["w.weight"].item() == pytest.approx(by_hand(3, 4, 0.1)[-1][0], rel=1e-5)
    rows = loop.folder.rows()
    assert [row["loss"] for row in rows] == pytest.approx([loss for _, loss, _ in by_hand(3, 4, 0.1)], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([abs(g) for *_, g in by_hand(3, 4, 0.1)], rel=1e-5)
    assert [row["wanted"] for row in rows] == pytest.approx([1.5, 5.5, 9.5])
    assert [row["step"] for row in rows] == [1, 2, 3] and {row["learning_rate"] for row in rows} == {0.1}


def test_network_keeps_its_own_weight(tmp_path):
    loop = built(tmp_path)
    layer = loop.objective.layer
    loop.run()
    assert layer.weight.item() == 2.0 and layer.weight.requires_grad and layer.weight.grad is None


def test_gradients_are_clipped_to_the_norm(tmp_path):
    loop = built(tmp_path, steps=1, size=1, rate=0.5, max_grad_norm=0.25)
    assert loop.run()["w.weight"].item() == pytest.approx(2.0 - 0.5 * 0.25, rel=1e-4)
    assert loop.folder.rows()[0]["grad_norm"] == pytest.approx(2.0)  # as it was before


def test_schedule_reaches_the_optimiser(tmp_path):
    loop = built(tmp_path, steps=4, size=1, warmup_steps=2, lr_schedule="linear")
    loop.run()
    assert [row["learning_rate"] for row in loop.folder.rows()] == pytest.approx([0.05, 0.1, 0.1, 0.05])


def test_average_follows_its_formula_and_is_the_result(tmp_path):
    loop = built(tmp_path, steps=5, ema_decay=0.25)
    result, average = loop.run()["w.weight"].item(), 2.0
    for n, (master, got) in enumerate(zip(loop.callbacks.masters, loop.callbacks.averages, strict=True), 1):
        decay = min(0.25, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * master
        assert got == pytest.approx(average, rel=1e-5)
    assert result == pytest.approx(average, rel=1e-5) != pytest.approx(loop.callbacks.masters[-1], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adafactor"])
def test_stopped_and_gone_on_is_the_same_for_every_optimiser(tmp_path, optimizer):
    options = {"steps": 6, "ema_decay": 0.5, "optimizer": optimizer, "samples": ("x",), "validation": [4]}
    options |= {"validate_every": 2, "save_every": 4, "weight_decay": 0.1}
    whole = built(tmp_path / "whole", **options)
    expected = whole.run()
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "stopped", stop=3, **options).run()
    again = built(tmp_path / "stopped", **options)
    assert torch.equal(again.run()["w.weight"], expected["w.weight"])
    assert again.callbacks.masters == whole.callbacks.masters[3:]
    one, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert one == other


def test_samples_show_the_average_and_name_their_prompts(tmp_path):
    from PIL import Image

    loop = built(tmp_path, steps=3, ema_decay=0.5, samples=("one",))
    loop.run()
    events = [row for row in loop.folder.rows() if row.get("event") == "sample"]
    assert [(row["step"], row["prompts"]) for row in events] == [(0, ["one"]), (2, ["one"]), (3, ["one"])]
    seen = [Image.open(loop.folder.samples / row["files"][0]).getpixel((0, 0))[0] for row in events]
    shown = [2.0, loop.callbacks.averages[1], loop.callbacks.averages[2]]
    assert seen == [round(255 * min(max(value / 10, 0), 1)) for value in shown]


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path):
    loop = built(tmp_path, steps=8, size=1, rate=0.3, validation=[3], validate_every=1)
    loop.run()
    losses = [row["loss"] for row in loop.folder.rows() if row.get("event") == "validation"]
    masters = [2.0, *loop.callbacks.masters]
    assert losses == pytest.approx([(w - 3) ** 2 for w in masters], rel=1e-4)
    best = min(range(len(losses)), key=losses.__getitem__)
    values, about = best_values(loop.folder)
    assert values["w.weight"].item() == masters[best]
    assert about == {"step": str(best), "validation_loss": repr(losses[best])}
    assert best_values(RunFolder(tmp_path / "none")) is None


def test_a_gradient_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    loop = built(tmp_path, steps=5, stop=2)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop = built(tmp_path, steps=5, factor=float("inf"))
    with pytest.raises(TrainingDiverged, match="gradient norm is inf at step 3.*state after step 2 is kept"):
        loop.run()
    state = load_state(loop.folder)
    assert state.step == 2 and state.masters["w.weight"].item() == pytest.approx(by_hand(2, 2, 0.1)[-1][0], rel=1e-5)
    status = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "failed" and status["step"] == 2 and "gradient norm" in status["message"]
    assert [row["step"] for row in loop.folder.rows()] == [1, 2]
    assert built(tmp_path, steps=5).run()["w.weight"].item() == pytest.approx(by_hand(5, 2, 0.1)[-1][0], rel=1e-5)


def test_a_gradient_that_is_not_finite_saves_what_only_memory_held(tmp_path):
    loop = built(tmp_path, steps=5, save_every=100)

    class Later(Weights):
        def before_step(self, step):
            self.loop.objective.gradient_factor = float("nan") if step == 4 else 1.0

    loop.callbacks = Later()
    loop.callbacks.loop = loop
    with pytest.raises(TrainingDiverged, match="gradient norm is nan at step 4"):
        loop.run()
    assert load_state(loop.folder).step == 3


def test_weights_that_go_astray_after_a_save_do_not_replace_it(tmp_path):
    loop = built(tmp_path, steps=9, save_every=2, rate=0.0)

    class Poison(Weights):
        def before_step(self, step):
            if step == 4:
                self.loop.trainable.parameters["w.weight"].data.fill_(3e38)  # finite, but its square is not

    loop.callbacks = Poison()
    loop.callbacks.loop = loop
    with pytest.raises(TrainingDiverged, match="loss is inf at step 4.*state after step 2 is kept"):
        loop.run()
    state = load_state(loop.folder)
    assert state.step == 2 and state.masters["w.weight"].item() == 2.0


def test_samples_once_per_epoch_with_a_sheet(tmp_path):
    loop = built(tmp_path, steps=7, samples=("a",))
    loop.config = dataclasses.replace(
        loop.config, samples=dataclasses.replace(loop.config.samples, every=0), steps_per_epoch=3.0
    )
    loop.run()
    rows = [row for row in loop.folder.rows() if row.get("event") == "sample"]
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (3, 1), (6, 2), (7, 2.33)]
    with Image.open(tmp_path / "samples" / rows[1]["grid"]) as sheet:
        assert sheet.size == (4, 4)


def test_what_was_loaded_may_have_moved_the_network_away(tmp_path):
    loop, seen = built(tmp_path, steps=2, validation=[1], validate_every=1), []
    load = loop.objective.load

    class Watch(Weights):
        def after_load(self):
            seen.append("back")

    loop.objective.load = lambda slots: seen.append("load") or load(slots)
    loop.callbacks = Watch()
    loop.callbacks.loop = loop
    loop.run()
    assert seen == ["load", "back"] * 5  # two steps, validation at 0, 1 and 2


def test_a_cancel_between_steps_saves_too(tmp_path):
    class Cancels(Weights):
        def before_step(self, step):
            if step == 3:
                raise KeyboardInterrupt

    loop = built(tmp_path, steps=5, save_every=100)
    loop.callbacks = Cancels()
    loop.callbacks.loop = loop
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert load_state(loop.folder).step == 2
    assert json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))["state"] == "interrupted"
    tensors, _ = read_tensors(loop.folder.latest)
    assert {"master.w.weight", "optimizer.0.momentum_buffer"} <= tensors.keys()


STOPS = {"size": 1, "rate": 0.1, "validation": [3], "validate_every": 1}
"""The weight follows the numbers 0, 1, 2, ... after a while: away from 3 for five steps, nearest to it after the
seventh, then away from it for good."""


def validated(loop):
    return [row["loss"] for row in loop.folder.rows() if row.get("event") == "validation"]


@pytest.mark.parametrize("patience, stop, best", [(3, 3, 0), (6, 13, 7), (0, 20, 7)])
def test_a_run_stops_early_with_its_best_weights(tmp_path, patience, stop, best):
    loop = built(tmp_path, steps=20, early_stop_after=patience, result="best", samples=("x",), **STOPS)
    result = loop.run()["w.weight"].item()
    weights = [2.0, *loop.callbacks.masters]
    assert len(weights) == stop + 1 and weights != sorted(weights)
    assert validated(loop) == pytest.approx([(weight - 3) ** 2 for weight in weights], rel=1e-4)
    assert result == weights[best]
    stale = stop - best
    assert loop.ending == {"stopped_early": patience > 0, "result": "best", "stale": stale, "best_step": best}
    drawn = [row["step"] for row in loop.folder.rows() if row.get("event") == "sample"]
    assert drawn[-1] == stop == load_state(loop.folder).step


def test_after_an_early_stop_the_last_weights_are_never_the_result(tmp_path):
    stopped = built(tmp_path / "stopped", steps=20, early_stop_after=3, result="last", **STOPS)
    assert stopped.run()["w.weight"].item() == 2.0 and stopped.ending["result"] == "best"
    whole = built(tmp_path / "whole", steps=20, early_stop_after=14, result="last", **STOPS)
    assert whole.run()["w.weight"].item() == whole.callbacks.masters[-1]
    assert whole.ending == {"stopped_early": False, "result": "last", "stale": 13}


@pytest.mark.parametrize("stop", [1, 6, 9])
def test_an_early_stop_comes_at_the_same_step_after_a_break(tmp_path, stop):
    options = {"steps": 20, "early_stop_after": 6, "save_every": 4, **STOPS}
    whole = built(tmp_path / "whole", **options)
    expected = whole.run()
    assert whole.step == 13
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "parts", stop=stop, **options).run()
    again = built(tmp_path / "parts", **options)
    assert torch.equal(again.run()["w.weight"], expected["w.weight"]) and again.ending == whole.ending
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / "metrics.jsonl").read_bytes()


def without_room(monkeypatch, event, step):
    """The row of an event at a step does not fit on the disk."""
    add_row = RunFolder.add_row

    def add(folder, row):
        if (row.get("event"), row["step"]) == (event, step):
            raise WriteFailed("metrics.jsonl: the disk is full.")
        add_row(folder, row)

    monkeypatch.setattr(RunFolder, "add_row", add)


@pytest.mark.parametrize("step", [2, 7, 12])
def test_a_validation_whose_row_was_not_written_counts_once(tmp_path, step, monkeypatch):
    options = {"steps": 20, "early_stop_after": 6, "save_every": 100, **STOPS}
    whole = built(tmp_path / "whole", **options)
    expected = whole.run()
    without_room(monkeypatch, "validation", step)
    with pytest.raises(WriteFailed, match=f"is full. Run 'parts' keeps its state after step {step}: queue it again"):
        built(tmp_path / "parts", **options).run()
    monkeypatch.undo()
    status = json.loads((tmp_path / "parts" / "status.json").read_bytes())
    assert (status["state"], status["step"]) == ("failed", step) and "queue it again" in status["message"]
    again = built(tmp_path / "parts", **options)
    assert torch.equal(again.run()["w.weight"], expected["w.weight"]) and again.ending == whole.ending
    for name in ("metrics.jsonl", "state/latest.safetensors", "state/best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_of_two_files_without_room_the_first_is_named(tmp_path, monkeypatch, caplog):
    def save(loop):
        raise WriteFailed("latest.safetensors: the disk is full.")

    loop = built(tmp_path, steps=20, save_every=100, **STOPS)
    without_room(monkeypatch, "validation", 3)
    monkeypatch.setattr(Loop, "_save", save)
    with pytest.raises(WriteFailed, match=r"^metrics.jsonl: .* has no saved state yet: queue it again"):
        loop.run()
    assert "latest.safetensors: the disk is full." in caplog.text


def test_a_run_that_stopped_early_goes_on_when_asked_for_more(tmp_path):
    whole = built(tmp_path / "whole", steps=20, **STOPS)
    expected = whole.run()
    stopped = built(tmp_path / "parts", steps=20, early_stop_after=3, **STOPS)
    stopped.run()
    assert stopped.step < 20
    again = built(tmp_path / "parts", steps=20, **STOPS)
    assert torch.equal(again.run()["w.weight"], expected["w.weight"])
    assert validated(again) == validated(whole)


def test_the_best_weights_need_a_validation(tmp_path):
    for options in ({"early_stop_after": 1}, {"result": "best"}):
        with pytest.raises(ValueError, match="number of held-out images is 0"):
            built(tmp_path, **options)
