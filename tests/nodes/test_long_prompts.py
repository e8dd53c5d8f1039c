"""Prompts beyond a window are counted through ComfyUI's tokenizers as it splits and cuts them."""

import pytest
import torch
from retune.training.data.prompt_lengths import long_prompts
from retune.training.data.prompts import Prompt

pytestmark = pytest.mark.comfyui

TEXTS = ["a red circle", *(" ".join(["red"] * count) for count in (20, 75, 76, 160))]


def test_they_are_those_that_comfyui_splits_or_cuts(demo):
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.text_encoder.projection import Projection

    prompts = [Prompt(text) for text in TEXTS]
    clip = demo[1]
    found = long_prompts(ComfyTextEncoder(clip), prompts)
    windows = [len(next(iter(clip.tokenize(text).values()))) for text in TEXTS]
    assert sorted(number for number, _, _ in found) == [i for i, n in enumerate(windows, 1) if n > 1] == [4, 5]
    assert found[0][1] == 160
    with torch.inference_mode():
        t5 = load_t5_clip("demo", Projection(96, 128, seed=3), max_tokens=30)
        lengths = [t5.encode_from_tokens(t5.tokenize(text)).shape[1] for text in TEXTS]
    encoder = ComfyTextEncoder(t5)
    numbers = sorted(number for number, _, _ in long_prompts(encoder, prompts))
    assert numbers and numbers[0] > 1 and not encoder.chunks_long_prompts and max(lengths) == 30
    assert all(length == 30 for number, length in enumerate(lengths, 1) if number in numbers)
    assert all(length < 31 for length in lengths) and lengths[0] < 30
