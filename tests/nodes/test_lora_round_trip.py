"""The whole chain: a network with trained adapters attached predicts what it predicts with their saved file loaded."""

from copy import deepcopy

import pytest
import torch
from retune.training.config.lora import ALGORITHMS, LoraConfig
from retune.training.formats.lora_save import save_lora
from retune.training.models.diffusers import DiffusersDenoiser
from retune.training.models.protocols import Conditioning
from retune.training.recipes.lora import unet_layers
from retune.training.trainables.lora import Adapters, select_layers

FAMILIES = {"sd15": (768, None), "sdxl": (2048, 1280)}


@pytest.fixture(autouse=True)
def nothing_stays_loaded(comfyui):
    """ComfyUI patches the weights that it loads in place, and these models are shared with other tests."""
    import comfy.model_management

    yield
    comfy.model_management.unload_all_models()


def config_of(algorithm):
    rates = {"learning_rate": 1e-4, "text_encoder_learning_rate": 1e-4}
    return LoraConfig(run_name="r", algorithm=algorithm, targets="all", rank=4, alpha=2.0, conv_rank=2, **rates)


def trained(layers, networks, config):
    """Adapters and values as after a training: nothing is zero any more."""
    adapters, random = Adapters(layers, networks, config, seed=0), torch.Generator().manual_seed(0)
    return adapters, {n: v + 0.05 * torch.randn(v.shape, generator=random) for n, v in adapters.values().items()}


def predicted(denoiser, family):
    width, pooled = FAMILIES[family]
    random = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, 4, 16, 16, generator=random)
    context = torch.randn(1, 7, width, generator=random)
    pooled = None if pooled is None else torch.randn(1, pooled, generator=random)
    with torch.no_grad():
        return denoiser.predict(noisy, torch.tensor([3.0]), Conditioning(context, pooled))


def check(found, expected, plain):
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unet_through_stock_lora_loader(request, tmp_path, family, algorithm):
    import comfy.sd
    import comfy.utils
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode

    model, _ = request.getfixturevalue(family)
    config = config_of(algorithm)
    with torch.inference_mode(), training_mode():
        denoiser = ComfyDenoiser(model)
        adapters, values = trained(select_layers(unet_layers(denoiser), config), [denoiser.network], config)
        plain = predicted(denoiser, family)
        with adapters.attach(values):
            expected = predicted(denoiser, family)
    save_lora(tmp_path / "x.safetensors", adapters.lora_model(values))
    file = comfy.utils.load_torch_file(str(tmp_path / "x.safetensors"), safe_load=True)
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
        with training_mode():
            check(predicted(ComfyDenoiser(patched), family), expected, plain)
            assert torch.equal(predicted(ComfyDenoiser(model), family), plain)


@pytest.mark.parametrize("algorithm", ["LoRA", "LoCon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_unet_through_diffusers(request, tmp_path, family, algorithm):
    """The two algorithms that diffusers' layout has for what is trained here."""
    pytest.importorskip("peft")
    network = deepcopy(request.getfixturevalue(f"{family}_unet"))
    denoiser, config = DiffusersDenoiser(network), config_of(algorithm)
    adapters, values = trained(select_layers(unet_layers(denoiser), config), [network], config)
    plain = predicted(denoiser, family)
    with adapters.attach(values):
        expected = predicted(denoiser, family)
    save_lora(tmp_path / "x.safetensors", adapters.lora_model(values), "diffusers")
    network.load_lora_adapter(str(tmp_path), weight_name="x.safetensors", prefix="unet")
    check(predicted(denoiser, family), expected, plain)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", ["t5", "SDXL"])
def test_text_encoders_through_apply_lora(sd15, clips, t5, tmp_path, text, algorithm):
    """T5, which stock ComfyUI knows at XXL size alone, and SDXL's two CLIPs at once."""
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode
    from retune.nodes.bridge.lora_patches import Row, apply_loras, lora_of
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.training.formats.lora import read_lora_tensors

    model, clip = sd15[0], t5 if text == "t5" else clips[text]
    config = config_of(algorithm)

    def encoded(encoder):
        with torch.no_grad():
            states = encoder.backbone(encoder.tokenize(["two small red circles on the left"]))
            return states.context if states.pooled is None else torch.cat([states.context[0], _wide(states)])

    def _wide(states):
        return torch.nn.functional.pad(states.pooled, (0, states.context.shape[-1] - states.pooled.shape[-1]))

    with torch.inference_mode(), training_mode():
        encoder = ComfyTextEncoder(clip, ComfyDenoiser(model))
        layers = select_layers(encoder.layers, config)
        plain = encoded(encoder)
        with encoder.training():
            adapters, values = trained(layers, list(layers.values()), config)
            with adapters.attach(values):
                expected = encoded(encoder)
    save_lora(tmp_path / "x.safetensors", adapters.lora_model(values))
    with torch.inference_mode():
        row = Row(lora_of("x", *read_lora_tensors(tmp_path / "x.safetensors")), 1.0, 1.0)
        patched, uses = apply_loras(model, clip, [row])[1:]
        with training_mode():
            check(encoded(ComfyTextEncoder(patched)), expected, plain)
    assert uses[0].text_layers == len(layers)
