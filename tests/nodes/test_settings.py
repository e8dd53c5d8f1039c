"""Node inputs against the config fields that they set: every field has one, and what a node changes is listed here."""

import dataclasses
import importlib

import pytest
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.fields import config_fields
from retune.training.config.folder import FolderConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.model import ModelConfig
from retune.training.config.reset import ResetConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings

CONFIGS = {
    "RetuneTrainingSettings": TrainingSettings,
    "RetuneSamplePrompts": SamplePrompts,
    "RetuneTrainModel": TrainModelConfig,
    "RetuneTrainLora": LoraConfig,
    "RetuneTrainEmbedding": EmbeddingConfig,
    "RetuneRewardTune": RewardTuneConfig,
    "RetuneLoadDataset": FolderConfig,
    "RetuneResetAttention": ResetConfig,
}
SOME_FIELDS = {"RetuneLoadT5": (ModelConfig, ("max_tokens", "pad", "projection"))}
OTHER_DEFAULTS = {
    "RetuneTrainLora.learning_rate": 1e-4,
    "RetuneTrainEmbedding.learning_rate": 5e-3,
    "RetuneRewardTune.steps": 100,
    "RetuneRewardTune.batch_size": 4,
}
"""A node's default where it is not the command line's, besides those of required fields."""
OTHER_TEXTS = {"RetuneLoadDataset.folder"}
NODES = [*CONFIGS, *SOME_FIELDS]
BASIC = 8
"""Most inputs of a node that are not advanced, sockets aside."""


def fields_of(node_id: str) -> dict:
    """The config fields that a node has inputs for, by name; nested configs are sockets."""
    config, names = SOME_FIELDS.get(node_id) or (CONFIGS[node_id], config_fields(CONFIGS[node_id]))
    return {name: config_fields(config)[name] for name in names if not config_fields(config)[name].is_config}


@pytest.fixture
def inputs(schemas):
    """`inputs(node_id)`: name -> (type, options)."""

    def of(node_id: str) -> dict:
        groups = schemas[node_id]["input"].values()
        return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()}

    return of


@pytest.mark.parametrize("node_id", NODES)
def test_every_field_has_an_input_of_its_type_text_and_choices(inputs, node_id):
    kinds = {int: "INT", float: "FLOAT", bool: "BOOLEAN", str: "STRING"}
    for name, field in fields_of(node_id).items():
        kind, options = inputs(node_id)[name]
        assert kind == ("COMBO" if field.choices else kinds.get(field.type, "STRING")), name
        if f"{node_id}.{name}" not in OTHER_TEXTS:
            assert options["tooltip"].removesuffix(" One a line.") == field.documentation, name
        if field.choices:
            assert sorted(options["options"]) == sorted(field.choices), name


@pytest.mark.parametrize("node_id", NODES)
def test_defaults_are_the_fields_but_for_those_listed(inputs, node_id):
    for name, field in fields_of(node_id).items():
        default = "\n".join(field.default) if field.repeated else field.default
        expected = OTHER_DEFAULTS.get(f"{node_id}.{name}", default)
        if not field.required:
            assert inputs(node_id)[name][1]["default"] == expected, name


@pytest.mark.parametrize("node_id", NODES)
def test_ranges_lie_within_the_fields(inputs, node_id):
    for name, field in fields_of(node_id).items():
        options = inputs(node_id)[name][1]
        if field.low is not None:
            assert options["min"] >= field.low and field.allows(options["max"]), name


@pytest.mark.parametrize("node_id", NODES)
def test_advanced_inputs_have_a_default_and_basic_ones_are_few(inputs, node_id):
    advanced = [name for name, (_, options) in inputs(node_id).items() if options.get("advanced")]
    assert all("default" in inputs(node_id)[name][1] for name in advanced)
    widgets = [name for name, (_, options) in inputs(node_id).items() if "default" in options]
    assert len(widgets) - len(advanced) <= BASIC


@pytest.mark.parametrize("config", [*CONFIGS.values(), ModelConfig])
def test_every_field_is_documented_in_three_sentences_at_most(config):
    for name, field in config_fields(config).items():
        if not field.is_config:
            assert field.documentation and len(field.documentation) <= 340, name


def test_a_config_s_fields_are_those_of_the_dataclass():
    assert list(config_fields(LoraConfig)) == [field.name for field in dataclasses.fields(LoraConfig)]
    assert config_fields(LoraConfig)["rank"].range == "1 to 4096"
    assert config_fields(FolderConfig)["repeats"].range == "at least 1"


WRONG = {
    "RetuneTrainModel": ("train", {"optimizer": "Prodigy"}, {}, "package none_such of optimizer 'Prodigy'"),
    "RetuneTrainLora": (
        "train_lora",
        {"fused_backward": True, "gradient_accumulation": 2},
        {},
        "with 2 batches a step",
    ),
    "RetuneTrainEmbedding": ("train_embedding", {"precision": "fp16"}, {"token": "<it>"}, "fp16' without a CUDA"),
    "RetuneRewardTune": ("reward_tune", {"precision": "fp16"}, {"prompts": "", "clip_constraint": 0.0}, "for a reward"),
}


@pytest.mark.parametrize("node_id", WRONG)
def test_settings_that_cannot_be_are_refused_before_a_models_turn(comfyui, monkeypatch, node_id):
    """Which is not even there."""
    from retune.training.loop.optimizers import PACKAGES

    file, settings, more, message = WRONG[node_id]
    monkeypatch.setitem(PACKAGES, "Prodigy", ("none_such", "none_such"))
    node = getattr(importlib.import_module(f"retune.nodes.{file}"), node_id)
    with pytest.raises(ValueError, match=message):
        node.execute(None, None, None, None, settings=TrainingSettings(**settings), run_name="r", **more)
