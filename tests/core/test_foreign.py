"""Files of others: whatever is wrong with one, the message names it; nothing endless or oversized is opened."""

import json
import os
import tracemalloc
import zipfile

import pytest
import torch
from retune.training.common import foreign
from retune.training.common.foreign import FileError, reading
from retune.training.formats.embedding import read_embedding
from retune.training.formats.lora import read_lora
from retune.training.text_encoder.tokenizers import load_tokenizer


def test_failures_in_any_words_name_the_file_and_keep_the_cause(tmp_path):
    path = tmp_path / "a.safetensors"
    failures = {
        KeyError("vocab"): "a.safetensors is damaged or of another kind (it has no entry 'vocab'). Save or download",
        RecursionError(): "it is nested too deeply",
        MemoryError(): "more memory than there is",
        RuntimeError("size\nmismatch"): "(size mismatch)",
        Exception("bare, as of tokenizers"): "bare, as of tokenizers",
        PermissionError(13, "Permission denied"): "(Permission denied)",
        TypeError(): "(TypeError)",
        ValueError("its width is 3; expected 4"): "a.safetensors: its width is 3; expected 4",
    }
    for failure, words in failures.items():
        with pytest.raises(FileError) as raised, reading(path):
            raise failure
        assert words in str(raised.value) and str(raised.value).startswith("a.safetensors")
        assert raised.value.__cause__ is failure


def test_what_is_not_the_files_fault_passes(tmp_path):
    for failure in (KeyboardInterrupt(), torch.OutOfMemoryError("full"), FileNotFoundError("b"), FileError("b: x")):
        with pytest.raises(type(failure)) as raised, reading(tmp_path / "outer"):
            raise failure
        assert raised.value is failure


def test_a_panic_of_a_rust_library_is_the_files_fault(tmp_path):
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with pytest.raises(FileError, match="tokenizer.json is damaged"), reading(tmp_path / "tokenizer.json"):
        raise panic("called `Option::unwrap()` on a `None` value")


def test_labels_have_the_folder_where_it_tells_files_apart_and_can_be_printed(tmp_path):
    assert foreign.label("unet/config.json") == "unet/config.json"
    assert foreign.label("loras/style.safetensors") == "style.safetensors"
    assert foreign.label(os.fsdecode(b"a\xff.pt")) == "a?.pt"


@pytest.mark.skipif(os.name == "nt", reason="no pipes in the file system")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for reader in (foreign.read_json, foreign.read_tensors, foreign.read_pickle, foreign.read_bytes):
        with pytest.raises(FileError, match="pipe.json is a pipe"):
            reader(tmp_path / "pipe.json")
        with pytest.raises(FileError, match="null is a pipe or a device"):
            reader("/dev/null")
        with pytest.raises(FileError, match="is a folder; expected a file"):
            reader(tmp_path)
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            reader(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text, words",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "not JSON"),
        (b'"\xff"', "byte 1 is no UTF-8 text"),
        (b'{"a": "\\ud83d"}', "half a character"),
        (b"[1]", "its content is a list; expected an object"),
        (b"null", "its content is empty"),
        (b"1" * 5000, "digits"),
    ],
)
def test_json_of_every_kind_of_damage(tmp_path, text, words):
    (tmp_path / "odd.json").write_bytes(text)
    with pytest.raises(FileError, match=f"odd.json.*{words}"):
        foreign.read_json(tmp_path / "odd.json", dict)


def test_sound_json_with_a_byte_order_mark_and_whole_characters(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "\U0001f600\u2028"}).encode())
    assert foreign.read_json(tmp_path / "a.json", dict) == {"a": "\U0001f600\u2028"}


def test_numbers_from_files():
    assert foreign.whole_number(3.0, "rank") == 3
    assert foreign.finite_number("0.5", "alpha") == 0.5
    for value in (True, 0, 10**400, 1.5, "3", None, float("nan"), [1]):
        with pytest.raises(ValueError, match="rank is .*; expected a whole number from 1 to 8"):
            foreign.whole_number(value, "rank", 1, 8)
    for value in (True, "nan", "1e999", 10**400, None, {}, "a"):
        with pytest.raises(ValueError, match="alpha is .*; expected a finite number"):
            foreign.finite_number(value, "alpha")


def test_layers_are_counted_by_the_names_that_exist():
    names = [f"encoder.block.{n}.layer.0.weight" for n in range(12)]
    assert foreign.count_numbered([*names, *names, "other.99.x"], "encoder.block.") == 12
    assert foreign.count_numbered([], "encoder.block.") == 0
    for number in ("999999999", "12345678901234567890123", "13"):
        with pytest.raises(ValueError, match=f"{number[:20]} and it has 13 of them"):
            foreign.count_numbered([*names, f"encoder.block.{number}.x"], "encoder.block.")


