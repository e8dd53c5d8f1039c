"""Each node of the spine called as ComfyUI calls it: class method, under inference mode."""

import json
from pathlib import Path

import pytest
import torch
from retune.training.data.images import save_png


def run(node, *args, **kwargs):
    """Results of a node as a tuple."""
    with torch.inference_mode():
        return node.execute(*args, **kwargs).result


def test_demo_model_without_clip_and_with_a_wrong_file(comfyui, tmp_path):
    import folder_paths
    from retune.nodes.demo import RetuneLoadDemoModel
    from safetensors.torch import save_file

    model, clip, vae = run(RetuneLoadDemoModel, "none")
    assert clip is None and model is not None and vae is not None
    with pytest.raises(ValueError, match="expected one of the files in models/checkpoints"):
        run(RetuneLoadDemoModel, "clip", file="../secret.safetensors")
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"model.diffusion_model.x": torch.zeros(1)}, folder / "other.safetensors")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(ValueError, match="other.safetensors is no demo checkpoint"):
        run(RetuneLoadDemoModel, "clip", file="other.safetensors")


def test_demo_dataset_gives_pictures_and_captions(comfyui):
    from retune.nodes.demo import RetuneDemoDataset

    dataset, images, captions = run(RetuneDemoDataset, 5, 1, "red")
    assert len(dataset) == 5 and images.shape == (5, 128, 128, 3)
    assert all("red" in line for line in captions.splitlines())
    again = run(RetuneDemoDataset, 5, 1, "red")
    assert torch.equal(images, again[1]) and dataset.fingerprint == again[0].fingerprint


def test_reset_changes_what_it_says_and_nothing_else(demo):
    from retune.nodes.common.weights import patched_weight
    from retune.nodes.reset import RetuneResetAttention

    model = demo[0]
    counts = {}
    for layers in ("cross-attention", "cross-attention K/V", "QK", "self-attention", "all attention"):
        changed, report = run(RetuneResetAttention, model, layers, "default", 1.0, False, "", 0)
        counts[layers] = len(changed.patches)
        assert report.startswith(f"{len(changed.patches)} tensors reset")
        assert not any("to_out" in key for key in changed.patches)
        for key in changed.patches:
            assert not torch.equal(patched_weight(changed, key), patched_weight(model, key))
    blocks = sum(key.endswith("attn2.to_k.weight") for key in model.model.state_dict())
    expected = {"cross-attention": 3, "cross-attention K/V": 2, "QK": 4, "self-attention": 3, "all attention": 6}
    assert counts == {name: number * blocks for name, number in expected.items()}
    assert not model.patches
    zeroed, _ = run(RetuneResetAttention, model, "cross-attention", "zero output", 1.0, False, "middle", 0)
    outputs = [key for key in zeroed.patches if "to_out.0.weight" in key]
    assert len(outputs) == 1 and not patched_weight(zeroed, outputs[0]).any()
    with pytest.raises(ValueError, match="no attention layer matches layers"):
        run(RetuneResetAttention, model, "QK", "default", 1.0, False, "nowhere", 0)


def test_t5_is_loaded_scaled_saved_and_loaded_again(demo):
    import folder_paths
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder, RetuneSaveTextEncoder
    from retune.nodes.scale import RetuneScaleTextEncoder
    from retune.nodes.text_encoder import RetuneLoadT5
    from retune.training.text_encoder.file import read_text_encoder

    model, clip, _ = demo
    (t5,) = run(RetuneLoadT5, "demo", "auto", model=model)
    words = "a large blue cross, white background"
    raw = encoded(t5, words)
    assert raw.shape[-1] == 128
    scaled, std, report, _ = run(RetuneScaleTextEncoder, t5, "target std", 0.2)
    assert std == pytest.approx(0.2, rel=1e-3) and "->" in report
    assert torch.equal(encoded(t5, words), raw)
    matched, std, *_ = run(RetuneScaleTextEncoder, t5, "match reference", 0.2, reference=clip)
    measured = run(RetuneScaleTextEncoder, clip, "off", 0.2)[1]
    assert std == pytest.approx(measured, rel=1e-3)
    with pytest.raises(ValueError, match="reference is not connected"):
        run(RetuneScaleTextEncoder, t5, "match reference", 0.2)
    (path,) = run(RetuneSaveTextEncoder, matched, "retune/test_encoder")
    folder_paths.filename_list_cache.clear()
    name = "retune/" + path.replace("\\", "/").rsplit("/", 1)[1]
    loaded, _ = run(RetuneLoadTextEncoder, name)
    (projected,) = run(RetuneLoadT5, "demo", "128", projection_file=name)
    for one in (loaded, projected):
        assert torch.equal(encoded(one, words), encoded(matched, words))
        (again,) = run(RetuneSaveTextEncoder, one, "retune/test_encoder")
        assert read_text_encoder(again).target_std == pytest.approx(measured, rel=1e-6)
    (path,) = run(RetuneSaveTextEncoder, clip, "retune/test_clip")
    with pytest.raises(ValueError, match="is no saved text encoder"):
        read_text_encoder(path)


