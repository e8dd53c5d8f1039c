"""Embedding files: every tool's layout, what is refused, which encoder gets what, saved files in other programs."""

import base64
import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from retune.training.formats.embedding import Embedding, read_embedding
from retune.training.formats.embedding_fit import assign_to_encoders, family_of
from retune.training.formats.embedding_image import _sequence
from retune.training.formats.embedding_report import (
    base_of_embedding,
    embedding_report,
    is_vocabulary_word,
    median_norm,
    nearest_words,
)
from retune.training.formats.embedding_save import save_embedding, token_file_name
from retune.training.models.concepts import Concept, Vocabulary
from safetensors.torch import load_file, save_file

WIDTHS = {
    "SD1.x": {"clip_l": 768},
    "SD2.x": {"clip_h": 1024},
    "SDXL": {"clip_l": 768, "clip_g": 1280},
    "T5": {"t5xxl": 4096},
    "small T5": {"t5base": 768},
}
WORDS = ["red", "circle", "a", "figure"]


def draw(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors_of(family, count=3):
    return {name: draw(count, width, seed=width) for name, width in WIDTHS[family].items()}


def vocabularies_of(family):
    """A few words as each encoder's vocabulary."""
    ids, word = lambda text: [WORDS.index(text)] if text in WORDS else [0, 1], WORDS.__getitem__
    return {n: Vocabulary(draw(len(WORDS), w, seed=1), ids, word) for n, w in WIDTHS[family].items()}


def a1111(vectors, **more):
    known = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat-toy", "step": 500}
    return known | {"sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5"} | more


def write(path, content, metadata=None):
    if path.suffix == ".safetensors":
        save_file(content, path, metadata)
    else:
        torch.save(content, path)
    return path


ONE, PAIR, T5 = vectors_of("SD1.x")["clip_l"], vectors_of("SDXL"), vectors_of("T5")["t5xxl"]
OLD = torch.nn.ParameterDict({"*": ONE.clone()})
LAYOUTS = {
    "A1111": ("SD1.x", "a.pt", a1111(ONE), None, "cat-toy"),
    "A1111 of SD2": ("SD2.x", "a.pt", a1111(vectors_of("SD2.x")["clip_h"]), None, "cat-toy"),
    "first implementation": ("SD1.x", "a.pt", a1111(ONE, string_to_param=OLD), None, "cat-toy"),
    "kohya pt": ("SD1.x", "a.pt", {"emb_params": ONE}, None, ""),
    "kohya": ("SD1.x", "a.safetensors", {"emb_params": ONE}, None, ""),
    "kohya SDXL": ("SDXL", "a.safetensors", PAIR, None, ""),
    "kohya SDXL pt": ("SDXL", "a.pt", PAIR, None, ""),
    "diffusers": ("SD1.x", "learned_embeds.bin", {"<cat-toy>": ONE}, None, "<cat-toy>"),
    "diffusers, one vector": ("SD1.x", "a.safetensors", {"<cat-toy>": ONE[0].clone()}, None, "<cat-toy>"),
    "OneTrainer": ("SD1.x", "a.safetensors", {"emp_params": ONE}, None, ""),
    "OneTrainer T5": ("T5", "a.safetensors", {"t5": T5}, None, ""),
    "ai-toolkit": (
        "SD1.x",
        "a.safetensors",
        {"emb_params": ONE},
        {"name": '"cat"', "step": "7", "string_to_param": '{"*": "emb_params"}', "software": '{"name": "ai-toolkit"}'},
        "cat",
    ),
    "Replicate": ("SDXL", "a.safetensors", {f"text_encoders_{i}": v for i, v in enumerate(PAIR.values())}, None, ""),
    "ComfyUI list": (
        "SDXL",
        "a.pt",
        [{"x": PAIR["clip_l"][:1], "y": PAIR["clip_g"]}, {"z": PAIR["clip_l"][1:]}],
        {},
        "",
    ),
    "within a LoRA": (
        "SDXL",
        "a.safetensors",
        {f"bundle_emb.<a.b>.{n}": v for n, v in PAIR.items()} | {"lora_unet_x.lora_down.weight": torch.ones(2, 2)},
        None,
        "<a.b>",
    ),
    "within A1111's LoRA": ("SD1.x", "a.safetensors", {"bundle_emb.cat.string_to_param.*": ONE}, None, "cat"),
    "T5": ("T5", "a.safetensors", {"t5xxl": T5}, None, ""),
    "T5 of this package": ("small T5", "a.safetensors", {"t5base": ONE}, None, ""),
    "a bare tensor": ("SD1.x", "a.pt", ONE, None, ""),
    "half precision": ("SD1.x", "a.safetensors", {"emb_params": ONE.bfloat16()}, None, ""),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_is_read(tmp_path, kind):
    family, name, content, metadata, token = LAYOUTS[kind]
    found = read_embedding(write(tmp_path / name, content, metadata))
    expected = vectors_of(family)
    if kind == "diffusers, one vector":
        expected = {"clip_l": ONE[:1]}
    if kind == "half precision":
        expected = {"clip_l": ONE.bfloat16().float()}
    given = assign_to_encoders(found, vocabularies_of(family))
    assert list(given) == list(expected) and found.token == token
    assert all(torch.equal(given[n], expected[n]) and given[n].dtype == torch.float32 for n in expected)


def test_files_say_what_they_are(tmp_path):
    def read(kind):
        name, content, metadata = LAYOUTS[kind][1:4]
        return read_embedding(write(tmp_path / name, content, metadata))

    old, toolkit = read("A1111"), read("ai-toolkit")
    assert (old.layout, old.step, old.checkpoint) == ("A1111", "500", "v1-5")
    assert (toolkit.layout, toolkit.step) == ("ai-toolkit", "7")
    assert read("OneTrainer").layout == "OneTrainer (emp_params)"
    kohya = {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}
    assert base_of_embedding(read_embedding(write(tmp_path / "k.safetensors", PAIR, kohya))).family == "SDXL"
    legacy = tmp_path / "old.pt"
    torch.save(a1111(ONE), legacy, _use_new_zipfile_serialization=False)
    assert torch.equal(read_embedding(legacy).parts[0][1], ONE)


def test_one_of_several_is_chosen_by_its_token(tmp_path):
    path = write(tmp_path / "two.safetensors", {"<a>": ONE, "<b>": 2 * ONE})
    assert torch.equal(read_embedding(path, "<b>").parts[0][1], 2 * ONE)
    with pytest.raises(ValueError, match="2 embeddings .<a>, <b>.; expected one. Write one as token"):
        read_embedding(path)


def noise(count):
    """A1111's fixed sequence, number by number."""
    x, found = 0, []
    for _ in range(count):
        x = (x * 1664525 + 1013904223) % 2**32
        found.append(x % 255)
    return np.array(found, dtype=np.uint8)


def with_strips(picture, data):
    """A picture (H, W, 3) with bytes hidden beside it, as A1111 hides them."""
    height = len(picture)
    pixels = -(-len(data) // (3 * height)) * 3 * height
    packed = np.resize(np.frombuffer(data, np.uint8), pixels)
    colour = 0xA0  # A1111 paints circles there
    strips = [(half ^ (noise(pixels) & 0x0F) | colour).reshape(height, -1, 3) for half in (packed & 0x0F, packed >> 4)]
    black = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([strips[0], black, picture, black, strips[1]], axis=1)


@pytest.mark.parametrize("place", ["text chunk", "png pixels", "webp pixels", "framed pixels"])
def test_pictures_of_a1111_are_read(tmp_path, place):
    text = json.dumps(a1111({"TORCHTENSOR": ONE.tolist()}))
    picture = np.random.default_rng(0).integers(16, 255, (64, 48, 3), dtype=np.uint8) | 1
    path = tmp_path / ("cat.webp" if place == "webp pixels" else "cat.png")
    if place == "text chunk":
        info = PngInfo()
        info.add_text("sd-ti-embedding", base64.b64encode(text.encode()).decode())
        Image.fromarray(picture).save(path, pnginfo=info)
    else:
        pixels = with_strips(picture, zlib.compress(text.encode(), 9))
        pixels = np.pad(pixels, ((3, 2), (1, 4), (0, 0))) if place == "framed pixels" else pixels
        Image.fromarray(pixels).save(path, lossless=True)
    found = read_embedding(path)
    assert found.layout == f"A1111 picture ({place.split()[-1] if 'pixels' in place else place})"
    assert torch.equal(found.parts[0][1], ONE) and found.token == "cat-toy" and found.step == "500"


def test_the_fixed_sequence_is_a1111s():
    assert _sequence(12).tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79, 167, 4]  # from its own test
    assert np.array_equal(_sequence(1001), noise(1001))


class Code:
    def __reduce__(self):
        return (print, ("run",))


def bad(path, kind):
    """Writes a file that is no embedding."""
    nan, cut = torch.full((2, 768), torch.nan), ONE.clone()
    lora = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    files = {
        "empty": lambda: path.write_bytes(b""),
        "code": lambda: torch.save({"string_to_param": {"*": ONE}, "name": Code()}, path),
        "plain pickle": lambda: path.write_bytes(pickle.dumps({"a": Code()})),
        "no pickle": lambda: path.write_bytes(b"hello " * 40),
        "pickle as safetensors": lambda: torch.save({"emb_params": ONE}, path),
        "safetensors as pickle": lambda: save_file({"emb_params": ONE}, path),
        "no tensors": lambda: torch.save({"name": "x"}, path),
        "NaN": lambda: save_file({"emb_params": nan}, path),
        "infinity": lambda: torch.save(a1111(cut.fill_(float("inf"))), path),
        "two in A1111": lambda: torch.save(a1111(ONE) | {"string_to_param": {"*": ONE, "+": ONE}}, path),
        "two tensors": lambda: save_file({"emb_params": ONE, "other": ONE + 1}, path),
        "half a pair": lambda: save_file({"clip_l": ONE, "clip_x": ONE + 1}, path),
        "no vectors": lambda: save_file({"emb_params": torch.ones(0, 768)}, path),
        "whole numbers": lambda: save_file({"emb_params": torch.ones(2, 768, dtype=torch.int64)}, path),
        "a table": lambda: save_file({"token": torch.ones(768, 768)}, path),
        "LoRA": lambda: save_file(lora, path),
        "checkpoint": lambda: save_file({"model.diffusion_model.out.2.weight": torch.ones(4, 4, 3, 3)}, path),
        "output embedding": lambda: save_file({"emp_params": 0 * ONE, "emp_params_out": ONE}, path),
        "a text": lambda: torch.save("hello", path),
        "one number": lambda: torch.save({"emb_params": torch.ones(1).expand(10**6, 768)}, path),
        "one wide number": lambda: torch.save({"emb_params": torch.ones(1).expand(2, 10**6)}, path),
        "one number in the first implementation": lambda: torch.save(a1111(ONE, string_to_param=repeated()), path),
        "itself": lambda: torch.save(endless(), path),
        "a long list": lambda: torch.save([{"x": draw(200, 768)}, {"y": draw(200, 768)}], path),
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a poster": lambda: Image.new("1", (5000, 5000)).save(path),
        "a program for printers": lambda: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "nested JSON": lambda: Image.new("RGB", (4, 4)).save(path, pnginfo=nested_chunk()),
        "a picture": lambda: Image.new("RGB", (20, 20), (9, 9, 9)).save(path),
        "a broken picture": lambda: path.write_bytes(b"\x89PNG broken"),
        "a broken chunk": lambda: Image.new("RGB", (4, 4)).save(path, pnginfo=broken_chunk()),
        "broken strips": lambda: Image.fromarray(with_strips(np.full((8, 8, 3), 7, np.uint8), b"x" * 40)).save(path),
    }
    if kind == "cut":
        save_file({"emb_params": ONE}, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "cut pickle":
        torch.save(a1111(ONE), path)
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "huge header":
        path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    else:
        files[kind]()


def repeated():
    """A table of many rows that is one number in the file."""
    return torch.nn.ParameterDict({"*": torch.ones(1).expand(10**7, 768)})


def endless():
    content = {"emb_params": ONE}
    return content | {"next": content.setdefault("next", content)}


def nested_chunk():
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(b"[" * 100_000).decode())
    return info


def broken_chunk():
    info = PngInfo()
    info.add_text("sd-ti-embedding", "!!! no base64")
    return info


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("empty", "a.pt", "is empty"),
        ("code", "a.pt", "damaged or holds more than tensors"),
        ("plain pickle", "a.pt", "damaged or holds more than tensors"),
        ("no pickle", "a.bin", "damaged or holds more than tensors"),
        ("cut pickle", "a.pt", "damaged or holds more than tensors"),
        ("cut", "a.safetensors", "damaged or no safetensors"),
        ("huge header", "a.safetensors", "damaged or no safetensors"),
        ("pickle as safetensors", "a.safetensors", "is a pickle by another name.*Rename it to a.pt"),
        ("safetensors as pickle", "a.pt", "is safetensors by another name.*Rename it to a.safetensors"),
        ("no tensors", "a.pt", "holds no tensors"),
        ("NaN", "a.safetensors", "NaN or infinity in emb_params"),
        ("infinity", "a.pt", "NaN or infinity"),
        ("two in A1111", "a.pt", "holds 2 embeddings"),
        ("two tensors", "a.safetensors", "emb_params, other; expected emb_params alone"),
        ("half a pair", "a.safetensors", "clip_l, clip_x; expected clip_l alone"),
        ("no vectors", "a.safetensors", r"\(0, 768\) of float32; expected vectors"),
        ("whole numbers", "a.safetensors", r"\(2, 768\) of int64; expected vectors"),
        ("a table", "a.safetensors", "768 vectors; expected at most 256"),
        ("LoRA", "a.safetensors", "is a LoRA .*models/loras"),
        ("checkpoint", "a.safetensors", "Is it a checkpoint"),
        ("output embedding", "a.safetensors", "output embedding of OneTrainer"),
        ("a text", "a.pt", "holds a str; expected tensors by name"),
        ("one number", "a.pt", "its tensors unfold to"),
        ("one wide number", "a.pt", "emb_params is 1000000 wide; expected at most"),
        ("one number in the first implementation", "a.pt", "its tensors unfold to"),
        ("itself", "a.pt", "contains itself"),
        ("a long list", "a.pt", "400 vectors; expected at most 256"),
        ("a folder", "a.pt", "a.pt is a folder; expected a file"),
        ("a pipe", "a.safetensors", "a.safetensors is a pipe or a device"),
        ("a pipe", "a.png", "a.png is a pipe or a device"),
        ("a poster", "a.png", "a.png is 5000x5000; expected a picture of at most"),
        ("a program for printers", "a.png", "a.png is damaged or no picture"),
        ("nested JSON", "a.png", "the embedding in the picture is damaged"),
        ("a picture", "a.png", "picture without an embedding"),
        ("a broken picture", "a.png", "damaged or no picture"),
        ("a broken chunk", "a.png", "the embedding in the picture is damaged"),
        ("broken strips", "a.png", "the embedding in the picture is damaged"),
    ],
)
def test_what_is_no_embedding_is_refused(tmp_path, capsys, kind, name, message):
    bad(tmp_path / name, kind)
    with pytest.raises(ValueError, match=message):
        read_embedding(tmp_path / name)
    assert capsys.readouterr().out == ""  # no code was run


