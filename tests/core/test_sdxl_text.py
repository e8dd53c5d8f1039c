"""SDXL's pair of CLIP encoders: diffusers' own encodings from a folder and from a checkpoint, T5 in its place, runs."""

import json
import shutil

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.config.lora import LoraConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.models import ldm, open_clip
from retune.training.models.clip import clip_config
from retune.training.models.diffusers import SD1_SCHEDULER, SD1_VAE, load_model
from retune.training.recipes.lora import train_lora, trainable_layers
from retune.training.trainables.lora import Adapters

PROMPTS = ["a red circle on the left", "", "Two SMALL blue squares, white background"]
WIDTHS, POOLED = (32, 64), 20
TEXT = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": POOLED}
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": sum(WIDTHS),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
}


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return build().eval()


@pytest.fixture
def second_in_checkpoint(tiny_model, open_clip_tensors):
    """SDXL's second encoder."""
    return open_clip_tensors(tiny_model.text_encoder.network.config.vocab_size, WIDTHS[1], 64, POOLED)


@pytest.fixture
def pipeline(tiny_model, second_in_checkpoint, tmp_path):
    """diffusers' pipeline of a tiny SDXL; the second encoder's weights as diffusers reads them from a checkpoint."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path / "clip_tokenizer"
    pads = ("<|endoftext|>", "!")
    tokenizers = [CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad) for pad in pads]
    size = tiny_model.text_encoder.network.config.vocab_size
    special = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    configs = [CLIPTextConfig(hidden_size=width, **TEXT, **special) for width in WIDTHS]
    configs[1].hidden_act = "gelu"
    second = CLIPTextModelWithProjection(configs[1]).eval()
    second.load_state_dict(convert_open_clip_checkpoint(second, second_in_checkpoint, prefix=""))
    return StableDiffusionXLPipeline(
        tiny_model.autoencoder.network,
        seeded(lambda: CLIPTextModel(configs[0])),
        second,
        *tokenizers,
        seeded(lambda: UNet2DConditionModel(**UNET)),
        EulerDiscreteScheduler(**SD1_SCHEDULER),
    )


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


@pytest.fixture
def checkpoint(pipeline, second_in_checkpoint, tmp_path):
    """The same model as one file in the original layout, its tiny shapes described in the metadata."""
    unet, vae = pipeline.unet, pipeline.vae
    first = {"text_model." + n.removeprefix("text_model."): t for n, t in pipeline.text_encoder.state_dict().items()}
    parts = {
        ldm.UNET_PREFIX: ldm.to_ldm(unet.state_dict(), ldm.unet_names(unet.config)),
        ldm.VAE_PREFIX: ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config)),
        ldm.SDXL_CLIP_PREFIXES[0]: first,
        ldm.SDXL_CLIP_PREFIXES[1]: second_in_checkpoint | {"logit_scale": torch.tensor(4.6)},
    }
    config = {"unet": dict(unet.config), "vae": dict(vae.config)}
    config |= {"clip": pipeline.text_encoder.config.to_dict(), "clip_2": pipeline.text_encoder_2.config.to_dict()}
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    write_tensors(tmp_path / "sdxl.safetensors", tensors, {"retune.config": json.dumps(config)})
    return tmp_path / "sdxl.safetensors"


@torch.no_grad()
def test_encodings_are_those_of_diffusers(pipeline, folder, checkpoint, tmp_path):
    context, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    tokenizer = tmp_path / "clip_tokenizer"
    sources = {folder: None, checkpoint: tokenizer}
    for path, given in [*sources.items(), (folder, tokenizer)]:
        encoder = load_model(path, tokenizer=given).text_encoder
        tokens = encoder.tokenize(PROMPTS)
        found = encoder.encode(tokens)
        assert (encoder.width, encoder.pooled_width) == (sum(WIDTHS), POOLED) and found.mask is None
        torch.testing.assert_close(found.context, context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-5)
        assert encoder.real_tokens(tokens).sum(1).tolist() == [
            len(ids) - 1 for ids in pipeline.tokenizer(PROMPTS)["input_ids"]
        ]


@torch.no_grad()
def test_one_prediction_is_that_of_diffusers(pipeline, folder):
    """Pooled text and the picture's sizes reach the UNet as diffusers' pipeline gives them."""
    model = load_model(folder)
    words = model.text_encoder.encode(model.text_encoder.tokenize(PROMPTS))
    noisy = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    step = 400
    sigma = model.denoiser.sigmas[step].expand(3)
    found = model.denoiser.predict(noisy, sigma, words)
    sizes = pipeline._get_add_time_ids((64, 128), (0, 0), (64, 128), torch.float32, POOLED).expand(3, -1)
    added = {"text_embeds": words.pooled, "time_ids": sizes}
    scaled = noisy / (1 + sigma[0] ** 2).sqrt()
    expected = pipeline.unet(scaled, step, encoder_hidden_states=words.context, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_long_prompts_take_more_windows_and_the_first_ones_pooled_output(pipeline, folder):
    encoder = load_model(folder).text_encoder
    long = " ".join(["a"] * 80)
    (tokens,) = encoder.tokenize([long])
    found = encoder.encode([tokens])
    assert found.context.shape == (1, 2 * 77, sum(WIDTHS))
    for i in (0, 1):
        alone = encoder.encode([tuple([windows[i]] for windows in tokens)])
        torch.testing.assert_close(found.context[:, 77 * i : 77 * (i + 1)], alone.context)
        assert (i == 0) == torch.allclose(found.pooled, alone.pooled, atol=1e-6)
    batch = encoder.encode(encoder.tokenize([long, PROMPTS[0]]))
    assert batch.mask.sum(1).tolist() == [154, 77]
    _, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(batch.pooled[1:], pooled, atol=1e-5, rtol=1e-5)


def test_fingerprint_follows_weights_and_pads(folder, tmp_path):
    known = load_model(folder).text_encoder
    assert load_model(folder).text_encoder.fingerprint == known.fingerprint
    about = folder / "tokenizer_2" / "tokenizer_config.json"
    text = about.read_text(encoding="utf-8")
    assert '"pad_token": "!"' in text
    about.write_text(text.replace('"pad_token": "!"', '"pad_token": "<|endoftext|>"'), encoding="utf-8")
    other = load_model(folder).text_encoder
    assert other.tokenize(PROMPTS)[0][1] != known.tokenize(PROMPTS)[0][1]
    with torch.no_grad():
        known.second.network.text_projection.weight.mul_(1.001)
    changed = type(known)(known.first, type(known.second)(known.second.network, folder / "tokenizer_2"))
    assert len({known.fingerprint, other.fingerprint, changed.fingerprint}) == 3


def test_true_shapes_of_the_second_encoder_are_recognised(open_clip_tensors):
    """SDXL's own sizes; names as diffusers converts them."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tensors = open_clip_tensors(64, WIDTHS[1], 64, POOLED, layers=2)
    found = open_clip.to_transformers(tensors | {"logit_scale": torch.tensor(4.6)})
    about = clip_config(found)
    assert (about["hidden_size"], about["projection_dim"], about["num_hidden_layers"]) == (WIDTHS[1], POOLED, 2)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**about))
    expected = convert_open_clip_checkpoint(model, tensors, prefix="")
    expected = {name.removeprefix("text_model."): tensor for name, tensor in expected.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
        state = CLIPTextModelWithProjection(config).state_dict()
    large = clip_config({name.removeprefix("text_model."): tensor for name, tensor in state.items()})
    assert {name: large[name] for name in ("num_hidden_layers", "num_attention_heads", "projection_dim")} == {
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    }
    assert large["hidden_act"] == "gelu"


def test_incomplete_models_are_named(folder, checkpoint, tmp_path):
    tokenizer = tmp_path / "clip_tokenizer"
    tensors, metadata = read_tensors(checkpoint)
    for index, prefix in enumerate(ldm.SDXL_CLIP_PREFIXES):
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        write_tensors(tmp_path / "cut.safetensors", rest, metadata)
        with pytest.raises(
            ValueError, match=rf"lacks SDXL's text encoder conditioner.embedders.{index}; expected both"
        ):
            load_model(tmp_path / "cut.safetensors", tokenizer=tokenizer)
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ValueError, match="lacks text_encoder_2; expected text_encoder, text_encoder_2"):
        load_model(folder)


