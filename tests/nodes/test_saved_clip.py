"""Save Text Encoder on CLIPs: ComfyUI's own loaders and transformers read the files and say the same."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from retune.training.common.rng import generator
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.comfyui

SMALL = {"num_hidden_layers": 3, "intermediate_size": 64, "hidden_size": 32, "num_attention_heads": 4}
BIG = SMALL | {"num_hidden_layers": 32}  # ComfyUI tells CLIP-G by its layers
CONFIGS = {"clip_l_model_config": SMALL, "clip_g_model_config": BIG, "clip_h_model_config": SMALL}
PROMPT = "a red circle on the left, (a cat:1.2)"


def small_clip(model, tokenizer):
    import comfy.sd

    with torch.inference_mode():
        target = SimpleNamespace(clip=model, tokenizer=tokenizer, params={})
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **CONFIGS})
        for seed, value in enumerate(clip.cond_stage_model.state_dict().values()):
            value.copy_(torch.randn(value.shape, generator=generator(seed, "clip")) * 0.05)
    return clip


@pytest.fixture(scope="module")
def pair(comfyui):
    """SDXL's two encoders, small, CLIP-G with its true number of layers."""
    from comfy import sdxl_clip

    return small_clip(sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer)


def tuned(clip):
    """Every weight that a run tunes, moved a little, as Reward Tune hands it out."""
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.nodes.common.weights import with_text_weights

    moved = {}
    for number, (name, target) in enumerate(ComfyTextEncoder(clip).weights.items()):
        step = torch.randn(target.tensor.shape, generator=generator(number, "move"))
        moved[name] = target.tensor.detach().float() + 0.02 * step
    return with_text_weights(clip, moved)


def saved(clip, **options):
    """Paths that the node wrote, and its result."""
    from retune.nodes.saved_text_encoder import RetuneSaveTextEncoder

    with torch.inference_mode():
        output = RetuneSaveTextEncoder.execute(clip, "test/clip", **options)
    return [Path(line) for line in output.result[0].splitlines()], output


def encoded(clip):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)


