"""Hugging Face folders below models/text_encoders: offered, loaded, saved and found again."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def models(comfyui, tmp_path, monkeypatch):
    """An empty folder that stands for models/text_encoders, for this test alone."""
    import folder_paths

    extensions = folder_paths.folder_names_and_paths["text_encoders"][1]
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], extensions))
    yield folder
    folder_paths.filename_list_cache.clear()


def offered():
    """The values of Load T5's first input."""
    import folder_paths
    from retune.nodes.text_encoder import RetuneLoadT5

    folder_paths.filename_list_cache.clear()
    return RetuneLoadT5.define_schema().inputs[0].options


def run(node, *args, **kwargs):
    with torch.inference_mode():
        return node.execute(*args, **kwargs).result[0]


def encoded(clip):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize("a red circle and two blue squares")).clone()


def test_folders_with_a_configuration_are_offered_after_the_files(models):
    for name in ("z/b/model-1.safetensors", "z/b/model-2.safetensors", "z/a/model.safetensors", "y/t5.safetensors"):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    for name in ("z/b", "z/a", "x", "."):  # x has a configuration without weights, y the reverse
        (models / name).mkdir(exist_ok=True)
        (models / name / "config.json").write_text("{}", encoding="utf-8")
    (models / "one.safetensors").touch()
    listed = ["one", "y/t5", "z/a/model", "z/b/model-1", "z/b/model-2"]
    assert offered() == ["demo", *(str(Path(f"{name}.safetensors")) for name in listed), "z/a", "z/b"]


def test_a_sharded_folder_loads_and_is_found_again(models, write_t5_folder, tmp_path):
    import folder_paths
    from retune.nodes import t5_clip
    from retune.nodes.text_encoder import RetuneLoadT5, RetuneLoadTextEncoder, RetuneSaveTextEncoder
    from retune.training.text_encoder.projection import Projection

    folder = write_t5_folder(models / "google" / "tiny t5 [1.1]", shard_size="100KB")
    whole = write_t5_folder(tmp_path / "whole")
    assert len(list(folder.glob("*.safetensors"))) > 1 == len(list(whole.glob("*.safetensors")))
    assert "google/tiny t5 [1.1]" in offered()
    clip = run(RetuneLoadT5, "google/tiny t5 [1.1]", "768", seed=5)
    expected = encoded(t5_clip.load_t5_clip(whole, Projection(64, 768, seed=5)))
    assert torch.equal(encoded(clip), expected)
    path = Path(run(RetuneSaveTextEncoder, clip, "retune/of folder"))
    folder_paths.add_model_folder_path("text_encoders", str(path.parents[1]))
    (models / "a" / folder.name).mkdir(parents=True)  # a folder of the same name without weights
    offered()
    again = run(RetuneLoadTextEncoder, f"retune/{path.name}")
    assert torch.equal(encoded(again), expected)
    for name in ("google", "../text_encoders/google/tiny t5 [1.1]", str(folder)):
        with pytest.raises(ValueError, match="expected one of the files in models/text_encoders"):
            run(RetuneLoadT5, name, "768")
