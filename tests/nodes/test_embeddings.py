"""Load and Save Embedding: every layout as a word equals stock `embedding:`, saved files are found at once."""

import logging
from pathlib import Path

import folder_paths
import pytest
import torch
from retune.nodes.clips.concept_tokens import embedding_widths, with_concepts
from retune.nodes.embedding import RetuneLoadEmbedding, RetuneSaveEmbedding, embedding_files
from retune.training.formats.embedding import Embedding
from retune.training.models.concepts import Concept
from safetensors.torch import save_file


def encode(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def equal(left, right):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(left, right, strict=True))


def load(clip, file, token="", **more):
    with torch.inference_mode():
        return RetuneLoadEmbedding.execute(clip, file, token, **more).args


@pytest.fixture
def folder(comfyui, monkeypatch, tmp_path):
    """The only embeddings folder, empty."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors", ".pt", ".bin"})
    )
    monkeypatch.delitem(folder_paths.filename_list_cache, "embeddings", raising=False)
    return tmp_path


@pytest.fixture
def clip_of(request, folder, monkeypatch):
    """A small CLIP by family, whose stock `embedding:` reads `folder`."""

    def find(family):
        one = {"SDXL": "small_sdxl_clip", "T5": "t5"}.get(family)
        clip = request.getfixturevalue(one) if one else request.getfixturevalue("clips")[family]
        for name, width in embedding_widths(clip).items():
            monkeypatch.setattr(getattr(clip.tokenizer, name), "embedding_directory", [str(folder)])
            monkeypatch.setattr(getattr(clip.tokenizer, name), "embedding_size", width)
        return clip

    return find


def vectors_of(clip, count=3):
    random = torch.Generator().manual_seed(5)
    return {name: 0.2 * torch.randn(count, width, generator=random) for name, width in embedding_widths(clip).items()}


def a1111(vectors):
    known = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat-toy", "step": 9}
    return known | {"sd_checkpoint": None, "sd_checkpoint_name": "v1"}


ONE = {
    "A1111": ("pt", a1111),
    "kohya": ("safetensors", lambda v: {"emb_params": v}),
    "kohya pt": ("pt", lambda v: {"emb_params": v}),
    "OneTrainer": ("safetensors", lambda v: {"emp_params": v}),
    "diffusers": ("bin", lambda v: {"<cat-toy>": v}),
    "diffusers, one vector": ("safetensors", lambda v: {"<cat-toy>": v[0].clone()}),
    "half precision": ("safetensors", lambda v: {"emb_params": v.half()}),
    "ComfyUI list": ("pt", lambda v: [{"a": v[:1]}, {"b": v[1:]}]),
    "bundled": ("safetensors", lambda v: {"bundle_emb.cat.string_to_param.*": v}),
}
PAIRS = {
    "kohya": ("safetensors", lambda v: v),
    "kohya pt": ("pt", lambda v: v),
    "ComfyUI list": ("pt", lambda v: [{"a": v["clip_l"]}, {"b": v["clip_g"]}]),
    "bundled": ("safetensors", lambda v: {f"bundle_emb.<cat>.{name}": value for name, value in v.items()}),
}
CASES = [(family, kind, ONE[kind]) for family in ("SD1.5", "SD2", "T5") for kind in ONE]
CASES += [("SDXL", kind, PAIRS[kind]) for kind in PAIRS] + [("T5", "named", ("safetensors", lambda v: {"t5base": v}))]


@pytest.mark.parametrize(("family", "layout"), [pytest.param(f, c, id=f"{f}, {k}") for f, k, c in CASES])
def test_a_loaded_word_equals_stock_embedding(clip_of, folder, family, layout):
    clip, (suffix, content) = clip_of(family), layout
    vectors = vectors_of(clip)
    content = content(vectors if family == "SDXL" else next(iter(vectors.values())))
    path = folder / f"stock.{suffix}"
    save_file(content, path) if suffix == "safetensors" else torch.save(content, path)
    knowing, report = load(clip, path.name, "<my-word>")
    for ours, stock in [
        ("a <my-word> in a bowl", "a embedding:stock in a bowl"),
        ("(<my-word>:1.3), <my-word>", "(embedding:stock:1.3), embedding:stock"),
    ]:
        assert equal(encode(knowing, ours), encode(clip, stock))
        assert not equal(encode(clip, ours), encode(clip, stock))
    assert "token <my-word>" in report and "nearest words" in report


@pytest.mark.parametrize("family", ["SD1.5", "SD2", "SDXL", "T5"])
@pytest.mark.parametrize("format", ["safetensors", "A1111 pt", "diffusers"])
def test_saved_words_are_found_at_once_and_come_back(clip_of, folder, family, format):
    if family == "T5" and format != "safetensors":
        return
    clip = clip_of(family)
    concepts = (Concept("<cat-toy>", vectors_of(clip)), Concept("sks", vectors_of(clip, 1)))
    embedding = Embedding(
        concepts, {"base": {"SD1.5": "SD1.x", "SD2": "SD2.x"}.get(family, family), "steps": 5, "run": "toys"}
    )
    assert embedding_files() == []
    paths = RetuneSaveEmbedding.execute(embedding, format, "%token%").args[0].splitlines()
    suffix = "pt" if format == "A1111 pt" else "safetensors"
    assert [Path(path).name for path in paths] == [f"cat-toy.{suffix}", f"sks.{suffix}"]
    listed = folder_paths.get_filename_list("embeddings")
    two_files = family == "SDXL" and format == "diffusers"
    assert len(listed) == (4 if two_files else 2) and embedding_files() == listed
    knowing = with_concepts(clip, concepts)
    expected = encode(knowing, "a <cat-toy> with (sks:1.2)")
    more = {"second_file": f"cat-toy_2.{suffix}"} if two_files else {}
    back, report = load(clip, f"cat-toy.{suffix}", **more)
    word = "cat-toy" if family == "SDXL" and suffix == "pt" else "<cat-toy>"  # that dictionary has no name
    more = {"second_file": f"sks_2.{suffix}"} if two_files else {}
    back, _ = load(back, f"sks.{suffix}", **more)
    assert equal(encode(back, f"a {word} with (sks:1.2)"), expected)
    assert f"token {word}" in report and "warning" not in report
    if not two_files:
        assert equal(encode(clip, "a embedding:cat-toy with (embedding:sks:1.2)"), expected)


def test_a_file_is_called_as_the_run_that_is_connected(clip_of, folder, tmp_path):
    words = tuple(Concept(word, vectors_of(clip_of("SD1.5"))) for word in ("<cat-toy>", "sks"))
    for concepts, prefix, expected in (
        (words[:1], "%token%", ["my-toys"]),
        (words, "", ["my-toys-cat-toy", "my-toys-sks"]),
        (words[:1], "mine", ["mine"]),
    ):
        output = RetuneSaveEmbedding.execute(Embedding(concepts, {}), "safetensors", prefix, tmp_path / "my toys")
        paths = [Path(path) for path in output.result[0].splitlines()]
        assert [path.stem for path in paths] == expected
        sizes = [f"{path.name}: {path.stat().st_size / 1024:.1f} KB" for path in paths]
        assert output.ui["text"] == [*map(str, paths), *sizes]


def test_tokens_come_from_the_input_the_file_or_its_name(clip_of, folder, caplog):
    clip = clip_of("SD1.5")
    vectors = vectors_of(clip)["clip_l"]
    torch.save(a1111(vectors) | {"name": "my style, 2"}, folder / "x.pt")
    save_file({"emb_params": vectors}, folder / "bad hands.safetensors")
    assert "token my-style-2" in load(clip, "x.pt")[1]
    assert "token bad-hands" in load(clip, "bad hands.safetensors")[1]
    with caplog.at_level(logging.WARNING):
        report = load(clip, "x.pt", "Cat")[1]
    assert "warning: Cat is a word that clip_l knows" in report and "Cat is a word" in caplog.text
    with pytest.raises(ValueError, match="token is 'a b'"):
        load(clip, "x.pt", "a b")


def test_another_models_file_is_an_error_and_a_doubt_a_warning(clip_of, folder):
    clip, sdxl = clip_of("SD2"), clip_of("SDXL")
    narrow, wide = torch.ones(2, 7), vectors_of(clip)["clip_h"]
    save_file({"emb_params": narrow}, folder / "narrow.safetensors")
    said = {"modelspec.architecture": "stable-diffusion-v1/textual-inversion"}
    save_file({"emb_params": wide}, folder / "doubt.safetensors", said)
    with pytest.raises(ValueError, match=r"for another model \(7 wide\).*SD2.x's \(clip_h 32\)"):
        load(clip, "narrow.safetensors")
    assert "warning: doubt.safetensors was made for SD1.x" in load(clip, "doubt.safetensors")[1]
    with pytest.raises(ValueError, match="for clip_l alone.*SDXL's.*second_file"):
        load(sdxl, "doubt.safetensors")
    with pytest.raises(ValueError, match=r"file is '../secret.pt'; expected one of"):
        load(clip, "../secret.pt")


def test_pictures_are_listed_and_changes_noticed(clip_of, folder):
    from PIL import Image

    clip = clip_of("SD1.5")
    (folder / "sub").mkdir()
    for name in ("a.png", "a.preview.png", "sub/b.WEBP", "c.jpg"):
        Image.new("RGB", (9, 9), (5, 5, 5)).save(folder / name)
    assert embedding_files() == ["a.png", str(Path("sub/b.WEBP"))]
    with pytest.raises(ValueError, match="a.png is a picture without an embedding"):
        load(clip, "a.png")
    save_file({"emb_params": torch.ones(1, 32)}, folder / "d.safetensors")
    assert RetuneLoadEmbedding.define_schema().inputs[1].options[0] == "d.safetensors"
    before = RetuneLoadEmbedding.fingerprint_inputs(file="d.safetensors", clip=None)
    save_file({"emb_params": torch.ones(2, 32)}, folder / "d.safetensors")
    assert RetuneLoadEmbedding.fingerprint_inputs(file="d.safetensors", clip=None) != before


def test_through_a_server_from_an_api_prompt(comfyui_server):
    place = comfyui_server.base_directory / "models" / "embeddings"
    place.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.ones(2, 128)}, place / "two words.safetensors")
    prompt = {
        "1": {"class_type": "RetuneLoadDemoModel", "inputs": {"text_encoder": "clip"}},
        "2": {
            "class_type": "RetuneLoadEmbedding",
            "inputs": {"clip": ["1", 1], "file": "two words.safetensors", "token": ""},
        },
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    }
    (report,) = comfyui_server.run(prompt)["3"]["text"]
    assert "token two-words" in report and "clip_l: 2 vectors of 128 numbers" in report
    prompt["2"]["inputs"]["file"] = "none.safetensors"
    with pytest.raises(ValueError, match="none.safetensors"):
        comfyui_server.queue(prompt)
