"""Every trainer under ComfyUI's memory modes: the results of plain mode, and models as they were, however it ends.

No GPU is at hand: dynamic VRAM is ComfyUI's own patcher class on a CPU (`dynamic_vram`), and what --lowvram and
--novram leave in RAM is given back by each patcher after every load.
"""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.rewards.load import RewardConfig

MODES = ("dynamic", "dynamic without recipes", "partly offloaded", "offloaded")
RUN = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}


def train_model(parts, pictures, **options):
    from retune.nodes.train import RetuneTrainModel

    found = executed(RetuneTrainModel, *parts, pictures, train="QK", train_projection=False, **options)
    return {name: patch[1][1][0] for name, patches in found[0].patches.items() for patch in patches}


def train_lora(parts, pictures, **options):
    from retune.nodes.train_lora import RetuneTrainLora

    more = {"rank": 2, "alpha": 1.0, "algorithm": "LoRA", "targets": "all", "text_encoder_learning_rate": 1e-3}
    return executed(RetuneTrainLora, *parts, pictures, **more, **options)[2]


def train_dora(parts, pictures, **options):
    from retune.nodes.train_lora import RetuneTrainLora

    more = {"rank": 2, "alpha": 1.0, "algorithm": "DoRA", "targets": "attention", "text_encoder_learning_rate": 1e-3}
    return executed(RetuneTrainLora, *parts, pictures, **more, **options)[2]


def train_embedding(parts, pictures, **options):
    from retune.nodes.train_embedding import RetuneTrainEmbedding

    more = {"token": "<thing>", "vectors": 1, "initial_text": "circle", "lora_rank": 2, "lora_learning_rate": 1e-3}
    found = executed(RetuneTrainEmbedding, *parts, pictures, **more, **options)
    return {"word": next(iter(found[1].concepts[0].vectors.values())), **found[4]}


def reward_tune(train):
    def tune(parts, pictures, **options):
        from retune.nodes.bridge.rewards import ManagedReward
        from retune.nodes.reward_tune import RetuneRewardTune

        values = {"train": train, "method": "last K", "gradient_steps": 2, "sampling_steps": 3, "cfg": 2.0}
        values |= {"clip_constraint": 0.0, "width": 64, "height": 64, "lora_rank": 2, "prompts": "a red circle"}
        reward = ManagedReward.open(RewardConfig(kind="demo aesthetic"), weight=1.0)
        model, clip, lora, _ = executed(RetuneRewardTune, *parts, reward, **values, **options)
        patches = {**model.patches, **clip.patcher.patches}
        return lora or {name: patch[1][1][0] for name, (patch,) in patches.items()}

    return tune


TRAINERS = {
    "model": train_model,
    "LoRA": train_lora,
    "DoRA": train_dora,
    "embedding": train_embedding,
    "reward on the text encoder": reward_tune("text encoder"),
    "reward on a LoRA": reward_tune("UNet LoRA"),
}


def executed(node, *inputs, **options):
    """A trainer's outputs, called as ComfyUI calls it."""

    class Node(node):
        hidden = SimpleNamespace(unique_id=None, prompt={}, extra_pnginfo=None)

    with torch.inference_mode():
        return Node.execute(*inputs, **RUN | options).result


@pytest.fixture
def options():
    samples = SamplePrompts(prompts=("a red circle",), every=1, steps=2, cfg=2.0, width=64, height=64)
    return {"settings": TrainingSettings(warmup_steps=1, gradient_accumulation=2), "samples": samples}


@pytest.fixture
def giving_back(comfyui, monkeypatch):
    """`giving_back(share)`: whenever models were loaded, each gives back a share of its weights, as in --novram."""
    import comfy.model_management as management

    def start(share):
        load = management.load_models_gpu

        def load_and_give_back(models, *args, force_patch_weights=False, **options):
            load(models, *args, force_patch_weights=force_patch_weights, **options)
            for patcher in models:
                patcher.partially_unload(patcher.offload_device, share * patcher.model_size(), force_patch_weights)

        monkeypatch.setattr(management, "load_models_gpu", load_and_give_back)
        monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)

    return start