def encoded(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text)).clone()


def test_conditioning_is_scaled_and_the_original_kept(comfyui):
    from retune.nodes.scale import RetuneScaleConditioning

    context = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    pooled = {"pooled_output": torch.ones(1, 4)}
    scaled, std = run(RetuneScaleConditioning, [[context, pooled]], 0.5)
    assert scaled[0][0].std(correction=0).item() == pytest.approx(0.5, rel=1e-5)
    assert std == pytest.approx(0.5, rel=1e-5)
    assert scaled[0][1] == pooled and scaled[0][1] is not pooled


def test_folders_and_images_become_datasets(comfyui, tmp_path):
    from retune.nodes.dataset import RetuneDatasetFromImages, RetuneLoadDataset

    image = torch.rand(3, 48, 64)
    save_png(image, tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png"):
        run(RetuneLoadDataset, str(tmp_path), 64)
    (tmp_path / "a.txt").write_text("a red circle", encoding="utf-8")
    before = RetuneLoadDataset.fingerprint_inputs(str(tmp_path), resolution=64)
    dataset, report = run(RetuneLoadDataset, str(tmp_path), 64)
    assert dataset.captions == ["a red circle"] and "1" in report
    (tmp_path / "a.txt").write_text("a blue circle", encoding="utf-8")
    assert RetuneLoadDataset.fingerprint_inputs(str(tmp_path), resolution=64) != before
    with pytest.raises(ValueError, match="folder is empty"):
        run(RetuneLoadDataset, " ", 64)
    (made,) = run(RetuneDatasetFromImages, [torch.rand(2, 32, 32, 3)], ["one\ntwo"])
    assert [e.caption for e in made.examples] == ["one", "two"]
    with pytest.raises(ValueError, match="caption"):
        run(RetuneDatasetFromImages, [torch.rand(3, 32, 32, 3)], ["one", "two"])


def test_settings_presets_win_and_bad_values_are_named(comfyui, caplog):
    from retune.nodes.settings import RetuneSamplePrompts, RetuneTrainingSettings

    values = {"lr_schedule": "constant", "snr_gamma": 5.0, "weight_decay": 0.5}
    settings, rate, steps = run(RetuneTrainingSettings, preset="T5 swap", **values)
    assert "preset 'T5 swap' wins: lr_schedule is cosine, not constant. Choose" in caplog.text  # and nothing else
    assert settings.lr_schedule == "cosine" and settings.weight_decay == 0.5 and (rate, steps) == (1e-5, 500)
    settings, rate, steps = run(RetuneTrainingSettings, preset="T5 swap, source notes", total_batch=8)
    assert settings.total_batch == 64 and settings.loss_weighting == "min-SNR" and (rate, steps) == (4e-5, 10000)
    with pytest.raises(ValueError, match="min_timestep is 600, above max_timestep 500"):
        run(RetuneTrainingSettings, min_timestep=600, max_timestep=500)
    (samples,) = run(RetuneSamplePrompts, " a \n\n b ", every=5, steps=2, cfg=1.0, seed=0, width=64, height=64)
    assert samples.prompts == ("a", "b")


def test_run_chart_draws_the_rows(comfyui, tmp_path):
    from retune.nodes.run_chart import RetuneRunChart

    rows = [{"step": s, "loss": 1 / s} for s in range(1, 50)] + [{"event": "validation", "step": 49, "loss": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    image, losses = run(RetuneRunChart, tmp_path)
    assert image.shape[0] == 1 and image.shape[-1] == 3 and image.std() > 0.05
    assert losses == {"loss": [1 / s for s in range(1, 50)]}
