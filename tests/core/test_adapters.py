"""Low-rank adapters: what they compute, how many there are, and that nothing but they changes."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from retune.benchmarks.random_models import SDXL_UNET
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.callbacks import Callbacks
from retune.training.config.lora import ALGORITHMS, LORA_PRESETS, LoraConfig
from retune.training.config.run import former_identity, identity
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.demo.files import weights_path
from retune.training.formats.lora import parse_lora, read_lora
from retune.training.formats.lora_save import save_lora
from retune.training.loop.loop import Loop, LoopConfig
from retune.training.models.clip import ClipTextEncoder
from retune.training.models.diffusers import SD1_SCHEDULER, DiffusersDenoiser
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective, TrainingSample
from retune.training.recipes.lora import networks_of, train_lora, trainable_layers, unet_layers
from retune.training.runs.folder import RunFolder
from retune.training.trainables.lora import Adapters, layers_of, select_layers
from retune.training.trainables.lora_init import start_from
from torch import nn

SETTINGS = TrainingSettings(warmup_steps=1, caption_dropout=0.0)


def lora_config(**changes):
    values = {"run_name": "r", "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "rank": 4, "alpha": 2.0}
    return LoraConfig(**(values | {"settings": SETTINGS, "targets": "all"} | changes))


@pytest.fixture(scope="module")
def demo():
    return build_model(ModelConfig(model="demo"))


@pytest.fixture
def layers():
    """A linear layer, a point convolution and a spatial one with stride and padding, all with biases."""
    torch.manual_seed(0)
    found = {"lin": nn.Linear(12, 8), "point": nn.Conv2d(6, 10, 1), "conv": nn.Conv2d(4, 6, 3, stride=2, padding=1)}
    return {name: layer.requires_grad_(False) for name, layer in found.items()}


def filled(adapters, seed=0):
    """Values unlike the initial ones, where half of each product is zero."""
    random = torch.Generator().manual_seed(seed)
    return {n: v + 0.3 * torch.randn(v.shape, generator=random) for n, v in adapters.values().items()}


def weight_by_hand(layer, tensors, config):
    """W' of a layer from the tensors of its adapter, straight from the papers."""
    w = layer.weight
    rank, alpha = config.shape_of(spatial=w.ndim == 4 and w.shape[-1] > 1)
    scale = alpha / rank
    if "hada_w1_a" in tensors:  # arXiv 2108.06098, eq. 2
        parts = [tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in (1, 2)]
        return w + scale * (parts[0] * parts[1]).reshape(w.shape)
    if "lokr_w1" in tensors:  # arXiv 2212.10650, eq. 2; whole factors know no alpha
        second = tensors.get("lokr_w2")
        if second is None:
            second = scale * tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        first = tensors["lokr_w1"]
        kernel = w.shape[2:]
        second = second.reshape(second.shape[0], -1, *kernel)
        product = torch.einsum("ab,cd...->acbd...", first, second)
        return w + product.reshape(w.shape)
    delta = scale * (tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)).reshape(w.shape)
    if "dora_scale" not in tensors:
        return w + delta
    norm = (w + delta).transpose(0, 1).flatten(1).norm(dim=1)
    return (w + delta) * tensors["dora_scale"] / norm.reshape(1, -1, *[1] * (w.ndim - 2))


KINDS_OF_LAYERS = [(kind, name) for kind in ALGORITHMS for name in ("lin", "point")]
KINDS_OF_LAYERS += [(kind, "conv") for kind in ("LoCon", "LoHa", "LoKr")]


@pytest.mark.parametrize(("algorithm", "name"), KINDS_OF_LAYERS)
def test_the_attached_layer_is_the_layer_with_the_weight_of_the_papers(layers, algorithm, name):
    layer = layers[name]
    config = lora_config(algorithm=algorithm, rank=2, alpha=3.0, conv_rank=1, conv_alpha=2.0)
    adapters = Adapters({name: layer}, [layer], config, seed=0)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 12) if name == "lin" else torch.randn(2, layer.in_channels, 5, 5)
    plain = layer(x)
    with adapters.attach(adapters.values()):
        torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-6)
    values = filled(adapters)
    tensors = {key.removeprefix(f"{name}."): value for key, value in values.items()}
    changed = weight_by_hand(layer, tensors, config)
    if name == "lin":
        expected = nn.functional.linear(x, changed, layer.bias)
    else:
        expected = nn.functional.conv2d(x, changed, layer.bias, layer.stride, layer.padding)
    with adapters.attach(values):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.05
    assert torch.equal(layer(x), plain) and not layer._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapters_train_beside_half_precision_layers(algorithm, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(12, 8).to(dtype).requires_grad_(False)
    adapters = Adapters({"lin": layer}, [layer], lora_config(algorithm=algorithm), seed=0)
    with adapters.attach():
        layer(torch.randn(3, 12).to(dtype)).float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in adapters.parameters.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters.values())


