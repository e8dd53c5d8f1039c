"""Text encoders in the stock layout: a run's folder holds them, and transformers reads them."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from retune.training.common.foreign import read_tensors
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.prompts import Prompt
from retune.training.models.clip import ClipTextEncoder
from retune.training.models.sdxl_clip import SdxlTextEncoder
from retune.training.recipes.reward import tune
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.runs.provenance import about_folder
from retune.training.text_encoder.projection import Projection
from retune.training.text_encoder.stock_file import read_stock_file, split_by_encoder, write_stock_files
from retune.training.text_encoder.t5 import load_t5
from safetensors.torch import load_file

PROMPTS = ["a red circle on the left", "", "two small blue squares"]


def test_a_run_leaves_a_whole_file_that_transformers_reads(tiny_model, tmp_path):
    from transformers import CLIPTextModel

    terms = [Term(reward=load_reward(RewardConfig(kind="demo aesthetic")), weight=2.0, target=7.0)]
    sizes = {"width": 32, "height": 32, "steps": 2, "batch_size": 1, "gradient_steps": 1, "sampling_steps": 2}
    config = RewardTuneConfig(run_name="r", learning_rate=1e-3, settings=TrainingSettings(warmup_steps=0), **sizes)
    tuned = tune(tiny_model, CombinedReward(terms), [Prompt("a red circle")], config, tmp_path)
    file, encoder = tmp_path / "r" / "clip_l.safetensors", tiny_model.text_encoder
    state, about = read_stock_file(file)
    assert state.keys() == load_file(file).keys()
    start = "text_encoders.clip_l.transformer."
    assert {start + name for name in state} == tuned.text.keys() == encoder.weights.keys()
    assert all(torch.equal(value, tuned.text[start + name]) for name, value in state.items())
    assert (
        about == about_folder(tmp_path / "r") and about["steps"] == 2 and about["settings"]["train"] == "text encoder"
    )
    limit = {"target": 7.0, "form": "hinge"}
    assert about["rewards"] == [{"reward": "demo aesthetic", "weight": 2.0, **limit, "files": []}]
    encoder.network.config.save_pretrained(tmp_path / "folder")
    file.rename(tmp_path / "folder" / "model.safetensors")
    network, report = CLIPTextModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([window for windows in encoder.tokenize(["a red circle", ""]) for window in windows])
    own = encoder.network
    values = {
        name: tuned.text[start + "text_model." + name.removeprefix("text_model.")] for name, _ in own.named_parameters()
    }
    with torch.no_grad():
        expected = torch.func.functional_call(own, values, kwargs={"input_ids": ids}).last_hidden_state
        torch.testing.assert_close(network(input_ids=ids).last_hidden_state, expected, rtol=0, atol=1e-5)
        assert not torch.equal(own(input_ids=ids).last_hidden_state, expected)


def test_sdxls_pair_makes_two_files(tiny_model, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small = tiny_model.text_encoder.network.config.to_dict()
    config = CLIPTextConfig(**small | {"hidden_size": 64, "projection_dim": 20})
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = CLIPTextModelWithProjection(config).eval()
    folder = tmp_path / "clip_tokenizer"
    first = ClipTextEncoder(tiny_model.text_encoder.network, folder, penultimate=True)
    encoder = SdxlTextEncoder(first, ClipTextEncoder(network, folder, penultimate=True, pad=0))
    weights = {name: target.tensor for name, target in encoder.weights.items()}
    assert [*split_by_encoder(weights)] == ["clip_l", "clip_g"]
    paths = {part: tmp_path / f"{part}.safetensors" for part in ("clip_l", "clip_g")}
    write_stock_files(paths, weights, {})
    assert "text_projection.weight" in load_file(paths["clip_g"])
    config.save_pretrained(tmp_path / "folder")
    paths["clip_g"].rename(tmp_path / "folder" / "model.safetensors")
    network, report = CLIPTextModelWithProjection.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = encoder.encode(encoder.tokenize(PROMPTS))
    ids = torch.tensor([windows[0] for windows in encoder.second.tokenize(PROMPTS)])
    with torch.no_grad():
        found = network(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(found.text_embeds, expected.pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.hidden_states[-2], expected.context[..., first.width :], rtol=0, atol=1e-5)


def test_a_tuned_t5_is_a_t5_file(tiny_model, tmp_path, write_t5_folder):
    before = load_t5(write_t5_folder(tmp_path / "t5"), Projection(64, 32))
    sizes = {"width": 32, "height": 32, "steps": 1, "batch_size": 1, "gradient_steps": 1, "sampling_steps": 2}
    config = RewardTuneConfig(run_name="r", learning_rate=1e-3, settings=TrainingSettings(warmup_steps=0), **sizes)
    reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
    tuned = tune(replace(tiny_model, text_encoder=before), reward, [Prompt("a red circle")], config, tmp_path)
    after = load_t5(tmp_path / "r" / "t5base.safetensors", before.projection, tokenizer=before.tokenizer)
    for name, value in after.model.named_parameters():
        assert torch.equal(value, tuned.text[f"text_encoders.t5base.transformer.{name}"])
    words = before.tokenize(["a red circle"])
    assert not torch.equal(after.encode(words).context, before.encode(words).context)


def test_names_of_every_encoder():
    one = torch.zeros(1)
    names = ("clip_l.transformer.text_model.x", "clip_l.transformer.text_projection.weight", "clip_l.logit_scale")
    names += ("clip_h.transformer.text_model.x", "t5xxl.transformer.shared.weight", "projection.linear.weight")
    for prefix in ("", "text_encoders."):
        parts = split_by_encoder({prefix + name: one for name in names})
        assert {part: [*tensors] for part, tensors in parts.items()} == {
            "clip_l": ["text_model.x"],
            "clip_h": ["text_model.x"],
            "t5xxl": ["shared.weight"],
        }


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no clip_g; expected one of clip_l"):
        write_stock_files({"clip_g": tmp_path / "x"}, {"clip_l.transformer.text_model.x": torch.zeros(1)}, {})
    write_stock_files({"t5base": tmp_path / "t5"}, {"t5base.transformer.shared.weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="t5 holds no CLIP text encoder"):
        read_stock_file(tmp_path / "t5")
    with pytest.raises(ValueError, match="holds no run"):
        about_folder(tmp_path)


def test_a_tuned_lora_is_read_by_diffusers(tiny_model, tmp_path):
    """In kohya's layout, as the run's folder has it, and in diffusers': the encodings are the tuned ones."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from retune.training.formats.lora_metadata import LoraDescription
    from retune.training.formats.lora_save import save_lora
    from retune.training.runs.folder import RunFolder

    pytest.importorskip("peft")
    sizes = {"width": 32, "height": 32, "steps": 2, "batch_size": 1, "gradient_steps": 1, "sampling_steps": 2}
    sizes |= {"train": "text encoder LoRA", "lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 1e-2, "cfg": 3.0}
    config = RewardTuneConfig(run_name="r", settings=TrainingSettings(warmup_steps=0), **sizes)
    reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")), weight=3.0)])
    tuned = tune(tiny_model, reward, [Prompt("a red circle")], config, tmp_path)
    about = LoraDescription(run=RunFolder(tmp_path / "r").config())
    save_lora(tmp_path / "peft" / "r.safetensors", tuned.lora, "diffusers", description=about)
    own, start = tiny_model.text_encoder.network, "text_encoders.clip_l.transformer.text_model."
    values = {}
    for name, value in own.named_parameters():
        layer = start + name.removeprefix("text_model.").removesuffix(".weight")
        up, down = (tuned.lora.get(f"{layer}.lora_{side}.weight") for side in ("up", "down"))
        values[name] = value if up is None else value + 2 * up @ down
    ids = torch.tensor([window for windows in tiny_model.text_encoder.tokenize(PROMPTS) for window in windows])
    with torch.no_grad():
        expected = torch.func.functional_call(own, values, kwargs={"input_ids": ids}).last_hidden_state
        plain = own(input_ids=ids).last_hidden_state
    assert (expected - plain).abs().max() > 1e-3
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    for folder in ("r", "peft"):
        text = deepcopy(own)
        parts = (tiny_model.autoencoder.network, text, None, tiny_model.denoiser.network, scheduler, None, None)
        pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
        pipe.load_lora_weights(tmp_path / folder, weight_name="r.safetensors")
        with torch.no_grad():
            found = pipe.text_encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=folder)
        metadata = read_tensors(tmp_path / folder / "r.safetensors")[1]
        assert metadata["ss_text_encoder_lr"] == "0.01" and metadata["ss_resolution"] == "(32, 32)"
        assert metadata["ss_training_comment"] == "reward tuning (last K, K 1 of 2, cfg 3): 3 x demo aesthetic"
        assert not metadata.keys() & {"ss_unet_lr", "ss_loss_type", "ss_min_snr_gamma"}
        assert json.loads(metadata["retune.run"])["settings"]["lora_rank"] == 2
