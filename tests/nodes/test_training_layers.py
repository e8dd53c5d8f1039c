"""ComfyUI's layers in training: exact gradients, no copies of frozen weights kept, casting afterwards as before.

The reference is torch's own autograd over weights that are cast beforehand.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from retune.training.config.training_settings import TrainingSettings
from torch import nn
from torch.nn import functional as F

MAKE = {
    "linear": (lambda ops: ops.Linear(8, 6), (2, 5, 8)),
    "linear without bias": (lambda ops: ops.Linear(8, 6, bias=False), (3, 8)),
    "convolution": (lambda ops: ops.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 5)),
    "strided, dilated and grouped": (lambda ops: ops.Conv2d(8, 6, 3, stride=2, dilation=2, groups=2), (2, 8, 9, 9)),
    "1-D": (lambda ops: ops.Conv1d(8, 6, 3, padding=1), (2, 8, 7)),
    "padding same": (lambda ops: ops.Conv2d(8, 6, 3, padding="same"), (2, 8, 7, 5)),
    "group norm": (lambda ops: ops.GroupNorm(4, 8), (2, 8, 7, 5)),
    "layer norm": (lambda ops: ops.LayerNorm(8), (2, 5, 8)),
    "rms norm": (lambda ops: ops.RMSNorm(8), (2, 5, 8)),
}


def generator():
    return torch.Generator().manual_seed(0)


def layer_of(name, dtype=torch.float16):
    """A frozen layer of ComfyUI with random weights, and a random fp32 input."""
    import comfy.ops

    make, shape = MAKE[name]
    layer, random = make(comfy.ops.disable_weight_init), generator()
    for key, value in layer.named_parameters():
        owner, _, attribute = key.rpartition(".")
        drawn = torch.randn(value.shape, generator=random).to(dtype)
        layer.get_submodule(owner)._parameters[attribute] = nn.Parameter(drawn, requires_grad=False)
    return layer, torch.randn(shape, generator=random)


def output_and_gradient(layer, x):
    x = x.clone().requires_grad_()
    output = layer(x)
    (gradient,) = torch.autograd.grad(output, x, torch.linspace(-1, 1, output.numel()).view_as(output).to(output))
    return output.detach(), gradient


def reference(layer, x):
    """As torch computes it with weights that were cast before."""
    import copy

    plain = copy.deepcopy(layer).float()
    kind = next(
        kind for kind in (nn.Linear, nn.Conv2d, nn.Conv1d, nn.GroupNorm, nn.LayerNorm) if isinstance(plain, kind)
    )
    return output_and_gradient(lambda value: kind.forward(plain, value), x)


@pytest.mark.parametrize("name", [name for name in MAKE if name != "rms norm"])
def test_half_precision_weights_give_the_gradient_of_their_fp32_values(comfyui, name):
    from retune.nodes.bridge.layers import training_layers

    layer, x = layer_of(name)
    expected = reference(layer, x)
    with training_layers(layer):
        found = output_and_gradient(layer, x)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not layer.comfy_cast_weights and "forward_comfy_cast_weights" not in vars(layer)


def test_an_rms_norm_casts_its_weight(comfyui):
    from retune.nodes.bridge.layers import training_layers

    layer, x = layer_of("rms norm")
    with training_layers(layer):
        output, _ = output_and_gradient(layer, x)
    assert torch.equal(output, F.rms_norm(x, (8,), layer.weight.float(), layer.eps))


@pytest.mark.parametrize("name", ["linear", "convolution"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_copy_of_a_frozen_weight_is_kept(comfyui, name, stored, autocast):
    """What is saved for backward is the weight itself, and the gradient is that of a weight cast in autograd."""
    from retune.nodes.bridge.layers import training_layers

    layer, x = layer_of(name, stored)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else nullcontext()
    dtype = torch.bfloat16 if autocast else torch.float32
    with training_layers(layer), precision:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer(x.requires_grad_())
        (gradient,) = torch.autograd.grad(output.float().square().sum(), x)
    weights = [tensor for tensor in saved if tensor.numel() == layer.weight.numel()]
    assert {tensor.untyped_storage().data_ptr() for tensor in weights} == {layer.weight.data_ptr()}
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    cast = x.to(dtype)
    same = F.linear(cast, weight, bias) if name == "linear" else F.conv2d(cast, weight, bias, padding=1)
    (expected,) = torch.autograd.grad(same.float().square().sum(), x)
    assert torch.equal(output, same) and torch.equal(gradient, expected)


def test_masters_get_their_gradient(comfyui):
    from retune.nodes.bridge.layers import training_layers

    layer, x = layer_of("linear")
    master = nn.Parameter(layer.weight.float())
    layer._parameters["weight"] = master
    with training_layers(layer):
        layer(x).square().sum().backward()
    weight = master.detach().clone().requires_grad_()
    F.linear(x, weight, layer.bias.float()).square().sum().backward()
    assert torch.equal(master.grad, weight.grad)


def test_a_patch_that_waits_in_ram_is_applied_in_both_passes(comfyui):
    from comfy.model_patcher import LowVramPatch
    from retune.nodes.bridge.layers import training_layers

    layer, x = layer_of("linear")
    change, shift = torch.randn(6, 8, generator=generator()), torch.linspace(-1, 1, 6)
    changes = {"weight": change, "bias": shift}
    patches = {name: [(0.5, ("diff", (value,)), 1.0, None, None)] for name, value in changes.items()}
    layer.weight_function, layer.bias_function = [LowVramPatch("weight", patches)], [LowVramPatch("bias", patches)]
    base = layer.weight.clone()
    with training_layers(layer):
        found = output_and_gradient(layer, x)
    patched = F.linear(x.requires_grad_(), layer.weight.float() + 0.5 * change, layer.bias + 0.5 * shift)
    (expected,) = torch.autograd.grad(patched, x, torch.linspace(-1, 1, patched.numel()).view_as(patched))
    torch.testing.assert_close(found[0], patched.detach())
    torch.testing.assert_close(found[1], expected)
    assert torch.equal(layer.weight, base)


def test_activation_checkpointing_recomputes_through_it(comfyui):
    from retune.nodes.bridge.layers import training_layers
    from torch.utils.checkpoint import checkpoint

    layer, x = layer_of("convolution")
    with training_layers(layer):
        expected = output_and_gradient(layer, x)
        found = output_and_gradient(lambda value: checkpoint(layer, value, use_reentrant=False), x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


KINDS = {
    "float8_e4m3fn": {"scale": "recalculate"},
    "float8_e5m2": {},
    "mxfp8": {},
    "nvfp4": {},
    "int8_tensorwise": {"per_channel": True, "convrot": True, "convrot_groupsize": 16},
    "convrot_w4a4": {"convrot_groupsize": 16},
    "asym_w4a8_int8": {"convrot_groupsize": 16},
}
"""ComfyUI's name of a quantised layout -> how a weight is brought into it."""


