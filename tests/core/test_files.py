"""Files are written wholly or not at all, whatever the disk, other programs or Windows do; errors name the file."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from retune.training.common import files
from retune.training.common.files import (
    WriteFailed,
    append_text,
    atomic_path,
    is_reserved,
    long_path,
    overwrite,
    replace,
    write_json,
    write_tensors,
    write_text,
    writing,
)
from retune.training.common.foreign import read_tensors
from retune.training.config.checks import check_run_name
from retune.training.runs.folder import RunFolder, move_aside

WRITE = """
import sys
import torch
from retune.training.common.files import write_tensors
metadata = {name: "ä\\u2028" for name in "the order of a hash map".split()}
write_tensors(sys.argv[1], {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}, metadata)
"""


@pytest.fixture
def windows(monkeypatch):
    """What this package does on Windows."""
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "_OPEN_ELSEWHERE", 0.3)


def refusing(monkeypatch, times: int, name: str = "replace"):
    """os.replace, or another function of os, that Windows refuses so often; returns what it was called with."""
    calls, real = [], getattr(os, name)

    def refuse(*arguments, **more):
        calls.append(arguments)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")
        return real(*arguments, **more)

    monkeypatch.setattr(os, name, refuse)
    return calls


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / name)], check=True)
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["a", "hash", "map", "of", "order", "the"]
    tensors, metadata = read_tensors(tmp_path / "one")
    assert tensors["b"].tolist() == [1, 1, 1] and metadata["map"] == "ä\u2028"


def test_metadata_of_every_character_is_sorted_in_place(tmp_path):
    names = [chr(i) for i in range(1, 0x3000, 7)] + ['"', "\\", "/", "\x7f", "\U0001f600"]
    write_tensors(tmp_path / "t", {}, dict.fromkeys(names, '"\\/\n\x1f\x7f\u2028'))
    data = (tmp_path / "t").read_bytes()
    found = json.loads(data[8:])["__metadata__"]
    assert list(found) == sorted(set(names)) and set(found.values()) == {'"\\/\n\x1f\x7f\u2028'}
    write_tensors(tmp_path / "none", {"a": torch.ones(1)})
    assert read_tensors(tmp_path / "none")[1] == {}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_and_is_not_changed(tmp_path, mask, monkeypatch):
    before = os.umask(mask)
    try:
        monkeypatch.setattr(os, "umask", None)  # changing it, if only for a moment, changes other threads' files
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
        write_text(tmp_path / "t.txt", "a")
        for name in ("t.safetensors", "t.txt"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask
    finally:
        monkeypatch.undo()
        os.umask(before)


def test_what_is_called_like_a_temporary_file_stands_in_nobodys_way(tmp_path):
    taken = tmp_path / f".{os.getpid():x}.{threading.get_ident():x}.0.tmp"
    taken.mkdir()
    (tmp_path / taken.name.replace(".0.", ".1.")).write_text("somebody's", encoding="utf-8")
    write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a" and taken.is_dir()
    (tmp_path / "r" / "state" / ".folder.tmp").mkdir(parents=True)
    for _ in range(2):
        with RunFolder.open(tmp_path, "r", resume="auto") as folder:
            assert (folder.path / "state" / ".folder.tmp").is_dir()


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_text(path, "a")
    assert path.read_text(encoding="utf-8") == "a"
    with pytest.raises(WriteFailed, match=r"n cannot be written \(File name too long\)"):
        write_text(tmp_path / ("n" * 256), "a")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_is_needed_and_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        WriteFailed, match=r"free disk space under .* is \d+ MB, too small for value.json \(3 MB\)"
    ) as e:
        write_json(path, "x" * 3 * 2**20)
    assert e.value.errno == number and isinstance(e.value, ValueError) and isinstance(e.value, OSError)
    assert json.loads(path.read_bytes()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: There is not enough space on the disk. (os error 112)", errno.ENOSPC),
        ("I/O error: Read-only file system (os error 30)", 30),
        ("something else", None),
    ],
)
def test_errors_from_rust_are_understood(tmp_path, windows, text, number):
    from safetensors import SafetensorError

    with pytest.raises(WriteFailed) as found, writing(tmp_path / "t.safetensors", 5 * 2**20):
        raise SafetensorError(text)
    assert found.value.errno == number and "t.safetensors" in str(found.value)
    assert ("(5 MB). Make room" in str(found.value)) == (number == errno.ENOSPC)


def test_other_errors_of_writing_name_the_file_and_the_reason(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for write in (write_json, append_text):
        with pytest.raises(WriteFailed, match=r"file/a.json cannot be written \((Not a directory|File exists)\)"):
            write(tmp_path / "file" / "a.json", "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteFailed, match=r"folder cannot be written \(Is a directory\)"):
        write_tensors(tmp_path / "folder", {"a": torch.ones(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


class HalfWritten:
    """A file of which a full disk takes the first half of what is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if len(data) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[: len(data) // 2])


def test_a_row_that_a_full_disk_cut_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_text(path, '{"step": 1}\n')
    monkeypatch.setattr(files, "open", lambda *a, **more: HalfWritten(open(*a, **more)), raising=False)
    with pytest.raises(WriteFailed, match=r"too small for rows.jsonl"):
        append_text(path, '{"step": 2}\n')
    monkeypatch.undo()
    assert path.read_bytes() == b'{"step": 1}\n'
    append_text(path, '{"step": "ä"}\n')
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": "ä"}\n'


def test_a_status_is_told_on_a_full_disk_too(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.set_status("running", 7)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    folder.set_status("failed", 7, message="the disk is full " * 20)
    assert folder.status() == {"state": "failed", "step": 7, "message": "the disk is full " * 20}
    overwrite(tmp_path / "status.json", '{"state": "failed", "step": 8}')
    assert folder.status() == {"state": "failed", "step": 8}


def test_halves_of_characters_are_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\udce9"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "caf\udce9"}


def test_a_file_that_another_program_holds_for_a_moment_is_replaced(tmp_path, monkeypatch, windows):
    path = tmp_path / "status.json"
    write_json(path, 1)
    calls = refusing(monkeypatch, 2)
    write_json(path, 2)
    assert len(calls) == 3 and json.loads(path.read_bytes()) == 2


def test_a_file_that_another_program_keeps_is_named_and_stays(tmp_path, monkeypatch, windows):
    path = tmp_path / "latest.safetensors"
    write_tensors(path, {"a": torch.ones(1)})
    refusing(monkeypatch, 10**6)
    with pytest.raises(WriteFailed, match=r"latest.safetensors cannot be written .*Close programs that have it open"):
        write_tensors(path, {"a": torch.zeros(1)})
    monkeypatch.undo()
    assert read_tensors(path)[0]["a"].tolist() == [1] and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_elsewhere_a_refusal_is_final_at_once(tmp_path, monkeypatch):
    calls = refusing(monkeypatch, 10**6)
    with pytest.raises(WriteFailed, match="cannot be written"):
        write_text(tmp_path / "a.txt", "a")
    assert len(calls) == 1


def test_folders_are_renamed_as_patiently(tmp_path, monkeypatch, windows):
    from retune.training.runs.index import delete_run

    with RunFolder.open(tmp_path, "r", resume="auto") as folder:
        folder.claim({"kind": "lora"}, {})
    calls = refusing(monkeypatch, 2)
    move_aside(tmp_path / "r")
    assert len(calls) == 3 and (tmp_path / "r (old 1)").is_dir()
    calls.clear()
    delete_run(tmp_path, "r (old 1)")
    assert len(calls) == 3 and [p.name for p in tmp_path.iterdir()] == [".locks"]
    (tmp_path / "new").mkdir()
    calls.clear()
    replace(tmp_path / "new", tmp_path / "newer")
    assert len(calls) == 3 and (tmp_path / "newer").is_dir()


def test_a_status_is_read_while_it_is_replaced(tmp_path, monkeypatch, windows):
    folder = RunFolder(tmp_path)
    folder.set_status("running", 3)
    import io

    real, refused = io.open, []

    def opened(*arguments, **more):
        if not refused and str(arguments[0]).endswith("status.json"):
            refused.append(arguments)
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")
        return real(*arguments, **more)

    monkeypatch.setattr(io, "open", opened)
    assert folder.status() == {"state": "running", "step": 3} and refused


def test_paths_longer_than_windows_takes_get_its_prefix(windows, monkeypatch):
    monkeypatch.setattr(os.path, "abspath", str)
    short, long = "C:\\output\\retune", "C:\\" + "a" * 230
    assert str(long_path(short)) == short and str(long_path(long)) == "\\\\?\\" + long
    assert str(long_path(long, 5)) == long  # its files have short names
    assert str(long_path("\\\\server\\share\\" + "a" * 240)) == "\\\\?\\UNC\\server\\share\\" + "a" * 240
    assert str(long_path("\\\\?\\" + long)) == "\\\\?\\" + long
    folder = RunFolder("C:\\" + "a" * 170)  # TensorBoard's names are long
    assert str(folder.latest).startswith("\\\\?\\C:\\aaa") and folder.name.endswith("aaa")


def test_elsewhere_paths_stay_as_they_are(tmp_path):
    assert long_path(tmp_path / ("a" * 300)) == tmp_path / ("a" * 300)


NAMES = [
    "CON",
    "con",
    "con.txt",
    "Con .tar.gz",
    "NUL",
    "aux.safetensors",
    "COM1",
    "lpt9.x",
    "COM0",
    "COM\u00b9",
    "LPT\u00b3.a",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_devices_are_refused(tmp_path, name, windows):
    assert is_reserved(name)
    with pytest.raises(ValueError, match="no device's name on Windows such as CON or LPT1"):
        check_run_name(name)
    with pytest.raises(WriteFailed, match="is a device's name on Windows"):
        write_text(tmp_path / name, "a")


@pytest.mark.parametrize(
    "name", ["a.", "a ", "a..b", "..", ".", "a/b", "a\\b", "", "a" * 101, "\u732b" * 84, "a:b", "a\n"]
)
def test_names_that_are_no_folder_everywhere_are_refused(name):
    with pytest.raises(ValueError, match="expected a plain folder name"):
        check_run_name(name)


@pytest.mark.parametrize(
    "name", ["console", "con1", "CONFIG.x", "a.con", "COM10", "COM", "nul-1", "\u732b" * 83, "a" * 100]
)
def test_names_like_those_of_devices_are_fine(name):
    check_run_name(name)
    assert not is_reserved(name)


def test_a_file_is_written_by_a_spawned_process_too(tmp_path):
    """Windows and macOS start processes anew: nothing that a module knows comes along."""
    spawn = multiprocessing.get_context("spawn").Process(target=write_json, args=(tmp_path / "a.json", [1]))
    spawn.start()
    spawn.join(300)
    assert spawn.exitcode == 0 and json.loads((tmp_path / "a.json").read_bytes()) == [1]


def test_a_body_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