@pytest.fixture
def in_mode(request):
    """`in_mode(mode)`: MODEL, CLIP and VAE of the demo in one of `MODES`, or in "plain" mode; a LoRA on the UNet."""

    def start(mode):
        from retune.nodes.common.demo_model import load_demo

        if mode.startswith("dynamic"):
            request.getfixturevalue("dynamic_vram")
        with torch.inference_mode():
            parts = load_demo()
            model = with_a_lora(parts[0])
        if mode == "dynamic without recipes":
            for patcher in (model, parts[1].patcher, parts[2].patcher):
                patcher.cached_patcher_init = None
        if mode.endswith("offloaded"):
            request.getfixturevalue("giving_back")(0.5 if mode.startswith("partly") else 1.0)
        return model, *parts[1:]

    return start


def with_a_lora(model):
    """A clone with a difference on one weight: what trains starts from the patched weight."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    shape, result = model.model.state_dict()[key].shape, model.clone()
    result.add_patches({key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02,))})
    return result


def state_of(parts):
    """Weights, and what a training may leave on layers: hooks and methods; whether they cast while unloaded."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    found = {}
    for number, patcher in enumerate((parts[0], parts[1].patcher, parts[2].patcher)):
        for name, value in patcher.model.state_dict().items():
            found[f"{number} {name}"] = value.clone()
        for name, module in patcher.model.named_modules():
            left = (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module).keys() & METHODS))
            casts = getattr(module, "prev_comfy_cast_weights", getattr(module, "comfy_cast_weights", None))
            found[f"{number} {name} is"] = (*left, None if number == 1 else casts)  # a CLIP casts in any case
    return found


METHODS = {"forward", "forward_comfy_cast_weights"}


def expect_unchanged(parts, before, cast=False):
    after = state_of(parts)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert after[name][: None if cast else -1] == value[: None if cast else -1], name
        else:
            assert torch.equal(after[name], value), name


def slow_but(*quick, **choices):
    """Every combination of two parameters' values; those that are not `quick` are marked slow."""
    names, values = ",".join(choices), itertools.product(*choices.values())
    marks = [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in values]
    return pytest.mark.parametrize(names, marks)


