"""Train LoRA from Folder: the same bits as the full graph with the values that it tells."""

import pytest
import torch
from PIL import Image
from retune.training.config import simple_lora
from retune.training.config.lora import LoraConfig


def node_of(kind):
    """The class as ComfyUI's execution prepares it."""
    return kind.PREPARE_CLASS_CLONE(None)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one of them with a caption."""
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (128, 128), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "0.txt").write_text("a red square")
    return tmp_path


def test_the_full_graph_with_the_derived_values_gives_the_same_bits(demo, folder, monkeypatch):
    from retune.nodes.dataset import RetuneLoadDataset
    from retune.nodes.settings import RetuneTrainingSettings
    from retune.nodes.train_lora import RetuneTrainLora
    from retune.nodes.train_lora_from_folder import RetuneTrainLoraFromFolder

    monkeypatch.setitem(simple_lora.STEPS, "quick", (2, 2))
    monkeypatch.setattr(simple_lora, "SAMPLE_SETS", 1)
    with torch.inference_mode():
        simple = node_of(RetuneTrainLoraFromFolder).execute(
            *demo, str(folder), "sks", "quick", "SD1.5 6 GB", run_name="simple", seed=7
        )
        dataset = RetuneLoadDataset.execute(str(folder), 128, trigger_word="sks").result[0]
        settings = RetuneTrainingSettings.execute(preset="SD1.5 6 GB").result[0]
        values = {"steps": 2, "batch_size": 1, "learning_rate": 1e-4, "rank": 16, "alpha": 16.0, "seed": 7}
        values |= {name: getattr(LoraConfig, name) for name in ("algorithm", "targets", "text_encoder_learning_rate")}
        full = node_of(RetuneTrainLora).execute(*demo, dataset, settings, run_name="full", **values)
    _, clip, lora, run, derived = simple.result
    assert dataset.captions == ["sks, a red square", "sks"] and clip is demo[1]
    assert lora.keys() == full.result[2].keys()
    assert all(torch.equal(value, full.result[2][name]) for name, value in lora.items())
    assert any(value.any() for name, value in lora.items() if name.endswith("up.weight"))
    assert "preset SD1.5 6 GB" in derived and "steps 2, batch_size 1" in derived and "2 images" in derived
    assert simple.ui["retune_run"] == ["simple"] and simple.ui["text"] == [derived] and run.name == "simple"
