"""What was saved with an earlier demo model works in ComfyUI with today's, and the report says what it was made for."""

import shutil
from pathlib import Path

import pytest
import torch
from retune.training.demo.editions import EDITIONS

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "demo_0_3"
OLD, NEW = EDITIONS[0].name, EDITIONS[-1].name
SAID = f"does not say which model it was made for; files of {OLD} do not. This is {NEW}."


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
    own = apply(demo[0], "demo: warm edges")[2]
    assert "made for" not in own
    assert SAID in apply(model, "warm_edges.safetensors")[2]  # patches do not make it another model


def test_nothing_is_said_of_what_was_just_trained(demo):
    from retune.nodes.lora import RetuneApplyLora
    from retune.training.formats.lora import read_lora_tensors

    trained = read_lora_tensors(FILES / "warm_edges.safetensors")[0]
    with torch.inference_mode():
        report = RetuneApplyLora.execute(demo[0], {"count": "1", "lora_1": "none"}, trained=trained).result[2]
    assert "keys used" in report and "made for" not in report


@pytest.mark.parametrize("file", ["glossy", "t5_reference"])
def test_text_encoders(folders, file):
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder

    with torch.inference_mode():
        clip, report = RetuneLoadTextEncoder.execute(f"{file}.safetensors").result
        context = clip.encode_from_tokens(clip.tokenize("a red circle on the left"))
    assert f"{file}.safetensors was made for {OLD}; this is {NEW}" in report or f"{file}.safetensors {SAID}" in report
    assert context.shape[-1] == 128


def test_todays_text_encoder_and_one_saved_without_a_run_need_no_word(demo, folders):
    import folder_paths
    from retune.nodes.saved_text_encoder import DEMO_CLIPS, RetuneLoadTextEncoder
    from retune.training.text_encoder.stock_file import write_stock_files

    path = Path(folder_paths.get_folder_paths("text_encoders")[0]) / "own.safetensors"
    state = {f"clip_l.{name}": value for name, value in demo[1].cond_stage_model.clip_l.state_dict().items()}
    write_stock_files({"clip_l": path}, state, {})
    with torch.inference_mode():
        for file in ("own.safetensors", *DEMO_CLIPS):
            assert "made for" not in RetuneLoadTextEncoder.execute(file).result[1]


def test_a_run_records_the_autoencoder_of_the_demo(demo):
    from retune.nodes.bridge.autoencoder import ComfyAutoencoder

    found = ComfyAutoencoder(demo[2], demo[0].model.latent_format).fingerprint
    assert found == EDITIONS[-1].vaes[1]