def test_a_pickle_may_not_unfold_to_more_than_its_file(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"w": torch.zeros(1).expand(1 << 15, 1 << 15)}, path)
    with pytest.raises(FileError, match="odd.pt: its tensors unfold to 4096 MB"):
        foreign.read_pickle(path)
    endless = {}
    endless["state_dict"] = endless
    torch.save(endless, path)
    with pytest.raises(FileError, match="odd.pt: its content contains itself"):
        foreign.read_pickle(path)
    laughs = [0]
    for _ in range(40):
        laughs = [laughs, laughs]
    torch.save(laughs, path)
    with pytest.raises(FileError, match="odd.pt: its content contains itself or is nested"):
        foreign.read_pickle(path)


@pytest.mark.parametrize("tensor", [torch.zeros(2, device="meta"), torch.eye(2).to_sparse()])
def test_a_pickle_of_tensors_without_values_is_refused(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "odd.pt")
    with pytest.raises(FileError, match="odd.pt: one of its tensors is sparse, quantised or without values"):
        foreign.read_pickle(tmp_path / "odd.pt")


def test_an_archive_may_not_unpack_to_more_than_its_file(tmp_path):
    torch.save({"w": torch.zeros(1 << 25)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(FileError, match="bomb.pt: its content unpacks to 128 MB"):
        foreign.read_pickle(tmp_path / "bomb.pt")


def test_sound_pickles_are_read_with_shared_tensors_and_from_compressed_archives(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"state_dict": {"a": weight, "b": weight.T}, "step": 3}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    torch.save({"state_dict": {"a": weight, "b": weight.T}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "packed.pt", "old.pt"):
        for mmap in (False, True):
            state = foreign.read_pickle(tmp_path / name, mmap=mmap)["state_dict"]
            assert torch.equal(state["a"], weight) and torch.equal(state["b"], weight.T)


def test_a_tensor_file_shows_shapes_before_it_reads(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, 3, dtype=torch.float16)}, tmp_path / "a.safetensors", {"about": "[1]"})
    with foreign.open_tensors(tmp_path / "a.safetensors") as file:
        assert file.shapes == {"w": (2, 3)} and file.dtypes == {"w": "F16"}
        assert foreign.metadata_json(file.metadata, "about", list) == [1]
        with pytest.raises(ValueError, match="its metadata has no entry other"):
            foreign.metadata_json(file.metadata, "other")
        assert foreign.metadata_json(file.metadata, "other", default={}) == {}


def test_reading_takes_no_more_memory_than_the_file(tmp_path):
    (tmp_path / "small").write_bytes(b"words")
    tracemalloc.start()
    try:
        assert foreign.read_bytes(tmp_path / "small", most=1 << 30) == b"words"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(FileError, match="small: its size is 0 MB; expected at most"):
        foreign.read_bytes(tmp_path / "small", most=4)


def test_a_pickle_of_the_old_format_may_not_declare_more_than_its_file(tmp_path):
    torch.save({"w": torch.zeros(200)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    assert torch.equal(foreign.read_pickle(tmp_path / "old.pt")["w"], torch.zeros(200))
    at = data.index(b"K\xc8")  # 200, the storage's size
    (tmp_path / "forged.pt").write_bytes(data[:at] + b"J\xff\xff\xff\x7f" + data[at + 2 :])
    with pytest.raises(FileError, match="forged.pt: one of its tensors has 2147483647 numbers"):
        foreign.read_pickle(tmp_path / "forged.pt")


@pytest.mark.parametrize("size", [10, 5000, 60_000, -30])
def test_a_cut_pickle_is_called_damaged_at_any_size(tmp_path, size):
    path = tmp_path / "words.pt"
    torch.save({"state_dict": {str(i): torch.ones(40, 40) for i in range(20)}}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match=r"words.pt is damaged or holds more than tensors \("):
        foreign.read_pickle(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file, whose weights are quantised. Use the fp16"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a pointer of Git LFS, not the file",
        ),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "is a web page. Download the file itself"),
        (b"<html>", "is a web page"),
    ],
)
@pytest.mark.parametrize(
    "read", [foreign.read_tensors, foreign.read_pickle, foreign.read_json, read_lora, read_embedding, load_tokenizer]
)
def test_what_was_downloaded_in_place_of_the_file_is_named(start, message, read, tmp_path):
    for name in ("a.safetensors", "tokenizer.json", "a.pt", "a.gguf"):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read(tmp_path / name)
