"""One caption has one encoding: the command line's and ComfyUI's text encoders compared over a table of captions."""

import pytest
import torch

pytestmark = pytest.mark.comfyui

LONG = ", ".join(["a red circle on the left"] * 30)
CAPTIONS = {
    "plain": "two small (flat) blue squares",
    "weight": "a (red:1.4) circle, [blue] square",
    "nested weights": "((a red circle)), (((star:1.2):0.5)",
    "escaped brackets": "hatsune miku \\(vocaloid\\), two stars",
    "escaped weight": "a \\(red:1.4\\) circle",
    "one bracket escaped": "a (red\\) circle \\(and",
    "backslashes": "a \\\\(red\\\\) circle \\ star \\n",
    "BREAK and AND": "a star BREAK a circle AND a square :0.5",
    "lora": "a red circle <lora:x:1>",
    "line ends": "a\tred\r\ncircle\n\non  white",
    "separators": "a red\u2028circle\u00a0on\u3000white\u0085",
    "capitals and accents": "Un CERCLE ROUGE, déjà vu, e\u0301, 円",
    "special tokens": "a <|endoftext|> red </s> circle <pad>",
    "nothing": "",
    "blanks": " \n ",
    "long": LONG,
    "long, escaped and weighted": f"{LONG} \\(large\\) (large:0.5)",
    "exactly a window": " ".join(["red"] * 75),
    "a window and one": " ".join(["red"] * 76),
}
CONCEPTS = {
    "token in brackets": "a \\(<cat>\\), (<cat>:1.2)",
    "token, then brackets": "<cat> \\(large\\) <cat>, red",
    "token across windows": f"{LONG} <cat> \\(<cat>\\)",
}


def expect_alike(core, bridged, captions):
    for title, caption in captions.items():
        ours = core.encode(core.tokenize([caption])).context.detach()
        with torch.no_grad():
            theirs = bridged.encode(bridged.tokenize([caption])).context.detach()
        assert ours.shape == theirs.shape, title
        assert (ours - theirs).abs().max() < 2e-4, title


def some_concept(encoder):
    from retune.training.models.concepts import Concept

    source, vectors = torch.Generator().manual_seed(0), {}
    for name, vocabulary in encoder.vocabularies.items():
        table = vocabulary.table.detach().float()
        vectors[name] = table.std() * torch.randn(2, table.shape[1], generator=source)
    return Concept("<cat>", vectors)


def test_a_clip_encodes_alike(demo, core_demo):
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder

    core, bridged = core_demo.text_encoder, ComfyTextEncoder(demo[1])
    expect_alike(core, bridged, CAPTIONS)
    concept = some_concept(core)
    expect_alike(core.with_concepts([concept]), bridged.with_concepts([concept]), CONCEPTS)


def test_a_t5_encodes_alike(comfyui):
    from retune.nodes.bridge.text_encoder import ComfyTextEncoder
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.demo.files import weights_path
    from retune.training.text_encoder.projection import Projection
    from retune.training.text_encoder.t5 import load_t5

    projection = Projection(96, 128, seed=0)
    core = load_t5(weights_path("t5.safetensors"), projection)
    with torch.inference_mode():
        bridged = ComfyTextEncoder(load_t5_clip("demo", projection))
    expect_alike(core, bridged, CAPTIONS)
    concept = some_concept(core)
    expect_alike(core.with_concepts([concept]), bridged.with_concepts([concept]), CONCEPTS)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_real_vocabulary_gives_the_same_ids(comfyui, family):
    """With SD1's, SD2's and SDXL's tokenizers and the pads that fill their windows."""
    from comfy.sd1_clip import SD1Tokenizer
    from comfy.sdxl_clip import SDXLTokenizer
    from comfy.text_encoders.sd2_clip import SD2Tokenizer
    from retune.training.models.clip import ClipTextEncoder
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    network = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **small))
    theirs = {"sd1": SD1Tokenizer, "sd2": SD2Tokenizer, "sdxl": SDXLTokenizer}[family]()
    folder, pads = comfyui / "comfy" / "sd1_tokenizer", {"l": None, "h": 0, "g": 0}
    for name in {"sd1": "l", "sd2": "h", "sdxl": "lg"}[family]:
        ours = ClipTextEncoder(network, folder, pad=pads[name])
        for title, caption in CAPTIONS.items():
            windows = theirs.tokenize_with_weights(caption, disable_weights=True)[name]
            assert ours.tokenize([caption])[0] == [[token for token, _ in window] for window in windows], title


def test_escaped_brackets_are_brackets_to_the_caches_the_counts_and_the_rewards(core_demo, tmp_path):
    from retune.training.data.cache import TextCache
    from retune.training.data.prompt_lengths import long_prompts
    from retune.training.data.prompts import Prompt
    from retune.training.demo.files import weights_path
    from retune.training.rewards.tokens import ClipTokens

    core = core_demo.text_encoder
    cache = TextCache(tmp_path, lambda texts: core.backbone(core.tokenize(texts)), core.fingerprint)
    escaped, plain = "a \\(red\\) circle", "a (red) circle"
    assert cache.fill([escaped, plain]) == 1
    assert torch.equal(cache.get(escaped).context, core.encode(core.tokenize([plain])).context)
    (many,) = long_prompts(core, [Prompt("\\(" * 76)])
    (as_many,) = long_prompts(core, [Prompt("(" * 76)])
    assert many[1] == as_many[1]
    tokens = ClipTokens(weights_path("clip_tokenizer"), len(core.tokenizer), window=core.window)
    assert torch.equal(tokens([escaped]), tokens([plain]))


def test_an_embeddings_file_name_is_said_to_be_words(core_demo, caplog):
    from retune.training.models import concepts

    concepts._warn_of_stock_mark.cache_clear()
    core_demo.text_encoder.tokenize(["my-embedding:x", "an embedding :x"])
    assert not caplog.text
    core_demo.text_encoder.tokenize(["a embedding:x", "embedding:y"])
    assert caplog.text.count("read as words here") == 1
