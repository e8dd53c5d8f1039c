"""Prompts of a CLIP that trains: one forward pass for a batch, with the rows and gradients of single prompts."""

import pytest
import torch
from retune.training.models.concepts import Concept

PROMPTS = ["a <it> on the left", "", "two small <it>, white background, red <it>"]
LONG = "a red circle on the left and " * 15


class LoadedWith:
    """As much of a denoiser as a text encoder that trains asks for."""

    def __init__(self):
        self.keep_loaded = []

    def load(self):
        import comfy.model_management

        comfy.model_management.load_models_gpu(self.keep_loaded, force_full_load=True)


@pytest.fixture(params=["demo", "sdxl"])
def clip(request):
    if request.param == "sdxl":
        return request.getfixturevalue("small_sdxl_clip")
    request.getfixturevalue("comfyui")
    from retune.nodes.common.demo_model import load_demo

    return load_demo()[1]  # not under inference mode: a node's view of a model makes its weights anew


def encoded(clip, calls):
    """Context and pooled of texts that are encoded in given batches, the gradients at learned words, and the number of
    passes of each CLIP."""
    from comfy.sd1_clip import SDClipModel
    from retune.nodes.bridge.device import training_mode
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.training.models.protocols import Conditioning

    passes = []
    parts = [m for m in clip.cond_stage_model.modules() if isinstance(m, SDClipModel)]
    hooks = [part.register_forward_hook(lambda module, *_: passes.append(id(module))) for part in parts]
    try:
        with torch.inference_mode(), training_mode():
            encoder, vectors = ComfyTextEncoder(clip, LoadedWith()), {}
            for name, vocabulary in encoder.vocabularies.items():
                start = torch.randn(2, vocabulary.table.shape[1], generator=torch.Generator().manual_seed(0))
                vectors[name] = (0.05 * start).requires_grad_(True)
            encoder = encoder.with_concepts([Concept("<it>", vectors)])
            with encoder.training():
                passes.clear()
                states = Conditioning.cat(encoder.backbone(encoder.tokenize(texts)) for texts in calls)
                random = torch.Generator().manual_seed(1)
                (states.context * torch.randn(states.context.shape, generator=random)).sum().backward()
            return states, {name: value.grad for name, value in vectors.items()}, len(passes) / len(parts)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_batch_is_one_pass_with_the_rows_and_gradients_of_single_prompts(clip):
    (found, gradients, passes), (expected, single, one_by_one) = (
        encoded(clip, calls) for calls in ([PROMPTS], [[text] for text in PROMPTS])
    )
    assert (passes, one_by_one) == (1, len(PROMPTS))
    torch.testing.assert_close(found.context, expected.context, rtol=0, atol=1e-5 * float(expected.context.abs().max()))
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-5 * float(expected.pooled.abs().max()))
    for name, gradient in single.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_prompts_of_as_many_windows_are_one_batch_and_others_come_one_by_one(clip):
    states, _, passes = encoded(clip, [[LONG, f"{LONG}<it>"]])
    alone, _, _ = encoded(clip, [[LONG], [f"{LONG}<it>"]])
    assert passes == 1 and states.context.shape[1] == 154
    torch.testing.assert_close(states.context, alone.context, rtol=0, atol=1e-5 * float(alone.context.abs().max()))
    _, _, passes = encoded(clip, [[LONG, "a <it>"]])
    assert passes == 2
