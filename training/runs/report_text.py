"""Texts and tables of a run's report: its settings, how it ended, its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from typing import Any

from ..config.embedding import EmbeddingConfig
from ..config.fields import field_docs
from ..config.lora import LoraConfig
from ..config.reward import RewardTuneConfig
from ..config.run import RunConfig, TrainModelConfig
from ..config.sample_prompts import SamplePrompts
from ..config.training_settings import FORMER_DEFAULTS, TrainingSettings
from ..plots.run_chart import smoothed
from .outcome import describe_guard

KINDS: dict[str, type[RunConfig]] = {
    "model": TrainModelConfig,
    "lora": LoraConfig,
    "embedding": EmbeddingConfig,
    "reward": RewardTuneConfig,
}
"""Config class of each "kind" in a run's identity."""
Row = dict[str, Any]


def ending(status: Mapping[str, Any]) -> str:
    """How a run ended, or its present state, from its status.json."""
    state, step = status["state"], status["step"]
    if state == "new":
        return "Nothing was trained yet."
    if state == "running":
        return f"Running, or ended without a word; the state after step {step} is saved."
    if state != "finished":
        how = {"interrupted": "Stopped by the user"}.get(state, f"Failed: {status.get('message', '')}".rstrip(". "))
        return f"{how}, after step {step}. The same run goes on from its last state when it is queued again."
    sentences = [f"Finished after {step} steps."]
    if status.get("finished_on_request"):
        sentences.append(f"It was asked to end there, before all of its {status['steps_asked']} steps.")
    if status.get("stopped_early"):
        sentences.append(f"It stopped early: {status['stale']} validations in a row brought no lower loss.")
    if status.get("guard") and status.get("result") != "best":
        words = describe_guard(status).removeprefix("; ")
        sentences.append(f"{words[0].upper()}{words[1:]}.")
    elif "best_step" in status:
        sentences.append(f"The result is the weights after step {status['best_step']}, of the lowest validation loss.")
    return " ".join(sentences)


def summary(about: Mapping[str, Any]) -> str:
    """A run's kind and main settings in a few sentences, from its config.json."""
    kind = about["identity"]["kind"]
    config = _with_defaults(KINDS[kind], about["config"])
    settings = _with_defaults(TrainingSettings, FORMER_DEFAULTS | config["settings"])
    batches = settings["total_batch"] // config["batch_size"] or settings["gradient_accumulation"]
    what = "prompts" if kind == "reward" and config["method"] != "direct" else "images"
    batch = f"{config['batch_size'] * batches} {what} a step"
    if batches > 1:
        batch += f" (batches of {config['batch_size']}, {batches} summed up)"
    warm = f" after {settings['warmup_steps']} steps of warm-up" if settings["warmup_steps"] else ""
    trained = _trained(kind, config, about["identity"])
    return (
        f"{trained} {config['steps']} steps were asked for, {batch}, with {settings['optimizer']} at a peak learning "
        f"rate of {config['learning_rate']:g}, {settings['lr_schedule']}{warm}; {settings['precision']}, seed "
        f"{config['seed']}."
    )


