"""Nothing of a folder vanishes in silence: what is no image of the data set is named, with the reason."""

import json
import os

import pytest
from PIL import Image
from retune.training.data.captions import MAX_LENGTH
from retune.training.data.dataset import FolderConfig, from_images, load_folder
from retune.training.data.folder import find_images
from retune.training.data.prompts import Prompt, PromptOrder, read_prompts


def draw(path, kind=None, caption="a red circle"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path, kind)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def load(folder, **options):
    return load_folder(FolderConfig(folder=folder, resolution=64, **options))


def names(folder, **options):
    return [example.name for example in load(folder, **options).examples]


def test_pictures_of_other_endings_are_used_and_others_named(tmp_path, caplog):
    for name in ("a.jpg", "b.JPEG", "c.jfif", "d.JPE", "e.Png", "f.apng"):
        draw(tmp_path / name, "PNG" if "n" in name.lower() else "JPEG")
    for name in ("g.nef", "h.NEF", "i.mp4", "j.psd", "k.svg", "l.npz", "m.jpg_large", "README"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "z.txt").write_text("nobody's caption", encoding="utf-8")
    data = load(tmp_path)
    assert [e.name for e in data.examples] == ["a.jpg", "b.JPEG", "c.jfif", "d.JPE", "e.Png", "f.apng"]
    lines = (
        "left out: 2 .nef files (g.nef, h.NEF), raw photographs: develop them",
        "left out: 1 .mp4 file (i.mp4), videos",
        "left out: 1 .psd file (j.psd), work files with layers",
        "left out: 1 .svg file (k.svg), drawings without pixels",
        "left out: 1 .npz file (l.npz), not pictures",
        "left out: 1 .jpg_large file (m.jpg_large), not pictures",
        "left out: 1 file (README), not pictures",
        "captions without a picture: 1 (z.txt)",
    )
    assert all(line in data.report and line in caplog.text for line in lines)


def test_heic_is_used_with_its_package_and_named_without(tmp_path, monkeypatch):
    from retune.training.data import listing, picture_files

    draw(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "b.txt").write_text("x", encoding="utf-8")
    without = tuple(ending for ending in picture_files.endings() if ending != ".heic")
    monkeypatch.setattr(listing, "endings", lambda: without)
    report = load(tmp_path).report
    assert "left out: 1 .heic file (b.heic), opened with the package pillow-heif only" in report
    assert "captions without a picture: 1 (b.txt)" in report
    monkeypatch.setattr(listing, "endings", lambda: (*without, ".heic"))
    assert "b.heic: it is not an image of a kind that is read: it is HEIC" in load(tmp_path).report


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_folders_behind_links_are_read_once_and_loops_end(tmp_path):
    draw(tmp_path / "elsewhere" / "5_cats" / "a.png")
    draw(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere" / "5_cats")
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "data" / "broken.txt").write_text("x", encoding="utf-8")
    data = load(tmp_path / "data")
    found = {e.name: e.repeats for e in data.examples}
    assert found in ({"again/a.png": 1, "b.png": 1}, {"b.png": 1, "linked/5_cats/a.png": 5})
    assert "up: it is a link to a folder that is read already" in data.report
    assert "broken.png: no such file" in data.report


def test_onetrainers_labels_are_no_pictures(tmp_path, caplog):
    draw(tmp_path / "a.png"), draw(tmp_path / "B.PNG", "PNG")
    before = load(tmp_path).fingerprint
    for name in ("a-masklabel.png", "B-masklabel.PNG", "a-condlabel.png"):
        draw(tmp_path / name, "PNG", caption=None)
    data = load(tmp_path)
    assert data.fingerprint == before and len(data) == 2
    assert "masks not used, since masks is 'none': 3 (B-masklabel.PNG, a-condlabel.png, a-masklabel.png)" in data.report
    assert find_images(tmp_path) == ["B.PNG", "a.png"]
    assert "masks: 2 of 2 images" in load(tmp_path, masks="files").report


def test_other_sources_of_captions_say_what_they_leave(tmp_path):
    draw(tmp_path / "a red circle.png")
    report = load(tmp_path, captions="file name").report
    assert "texts not used, since captions is 'file name': 1 (a red circle.txt)" in report
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a red circle.png", "text": "x"}', encoding="utf-8")
    assert "texts not used, since captions is 'txt': 1 (metadata.jsonl)" in load(tmp_path).report
    assert "metadata.jsonl (" not in load(tmp_path, captions="metadata.jsonl").report


