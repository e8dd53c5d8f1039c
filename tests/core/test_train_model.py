"""Training end to end on a tiny model: resume is exact, the base is untouched, numbers are what they should be."""

import dataclasses
import hashlib
import json
import sys

import pytest
import torch
from retune.training.common.callbacks import Callbacks
from retune.training.common.foreign import read_tensors
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.loop.loop import TrainingDiverged
from retune.training.recipes.unet import train_model
from retune.training.runs.folder import RunFolder


def config(**changes):
    settings = TrainingSettings(
        save_every=3, warmup_steps=2, ema_decay=0.9, gradient_accumulation=2, validation_fraction=0.3, validate_every=4
    )
    values = {
        "run_name": "r",
        "train": "cross-attention",
        "steps": 8,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "settings": settings,
        "samples": SamplePrompts(prompts=("a red circle",), every=4, steps=2, cfg=2.0, width=32, height=32),
    }
    return TrainModelConfig(**(values | changes))


def digest(root, run="r"):
    """Hashes of everything a run leaves that must be reproducible."""
    folder = root / run
    files = [folder / "metrics.jsonl", folder / "model.safetensors", *sorted((folder / "samples").glob("*.png"))]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def weights_of(model):
    parts = (model.denoiser.network, model.autoencoder.network, model.text_encoder.network)
    return [p.detach().clone() for part in parts for p in part.parameters()]


class Dies(Callbacks):
    """Raises as a killed process would look from outside: after the row of a step is on disk."""

    def __init__(self, step):
        self.step = step

    def on_step(self, info):
        if info.step == self.step:
            raise KeyboardInterrupt


def test_run_is_exact_after_a_stop_anywhere(tiny_model, pictures, tmp_path):
    train_model(tiny_model, pictures, config(), tmp_path / "whole")
    whole = digest(tmp_path / "whole")
    assert {"metrics.jsonl", "model.safetensors", "000000_00.png", "000008_00.png"} <= whole.keys()
    for step in (1, 3, 4, 7):
        root = tmp_path / f"stopped{step}"
        with pytest.raises(KeyboardInterrupt):
            train_model(tiny_model, pictures, config(), root, Dies(step))
        assert json.loads((root / "r" / "status.json").read_text())["state"] == "interrupted"
        train_model(tiny_model, pictures, config(), root)
        assert digest(root) == whole


def test_a_run_of_an_earlier_version_goes_on(tiny_model, pictures, tmp_path):
    """Its record lacks settings that came later; at their defaults they change nothing."""
    train_model(tiny_model, pictures, config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_model(tiny_model, pictures, config(), tmp_path, Dies(5))
    file = tmp_path / "r" / "config.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    del record["identity"]["settings"]["lr_cycles"]
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match="settings.lr_cycles is 2; run 'r' was made with 1"):
        later = dataclasses.replace(config().settings, lr_cycles=2)
        train_model(tiny_model, pictures, config(settings=later), tmp_path)
    train_model(tiny_model, pictures, config(), tmp_path)
    assert digest(tmp_path) == digest(tmp_path / "whole")


def test_run_is_exact_when_the_state_is_older_than_the_rows(tiny_model, pictures, tmp_path):
    train_model(tiny_model, pictures, config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_model(tiny_model, pictures, config(), tmp_path / "killed", Dies(3))
    folder = tmp_path / "killed" / "r"
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # a row of a lost step, and a torn one
    train_model(tiny_model, pictures, config(), tmp_path / "killed")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_base_model_is_bit_identical_and_frozen_flags_return(tiny_model, pictures, tmp_path):
    before = weights_of(tiny_model)
    flags = [p.requires_grad for p in tiny_model.denoiser.network.parameters()]
    result = train_model(tiny_model, pictures, config(train="whole UNet"), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(tiny_model), strict=True))
    assert flags == [p.requires_grad for p in tiny_model.denoiser.network.parameters()]
    names = {tiny_model.denoiser.canonical_name(n) for n, _ in tiny_model.denoiser.network.named_parameters()}
    assert result.unet.keys() == names


def test_only_the_chosen_layers_train(tiny_model, pictures, tmp_path):
    result = train_model(tiny_model, pictures, config(train="cross-attention K/V"), tmp_path)
    assert result.unet and all(".attn2.to_k." in n or ".attn2.to_v." in n for n in result.unet)
    network = {tiny_model.denoiser.canonical_name(n): p for n, p in tiny_model.denoiser.network.named_parameters()}
    assert all(not torch.equal(result.unet[n], network[n]) for n in result.unet)