def test_texts_of_a_file_can_be_printed_and_written(tmp_path):
    write(tmp_path / "a.safetensors", {"emb_params": ONE}, {"name": '"cat\\ud800"', "step": "7"})
    write(tmp_path / "a.pt", a1111(ONE, name="cat?" + "x" * 10**6, step=10**500))
    for name in ("a.safetensors", "a.pt"):
        file = read_embedding(tmp_path / name)
        assert file.token.startswith("cat?") and len(file.token) <= 1000 and len(file.step) < 100
        assert (file.token + file.step).encode("utf-8")


@pytest.mark.parametrize("length", [0x80, 0x180, 0x78])
def test_headers_of_every_length_are_safetensors(tmp_path, length):
    """A header of 128 bytes begins as a pickle does."""
    for size in range(200 + length):
        save_file({"emb_params": ONE}, tmp_path / "a.safetensors", {"name": "x" * size})
        if int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") == length:
            break
    assert torch.equal(read_embedding(tmp_path / "a.safetensors").parts[0][1], ONE)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is safetensors by another name"):
        read_embedding(tmp_path / "a.pt")


def test_damage_anywhere_is_a_value_error(tmp_path):
    torch.save(a1111(ONE[:, :8].clone()), tmp_path / "whole.pt")
    data, random = (tmp_path / "whole.pt").read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        for place in random.integers(len(data), size=4):
            broken[place] = random.integers(256)
        (tmp_path / "a.pt").write_bytes(broken[: random.integers(1, len(data))] if random.random() < 0.3 else broken)
        try:
            read_embedding(tmp_path / "a.pt")
        except ValueError:
            pass