def loaded(path):
    """By the function behind ComfyUI's CLIPLoader, which takes one size for all it loads."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_clip([str(path)], model_options={"dtype": torch.float32, "model_config": dict(SMALL)})


def loaded_pair(paths):
    """As that function does for two files."""
    import comfy.sd
    from comfy import sdxl_clip

    states = [load_file(path) for path in paths]
    kinds = [comfy.sd.detect_te_model(state) for state in states]
    assert kinds == [comfy.sd.TEModel.CLIP_L, comfy.sd.TEModel.CLIP_G]
    target = SimpleNamespace(clip=sdxl_clip.SDXLClipModel, tokenizer=sdxl_clip.SDXLTokenizer, params={})
    with torch.inference_mode():
        return comfy.sd.CLIP(target, state_dict=states, model_options={"dtype": torch.float32, **CONFIGS})


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_stock_loaders_say_what_the_tuned_encoder_says(clips, pair, family):
    clip = tuned(pair if family == "SDXL" else clips[family])
    paths, _ = saved(clip)
    assert [path.stem.split("_", 2)[2] for path in paths] == (["clip_l", "clip_g"] if family == "SDXL" else ["clip_l"])
    stock = loaded_pair(paths) if family == "SDXL" else loaded(paths[0])
    (context, pooled), (again, pooled_again) = encoded(clip), encoded(stock)
    assert torch.equal(context, again)
    assert not torch.equal(context, encoded(pair if family == "SDXL" else clips[family])[0])
    if family == "SDXL":
        assert torch.equal(pooled, pooled_again)


def test_transformers_says_the_same(clips, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = tuned(clips["SD1.5"])
    ((path,), _) = saved(clip)
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    vocabulary = load_file(path)["text_model.embeddings.token_embedding.weight"].shape[0]
    config = CLIPTextConfig(**SMALL, vocab_size=vocabulary, hidden_act="quick_gelu", eos_token_id=vocabulary - 1)
    config.save_pretrained(tmp_path)
    network, report = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.inference_mode():
        tokens = clip.tokenize("a red circle on the left")
        ids = torch.tensor([[token for token, _ in tokens["l"][0]]])
        found, expected = network(input_ids=ids).last_hidden_state, clip.encode_from_tokens(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_comfyuis_own_clip_save_writes_the_same_weights(clips, pair, family, comfyui):
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave

    clip = tuned(pair if family == "SDXL" else clips[family])
    with torch.inference_mode():
        CLIPSave().save(clip, f"stock {family}/clip")
    for path in saved(clip)[0]:
        ours, part = load_file(path), path.stem.split("_", 2)[2]
        stock = load_file(
            Path(folder_paths.get_output_directory()) / f"stock {family}" / f"clip_{part}_00001_.safetensors"
        )
        assert stock.keys() - ours.keys() <= {"text_projection.weight", "logit_scale"}
        assert ("text_projection.weight" in ours) == (part == "clip_g")
        assert all(torch.equal(value, stock[name]) and value.dtype == torch.float32 for name, value in ours.items())


def test_a_lora_is_part_of_the_file(clips):
    from comfy.sd import load_lora_for_models

    clip, name = clips["SD1.5"], "text_model.encoder.layers.1.mlp.fc1"
    up, down = (torch.randn(shape, generator=generator(i, "lora")) for i, shape in enumerate(((64, 2), (2, 32))))
    key = f"lora_te_{name.replace('.', '_')}"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
    with torch.inference_mode():
        with_lora = load_lora_for_models(None, clip, lora, 1.0, 0.5)[1]
    plain, merged = (load_file(saved(one)[0][0]) for one in (clip, with_lora))
    assert [n for n in plain if not torch.equal(plain[n], merged[n])] == [f"{name}.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], plain[f"{name}.weight"] + 0.5 * up @ down)
    assert torch.equal(encoded(loaded(saved(with_lora)[0][0]))[0], encoded(with_lora)[0])


def test_the_demos_own_file_is_loaded_again(demo, comfyui):
    import folder_paths
    from comfy_extras.nodes_model_merging import CLIPSave
    from retune.nodes.common.demo_model import load_demo_clip
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder

    clip = tuned(demo[1])
    ((path,), _) = saved(clip)
    with torch.inference_mode():
        CLIPSave().save(clip, "demo clip")
        again = RetuneLoadTextEncoder.execute(f"test/{path.name}").result[0]
        stock = load_demo_clip(Path(folder_paths.get_output_directory()) / "demo clip_clip_l_00001_.safetensors")
        ready = RetuneLoadTextEncoder.execute("demo: glossy").result[0]
    assert torch.equal(encoded(again)[0], encoded(clip)[0]) and torch.equal(encoded(stock)[0], encoded(clip)[0])
    assert not torch.equal(encoded(ready)[0], encoded(demo[1])[0])
    assert torch.equal(encoded(again.clone())[0], encoded(clip)[0])
    patcher_again = again.patcher.cached_patcher_init[0](*again.patcher.cached_patcher_init[1])
    state = again.patcher.model.state_dict()
    read = {name: value for name, value in patcher_again.model.state_dict().items() if ".text_model." in name}
    assert read and all(torch.equal(value, state[name]) for name, value in read.items())


def test_what_the_files_lack_is_said(clips, pair, demo):
    from retune.nodes.clips.concept_tokens import with_concepts
    from retune.training.models.concepts import Concept

    clip = demo[1].clone()
    clip.clip_layer(-2)
    clip = with_concepts(clip, [Concept("<x>", {"clip_l": torch.zeros(1, 128)})])
    _, output = saved(clip)
    text = "\n".join(output.ui["text"])
    assert "CLIP Set Last Layer is not in the file" in text and "the words of Load Embedding (<x>)" in text
    assert len(saved(pair)[1].ui["text"]) == 2


def test_what_is_refused(clips, pair, demo):
    from retune.nodes.clips.blended_clip import blend_embeddings
    from retune.nodes.saved_text_encoder import RetuneLoadTextEncoder

    with torch.inference_mode():
        blend = blend_embeddings([demo[1], tuned(demo[1])], [0.5, 0.5])
    with pytest.raises(ValueError, match='space "embeddings" has no weights'):
        saved(blend)
    with pytest.raises(ValueError, match="clip is empty"):
        saved(None)
    ((path,), _) = saved(clips["SD1.5"])
    with pytest.raises(ValueError, match=r"is a CLIP of width 32; .* Load CLIP"):
        RetuneLoadTextEncoder.execute(f"test/{path.name}")
    ((path,), _) = saved(demo[1])
    with pytest.raises(ValueError, match="expected keep_clip unconnected"):
        RetuneLoadTextEncoder.execute(f"test/{path.name}", keep_clip=demo[1])


def tune_demo(demo, folder, **changes):
    """(MODEL, CLIP, LORA_MODEL, run folder) of a reward tuning of one step."""
    from retune.nodes.bridge.reward_tuning import apply_result, ready_to_tune, reward_with_constraint
    from retune.nodes.bridge.rewards import ManagedReward
    from retune.training.config.reward import RewardTuneConfig
    from retune.training.config.training_settings import TrainingSettings
    from retune.training.data.prompts import Prompt
    from retune.training.recipes.reward import tune
    from retune.training.rewards.load import RewardConfig

    sizes = {"width": 64, "height": 64, "batch_size": 1, "steps": 1, "gradient_steps": 1, "sampling_steps": 2}
    settings = TrainingSettings(warmup_steps=0)
    config = RewardTuneConfig(run_name="told", settings=settings, learning_rate=1e-2, **sizes, **changes)
    with torch.inference_mode():
        aesthetic, clip_reward = (ManagedReward.open(RewardConfig(kind=f"demo {k}")) for k in ("aesthetic", "CLIP"))
        judge = reward_with_constraint(aesthetic, 0.5, clip_reward, None)
        with ready_to_tune(*demo, judge) as (view, rewards):
            found = tune(view, rewards, [Prompt("a red circle")], config, folder)
        return *apply_result(demo[0], demo[1], found, "told"), found.lora, folder / "told"


def test_the_run_is_told_in_the_file(demo, tmp_path):
    _, clip, _, run = tune_demo(demo, tmp_path)
    ((path,), _) = saved(clip, run=run)
    with safe_open(path, "pt") as ours, safe_open(run / "clip_l.safetensors", "pt") as core:
        assert ours.metadata() == core.metadata() and sorted(ours.keys()) == sorted(core.keys())
        assert all(torch.equal(ours.get_tensor(name), core.get_tensor(name)) for name in ours.keys())
        about = json.loads(ours.metadata()["retune.run"])
    assert about["run"] == "told" and about["kind"] == "reward" and about["steps"] == 1
    assert about["rewards"] == [
        {"reward": "demo aesthetic", "weight": 1.0, "files": []},
        {"reward": "demo CLIP", "weight": 0.5, "files": []},
    ]
    assert about["settings"]["gradient_steps"] == 1 and about["settings"]["sampling_steps"] == 2
    assert about["base"]["text_encoder"] and about["base"]["model"]


def test_a_tuned_lora_is_read_by_the_stock_loader(demo, tmp_path):
    import comfy.sd
    import comfy.utils
    from retune.nodes.save_lora import RetuneSaveLora

    model, clip, lora, run = tune_demo(demo, tmp_path, train="text encoder LoRA", lora_rank=2, lora_alpha=4.0)
    with torch.inference_mode():
        written = RetuneSaveLora.execute(lora, "kohya", "test/tuned", run=run).result[0]
    expected, plain = encoded(clip)[0], encoded(demo[1])[0]
    assert (expected - plain).abs().max() > 1e-3
    for file in (written, run / "lora.safetensors", run / "told.safetensors"):
        tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
        with torch.inference_mode():
            stock = comfy.sd.load_lora_for_models(demo[0], demo[1], tensors, 1.0, 1.0)[1]
        torch.testing.assert_close(encoded(stock)[0], expected, rtol=0, atol=1e-5, msg=str(file))
    with safe_open(written, "pt") as file:
        assert file.metadata()["ss_text_encoder_lr"] == "0.01" and len(file.keys()) == len(lora)
        assert {name.split("_layers_")[0] for name in file.keys()} == {"lora_te_text_model_encoder"}


@pytest.mark.slow
def test_at_real_size(comfyui, tmp_path):
    """SD1.5's CLIP-L, random weights: 196 tensors as in flux_text_encoders, 492 MB in fp32."""
    import comfy.sd
    from comfy import sd1_clip
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.inference_mode():
        target = SimpleNamespace(clip=sd1_clip.SD1ClipModel, tokenizer=sd1_clip.SD1Tokenizer, params={})
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
        for seed, (name, value) in enumerate(clip.cond_stage_model.state_dict().items()):
            scale = 0.7 * value.shape[-1] ** -0.5 if value.ndim == 2 else 0.02
            value.copy_(torch.randn(value.shape, generator=generator(seed, name)) * scale)
    clip = tuned(clip)
    ((path,), _) = saved(clip)
    try:
        assert len(load_file(path)) == 196 and path.stat().st_size == pytest.approx(492.2e6, rel=0.01)
        with torch.inference_mode():
            again = comfy.sd.load_clip([str(path)], model_options={"dtype": torch.float32})
        assert torch.equal(encoded(again)[0], encoded(clip)[0])
        config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
        CLIPTextConfig(**config).save_pretrained(tmp_path)
        path.rename(tmp_path / "model.safetensors")
        network = CLIPTextModel.from_pretrained(tmp_path)
        with torch.inference_mode():
            tokens = clip.tokenize("a red circle on the left")
            ids = torch.tensor([[token for token, _ in tokens["l"][0]]])
            expected = clip.encode_from_tokens(tokens)
            torch.testing.assert_close(network(input_ids=ids).last_hidden_state, expected, rtol=0, atol=1e-4)
    finally:
        path.unlink(missing_ok=True)
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
