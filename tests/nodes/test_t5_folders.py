"""Files and Hugging Face folders below models/text_encoders: offered, loaded at XXL width, saved and found again."""

from pathlib import Path

import pytest
import torch
from retune.training.text_encoder.t5_config import expected_names
from safetensors.torch import save_file


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
    (folder / "xxl.safetensors").unlink(missing_ok=True)  # a gigabyte, and pytest keeps the folders of three runs


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
    from retune.nodes.clips import t5_clip
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder, RetuneSaveTextEncoder
    from retune.nodes.text_encoder import RetuneLoadT5
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v1.1", "Pile-T5"])
def test_a_file_of_xxl_width_gives_the_cores_encodings(models, comfyui, cheap_noise, kind):
    """The XXL's true layout, widths and vocabulary in half precision, two of its 24 blocks; ComfyUI's tokenizers."""
    from retune.nodes.text_encoder import RetuneLoadT5
    from retune.training.text_encoder.projection import Projection
    from retune.training.text_encoder.t5 import load_t5

    own_bias = kind == "Pile-T5"
    save_file(dict(xxl_tensors(own_bias, cheap_noise)), models / "xxl.safetensors")
    offered()
    clip = run(RetuneLoadT5, "xxl.safetensors", "sdxl", seed=5)
    stored = clip.cond_stage_model.t5xxl.transformer.shared.weight
    assert stored.shape == (32128, 4096) and stored.dtype == torch.float16
    core = load_t5(models / "xxl.safetensors", Projection(4096, 2048, seed=5, pooled_width=1280), comfyui=comfyui)
    for text in ("a red circle and two blue squares", ""):
        tokens = core.tokenize([text])
        with torch.inference_mode():
            context, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
            expected = core.encode(tokens)
        assert [token for token, _ in clip.tokenize(text)["t5xxl"][0]] == tokens[0]
        assert expected.context.std() > 0.5 and context.shape[2] == 2048
        torch.testing.assert_close(context, expected.context, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled, expected.pooled, atol=1e-4, rtol=1e-4)


def xxl_tensors(own_bias, cheap_noise):
    """(name, half-precision tensor) of a T5 XXL of two blocks; matrices keep their input's size."""
    for seed, name in enumerate(expected_names(2, gated=True, bias_per_layer=own_bias)):
        part = name.split(".")[-2]
        shape = {"wi_0": (10240, 4096), "wi_1": (10240, 4096), "wo": (4096, 10240), "shared": (32128, 4096)}.get(part)
        shape = shape or ((32, 64) if part == "relative_attention_bias" else (4096, 4096))
        if part.endswith("layer_norm"):
            yield name, (1 + 0.1 * cheap_noise((4096,), seed)).half()
        else:
            whole = part in ("shared", "relative_attention_bias")
            scale = 1 if whole else shape[1] ** -0.5 / (8 if part == "q" else 1)
            yield name, (scale * cheap_noise(shape, seed)).half()