def _with_defaults(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config with the defaults of settings that it lacks, since an earlier version made it."""
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING} | dict(values)


def _trained(kind: str, config: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """A sentence about what trains."""
    if kind == "model":
        along = config["train_projection"] and identity.get("projection") is not None
        projection = " and the text encoder's projection" if along else ""
        return f"Layers of the UNet ({config['train']}){projection} are retrained."
    if kind == "lora":
        text = "; the text encoder trains too" if config["text_encoder_learning_rate"] else ""
        return (
            f"A {config['algorithm']} of rank {config['rank']} and alpha {config['alpha']:g} learns on "
            f"{config['targets']}{text}."
        )
    if kind == "embedding":
        beside = f", with a LoRA of rank {config['lora_rank']} beside" if config["lora_rank"] else ""
        start = f'starting from "{config["initial_text"]}"' if config["initial_text"] else "starting at random"
        return f"{config['token']} becomes a word of {config['vectors']} vectors, {start}{beside}."
    if config["method"] == "direct":
        return f"The {config['train']} is tuned by rewards of noised images, each cleaned in one step (direct)."
    return (
        f"The {config['train']} is tuned by rewards of pictures of {config['width']}x{config['height']}, through "
        f"{config['gradient_steps']} of {config['sampling_steps']} sampler steps ({config['method']})."
    )


def settings_tables(about: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Every setting with its value and meaning: those that differ from their defaults, and the others."""
    config, kind = about["config"], KINDS[about["identity"]["kind"]]
    changed, usual = [], []
    for group, values, prefix in (
        (kind, config, ""),
        (TrainingSettings, config["settings"], ""),
        (SamplePrompts, config["samples"], "sample "),
    ):
        for name, value, default, doc in _settings(group, values):
            row = {"setting": prefix + name, "value": _text(value), "default": _text(default), "what it is": doc}
            (usual if value == default else changed).append(row)
    return changed, usual


def _settings(kind: type, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
    """Name, value, default (None without one) and documentation of each field that is no dataclass itself."""
    docs = field_docs(kind)
    for field in fields(kind):
        default = None if field.default is MISSING else field.default
        if not is_dataclass(default) and field.name in values:
            default = list(default) if isinstance(default, tuple) else default
            yield field.name, values[field.name], default, docs.get(field.name, "")


def _text(value: Any) -> str:
    """A setting's value for a table."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def outcome(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """First, last and best value of each figure in a run's rows of metrics.jsonl."""
    steps = [row for row in rows if "event" not in row]
    sign, name = (-1.0, "reward") if steps and "reward" in steps[-1] else (1.0, "loss")
    held_out = [sign * row["loss"] for row in rows if row.get("event") == "validation"]
    alignment = [row["alignment"] for row in rows if row.get("event") == "sample" and "alignment" in row]
    figures = [
        (f"{name}, smoothed", smoothed([row[name] for row in steps]), sign),
        (f"held-out {name}", held_out, sign),
        ("alignment of the samples", alignment, -1.0),
    ]
    return [
        {"figure": title, "first": values[0], "last": values[-1], "best": (min if sign > 0 else max)(values)}
        for title, values, sign in figures
        if values
    ]


def token_table(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Norm and nearest words of the vectors of new tokens at their last measurement. Empty for other runs."""
    measured = [row["tokens"] for row in rows if row.get("event") == "watch" and "tokens" in row]
    table = []
    for token, about in (measured[-1] if measured else {}).items():
        for number, (norm, nearest) in enumerate(zip(about["norm"], about["nearest"], strict=True), 1):
            words = ", ".join(f"{word or '(blank)'} {cosine:.2f}" for word, cosine in nearest)
            table.append({"word / encoder": token, "vector": number, "norm / median": norm, "nearest words": words})
    return table


def environment_table(about: Mapping[str, Any]) -> list[Row]:
    """The machine and the versions of programs that the run was made with."""
    return [{"name": name, "value": value} for name, value in (about.get("environment") or {}).items()]


def stretches_table(about: Mapping[str, Any]) -> list[Row]:
    """What changed from which step on, for a run that went on with other settings or elsewhere; else empty."""
    stretches = about.get("stretches", ())
    return [
        {"from step": now["after_step"] + 1, "what": what, "value": _text(value), "before": _text(old)}
        for before, now in pairwise(stretches)
        for what, value, old in _changes(before, now)
    ]


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and earlier value of every entry that differs between two records of a stretch."""
    both = [{} if value is None else value for value in (before, now)]
    if before != now and all(isinstance(value, dict) for value in both):
        before, now = both
        for key in dict.fromkeys([*before, *now]):
            if key != "after_step":
                yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, now, before