@pytest.mark.slow
def test_latents_of_a_file_have_sdxls_scale(checkpoint, tmp_path):
    """A VAE of true shapes, which need no description."""
    from diffusers import AutoencoderKL

    tensors, metadata = read_tensors(checkpoint)
    config = json.loads(metadata["retune.config"])
    del config["vae"]
    with torch.device("meta"):
        vae = AutoencoderKL(**SD1_VAE)
    shapes = {name: tensor.shape for name, tensor in ldm.to_ldm(vae.state_dict(), ldm.vae_names(vae.config)).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ldm.VAE_PREFIX)}
    tensors |= {ldm.VAE_PREFIX + name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    write_tensors(checkpoint, tensors, {"retune.config": json.dumps(config)})
    model = load_model(checkpoint, tokenizer=tmp_path / "clip_tokenizer")
    assert model.autoencoder.network.config.scaling_factor == 0.13025


def test_command_line_trains_it_with_its_own_encoders_and_with_t5(folder, picture_folder, write_t5_folder, tmp_path):
    flags = ["--folder", picture_folder, "--resolution", 32, "--no-buckets", "--steps", 2, "--batch-size", 2]
    flags += ["--warmup-steps", 1, "--device", "cpu", "--sample-prompts", "a red circle", "--sample-every", 2]
    flags += ["--sample-steps", 2, "--sample-width", 32, "--sample-height", 32, "--output", tmp_path / "runs"]
    t5 = write_t5_folder(tmp_path / "t5")
    for name, more in {"clip": [], "t5": ["--t5", t5]}.items():
        arguments = ["train", "--model", folder, "--run-name", name, *flags, *more]
        assert main([str(argument) for argument in arguments]) == 0
        rows = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "event" not in row] == [1, 2]
        tensors, _ = read_tensors(tmp_path / "runs" / name / "model.safetensors")
        assert ("projection.pooled.weight" in tensors) == (name == "t5")
    model = build_model(ModelConfig(model=str(folder), t5=str(t5)))
    assert (model.text_encoder.width, model.text_encoder.pooled_width) == (sum(WIDTHS), POOLED)