def quantised_layer(kind, weight, bias):
    """ComfyUI's linear layer of quantised weights, read as from a file, and the weight that they stand for."""
    import json

    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    stored = QuantizedTensor.from_float(weight.detach(), QUANT_ALGOS[kind]["comfy_tensor_layout"], **KINDS[kind])
    about = {"format": kind, "full_precision_matrix_mult": True}  # a CPU has no product of mxfp8 for ComfyUI
    about |= {name: value for name, value in KINDS[kind].items() if "convrot" in name}
    state = stored.state_dict("weight") | ({} if bias is None else {"bias": bias})
    state["comfy_quant"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    sizes = weight.shape[1], weight.shape[0], bias is not None
    layer = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear(*sizes)
    layer.load_state_dict(state, strict=False)
    return layer.requires_grad_(False), stored.dequantize()


def test_every_quantised_layout_of_comfyui_is_tested(comfyui):
    from comfy.quant_ops import QUANT_ALGOS

    assert KINDS.keys() == QUANT_ALGOS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_dequantised_for_each_pass(comfyui, kind):
    from retune.nodes.bridge.layers import training_layers
    from retune.training.models.recast import is_quantised
    from retune.training.trainables.lora import layers_of

    bias = torch.linspace(-1, 1, 80)
    layer, weight = quantised_layer(kind, torch.randn(80, 128, generator=generator()), bias)  # 80 rows need padding
    assert is_quantised(layer.weight)
    x = torch.randn(2, 5, 128, generator=generator())
    saved = []
    with training_layers(layer), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = output_and_gradient(layer, x)
    expected = output_and_gradient(lambda value: F.linear(value, weight, bias), x)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert [is_quantised(tensor) for tensor in saved if tensor.shape == weight.shape] == [True]
    assert "forward" not in vars(layer) and list(layers_of(nn.Sequential(layer))) == ["0"]


def quantised_demo(kind, is_quantised):
    """MODEL, CLIP and VAE of the demo; linear layers of cross-attention, and of the CLIP's, in a quantised layout, or
    as the weights that these stand for."""
    from retune.nodes.common.demo_model import load_demo

    model, clip, vae = load_demo()
    for network in (model.model.diffusion_model, clip.cond_stage_model):
        for path, layer in list(network.named_modules()):
            chosen = ".attn2.to_" in path or ".self_attn." in path
            if isinstance(layer, nn.Linear) and chosen and layer.in_features % 64 == 0:  # as W4A4 needs
                quantised, weight = quantised_layer(kind, layer.weight, layer.bias)
                if is_quantised:
                    owner, _, name = path.rpartition(".")
                    setattr(network.get_submodule(owner), name, quantised)
                else:
                    layer.weight.copy_(weight)
    return model, clip, vae


def trained_on(node, kind, is_quantised, pictures, **options):
    """The outputs of a trainer on `quantised_demo`, whose stored bytes stay as they were."""

    class Node(node):
        hidden = SimpleNamespace(unique_id=None, prompt={}, extra_pnginfo=None)

    parts = quantised_demo(kind, is_quantised)
    values = {"steps": 2, "batch_size": 2, "learning_rate": 1.0, "seed": 0}
    values["settings"] = TrainingSettings(warmup_steps=1, optimizer="SGD")
    name = f"{options.get('algorithm', 'retrained')} on {kind} {is_quantised}"
    before = [stored_bytes(patcher) for patcher in (parts[0], parts[1].patcher)]
    with torch.inference_mode():
        found = Node.execute(*parts, pictures, run_name=name, **values | options).result
    assert [stored_bytes(patcher) for patcher in (parts[0], parts[1].patcher)] == before
    return found


def stored_bytes(patcher):
    state = patcher.model.state_dict()
    return {
        name: value.cpu().contiguous().view(torch.uint8).sum().item() for name, value in state.items() if value.ndim
    }


@pytest.mark.parametrize(
    "kind, algorithm",
    [("float8_e4m3fn", "LoRA"), ("nvfp4", "DoRA")]
    + [pytest.param(name, "LoRA", marks=pytest.mark.slow) for name in KINDS if name != "float8_e4m3fn"],
)
def test_a_lora_trains_on_a_quantised_base_as_on_the_weights_that_it_stands_for(comfyui, pictures, kind, algorithm):
    """Of the UNet and of the text encoder."""
    from retune.nodes.train_lora import RetuneTrainLora

    options = {"rank": 2, "alpha": 2.0, "algorithm": algorithm, "targets": "regex", "text_encoder_learning_rate": 1.0}
    options |= {"target_regex": "attn2|self_attn"}
    expected, found = (trained_on(RetuneTrainLora, kind, q, pictures, **options)[2] for q in (False, True))
    assert found.keys() == expected.keys() and {name.partition(".")[0] for name in found} == {
        "diffusion_model",
        "text_encoders",
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    up = torch.cat([value.flatten() for name, value in found.items() if "lora_up" in name])
    wanted = torch.cat([expected[name].flatten() for name in found if "lora_up" in name])
    assert F.cosine_similarity(up, wanted, dim=0) > 0.99 and up.any()


def test_layers_of_a_quantised_base_are_retrained_from_the_weights_that_they_stand_for(comfyui, pictures):
    from retune.nodes.train import RetuneTrainModel

    options = {"train": "cross-attention", "train_projection": False, "learning_rate": 1e-3}
    expected, found = (
        {
            name: patch[1][1][0]
            for name, (patch,) in trained_on(RetuneTrainModel, "nvfp4", q, pictures, **options)[0].patches.items()
        }
        for q in (False, True)
    )
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


class Model(nn.Module):
    """Layers of ComfyUI in fp16 that a ModelPatcher can load and offload."""

    def __init__(self):
        super().__init__()
        self.device = None
        self.layers = nn.ModuleList([layer_of(name)[0] for name in ("linear", "convolution", "layer norm")])


def casting(model):
    return [(layer.comfy_cast_weights, hasattr(layer, "prev_comfy_cast_weights")) for layer in model.layers]


@pytest.mark.parametrize("force_cast", [False, True])
@pytest.mark.parametrize("at_first", ["loaded", "offloaded"])
@pytest.mark.parametrize("then", ["stays", "offloaded", "loaded"])
def test_what_comfyui_offloads_meanwhile_goes_on_casting(comfyui, at_first, then, force_cast):
    """Afterwards each layer casts exactly as if nothing had been entered, and once it is loaded again too."""
    from comfy.model_patcher import ModelPatcher
    from retune.nodes.bridge.layers import training_layers

    cpu, whole = torch.device("cpu"), 1e32

    def through(context):
        patcher, found = ModelPatcher(Model(), cpu, cpu), []
        patcher.force_cast_weights = force_cast
        patcher.partially_load(cpu, whole)
        if at_first == "offloaded":
            patcher.partially_unload(cpu, whole)
        try:
            with context(patcher.model):
                if then == "offloaded":
                    patcher.partially_unload(cpu, whole)
                if then == "loaded":
                    patcher.partially_load(cpu, whole)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            found.append(casting(patcher.model))
        patcher.partially_unload(cpu, whole)
        patcher.partially_load(cpu, whole)
        return [*found, casting(patcher.model)]

    assert through(training_layers) == through(lambda model: nullcontext())


def test_a_unet_in_half_precision_keeps_no_copy_of_a_weight(demo):
    """What ComfyUI's own casting keeps for the backward pass is counted beside it."""
    from retune.nodes.bridge.view import text_to_image
    from retune.training.models.protocols import Conditioning

    model, clip, vae = demo
    network = model.model.diffusion_model
    for owner in network.modules():
        for name, value in owner._parameters.items():
            owner._parameters[name] = (
                None if value is None else nn.Parameter(value.detach().half(), requires_grad=False)
            )
    shapes = {shape for p in network.parameters() if p.ndim > 1 for shape in (p.shape, p.shape[::-1])}

    def copies(denoiser):
        """Bytes of what autograd saves in the shape of a weight, the weights themselves left out."""
        own, found = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if tensor.shape in shapes and storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage
            return tensor

        noisy = torch.ones(3, 4, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = denoiser.predict(noisy, torch.full((3,), 2.0), Conditioning(torch.ones(3, 5, 128)))
        (gradient,) = torch.autograd.grad(output.sum(), noisy)
        return sum(storage.nbytes() for storage in found.values()), gradient

    with torch.inference_mode(), text_to_image(model, clip, vae) as view:
        kept, gradient = copies(view.denoiser)
        for layer in network.modules():
            vars(layer).pop("forward_comfy_cast_weights", None)
        kept_by_comfyui, expected = copies(view.denoiser)
    weights = sum(p.nbytes for p in network.parameters())
    assert kept == 0 and kept_by_comfyui > 1.5 * weights
    torch.testing.assert_close(gradient, expected)