def test_rows_hold_step_and_loss_and_events_apart(tiny_model, pictures, tmp_path):
    train_model(tiny_model, pictures, config(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "event" not in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in steps)
    events = [(row["event"], row["step"]) for row in rows if "event" in row]
    assert events == [(e, s) for s in (0, 4, 8) for e in ("validation", "sample")]


def test_finished_run_returns_from_disk_and_more_steps_go_on(tiny_model, pictures, tmp_path):
    first = train_model(tiny_model, pictures, config(), tmp_path)
    stamp = (tmp_path / "r" / "metrics.jsonl").stat().st_mtime_ns
    again = train_model(tiny_model, pictures, config(), tmp_path, Dies(1))
    assert (tmp_path / "r" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert all(torch.equal(first.unet[k], again.unet[k]) for k in first.unet)
    train_model(tiny_model, pictures, config(steps=10), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, 11))
    with pytest.raises(ValueError, match="steps is 9; run 'r' has done 10"):
        train_model(tiny_model, pictures, config(steps=9), tmp_path)


def test_other_settings_under_the_same_name_are_refused_by_name(tiny_model, pictures, tmp_path):
    train_model(tiny_model, pictures, config(), tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate is 0.002; run 'r' was made with 0.001.*'r 2'"):
        train_model(tiny_model, pictures, config(learning_rate=2e-3), tmp_path)
    changed = dataclasses.replace(config().settings, snr_gamma=2.0)
    with pytest.raises(ValueError, match=r"settings.snr_gamma is 2.0; run 'r' was made with 5.0"):
        train_model(tiny_model, pictures, config(settings=changed), tmp_path)
    train_model(tiny_model, pictures, config(learning_rate=2e-3, resume="restart"), tmp_path)
    assert (tmp_path / "r (old 1)" / "model.safetensors").exists()


def test_overfits_one_picture(tiny_model, pictures, tmp_path):
    one = dataclasses.replace(pictures, examples=pictures.examples[:1])
    settings = TrainingSettings(
        warmup_steps=1, lr_schedule="constant", caption_dropout=0.0, min_timestep=400, max_timestep=400, weight_decay=0
    )
    run = config(train="whole UNet", steps=60, learning_rate=3e-3, settings=settings, samples=SamplePrompts())
    train_model(tiny_model, one, run, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    first, last = [sum(r["loss"] for r in part) / 8 for part in (rows[:8], rows[-8:])]
    assert last < 0.5 * first


def test_nonfinite_loss_stops_and_keeps_the_last_good_state(tiny_model, pictures, tmp_path):
    run = config(learning_rate=1.0, settings=TrainingSettings(optimizer="SGD", max_grad_norm=0, save_every=100))
    train_model(tiny_model, pictures, dataclasses.replace(run, learning_rate=1e-4, run_name="calm"), tmp_path)

    class Poison(Callbacks):
        def before_step(self, step):
            if step == 3:
                tiny_model.denoiser.network.conv_in.weight.data[0, 0, 0, 0] = float("nan")

    with pytest.raises(TrainingDiverged, match="loss is nan at step 3.*state after step 2.*lower learning rate"):
        train_model(tiny_model, pictures, config(samples=SamplePrompts()), tmp_path, Poison())
    assert json.loads((tmp_path / "r" / "status.json").read_text())["state"] == "failed"
    from retune.training.loop.checkpoint import load_state
    from retune.training.runs.folder import RunFolder

    state = load_state(RunFolder(tmp_path / "r"))
    assert state.step == 2 and all(v.isfinite().all() for v in state.masters.values())


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", "", ".hidden", "CON", "x" * 101, "a..b"])
def test_run_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="run name is"):
        config(run_name=name)


def test_text_encoder_of_another_width_is_refused(tiny_model, pictures, tmp_path):
    tiny_model.text_encoder.width = 48
    with pytest.raises(ValueError, match="width is 48; the UNet reads 32"):
        train_model(tiny_model, pictures, config(), tmp_path)


def test_too_little_disk_is_refused_before_training(tiny_model, pictures, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises((ValueError, OSError), match="free"):
        train_model(tiny_model, pictures, config(), tmp_path)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_total_batch_is_summed_up_from_batches(tiny_model, pictures, tmp_path):
    """The same run as with that many batches, and refused where batches do not add up to it."""
    settings = {"caption_dropout": 0.0, "save_every": 100}
    total = TrainingSettings(**settings, total_batch=4)
    batches = TrainingSettings(**settings, gradient_accumulation=2)
    runs = {"total": config(run_name="total", settings=total), "batches": config(run_name="batches", settings=batches)}
    for made in runs.values():
        train_model(tiny_model, pictures, made, tmp_path)
    assert digest(tmp_path, "total")["metrics.jsonl"] == digest(tmp_path, "batches")["metrics.jsonl"]
    with pytest.raises(ValueError, match="total_batch is 5; expected a multiple of batch_size, 2"):
        config(settings=TrainingSettings(total_batch=5))


def test_samples_are_judged_where_something_can(tiny_model, pictures, tmp_path):
    judged = []

    def judge(images, prompts):
        judged.append((len(images), list(prompts)))
        return {"alignment": 0.25 * len(judged)}

    run = config(steps=4, settings=TrainingSettings())
    train_model(dataclasses.replace(tiny_model, judge=judge), pictures, run, tmp_path)
    rows = [row for row in RunFolder(tmp_path / "r").rows() if row.get("event") == "sample"]
    assert judged == [(1, ["a red circle"])] * 2
    assert [(row["step"], row["alignment"]) for row in rows] == [(0, 0.25), (4, 0.5)]


def stopping(patience, **changes):
    """A learning rate at which the held-out loss soon goes up and down."""
    settings = dataclasses.replace(config().settings, early_stop_after=patience, validate_every=2, ema_decay=0.0)
    return config(learning_rate=0.3, steps=12, settings=dataclasses.replace(settings, **changes))


def weights_at(path):
    return {name: value for name, value in read_tensors(path)[0].items() if not name.startswith("projection.")}


def validation_losses(root):
    return [row["loss"] for row in RunFolder(root / "r").rows() if row.get("event") == "validation"]


def run_whose_loss_rises_early(tiny_model, pictures, root):
    """A finished run's root, its seed and the number of its first validation that is worse than one before."""
    for seed in range(8):
        whole = root / f"whole {seed}"
        train_model(tiny_model, pictures, dataclasses.replace(stopping(0), seed=seed), whole)
        losses = validation_losses(whole)
        first = next((i for i, loss in enumerate(losses) if loss > min(losses[:i], default=loss)), len(losses))
        if first < 6:
            return whole, seed, first
    raise AssertionError("no seed's validation loss rose before the end")


def test_a_run_that_stopped_early_is_finished(tiny_model, pictures, tmp_path):
    whole, seed, last = run_whose_loss_rises_early(tiny_model, pictures, tmp_path)
    patient, impatient = (dataclasses.replace(stopping(patience), seed=seed) for patience in (0, 1))
    trained = train_model(tiny_model, pictures, impatient, tmp_path)
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    early = {"stopped_early": True, "result": "best", "stale": 1, "best_step": 2 * last - 2}
    assert status == {"state": "finished", "step": 2 * last, **early}
    best = weights_at(tmp_path / "r" / "state" / "best.safetensors")
    found = weights_at(trained.path)
    assert found.keys() == best.keys() and all(torch.equal(found[key], best[key]) for key in best)
    before = digest(tmp_path)
    for asked in (impatient, dataclasses.replace(impatient, steps=20)):
        train_model(tiny_model, pictures, asked, tmp_path, Dies(2 * last + 1))  # it would, were it not read from disk
        assert digest(tmp_path) == before
    train_model(tiny_model, pictures, patient, tmp_path)
    others = {name for name, _ in digest(whole).items() - digest(tmp_path).items()}
    drawn = {row["step"] for row in RunFolder(whole / "r").rows() if row.get("event") == "sample"}
    assert others == (set() if 2 * last in drawn else {"metrics.jsonl"})  # which tells of samples of the early stop
    assert json.loads((tmp_path / "r" / "status.json").read_text())["result"] == "last"


def run_whose_last_weights_are_not_the_best(tiny_model, pictures, root):
    """A finished run and its seed; at this learning rate it depends on the processor's last bits which seed it is."""
    for seed in range(8):
        trained = train_model(tiny_model, pictures, dataclasses.replace(stopping(0), seed=seed, resume="restart"), root)
        losses = validation_losses(root)
        if losses[-1] > min(losses):
            return trained, seed
    raise AssertionError("no seed's validation loss rose at the end")


def test_the_best_weights_of_a_finished_run_may_be_asked_for(tiny_model, pictures, tmp_path):
    last, seed = run_whose_last_weights_are_not_the_best(tiny_model, pictures, tmp_path)
    rows = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    asked = dataclasses.replace(stopping(0, result="best"), seed=seed)
    best = train_model(tiny_model, pictures, asked, tmp_path, Dies(13))
    kept = weights_at(tmp_path / "r" / "state" / "best.safetensors")
    found = weights_at(best.path)
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert not all(torch.equal(last.unet[key], value) for key, value in best.unet.items())
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == rows
    again = train_model(tiny_model, pictures, dataclasses.replace(stopping(0), seed=seed), tmp_path)
    assert all(torch.equal(last.unet[key], value) for key, value in again.unet.items())


def test_early_stop_without_held_out_images_is_refused():
    for changes in ({"early_stop_after": 3}, {"result": "best"}):
        with pytest.raises(ValueError, match="validation_fraction is 0; expected more with early_stop_after"):
            config(settings=TrainingSettings(**changes))


def test_a_missing_package_is_named_before_anything_is_made(tiny_model, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match="pip install pytorch-optimizer"):
        train_model(tiny_model, pictures, config(settings=TrainingSettings(optimizer="CAME")), tmp_path)
    assert not (tmp_path / "r").exists()
