"""Compare Grid: KSampler's own pictures, one noise for all columns, and a table that carries its labels."""

import pytest
import torch

PROMPTS = ("two small red circles", "a blue square on the left")
OPTIONS = {"seed": 5, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "negative": "dull"}
OPTIONS |= {"width": 64, "height": 64}


def drawn(model, clip, vae, **options):
    """(grid, pictures) of the node."""
    from retune.nodes.compare import RetuneCompareGrid

    with torch.inference_mode():
        return RetuneCompareGrid.execute(model, clip, vae, "\n".join(PROMPTS), **(OPTIONS | options)).result


def stock_picture(model, clip, vae, prompt):
    """ComfyUI's own nodes, connected as a person would."""
    from nodes import CLIPTextEncode, EmptyLatentImage, KSampler, VAEDecode

    with torch.inference_mode():
        texts = [CLIPTextEncode().encode(clip, text)[0] for text in (prompt, OPTIONS["negative"])]
        (latent,) = EmptyLatentImage().generate(64, 64)
        options = [OPTIONS[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler")]
        (latent,) = KSampler().sample(model, *options, *texts, latent)
        return VAEDecode().decode(vae, latent)[0]


@pytest.fixture
def lora():
    """A LoRA on all cross-attention keys of the demo model's first block."""
    from retune.nodes.common.demo_model import read_demo

    tensors, _ = read_demo()
    source, found = torch.Generator().manual_seed(0), {}
    for name, weight in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            layer = name.removeprefix("model.").removesuffix(".weight")
            found[f"{layer}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=source)
            found[f"{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=source)
    return found


def test_strengths_are_ksamplers_pictures_with_that_lora(demo, lora):
    import comfy.sd

    model, clip, vae = demo
    grid, pictures = drawn(*demo, lora=lora, strengths="0, 1.5")
    assert pictures.shape == (4, 64, 64, 3)
    patched = comfy.sd.load_lora_for_models(model, clip, dict(lora), 1.5, 1.5)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(pictures[2 * row], stock_picture(model, clip, vae, prompt)[0])
        torch.testing.assert_close(pictures[2 * row + 1], stock_picture(*patched, vae, prompt)[0], atol=2e-3, rtol=0)
        assert (pictures[2 * row + 1] - pictures[2 * row]).abs().max() > 0.05
    assert not model.patches and grid.shape[0] == 1 and grid.shape[2] == 2 * 64 + 4


def test_models_and_text_encoders_are_columns_after_the_base(demo, caplog):
    model, clip, vae = demo
    from retune.nodes.compare import columns_of

    other, spare = model.clone(), clip.clone()
    columns = columns_of(model, clip, [], "", {"model0": other, "model1": None}, {"clip0": spare, "clip2": spare})
    expected = [("base", model, clip), ("model0 + clip0", other, spare), ("clip2", model, spare)]
    assert [(column.title, column.model, column.clip) for column in columns] == expected
    _, pictures = drawn(*demo, models={"model0": other}, titles="before\nafter")
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[2], pictures[3])  # one noise


@pytest.mark.parametrize(
    "options, message",
    [
        ({"titles": "one\ntwo"}, "titles has 2 lines; expected 1"),
        ({"strengths": "0, x", "lora_file": "demo: warm edges"}, "strengths is '0, x'; expected numbers"),
        ({"strengths": " ", "lora_file": "demo: warm edges"}, "strengths is empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_sampling(demo, options, message):
    with pytest.raises(ValueError, match=message):
        drawn(*demo, **options)
