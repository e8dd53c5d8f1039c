"""Folders of captioned images, good and bad."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from retune.training.data.captions import caption_from_name
from retune.training.data.dataset import FolderConfig, load_folder
from retune.training.data.folder import folder_repeats
from retune.training.data.images import ImageError


def draw(path: Path, size=(64, 64), color="red", caption: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def load(folder: Path, **options):
    return load_folder(FolderConfig(folder=folder, **{"resolution": 64, **options}))


def captions(folder: Path, **options) -> dict[str, str]:
    return {e.name: e.caption for e in load(folder, **options).examples}


def metadata(folder: Path, *rows: dict | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_txt_captions_of_all_kinds(tmp_path):
    draw(tmp_path / "b.PNG", caption="two\nlines \r\n here ")
    draw(tmp_path / "a.jpg", caption="plain")
    draw(tmp_path / "sub" / "c.webp")
    (tmp_path / "sub" / "c.caption").write_text("déjà vu", encoding="utf-8")
    draw(tmp_path / "d.bmp")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "d.caption").write_text("not this one", encoding="utf-8")
    assert captions(tmp_path) == {
        "a.jpg": "plain",
        "b.PNG": "two lines here",
        "d.bmp": "with a mark",
        "sub/c.webp": "déjà vu",
    }


def test_example_holds_content_hash_and_pixels(tmp_path):
    path = draw(tmp_path / "a.png", (100, 50), caption="x")
    dataset = load(tmp_path, resolution=128)
    (example,) = dataset.examples
    assert example.key == hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    assert example.source == path and example.width > example.height
    image = example.load()
    assert image.shape == (3, example.height, example.width)
    torch.testing.assert_close(image, torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand_as(image))


def test_a_file_that_changed_or_went_is_noticed(tmp_path):
    path = draw(tmp_path / "a.png", caption="x")
    (example,) = load(tmp_path).examples
    draw(path, color="blue")
    with pytest.raises(ImageError, match="a.png.*changed"):
        example.load()
    path.unlink()
    with pytest.raises(ImageError, match="a.png"):
        example.load()


def test_order_does_not_depend_on_when_files_were_written(tmp_path):
    names = ["b/1.png", "a.png", "b.png", "B.png", "a/z.png"]
    for folder, order in (("one", names), ("two", names[::-1])):
        for name in order:
            draw(tmp_path / folder / name, caption=name)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert [e.name for e in one.examples] == ["B.png", "a.png", "a/z.png", "b.png", "b/1.png"]
    assert one.examples == two.examples and one.fingerprint == two.fingerprint


def test_hidden_files_and_archive_leftovers_are_left_out(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    for name in (".hidden.png", ".cache/b.png", "__MACOSX/c.png"):
        draw(tmp_path / name, caption="y")
    assert list(captions(tmp_path)) == ["a.png"]


def test_missing_captions_stop_with_names_or_are_skipped_with_a_count(tmp_path):
    draw(tmp_path / "a.png", caption="x")
    draw(tmp_path / "b.png")
    draw(tmp_path / "c.png", caption=" \n ")
    with pytest.raises(ValueError, match=r"2 of 3 images .*no caption \(b.png, c.png\)"):
        load(tmp_path)
    dataset = load(tmp_path, on_missing_caption="skip")
    assert [e.name for e in dataset.examples] == ["a.png"]
    assert "skipped: 2 files" in dataset.report and "b.png: it has no caption" in dataset.report


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt is damaged or no UTF-8 text .byte 1.*Save it as UTF-8"):
        load(tmp_path)


def test_file_names_as_captions(tmp_path):
    draw(tmp_path / "a_red_circle_003.png")
    draw(tmp_path / "big dog (2).jpg")
    assert list(captions(tmp_path, captions="file name").values()) == ["a red circle", "big dog"]
    draw(tmp_path / "0001.png")
    with pytest.raises(ValueError, match="0001.png.*words in the file name"):
        load(tmp_path, captions="file name")


@pytest.mark.parametrize(
    ("name", "caption"),
    [("cat-12", "cat"), ("model3", "model3"), ("a__b", "a b"), ("12", ""), ("x_1_2", "x 1"), ("7 dwarfs", "7 dwarfs")],
)
def test_caption_from_name(name, caption):
    assert caption_from_name(Path(f"{name}.png")) == caption


def test_one_caption_for_all(tmp_path):
    draw(tmp_path / "a.png", caption="not used")
    draw(tmp_path / "b.png")
    assert captions(tmp_path, captions="one caption", caption=" a toy ") == {"a.png": "a toy", "b.png": "a toy"}
    with pytest.raises(ValueError, match="caption is empty"):
        load(tmp_path, captions="one caption", caption=" ")


def test_metadata_in_the_hugging_face_layout(tmp_path):
    for name in ("b.png", "sub/a.png", "c.png"):
        draw(tmp_path / name)
    metadata(
        tmp_path,
        {"file_name": "sub/a.png", "text": "in a folder"},
        "",
        {"file_name": "b.png", "caption": "größer", "extra": 1},
        {"file_name": "b.png", "text": "a second caption"},
    )
    dataset = load(tmp_path, captions="metadata.jsonl")
    assert [(e.name, e.caption) for e in dataset.examples] == [
        ("b.png", "größer"),
        ("b.png", "a second caption"),
        ("sub/a.png", "in a folder"),
    ]
    assert "not in metadata.jsonl: 1 of 3 images (c.png)" in dataset.report


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ('["a.png", "x"]', "line 2: no file_name"),
        ('{"text": "x"}', "line 2: no file_name"),
        ('{"file_name": 3, "text": "x"}', "line 2: no file_name"),
        ('{"file_name": "a.png", "text": ["x"]}', "line 2: the caption is"),
    ],
)
def test_bad_metadata_lines_are_named(tmp_path, line, message):
    draw(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "x"}, line)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, captions="metadata.jsonl")


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/x.png", "C:\\x.png", "..\\secret.png"])
def test_metadata_cannot_leave_the_folder(tmp_path, name):
    draw(tmp_path / "secret.png")
    draw(tmp_path / "data" / "a.png")
    metadata(tmp_path / "data", {"file_name": name, "text": "x"})
    with pytest.raises(ValueError, match="line 1: .*outside the folder"):
        load(tmp_path / "data", captions="metadata.jsonl")


def test_metadata_naming_a_missing_file(tmp_path):
    draw(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "y"})
    dataset = load(tmp_path, captions="metadata.jsonl")
    assert len(dataset) == 1 and "gone.png: no such file" in dataset.report
    with pytest.raises(ImageError, match="gone.png"):
        load(tmp_path, captions="metadata.jsonl", on_bad_image="stop")


def test_metadata_missing(tmp_path):
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match="metadata.jsonl is missing"):
        load(tmp_path, captions="metadata.jsonl")


def test_folder_missing_empty_or_without_images(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images; found nothing"):
        load(tmp_path)
    for name in ("a.txt", "b.txt", "c.heic", "README"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"found 2 x .txt, 1 x no extension, 1 x .heic. Expected .*\.png"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "a.txt")


def test_broken_images_are_skipped_with_a_count_or_stop(tmp_path, caplog):
    draw(tmp_path / "good.png", caption="x")
    truncate(draw(tmp_path / "cut.jpg", (300, 300), caption="x"))
    (tmp_path / "fake.png").write_text("no image", encoding="utf-8")
    (tmp_path / "fake.txt").write_text("x", encoding="utf-8")
    dataset = load(tmp_path)
    assert [e.name for e in dataset.examples] == ["good.png"]
    assert "skipped: 2 files" in dataset.report and "cut.jpg: it cannot be decoded" in dataset.report
    assert "fake.png: it is not an image" in dataset.report and "cut.jpg" in caplog.text
    with pytest.raises(ImageError, match="cut.jpg"):
        load(tmp_path, on_bad_image="stop")
    (tmp_path / "good.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable image.*good.png: the file is empty"):
        load(tmp_path)


def test_buckets_or_squares(tmp_path):
    draw(tmp_path / "wide.png", (1920, 1080), caption="x")
    draw(tmp_path / "tall.png", (1080, 1920), caption="x")
    draw(tmp_path / "square.png", (900, 900), caption="x")
    sizes = {e.name: (e.width, e.height) for e in load(tmp_path, resolution=512).examples}
    assert sizes == {"wide.png": (640, 384), "tall.png": (384, 640), "square.png": (512, 512)}
    squares = load(tmp_path, resolution=136, buckets=False)
    assert {(e.width, e.height) for e in squares.examples} == {(136, 136)}


def test_a_rotated_photo_lands_in_the_upright_bucket(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1920, 1080)).save(tmp_path / "phone.jpg", exif=exif)
    (example,) = load(tmp_path, resolution=512, captions="one caption", caption="x").examples
    assert (example.width, example.height) == (384, 640) and example.pixels().shape == (3, 1920, 1080)


def test_kohya_folder_repeats(tmp_path):
    draw(tmp_path / "10_cat" / "a.png", caption="x")
    draw(tmp_path / "10_cat" / "deeper" / "b.png", color="blue", caption="x")
    draw(tmp_path / "c.png", color="green", caption="x")
    dataset = load(tmp_path, repeats=2)
    assert [e.repeats for e in dataset.examples] == [10, 10, 1] and len(dataset) == 42
    assert "10_cat 1 x 10" in dataset.report and "42 shown per epoch" in dataset.report


@pytest.mark.parametrize(
    ("name", "repeats"),
    [("3_a/x.png", 3), ("5_b/2_a/x.png", 2), ("2024_trip/x.png", 1), ("0_a/x.png", 1), ("4_x.png", 1)],
)
def test_folder_repeats(name, repeats):
    assert folder_repeats(name) == repeats


def test_fingerprint_covers_content_caption_size_and_options(tmp_path):
    path = draw(tmp_path / "a.png", caption="x")
    base = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == base and len(base) == 32
    changed = {load(tmp_path, **o).fingerprint for o in ({"crop": "random"}, {"flip": True}, {"repeats": 2})}
    changed.add(load(tmp_path, resolution=128).fingerprint)
    path.with_suffix(".txt").write_text("y", encoding="utf-8")
    changed.add(load(tmp_path).fingerprint)
    draw(path, color="blue", caption="x")
    changed.add(load(tmp_path).fingerprint)
    assert len(changed | {base}) == 7


def test_report(tmp_path):
    draw(tmp_path / "a.png", (128, 128), caption="one two three")
    draw(tmp_path / "copy.png", (128, 128), caption="one two three")
    draw(tmp_path / "small.png", (20, 10), caption="four")
    report = load(tmp_path, resolution=128, flip=True).report
    assert report.splitlines()[0] == f"{tmp_path.name}: 3 images (center crop, mirrored at random)"
    assert "    128 x 128       2  ########################" in report.splitlines()
    assert "captions: 2 different; 1 to 3 words, median 3" in report
    assert "duplicates: 1 image present more than once: a.png = copy.png" in report
    assert "enlarged: 1 image smaller than the target size: small.png (20 x 10)" in report
    assert "skipped" not in report


def test_progress_is_called_for_every_file_and_may_cancel(tmp_path):
    for i in range(3):
        draw(tmp_path / f"{i}.png", caption="x")
    calls = []
    load_folder(FolderConfig(folder=tmp_path, resolution=64), lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)] and "0.png" in calls[0][2]

    def cancel(done, total, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_folder(FolderConfig(folder=tmp_path, resolution=64), cancel)


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": 100},
        {"captions": "csv"},
        {"crop": "left"},
        {"repeats": 0},
        {"on_bad_image": "ignore"},
        {"on_missing_caption": ""},
    ],
)
def test_bad_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*expected"):
        FolderConfig(folder=tmp_path, **options)
