"""Training tokens through ComfyUI: transformers' gradients, the core's numbers, words that stock nodes read."""

import json
from pathlib import Path

import pytest
import torch
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.models.concepts import Concept


@pytest.fixture
def shown():
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return from_images(images, ["one <it> on the left", "two small <it>, (white) background"])


def gradients(encoder, text, pooled=False):
    """Of two vectors for each encoder, of a sum that every state (and the pooled output) enters, by encoder."""
    vectors = {}
    for name, vocabulary in encoder.vocabularies.items():
        start = torch.randn(2, vocabulary.table.shape[1], generator=torch.Generator().manual_seed(0))
        vectors[name] = (0.05 * start).requires_grad_(True)
    knowing = encoder.with_concepts([Concept("<it>", vectors)])
    with knowing.training():
        states = knowing.backbone(knowing.tokenize([text]))
        total = torch.zeros(())
        for value in (states.context, states.pooled)[: 1 + pooled]:
            total = total + (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))).sum()
        total.backward()
    return {name: value.grad for name, value in vectors.items()}


@pytest.mark.parametrize("text", ["clip", "t5"])
def test_gradients_equal_those_of_transformers(demo, core_demo, text):
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.demo.files import weights_path
    from retune.training.text_encoder.projection import Projection
    from retune.training.text_encoder.t5 import load_t5

    model, clip, vae = demo
    core = core_demo.text_encoder
    if text == "t5":
        projection = Projection(96, 128, seed=3)
        core = load_t5(weights_path("t5.safetensors"), projection)
        with torch.inference_mode():
            clip = load_t5_clip("demo", projection)
    with torch.inference_mode(), text_to_image(model, clip, vae) as view:
        (ours,) = gradients(view.text_encoder, "two <it> on the left, red <it>").values()
    (expected,) = gradients(core, "two <it> on the left, red <it>").values()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def core_sdxl(clip):
    """The core's text encoder with the weights of ComfyUI's SDXL CLIP."""
    import comfy.sd
    from retune.training.models.clip import ClipTextEncoder
    from retune.training.models.sdxl_clip import SECOND_PAD, SdxlTextEncoder

    folder = Path(comfy.sd.__file__).parent / "sd1_tokenizer"
    parts = []
    for name, activation, pad in (("clip_l", "quick_gelu", None), ("clip_g", "gelu", SECOND_PAD)):
        state = getattr(clip.cond_stage_model, name).transformer.state_dict()
        width = state["text_model.embeddings.token_embedding.weight"].shape[1]
        size = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        special = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "projection_dim": width}
        config = size | special | {"hidden_act": activation}
        projected = name == "clip_g"
        if not projected:
            state.pop("text_projection.weight")
        options = {"projected": projected, "penultimate": True, "pad": pad}
        parts.append(ClipTextEncoder.from_state(state, config, folder, **options))
    return SdxlTextEncoder(*parts)


def test_gradients_of_both_encoders_of_sdxl(small_sdxl_clip):
    from retune.nodes.bridge.device import training_mode
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder

    class LoadedWith:
        """As much of a denoiser as a text encoder that trains asks for."""

        keep_loaded: list = []

        def load(self):
            import comfy.model_management

            comfy.model_management.load_models_gpu(self.keep_loaded, force_full_load=True)

    core, text = core_sdxl(small_sdxl_clip), "two <it> on the left, red <it>"
    with torch.inference_mode(), training_mode():
        encoder = ComfyTextEncoder(small_sdxl_clip, LoadedWith())
        ours, expected = (gradients(each, text, pooled=True) for each in (encoder, core))
    assert ours.keys() == expected.keys() == {"clip_l", "clip_g"}
    for name, reference in expected.items():
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(ours[name], reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def test_both_implementations_learn_the_same(demo, core_demo, shown, tmp_path):
    from retune.nodes.bridge.view import text_to_image
    from retune.training.recipes.textual_inversion import train_embedding

    model, clip, vae = demo
    config = EmbeddingConfig(
        run_name="r",
        token="<it>",
        vectors=2,
        initial_text="figure",
        steps=4,
        batch_size=2,
        learning_rate=0.5,
        settings=TrainingSettings(warmup_steps=1, optimizer="SGD"),
    )
    core = train_embedding(core_demo, shown, config, tmp_path / "core")
    before = {k: v.clone() for k, v in clip.cond_stage_model.state_dict().items()}
    with torch.inference_mode(), text_to_image(model, clip, vae) as view:
        ours = train_embedding(view, shown, config, tmp_path / "comfyui")

    def losses(name):
        rows = [json.loads(line) for line in (tmp_path / name / "r" / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "event" not in row]

    assert losses("comfyui") == pytest.approx(losses("core"), rel=1e-4)
    found, expected = (run.embedding.concepts[0].vectors["clip_l"] for run in (ours, core))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in clip.cond_stage_model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clip.patcher.model.modules())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_node_hands_out_words_that_stock_nodes_read(comfyui, demo, sampled, shown, lora_rank):
    from retune.nodes.embedding import RetuneSaveEmbedding
    from retune.nodes.train_embedding import RetuneTrainEmbedding

    import nodes as stock

    model, clip, vae = demo
    node = RetuneTrainEmbedding.PREPARE_CLASS_CLONE(None)
    values = {
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-1,
        "token": "<it-of-a-test>",
        "vectors": 2,
        "initial_text": "figure",
        "caption_word": "<it>",
        "run_name": f"embedding of a test {lora_rank}",
        "seed": 0,
        "lora_rank": lora_rank,
    }
    shown = from_images([e.pixels() for e in shown.examples], ["one figure", "two figure"])
    values["caption_word"] = "figure"
    with torch.inference_mode():
        new_clip, embedding, _, new_model, lora = node.execute(model, clip, vae, shown, **values).args
        (path,) = RetuneSaveEmbedding.execute(embedding, "safetensors", "%token%").args
        encode = stock.CLIPTextEncode().encode
        ours = encode(new_clip, "a red <it-of-a-test> on the left")[0][0][0]
        through_stock = encode(clip, "a red embedding:it-of-a-test on the left")[0][0][0]
        again = node.execute(model, clip, vae, shown, **values).args[1]
    assert torch.equal(ours, through_stock)
    assert bool(lora) == (new_model is not model) == bool(lora_rank)
    left, right = again.concepts[0].vectors["clip_l"], embedding.concepts[0].vectors["clip_l"]
    assert torch.equal(left, right)
    Path(path).unlink()