FIRST, SECOND = "text_encoders.clip_l.", "text_encoders.clip_g."


@pytest.mark.parametrize(
    ("rates", "learns", "written"),
    [((0.01, -1), {FIRST, SECOND}, "0.01"), ((0.01, 0), {FIRST}, "[0.01, 0.0]"), ((0, 0.02), {SECOND}, "[0.0, 0.02]")],
)
def test_each_text_encoder_has_a_rate_and_none_at_0(folder, pictures, tmp_path, rates, learns, written):
    first, second = (float(rate) for rate in rates)
    config = LoraConfig(
        run_name="r",
        steps=2,
        batch_size=2,
        learning_rate=0.04,
        rank=2,
        text_encoder_learning_rate=first,
        text_encoder_2_learning_rate=second,
        settings=TrainingSettings(warmup_steps=1),
    )
    trained = train_lora(build_model(ModelConfig(model=str(folder))), pictures, config, tmp_path)
    ups = {name: value for name, value in trained.tensors.items() if name.endswith("lora_up.weight")}
    assert {start for start in (FIRST, SECOND) for name in ups if name.startswith(start)} == learns
    assert all(any(ups[name].any() for name in ups if name.startswith(start)) for start in learns)
    assert read_tensors(tmp_path / "r" / "r.safetensors")[1]["ss_text_encoder_lr"] == written


def test_the_optimiser_gets_each_text_encoders_rate(folder):
    config = LoraConfig(
        run_name="r", learning_rate=1e-3, text_encoder_learning_rate=2e-4, text_encoder_2_learning_rate=5e-5
    )
    found = trainable_layers(build_model(ModelConfig(model=str(folder))), config)
    chosen = {name: found[name] for name in [*found][:1] + [n for n in found if n.endswith("0.mlp.fc1")]}
    adapters = Adapters(chosen, [], config, seed=0)
    rates = {name.split(".")[1]: adapters.rate(name) for name in adapters.parameters if name.startswith("text")}
    assert rates == {"clip_l": pytest.approx(0.2), "clip_g": pytest.approx(0.05)}
    assert {adapters.rate(name) for name in adapters.parameters if not name.startswith("text")} == {1.0}


def test_a_tuned_first_encoder_goes_into_the_pair(folder, tmp_path):
    model = load_model(folder)
    weights = {name: target.tensor.clone() for name, target in model.text_encoder.weights.items()}
    first = {name: 2 * value for name, value in weights.items() if name.startswith("text_encoders.clip_l.")}
    write_tensors(tmp_path / "tuned.safetensors", first)
    tuned = build_model(ModelConfig(model=str(folder), tuned=(str(tmp_path / "tuned.safetensors"),)))
    found = {name: target.tensor for name, target in tuned.text_encoder.weights.items()}
    assert 0 < len(first) < len(found) and all(
        torch.equal(value, first.get(name, weights[name])) for name, value in found.items()
    )
    assert tuned.text_encoder.fingerprint != model.text_encoder.fingerprint
    assert tuned.text_encoder.second.fingerprint == model.text_encoder.second.fingerprint


def test_rewards_tune_both_encoders_and_the_pooled_path(folder, tmp_path):
    from retune.training.config.reward import RewardTuneConfig
    from retune.training.data.prompts import Prompt
    from retune.training.recipes.reward import tune
    from retune.training.rewards.combined import CombinedReward, Term
    from retune.training.rewards.load import RewardConfig, load_reward

    model = load_model(folder)
    before = {name: target.tensor.detach().clone() for name, target in model.text_encoder.weights.items()}
    config = RewardTuneConfig(
        run_name="r",
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        gradient_steps=2,
        sampling_steps=3,
        cfg=2.0,
        width=32,
        height=32,
        eps_constraint=1.0,
        drift_constraint=1.0,
        settings=TrainingSettings(warmup_steps=1, weight_decay=0.0),
    )
    reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo CLIP")))])
    tuned = tune(model, reward, [Prompt(text) for text in PROMPTS if text], config, tmp_path / "runs")
    moved = {name for name, value in tuned.text.items() if not torch.equal(value, before[name])}
    for part in ("clip_l.transformer", "clip_g.transformer", "clip_g.transformer.text_projection"):
        assert any(part in name for name in moved), part
    assert all(torch.equal(target.tensor, before[name]) for name, target in model.text_encoder.weights.items())
    rows = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["drift"] < 1e-10 and rows[1]["drift"] > 1e-6 and rows[1]["eps_mse"] > 0
