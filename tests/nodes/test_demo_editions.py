"""What was saved with an earlier demo model works in ComfyUI with today's, and the report says what it was made for."""

import shutil
from pathlib import Path

import pytest
import torch
from retune.training.demo.editions import EDITIONS

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "demo_0_3"
OLD, NEW = EDITIONS[0].name, EDITIONS[-1].name
SAID = f"does not say which model it was made for, as files of {OLD}; this is {NEW}."


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """The folders of models, with the old files."""
    import folder_paths

    for kind, names in (("loras", ["warm_edges"]), ("text_encoders", ["glossy", "t5_reference"])):
        (tmp_path / kind).mkdir()
        for name in names:
            shutil.copy(FILES / f"{name}.safetensors", tmp_path / kind)
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors", ".bin"})
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


def apply(model, lora):
    from retune.nodes.lora import RetuneApplyLora

    row = {"count": "1", "lora_1": lora, "strength_model_1": 1.0, "strength_clip_1": 1.0}
    with torch.inference_mode():
        return RetuneApplyLora.execute(model, row).result


def test_a_lora(demo, folders):
    model, _, report = apply(demo[0], "warm_edges.safetensors")
    assert f"warm_edges.safetensors {SAID}" in report and model.patches
    assert "made for" not in apply(demo[0], "demo: warm edges")[2].replace("base", "")
    again = apply(model, "warm_edges.safetensors")[2]  # the patches that are on it do not make it another model
    assert SAID in again


def test_text_encoders(folders, comfyui):
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder

    with torch.inference_mode():
        for file, said in (("glossy", f"was made for {OLD}; this is {NEW}"), ("t5_reference", f"was made for {OLD}")):
            output = RetuneLoadTextEncoder.execute(f"{file}.safetensors")
            assert said in output.ui["text"][0]
            clip = output.result[0]
            context = clip.encode_from_tokens(clip.tokenize("a red circle on the left"))
            assert context.shape[-1] == 128
        from retune.nodes.saved_text_encoder import DEMO_CLIPS

        assert RetuneLoadTextEncoder.execute(next(iter(DEMO_CLIPS))).ui is None
