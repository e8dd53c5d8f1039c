"""Concepts in ComfyUI's prompts equal stock `embedding:` and the core's encoders."""

import pytest
import torch
from retune.nodes.clips.concept_tokens import concepts_of, embedding_widths, vocabularies_of, with_concepts
from retune.training.models.concepts import Concept
from safetensors.torch import save_file


def encode(clip, text, **options):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text, **options), return_pooled=True)


def equal(left, right):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def random_concept(clip, token, count=3):
    random = torch.Generator().manual_seed(len(token))
    widths = embedding_widths(clip)
    return Concept(token, {name: 0.05 * torch.randn(count, width, generator=random) for name, width in widths.items()})


@pytest.mark.parametrize("kind", ["SD1.5", "SD2", "SDXL", "T5"])
def test_a_token_equals_stock_embedding(comfyui, clips, t5, tmp_path, kind):
    clip = (t5 if kind == "T5" else clips[kind]).clone()
    concepts = [random_concept(clip, "<cat-toy>"), random_concept(clip, "sks", 1)]
    for name in ("cat", "sks"):
        save_file(dict(concepts[name == "sks"].vectors), tmp_path / f"{name}.safetensors")
    knowing = with_concepts(clip, concepts)
    for part in [p for p in vars(clip.tokenizer).values() if hasattr(p, "embedding_directory")]:
        part.embedding_directory = [str(tmp_path)]
    many = 20 if kind == "T5" else 73  # of a window of 77 tokens
    for ours, stock in [
        ("a <cat-toy> in a bowl", "a embedding:cat in a bowl"),
        ("(<cat-toy>:1.3) and sks, SKS", "(embedding:cat:1.3) and embedding:sks , embedding:sks"),
        (r"a \(<cat-toy> b\)", r"a \( embedding:cat b\)"),
        ("word " * many + "<cat-toy>", "word " * many + "embedding:cat"),
    ]:
        assert equal(encode(knowing, ours), encode(clip, stock))
        assert not equal(encode(clip, ours), encode(clip, stock))
    assert equal(encode(knowing, "a plain prompt"), encode(clip, "a plain prompt"))
    plain = {"disable_weights": True}
    assert equal(encode(knowing, "(sks:1.2)", **plain), encode(clip, "( embedding:sks :1.2)", **plain))
    assert concepts_of(knowing) == tuple(concepts)
    assert concepts_of(clip) == ()


def test_stock_embeddings_and_several_loads_live_together(comfyui, clips, tmp_path, monkeypatch):
    clip = clips["SD1.5"].clone()
    first, second = random_concept(clip, "<one>"), random_concept(clip, "<second>")
    save_file(dict(first.vectors), tmp_path / "one.safetensors")
    monkeypatch.setattr(clip.tokenizer.clip_l, "embedding_directory", [str(tmp_path)])
    both = with_concepts(with_concepts(clip, [first]), [second])
    assert equal(encode(both, "a <one> <second>"), encode(both, "a embedding:one <second>"))


def test_the_core_reads_the_same(demo, core_demo):
    clip = demo[1]
    concept = random_concept(clip, "<it>", 2)
    knowing, core = with_concepts(clip, [concept]), core_demo.text_encoder.with_concepts([concept])
    for text in ("two <it> on the left", "<it>, white background", "red " * 70 + "<it> <it> <it>"):
        ours, expected = encode(knowing, text)[0], core.encode(core.tokenize([text])).context
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < 1e-5
    ours, core = vocabularies_of(clip)["clip_l"], core_demo.text_encoder.vocabularies["clip_l"]
    assert torch.equal(ours.table, core.table)
    assert ours.ids("red circle") == core.ids("red circle")
    assert ours.word(ours.ids("red")[0]) == core.word(core.ids("red")[0]) == "red"


def test_the_core_reads_the_same_with_a_t5(t5):
    from retune.nodes.bridge.text_encoder import core_text_encoder

    concept = random_concept(t5, "<it>", 2)
    knowing, core = with_concepts(t5, [concept]), core_text_encoder(t5).with_concepts([concept])
    for text in ("a <it> on the left", "(<it>) and <it>"):
        ours = encode(knowing, text, disable_weights=True)[0]
        expected = core.encode(core.tokenize([text])).context
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < 1e-4


def test_fingerprints_tell_concepts_apart(demo):
    from retune.nodes.clips.fingerprint import clip_fingerprint

    clip = demo[1]
    one = with_concepts(clip, [random_concept(clip, "<it>")])
    other = with_concepts(clip, [random_concept(clip, "<it>", 2)])
    assert len({clip_fingerprint(each) for each in (clip, one, other)}) == 3