def test_upper_case_captions_are_found(tmp_path):
    draw(tmp_path / "A.PNG", "PNG", caption=None)
    (tmp_path / "A.TXT").write_text("loud", encoding="utf-8")
    assert [e.caption for e in load(tmp_path).examples] == ["loud"]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_named_as_well_as_it_goes(tmp_path):
    draw(tmp_path / "a.png")
    odd = os.fsencode(tmp_path) + b"/b\xff.png"
    with open(odd, "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    report = load(tmp_path).report
    assert "b?.png: its name is not UTF-8" in report and report.encode()


def test_lines_end_at_newline_bytes_only(tmp_path):
    texts = ["a red circle\u2028on the left", "a blue\u2029square", "two\u0085stars", "a\x0cb\x1cc", "x, y\n(z)"]
    for number, _ in enumerate(texts):
        draw(tmp_path / f"{number}.png", caption=None)
    rows = [json.dumps({"file_name": f"{n}.png", "text": t}, ensure_ascii=False) for n, t in enumerate(texts)]
    cleaned = [" ".join(text.split()) for text in texts]
    for end in ("\n", "\r\n"):
        (tmp_path / "metadata.jsonl").write_bytes(("\ufeff" + end.join(rows) + end + end).encode())
        assert [e.caption for e in load(tmp_path, captions="metadata.jsonl").examples] == cleaned
        prompts = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
        (tmp_path / "prompts.jsonl").write_bytes(end.join(prompts).encode())
        assert [prompt.text for prompt in read_prompts(tmp_path / "prompts.jsonl")] == cleaned
        (tmp_path / "prompts.txt").write_bytes(end.join(texts[:4]).encode())
        assert [prompt.text for prompt in read_prompts(tmp_path / "prompts.txt")] == texts[:4]


def test_the_nodes_cut_their_texts_alike():
    from retune.training.common.text import filled_lines, text_lines

    assert text_lines("a\u2028b\r\n\r\n c\x0cd ") == ["a\u2028b", "", "c\x0cd"]
    assert filled_lines("\n a\u2028b\n\n") == ["a\u2028b"] and filled_lines("") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "a.png", "text": "half \\ud83d"}', "line 1: a text in it has half a character"),
        ("[" * 50_000, "line 1: it is nested too deeply"),
        ('{"file_name": "a.png", "text": "x", "n": ' + "1" * 5000 + "}", "line 1: .*digits"),
        (json.dumps({"file_name": "a.png", "text": "w " * 20_000}), "metadata.jsonl, line 1 has 39999 characters"),
        (json.dumps({"file_name": "a\0.png", "text": "x"}), "no usable image"),
    ],
)
def test_odd_captions_are_refused_by_name(tmp_path, line, words):
    draw(tmp_path / "a.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load(tmp_path, captions="metadata.jsonl")


@pytest.mark.parametrize("ending", [".txt", ".caption", ".TXT"])
def test_a_text_that_is_no_caption_is_refused_by_its_own_name(tmp_path, ending):
    draw(tmp_path / "a.png", caption=None)
    (tmp_path / f"a{ending}").write_text("w " * MAX_LENGTH, encoding="utf-8")
    with pytest.raises(ValueError, match=f"a{ending} has {2 * MAX_LENGTH - 1} characters .*; expected at most"):
        load(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices in the file system")
def test_texts_that_never_end_are_refused(tmp_path):
    draw(tmp_path / "a.png", caption=None)
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt is a pipe or a device"):
        load(tmp_path)
    os.rename(tmp_path / "a.txt", tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="metadata.jsonl is a pipe or a device"):
        load(tmp_path, captions="metadata.jsonl")
    os.rename(tmp_path / "metadata.jsonl", tmp_path / "p.txt")
    with pytest.raises(ValueError, match="p.txt is a pipe or a device"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "z.txt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="z.txt is a pipe or a device"):
        read_prompts(tmp_path / "z.txt")


def test_prompt_weights_that_are_no_numbers_are_refused(tmp_path):
    for weight in ("NaN", "Infinity", "-1", "1e400", "1" + "0" * 400, "true", '"2"'):
        (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a", "weight": {weight}}}', encoding="utf-8")
        with pytest.raises(ValueError, match="p.jsonl, line 1: weight is .*expected a number above 0"):
            read_prompts(tmp_path / "p.jsonl")
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match="weights of prompts are not all finite"):
            PromptOrder([Prompt("a"), Prompt("b", bad)], 1, 0)
    (tmp_path / "p.txt").write_bytes(b"x" * (1 << 20))
    with pytest.raises(ValueError, match="p.txt, line 1 is longer than"):
        read_prompts(tmp_path / "p.txt")


def test_captions_of_given_images_are_checked_too():
    import torch

    with pytest.raises(ValueError, match="the caption of image 2 has half a character"):
        from_images([torch.rand(3, 8, 8)] * 2, ["a", "b\ud83d"])
    with pytest.raises(ValueError, match=f"expected at most {MAX_LENGTH}"):
        from_images([torch.rand(3, 8, 8)], ["x" * (MAX_LENGTH + 1)])
    with pytest.raises(ValueError, match="caption has half a character"):
        FolderConfig(folder="x", captions="one caption", caption="\udc00")


def test_a_picture_that_is_cut_to_a_strip_is_named(tmp_path):
    Image.new("RGB", (1, 30_000)).save(tmp_path / "thread.png")
    draw(tmp_path / "a.png")
    data = load(tmp_path, captions="one caption", caption="x")
    assert "cropped: 1 image to less than half: thread.png (1 x 30000)" in data.report
    assert data.examples[1].load().shape[0] == 3


def test_the_command_line_says_what_is_left_out(tmp_path, caplog):
    from retune.training.commands.score import prompts_for

    picture = draw(tmp_path / "a.png", caption=None)
    picture.with_suffix(".caption").write_text("a\ncat", encoding="utf-8")
    (tmp_path / "b.mp4").write_bytes(b"x")
    assert prompts_for(None, [picture], needed=True) == ["a cat"]
    (tmp_path / "prompts.list").write_bytes("a\u2028b\r\n".encode())
    assert prompts_for(tmp_path / "prompts.list", [picture], needed=True) == ["a\u2028b"]
    assert find_images(tmp_path) == ["a.png"] and "b.mp4" in caplog.text