@pytest.mark.parametrize("mode", ["dynamic", pytest.param("offloaded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trainer", ["LoRA", "reward on a LoRA"])
def test_a_run_in_bf16_too(in_mode, pictures, options, trainer, mode):
    options["settings"] = TrainingSettings(warmup_steps=0, precision="bf16")
    expected = TRAINERS[trainer](in_mode("plain"), pictures, run_name=f"{trainer} bf16 plain {mode}", **options)
    parts = in_mode(mode)
    before = state_of(parts)
    found = TRAINERS[trainer](parts, pictures, run_name=f"{trainer} bf16 {mode}", **options)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    expect_unchanged(parts, before, cast=mode != "dynamic")


@slow_but(("dynamic without recipes", "LoRA"), ("dynamic", "reward on the text encoder"), mode=MODES, trainer=TRAINERS)
def test_the_result_is_that_of_plain_mode_and_the_models_stay_as_they_are(
    in_mode, pictures, options, sampled, trainer, mode
):
    plain = in_mode("plain")
    drawn = sampled(*plain[:2])
    expected = TRAINERS[trainer](plain, pictures, run_name=f"{trainer} plain {mode}", **options)
    parts = in_mode(mode)
    before = state_of(parts)
    found = TRAINERS[trainer](parts, pictures, run_name=f"{trainer} {mode}", **options)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    expect_unchanged(parts, before, cast=not mode.startswith("dynamic"))
    torch.testing.assert_close(sampled(*parts[:2]), drawn)


ENDS = {"dynamic": "cancel", "offloaded": "error"}
"""How a run is ended in a mode."""


@slow_but(("dynamic", "LoRA"), ("dynamic", "reward on the text encoder"), mode=ENDS, trainer=TRAINERS)
def test_after_an_error_or_a_cancel_too(in_mode, pictures, options, sampled, monkeypatch, trainer, mode):
    import comfy.model_management
    from retune.nodes.bridge.denoiser import ComfyDenoiser

    kind = comfy.model_management.InterruptProcessingException if ENDS[mode] == "cancel" else ValueError
    predict, calls = ComfyDenoiser.predict, []

    def stops(self, *args):
        calls.append(args)
        if len(calls) == 5:
            raise kind("stopped")
        return predict(self, *args)

    parts = in_mode(mode)
    before = state_of(parts)
    drawn = sampled(*parts[:2])
    monkeypatch.setattr(ComfyDenoiser, "predict", stops)
    with pytest.raises(kind):
        TRAINERS[trainer](parts, pictures, run_name=f"stopped {trainer} {mode}", **options)
    expect_unchanged(parts, before, cast=mode != "dynamic")
    torch.testing.assert_close(sampled(*parts[:2]), drawn)
    assert not comfy.model_management.in_training


@pytest.fixture
def loads(comfyui, monkeypatch):
    """The ModelPatchers of each call of ComfyUI's `load_models_gpu`."""
    import comfy.model_management

    load, calls = comfy.model_management.load_models_gpu, []

    def counted(models, *args, **options):
        calls.append(list(models))
        return load(models, *args, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", counted)
    return calls


def test_models_are_loaded_once_for_a_run(in_mode, pictures, options, loads):
    """Not once for each batch, of which there are two a step here; samples displace the UNet, which is loaded again."""
    parts = in_mode("plain")

    def count(steps, samples):
        loads.clear()
        options_of_run = options | {"samples": samples, "steps": steps}
        train_lora(
            parts, pictures, run_name=f"{steps} steps {'with' if samples else 'without'} samples", **options_of_run
        )
        return len([models for models in loads if len(models) == 2])  # UNet and CLIP

    assert count(3, None) == count(1, None)
    assert count(3, options["samples"]) - count(1, options["samples"]) == 2  # one for each picture's decoding


def test_what_was_moved_or_displaced_is_loaded_again(in_mode, loads):
    import comfy.model_management
    from retune.nodes.bridge.device import Loaded

    (model, clip, vae), loaded = in_mode("plain"), Loaded()

    def loads_of(memory=0):
        loads.clear()
        loaded.load([model, clip.patcher], memory)
        return len(loads)

    assert loads_of() == 1 and loads_of() == 0
    assert loads_of(10) == 1 and loads_of(10) == 0 and loads_of(5) == 0
    comfy.model_management.load_models_gpu([vae.patcher])
    assert loads_of() == 1 and loads_of() == 0
    model.partially_unload(model.offload_device, model.model_size() / 2)
    assert loads_of() == 1 and model.loaded_size() == model.model_size()
    comfy.model_management.unload_all_models()
    assert loads_of() == 1 and loads_of() == 0


@pytest.mark.parametrize("trainer", ["LoRA", "DoRA", "embedding", "reward on a LoRA"])
def test_a_unet_that_the_text_encoder_pushed_out_is_back_when_adapters_begin(
    in_mode, pictures, options, monkeypatch, trainer
):
    """DoRA's magnitude begins as that of the weights with their patches, which an offloaded layer lacks."""
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.training.trainables.lora import Adapters

    measure, begin, offloaded = ComfyTextEncoder._measure_widths, Adapters.__init__, []

    def measured_beside_others(encoder):
        patcher, widths = encoder._denoiser.patcher, measure(encoder)
        patcher.partially_unload(patcher.offload_device, patcher.model_size())
        offloaded.append(patcher)
        return widths

    def begun(adapters, *arguments):
        assert all(patcher.loaded_size() == patcher.model_size() for patcher in offloaded)
        begin(adapters, *arguments)

    if trainer != "embedding":
        options["settings"] = TrainingSettings(warmup_steps=0, gradient_accumulation=1)
    expected = TRAINERS[trainer](in_mode("plain"), pictures, run_name=f"{trainer} loaded", **options)
    monkeypatch.setattr(ComfyTextEncoder, "_measure_widths", measured_beside_others)
    monkeypatch.setattr(Adapters, "__init__", begun)
    found = TRAINERS[trainer](in_mode("plain"), pictures, run_name=f"{trainer} pushed out", **options)
    assert offloaded and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("text_trains", [False, True])
def test_idle_models_count_as_free_and_the_runs_own_do_not(in_mode, pictures, text_trains):
    import comfy.model_management
    from retune.nodes.bridge.view import text_to_image
    from retune.nodes.ui.progress import NodeCallbacks

    comfy.model_management.unload_all_models()
    model, clip, vae = in_mode("plain")
    with text_to_image(model, clip, vae) as view:
        callbacks = NodeCallbacks(None, "idle models", 1)
        callbacks.reserve_for_dataset(view, pictures, 2)
        with view.text_encoder.training() if text_trains else nullcontext():
            comfy.model_management.load_models_gpu([vae.patcher, clip.patcher])
            callbacks.after_load()
            idle = [vae.patcher] if text_trains else [vae.patcher, clip.patcher]
            assert {id(network) for network in callbacks.idle_networks()} == {id(patcher.model) for patcher in idle}
            expected = sum(patcher.loaded_size() for patcher in idle)
            assert callbacks.managed_bytes(torch.device("cpu")) == expected > 0
    assert callbacks.versions()["ComfyUI"]


@pytest.mark.parametrize("trainer", ["LoRA", "reward on a LoRA"])
def test_a_run_that_fits_once_idle_models_are_unloaded_is_not_refused(in_mode, pictures, options, monkeypatch, trainer):
    """Free is what the run needs, less the part that is in memory and in no step: VAE or text encoder."""
    import comfy.model_management
    from retune.training.loop import estimate
    from retune.training.recipes import run

    parts, estimates = in_mode("plain"), []
    comfy.model_management.load_models_gpu([parts[1].patcher, parts[2].patcher])  # a full cache would not load the VAE
    idle = {"LoRA": parts[2], "reward on a LoRA": parts[1]}[trainer]  # the one trains text, the other decodes
    size = idle.patcher.model_size()
    estimate_memory = run.estimate_memory

    def noted(*arguments):
        estimates.append(estimate_memory(*arguments))
        return estimates[-1]

    monkeypatch.setattr(run, "estimate_memory", noted)
    monkeypatch.setattr(estimate, "_swap_bytes", lambda device: 0)
    monkeypatch.setattr(estimate, "TOLERANCE", 0.0)
    monkeypatch.setattr(run, "free_bytes", lambda device: estimates[-1].needed - size)
    assert TRAINERS[trainer](parts, pictures, run_name=f"{trainer} beside idle models", **options)


@pytest.mark.parametrize("mode", ["plain", "dynamic"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_cannot_fit_is_refused_before_its_first_step(
    comfyui, in_mode, options, pictures, monkeypatch, trainer, mode
):
    """So ComfyUI's own networks run without values too: there is an estimate of each."""
    from retune.nodes.ui.progress import NodeCallbacks
    from retune.training.loop import estimate
    from retune.training.recipes import run

    parts, steps = in_mode(mode), []
    monkeypatch.setattr(run, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(estimate, "_swap_bytes", lambda device: 0)
    monkeypatch.setattr(NodeCallbacks, "managed_bytes", lambda self, device: 0)
    monkeypatch.setattr(NodeCallbacks, "before_step", lambda self, step: steps.append(step))
    before = state_of(parts)
    with pytest.raises(
        ValueError, match="memory that the run takes on cpu is about .* more than now; expected at most"
    ):
        TRAINERS[trainer](parts, pictures, run_name=f"refused {trainer} {mode}", **options)
    assert not steps
    expect_unchanged(parts, before)
