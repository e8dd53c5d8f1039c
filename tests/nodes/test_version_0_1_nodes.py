"""A text encoder that version 0.1.0's Save Text Encoder wrote says the same in ComfyUI now."""

from pathlib import Path

import torch
from retune.training.common.foreign import read_tensors

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
FILES = FIXTURES / "files"


def test_a_t5_with_its_projection(comfyui, monkeypatch):
    import folder_paths
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder

    folders = ([str(FIXTURES)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    with torch.inference_mode():
        clip = RetuneLoadTextEncoder.execute("files/t5_projection.safetensors").result[0]
        context, pooled = clip.encode_from_tokens(clip.tokenize("a red circle on the left"), return_pooled=True)
    expected, _ = read_tensors(FILES / "expected.safetensors", "t5_projection|comfyui")
    for value, name in ((context, "context"), (pooled, "pooled")):
        torch.testing.assert_close(value, expected[f"t5_projection|comfyui {name}"], rtol=1e-4, atol=1e-6)