def test_a_misfit_names_the_model_it_belongs_to(tmp_path):
    one = read_embedding(write(tmp_path / "one.safetensors", {"emb_params": ONE}))
    second = read_embedding(write(tmp_path / "two.safetensors", {"<cat>": PAIR["clip_g"]}))
    pair = read_embedding(write(tmp_path / "pair.safetensors", PAIR))
    short = read_embedding(write(tmp_path / "short.safetensors", {"<cat>": PAIR["clip_g"][:1]}))
    for file, family, message in [
        (one, "SD2.x", r"one.safetensors is for SD1.x's CLIP.* \(768 wide\); .* which is SD2.x's \(clip_h 1024\)"),
        (one, "SDXL", r"for clip_l alone; .* clip_g too, .* SDXL's \(clip_l 768, clip_g 1280\). .* second_file"),
        (one, "T5", r"is for SD1.x's CLIP.*T5's \(t5xxl 4096\)"),
        (pair, "SD1.x", r"is for the second CLIP of SDXL \(clip_g, 1280 wide\); .* SD1.x's \(clip_l 768\)"),
        (pair, "small T5", r"is for SD1.x's CLIP.*\(clip_l, 768 wide\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            assign_to_encoders(file, vocabularies_of(family))
    both = assign_to_encoders(one, vocabularies_of("SDXL"), second)
    assert torch.equal(both["clip_l"], ONE) and torch.equal(both["clip_g"], PAIR["clip_g"])
    with pytest.raises(ValueError, match="two.safetensors brings vectors for clip_g, which has some already"):
        assign_to_encoders(pair, vocabularies_of("SDXL"), second)
    with pytest.raises(ValueError, match=r"unequal numbers of vectors \(clip_l 3, clip_g 1\)"):
        assign_to_encoders(one, vocabularies_of("SDXL"), short)
    assert torch.equal(assign_to_encoders(one, vocabularies_of("small T5"))["t5base"], ONE)  # the width alone tells


@pytest.mark.parametrize("family", WIDTHS)
@pytest.mark.parametrize("format", ["safetensors", "A1111 pt", "diffusers"])
def test_saved_files_come_back(tmp_path, family, format):
    concept = Concept("<cat-toy>", vectors_of(family))
    embedding = Embedding((concept,), {"base": family_of(concept.vectors), "steps": 300, "run": "toy"})
    if "T5" in family and format != "safetensors":
        with pytest.raises(ValueError, match="expected safetensors"):
            save_embedding(tmp_path, embedding, format)
        return
    (paths,) = save_embedding(tmp_path, embedding, format)
    found = [read_embedding(path) for path in paths]
    given = assign_to_encoders(found[0], vocabularies_of(family), *found[1:])
    assert all(torch.equal(given[name], vectors) for name, vectors in concept.vectors.items())
    if not (family == "SDXL" and format == "A1111 pt"):
        assert {file.token for file in found} == {"<cat-toy>"} and found[0].step == "300"
    if format == "safetensors":
        many = {"SDXL": {"clip_g", "clip_l"}, "T5": {"t5xxl"}, "small T5": {"t5base"}}
        assert load_file(paths[0]).keys() == many.get(family, {"emp_params"})
        assert base_of_embedding(found[0]).family == family_of(concept.vectors)
    assert save_embedding(tmp_path, embedding, format) == [paths]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_no_file_is_overwritten(tmp_path):
    def save(scale, format="safetensors", prefix="%token%"):
        ((path, *_),) = save_embedding(
            tmp_path, Embedding((Concept("<cat-toy>", {"clip_l": scale * ONE}),)), format, prefix
        )
        return path.relative_to(tmp_path).as_posix()

    assert [save(1), save(2), save(1), save(2)] == ["cat-toy.safetensors", "cat-toy-2.safetensors"] * 2
    assert save(1, "A1111 pt") == "cat-toy-3.pt"  # `embedding:cat-toy` would not find cat-toy.pt
    assert save(1, prefix="toys/my-%token%") == "toys/my-cat-toy.safetensors"
    (tmp_path / "odd.safetensors").write_bytes(b"damaged")
    assert save(1, prefix="odd") == "odd-2.safetensors"
    for prefix in ("../x", "/x", "", "toys/"):
        with pytest.raises(ValueError, match="filename_prefix is"):
            save(1, prefix=prefix)
    assert [token_file_name(token) for token in ("<cat-toy>", "[a](b):c", "S*", "猫.1", "<*>")] == [
        "cat-toy",
        "abc",
        "S",
        "猫.1",
        "",
    ]
    for token, message in (("<con>", "device's name on Windows"), ("x" * 260, "expected at most 200 bytes")):
        with pytest.raises(ValueError, match=message):
            save_embedding(tmp_path, Embedding((Concept(token, {"clip_l": ONE}),)), "safetensors")
    with pytest.raises(ValueError, match="gives no file name"):
        save_embedding(tmp_path, Embedding((Concept("<*>", {"clip_l": ONE}),)), "safetensors")


@pytest.mark.parametrize("format", ["safetensors", "A1111 pt", "diffusers"])
def test_equal_content_is_the_same_bytes_under_any_name(tmp_path, format):
    """A pickle's archive has the name that it was first written to in it, and a header may have any order."""
    embedding = Embedding((Concept("<cat>", {"clip_l": ONE}),), {"base": "SD1.x", "steps": 3, "run": "toy"})
    ((one, *_),) = save_embedding(tmp_path / "a", embedding, format)
    ((other, *_),) = save_embedding(tmp_path / "b", embedding, format, "other")
    assert one.read_bytes() == other.read_bytes()
    if one.suffix == ".safetensors":
        data = one.read_bytes()
        entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert list(entries) == sorted(entries)


def test_reports_show_norms_words_and_warnings(tmp_path):
    table = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    vocabulary = Vocabulary(table, lambda text: [WORDS.index(text)] if text in WORDS else [0, 1], WORDS.__getitem__)
    assert median_norm(vocabulary) == 2  # torch's median: the lower of the middle two
    near = nearest_words(vocabulary, torch.tensor([[3.0, 4.0, 0.0, 0.0]]), 2)
    assert [word for word, _ in near[0]] == ["circle", "red"]
    assert [cosine for _, cosine in near[0]] == pytest.approx([0.8, 0.6])
    assert is_vocabulary_word(vocabulary, "Figure") and not is_vocabulary_word(vocabulary, "<cat>")
    metadata = {"base_model": "SDXL", "token": "figure", "step": "9"}
    vectors = torch.stack([torch.tensor([0.0, 0, 3, 4]), torch.zeros(4)])
    file = read_embedding(write(tmp_path / "f.safetensors", {"emp_params": vectors}, metadata))
    text = embedding_report([file], Concept("figure", {"clip_l": vectors}), {"clip_l": vocabulary})
    assert "f.safetensors: OneTrainer (emp_params), token figure" in text
    assert "1: norm 5, 2.50 x the words' median; nearest words figure 0.80, a 0.60, " in text
    for warning in ("figure is a word that clip_l knows", "was made for SDXL", "has vectors of zeros for clip_l"):
        assert warning in text


@pytest.mark.parametrize("format", ["safetensors", "A1111 pt", "diffusers"])
def test_diffusers_loads_saved_files(tiny_model, tmp_path, format):
    """Vectors that are those of known words must encode as these words, bit for bit, in both of SDXL's encoders."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    text = tiny_model.text_encoder.network
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip_tokenizer", model_max_length=77)
    ids = tokenizer("red circle", add_special_tokens=False).input_ids
    vectors = text.get_input_embeddings().weight[ids].detach().clone()
    ((path, *more),) = save_embedding(tmp_path / "e", Embedding((Concept("<cat-toy>", {"clip_l": vectors}),)), format)
    network, vae = tiny_model.denoiser.network, tiny_model.autoencoder.network
    pipeline = StableDiffusionPipeline(
        vae, text, tokenizer, network, scheduler(), None, None, requires_safety_checker=False
    )
    expected = encoded(pipeline, "a red circle on the left")
    pipeline.load_textual_inversion(str(path), token="<cat-toy>")
    assert torch.equal(encoded(pipeline, "a <cat-toy> on the left"), expected)
    assert not more


def scheduler():
    from diffusers import DDIMScheduler
    from retune.training.models.diffusers import SD1_SCHEDULER

    return DDIMScheduler(**SD1_SCHEDULER)


def encoded(pipeline, prompt):
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[
            0
        ]


def test_diffusers_loads_both_files_of_sdxl(tiny_model, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    config = tiny_model.text_encoder.network.config.to_dict()
    networks = [
        kind(CLIPTextConfig(**config | {"hidden_size": width})).eval()
        for kind, width in ((CLIPTextModel, 32), (CLIPTextModelWithProjection, 64))
    ]
    tokenizers = [CLIPTokenizer.from_pretrained(tmp_path / "clip_tokenizer", model_max_length=77) for _ in networks]
    pipeline = StableDiffusionXLPipeline(None, *networks, *tokenizers, None, scheduler(), add_watermarker=False)
    ids = tokenizers[0]("red circle", add_special_tokens=False).input_ids
    tables = [network.get_input_embeddings().weight[ids].detach().clone() for network in networks]
    concept = Concept("<cat-toy>", dict(zip(("clip_l", "clip_g"), tables, strict=True)))
    expected = encoded(pipeline, "a red circle on the left")
    (paths,) = save_embedding(tmp_path / "e", Embedding((concept,)), "diffusers")
    assert [path.name for path in paths] == ["cat-toy.safetensors", "cat-toy_2.safetensors"]
    parts = list(zip(paths, networks, tokenizers, strict=True))
    for path, network, tokenizer in parts:
        pipeline.load_textual_inversion(str(path), text_encoder=network, tokenizer=tokenizer)
    assert torch.equal(encoded(pipeline, "a <cat-toy> on the left"), expected)