def test_dropout_comes_from_its_name_alone(layers):
    config = lora_config(algorithm="LoCon", dropout=0.3, rank_dropout=0.3, module_dropout=0.2)
    adapters = Adapters(layers, list(layers.values()), config, seed=3)
    adapters.load(filled(adapters))
    x = torch.randn(4, 12)

    def output(*draw, values=None):
        with adapters.attach(values, rng_key=draw):
            return torch.cat([layers["lin"](x) for _ in range(8)])

    state = torch.random.get_rng_state()
    one = output(1, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(7)
    assert torch.equal(output(1, 0), one) and not torch.equal(output(1, 2), one) and not torch.equal(output(2, 0), one)
    sure = output(values=adapters.values())
    assert torch.equal(sure, output(5, values=adapters.values())) and torch.equal(sure[:4], sure[4:8])
    mean = torch.stack([output(i, 0) for i in range(60)]).mean((0,))
    kept = 0.8  # module dropout takes whole adapters away, the other two keep the mean
    plain = layers["lin"](x).repeat(8, 1)
    assert (mean.reshape(8, 4, -1).mean(0) - (plain + kept * 0.7 * (sure - plain))[:4]).abs().max() < 0.15


def test_initial_values_depend_on_seed_and_name_alone(layers):
    config = lora_config(algorithm="LoCon")
    torch.manual_seed(1)
    one = Adapters(layers, [], config, seed=0).values()
    torch.manual_seed(2)
    some = {name: layers[name] for name in ("conv", "lin")}
    two = Adapters(some, [], config, seed=0).values()
    assert two and all(torch.equal(value, one[name]) for name, value in two.items())
    other = Adapters(layers, [], config, seed=1).values()
    assert not torch.equal(other["lin.lora_down.weight"], one["lin.lora_down.weight"])


SD15 = {
    "block_out_channels": (32, 64, 128, 128),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SDXL = SDXL_UNET | {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "norm_num_groups": 8}


@pytest.mark.parametrize(("shape", "expected", "spatial"), [(SD15, 192, 86), (SDXL, 722, 66)])
def test_as_many_layers_of_the_unet_as_sd_scripts(shape, expected, spatial):
    """Counts of sd-scripts' lora.py on the true block layouts; `spatial`: what its conv_dim adds."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        denoiser = DiffusersDenoiser(UNet2DConditionModel(**shape))
    found = unet_layers(denoiser)
    assert len(select_layers(found, lora_config(targets="attention + feed-forward"))) == expected
    blocks = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
    inside = [m for m in denoiser.network.modules() if type(m).__name__ in blocks]
    convolutions = {id(x) for m in inside for x in m.modules() if isinstance(x, (nn.Conv2d, nn.Linear))}
    chosen = select_layers(found, lora_config(targets="all", algorithm="LoCon"))
    assert len(chosen) == expected + len(convolutions) and len(convolutions) >= spatial
    pairs = expected // 12 if shape is SD15 else 70
    assert len(select_layers(found, lora_config(targets="attention"))) == 8 * pairs
    assert len(select_layers(found, lora_config(targets="cross-attention"))) == 4 * pairs


@pytest.mark.parametrize(("depth", "expected"), [(12, 72), (32, 192)])
def test_as_many_layers_of_the_text_encoders_as_sd_scripts(depth, expected):
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = json.loads((weights_path("clip_tokenizer") / "vocab.json").read_text(encoding="utf-8"))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": depth}
    config = CLIPTextConfig(vocab_size=len(vocabulary), **shape)
    encoder = ClipTextEncoder(CLIPTextModel(config), weights_path("clip_tokenizer"))
    assert len(select_layers(encoder.layers, lora_config(targets="attention + feed-forward"))) == expected
    assert len(select_layers(encoder.layers, lora_config(targets="attention"))) == 4 * depth


def test_a_regex_chooses_layers_and_a_bad_one_is_refused(demo):
    found = trainable_layers(demo, lora_config(text_encoder_learning_rate=1e-4))
    some = select_layers(found, lora_config(targets="regex", target_regex=r"attn2\.to_[kv]|mlp\.fc1"))
    assert {name.rsplit(".", 1)[-1] for name in some} == {"to_k", "to_v", "fc1"}
    with pytest.raises(ValueError, match="not a regular expression"):
        select_layers(found, lora_config(targets="regex", target_regex="("))
    with pytest.raises(ValueError, match="match none of .* layers; expected at least one. Layer names are such as"):
        select_layers(found, lora_config(targets="regex", target_regex="nowhere"))


def test_wrong_configs_are_refused():
    for changes, message in (
        ({"targets": "regex"}, "target_regex is empty"),
        ({"rank": 0}, "rank is 0"),
        ({"algorithm": "LoRa"}, "algorithm is 'LoRa'"),
        ({"learning_rate": 0.0, "text_encoder_learning_rate": 1e-4}, "expected a rate for both"),
        ({"algorithm": "DoRA", "rank_dropout": 0.1}, "rank_dropout is set for DoRA"),
        ({"lokr_factor": 0}, "lokr_factor is 0"),
        ({"text_encoder_2_learning_rate": -0.5}, "text_encoder_2_learning_rate is -0.5; expected 0 to 10, or -1"),
        ({"learning_rate": 0.0, "text_encoder_2_learning_rate": 1e-4}, "expected a rate for both"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_config(**changes)
    for values in LORA_PRESETS.values():
        lora_config(**values)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_tensor_learns_and_the_model_stays_as_it_was(demo, pictures, tmp_path, algorithm):
    parts = (demo.denoiser.network, demo.text_encoder.network)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    config = lora_config(algorithm=algorithm, text_encoder_learning_rate=1e-2)
    trained = train_lora(demo, pictures, config, tmp_path)
    chosen = select_layers(trainable_layers(demo, config), config)
    start = Adapters(chosen, networks_of(demo, chosen), config, config.seed)
    assert trained.tensors.keys() == start.lora_model().keys()
    for name, value in start.lora_model().items():
        assert torch.equal(trained.tensors[name], value) == name.endswith(".alpha"), name
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())


def test_the_run_keeps_a_copy_for_other_programs(demo, pictures, tmp_path):
    from retune.training.common.foreign import read_tensors
    from retune.training.formats.lora import read_lora

    config = lora_config(text_encoder_learning_rate=1e-3, algorithm="LoCon")
    trained = train_lora(demo, pictures, config, tmp_path)
    copy, metadata = read_tensors(tmp_path / "r" / "r.safetensors")
    assert len(copy) == len(trained.tensors) and {name.split("_")[1] for name in copy} == {"unet", "te"}
    down = "diffusion_model.input_blocks.3.1.proj_in.lora_down.weight"
    assert torch.equal(copy["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"], trained.tensors[down])
    assert {module.alpha for module in read_lora(tmp_path / "r" / "r.safetensors").modules.values()} == {2.0}
    assert metadata["ss_network_dim"] == "4" and metadata["ss_num_train_images"] == "6"
    assert metadata["modelspec.prediction_type"] == "v" and metadata["modelspec.resolution"] == "32x32"


STARTS = {
    "the same": ({}, {}, 1e-5),
    "another alpha": ({"alpha": 1.0}, {}, 1e-5),
    "a smaller rank": ({"rank": 2}, {}, 1e-5),
    "LoHa into a full rank": ({"algorithm": "LoHa", "rank": 2}, {"rank": 64}, 1e-4),
    "LoKr as it is": ({"algorithm": "LoKr"}, {"algorithm": "LoKr", "alpha": 3.0}, 1e-5),
    "LoHa as it is": ({"algorithm": "LoHa"}, {"algorithm": "LoHa", "alpha": 3.0}, 1e-5),
    "DoRA as it is": ({"algorithm": "DoRA"}, {"algorithm": "DoRA", "alpha": 3.0}, 1e-5),
}


@pytest.mark.parametrize("case", STARTS)
def test_adapters_begin_where_another_lora_ended(demo, tmp_path, case):
    """Through a file in kohya's names, without anything else from the run that made it."""
    theirs, ours, near = STARTS[case]
    layer = {"targets": "regex", "target_regex": r"input_blocks\.3\.1\.(proj_in|.*attn2\.to_[qk])"}
    old, new = lora_config(**layer, **theirs), lora_config(**layer, **ours)
    chosen = select_layers(trainable_layers(demo, old), old)
    before, after = (
        Adapters(chosen, networks_of(demo, chosen), config, seed) for seed, config in enumerate((old, new))
    )
    before.load(filled(before))
    save_lora(tmp_path / "old.safetensors", before.lora_model())
    start_from(after, read_lora(tmp_path / "old.safetensors"))
    random = torch.Generator().manual_seed(0)
    for name, module in chosen.items():
        shape = (2, 5, module.in_features) if isinstance(module, nn.Linear) else (2, module.in_channels, 4, 4)
        x, found = torch.randn(shape, generator=random), []
        for adapters in (before, after):
            with adapters.attach(adapters.values()), torch.no_grad():
                found.append(module(x))
        with torch.no_grad():
            assert (found[0] - module(x)).abs().max() > 1e-2
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=near * float(found[0].abs().max()), msg=name)


def test_a_lora_that_cannot_be_begun_from_is_refused(demo, pictures, tmp_path, caplog):
    config = lora_config(algorithm="LoKr")
    chosen = select_layers(trainable_layers(demo, config), config)
    lora = Adapters(chosen, [], config, 0).lora_model()
    dora = lora_config(algorithm="DoRA", rank=2)
    with pytest.raises(ValueError, match="cannot begin from: .*LoKr"):
        train_lora(demo, pictures, dora, tmp_path, start=parse_lora("x", lora))
    only_text = lora_config(targets="regex", target_regex="to_k")
    other = {name: value for name, value in lora.items() if "to_q" in name}
    with pytest.raises(ValueError, match="x has no layer that trains here, only"):
        train_lora(demo, pictures, only_text, tmp_path, start=parse_lora("x", other))
    begun = train_lora(demo, pictures, lora_config(steps=1, run_name="b"), tmp_path, start=parse_lora("x", lora))
    assert begun.tensors and "layers have no adapter here" in caplog.text
    with pytest.raises(ValueError, match="the LoRA that training starts from differs"):
        train_lora(demo, pictures, lora_config(steps=1, run_name="b"), tmp_path)


@pytest.mark.parametrize("rate", [0.0, 1e-4])
def test_a_rate_for_a_second_text_encoder_needs_one(demo, pictures, tmp_path, rate):
    config = lora_config(text_encoder_learning_rate=1e-4, text_encoder_2_learning_rate=rate)
    with pytest.raises(ValueError, match="but the model has one text encoder; expected -1"):
        train_lora(demo, pictures, config, tmp_path)


def test_runs_from_before_a_second_rate_had_the_firsts():
    assert former_identity(lora_config())["text_encoder_2_learning_rate"] == -1
    assert identity(lora_config(text_encoder_2_learning_rate=0.0))["text_encoder_2_learning_rate"] == 0


class OneBatch(DenoisingObjective):
    """Two latents, and in every step the noise and the noise levels of the first."""

    def load(self, slots):
        return slots

    def batch(self, number):
        random = torch.Generator().manual_seed(0)
        return [
            TrainingSample(text, torch.randn(4, 4, 4, generator=random)) for text in ("a red circle", "a green star")
        ]

    def __call__(self, batch, step):
        return super().__call__(batch, 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_batch_is_learned_by_heart(tmp_path, algorithm):
    """In 50 steps to less than a five-hundredth of the first loss; it comes to 0.0001 to 0.0003 of it."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {"down_block_types": SDXL["down_block_types"][:2], "up_block_types": SDXL["up_block_types"][1:]}
    shape = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 32}
    denoiser = DiffusersDenoiser(UNet2DConditionModel(**blocks, **shape, layers_per_block=1), SD1_SCHEDULER)
    with torch.no_grad():
        denoiser.network.conv_out.weight *= 4  # drawn too small to reach the target from normalised features
    settings = replace(SETTINGS, loss_weighting="none", weight_decay=0.0)
    texts = {text: Conditioning(torch.randn(1, 5, 32)) for text in ("a red circle", "a green star")}
    one = OneBatch(denoiser, settings, 0, latent_of=None, text_of=texts.get, project=lambda states, time: states)
    config = lora_config(rank=16, alpha=16.0, algorithm=algorithm)
    adapters = Adapters(select_layers(unet_layers(denoiser), config), [denoiser.network], config, seed=0)
    size = LoopConfig(steps=50, batch_size=2, learning_rate=1e-2, settings=settings, samples=SamplePrompts())
    Loop(RunFolder(tmp_path), adapters, one, one, size).run()
    losses = [row["loss"] for row in RunFolder(tmp_path).rows()]
    assert losses[-1] < 0.002 * losses[0]


def test_a_run_cut_in_two_ends_like_one_in_one_piece(demo, pictures, tmp_path):
    from retune.training.common.callbacks import Callbacks

    class Stop(Callbacks):
        def on_step(self, info):
            if info.step == 2:
                raise KeyboardInterrupt

    config = lora_config(
        text_encoder_learning_rate=1e-3,
        dropout=0.2,
        module_dropout=0.1,
        samples=SamplePrompts(prompts=("a red circle",), every=2, steps=2, width=64, height=64),
    )
    with pytest.raises(KeyboardInterrupt):
        train_lora(demo, pictures, config, tmp_path / "a", Stop())
    cut = train_lora(demo, pictures, config, tmp_path / "a")
    whole = train_lora(demo, pictures, config, tmp_path / "b")
    assert all(torch.equal(value, whole.tensors[name]) for name, value in cut.tensors.items())
    rows = [(tmp_path / side / "r" / "metrics.jsonl").read_bytes() for side in "ab"]
    assert rows[0] == rows[1]
    names = [p.name for p in sorted((tmp_path / "a" / "r" / "samples").iterdir())]
    for name in names:
        assert (tmp_path / "a/r/samples" / name).read_bytes() == (tmp_path / "b/r/samples" / name).read_bytes()
    assert train_lora(demo, pictures, config, tmp_path / "a").tensors.keys() == cut.tensors.keys()
    with pytest.raises(ValueError, match="rank is 8; run 'r' was made with 4"):
        train_lora(demo, pictures, replace(config, rank=8), tmp_path / "a")


class Ends(Callbacks):
    """Raises, if there is something to raise, when the third step begins."""

    def __init__(self, error=None):
        self.error = error

    def before_step(self, step):
        if step == 3 and self.error:
            raise self.error


@pytest.mark.own_peaks
@pytest.mark.parametrize("error", [None, RuntimeError("anything"), KeyboardInterrupt()])
def test_a_run_hooks_each_layer_once_more_and_leaves_the_model_as_it_was(demo, pictures, tmp_path, monkeypatch, error):
    """Once for the estimate of its memory, and once for all of its four steps of two batches each, samples and
    validations; after success, an error and a cancel."""
    network, hooked = demo.denoiser.network, []
    before = {name: (value, value.clone(), value.requires_grad) for name, value in network.named_parameters()}
    register = nn.Module.register_forward_hook
    monkeypatch.setattr(
        nn.Module, "register_forward_hook", lambda layer, hook: hooked.append(layer) or register(layer, hook)
    )
    settings = replace(SETTINGS, gradient_accumulation=2, validation_fraction=0.2, validate_every=2)
    samples = SamplePrompts(prompts=("a red circle",), every=2, steps=1, width=32, height=32)
    config = lora_config(targets="cross-attention", settings=settings, samples=samples)
    with nullcontext() if error is None else pytest.raises(type(error)):
        train_lora(demo, pictures, config, tmp_path, Ends(error))
    layers = len(select_layers(trainable_layers(demo, config), config))
    assert len(hooked) == 2 * layers and len(set(hooked[:layers])) == len(set(hooked[layers:])) == layers
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in network.modules())
    for name, parameter in network.named_parameters():
        same, values, flag = before[name]
        assert parameter is same and torch.equal(parameter, values) and parameter.requires_grad == flag


def test_checkpointing_changes_no_gradient_even_with_dropout(demo):
    config = lora_config(dropout=0.3, text_encoder_learning_rate=0.0)
    chosen = select_layers(trainable_layers(demo, config), config)
    adapters = Adapters(chosen, networks_of(demo, chosen), config, seed=0)
    adapters.load(filled(adapters))
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = Conditioning(torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(1)))
    gradients = []
    for enabled in (False, True):
        for parameter in adapters.parameters.values():
            parameter.grad = None
        demo.denoiser.network.train(enabled)
        with demo.denoiser.checkpointing(enabled), adapters.attach(rng_key=(1, 0)):
            demo.denoiser.predict(noisy, torch.tensor([3.0]), states).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in adapters.parameters.items() if p.grad is not None})
    demo.denoiser.network.eval()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_layers_are_linear_and_convolutions_by_name():
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Conv2d(1, 1, 1), nn.Embedding(2, 2))
    assert layers_of(network, lambda path: f"x.{path}") == {"x.0": network[0], "x.2": network[2]}


@pytest.mark.parametrize("algorithm", ["LoRA", "DoRA", "LoKr"])
def test_adapters_of_the_unet_are_where_it_computes_wherever_its_weights_are(algorithm):
    """ComfyUI may have pushed some of them out; a text encoder has a device of its own."""
    layers = {"diffusion_model.a": nn.Linear(4, 6), "text_encoders.clip_l.b": nn.Linear(4, 6)}
    adapters = Adapters(layers, list(layers.values()), lora_config(algorithm=algorithm), 0, torch.device("meta"))
    for name, parameter in adapters.parameters.items():
        assert parameter.device.type == ("meta" if name.startswith("diffusion_model") else "cpu"), name
