"""Picture files of every kind and in every state: used, or refused by name without harm."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from retune.training.common.foreign import FileError
from retune.training.data import images, picture_files, pixels
from retune.training.data.images import check_image, decode_alpha, decode_image, load_image, resize_and_crop


def noise(mode="RGB", width=53, height=37) -> Image.Image:
    random = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    values = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return values.convert("RGB").quantize(40) if mode == "P" else values.convert(mode)


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"),
        ("a.JPE", "JPEG"),
        ("a.mpo", "MPO"),
        ("a.apng", "PNG"),
        ("a.jp2", "JPEG2000"),
        ("a.qoi", "QOI"),
    ]
    + [("a.tga", "TGA"), ("a.ppm", "PPM"), ("a.dib", "DIB"), ("a.pcx", "PCX"), ("a.sgi", "SGI")],
)
def test_what_pillow_opens_is_read(tmp_path, name, kind):
    (tmp_path / name).write_bytes(encoded(noise(), kind))
    assert any(name.lower().endswith(ending) for ending in picture_files.endings())
    with Image.open(tmp_path / name) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / name), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_bands_give_the_same_pixels_in_every_orientation(monkeypatch, mode, kind):
    for turned in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turned
        data = encoded(noise(mode), kind, exif=exif)
        whole, alpha = decode_image(data, "a"), mode != "I;16" and decode_alpha(data, "a")
        assert check_image(data, "a") == (whole.shape[2], whole.shape[1]) == ((53, 37) if turned < 5 else (37, 53))
        monkeypatch.setattr(pixels, "BAND", 300)
        assert torch.equal(decode_image(data, "a"), whole)
        assert mode == "I;16" or torch.equal(decode_alpha(data, "a"), alpha)
        monkeypatch.undo()


def test_a_picture_beyond_the_largest_comes_at_half_its_size(monkeypatch):
    data = encoded(noise("RGBA"))
    whole, alpha = decode_image(data, "a"), decode_alpha(data, "a")
    monkeypatch.setattr(pixels, "MEMORY", (4 + 12 // 2) * 53 * 37)
    monkeypatch.setattr(pixels, "BAND", 300)
    for half, full in ((decode_image(data, "a"), whole), (decode_alpha(data, "a"), alpha)):
        torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(full, 2))
    assert check_image(data, "a") == (53, 37)
    monkeypatch.undo()
    assert [pixels._factor(n * 1_000_000) for n in (1, 61, 62, 102, 150, 200)] == [1, 1, 1, 2, 3, 4]


def test_long_texts_and_profiles_of_a_png_do_not_spoil_its_pixels(caplog):
    plain, long = encoded(noise()), zlib.compress(b"x" * 3_000_000)
    chunks = {b"zTXt": b"Raw profile type xmp\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"iCCP": b"big\0\0"}
    before = PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    for kind, start in chunks.items():
        data = with_chunk(plain, kind, start + long)
        assert check_image(data, "a.png") == (53, 37)
        assert torch.equal(decode_image(data, "a.png"), decode_image(plain, "a.png"))
    assert "its colour profile cannot be used" in caplog.text
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    endless = with_chunk(plain, b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    with pytest.raises(FileError, match="a.png: it cannot be decoded"):
        check_image(endless, "a.png")


@pytest.mark.parametrize("size", [(20_000, 10_001), (1 << 20 | 1, 1)])
def test_a_picture_beyond_the_limits_is_refused_before_it_is_decoded(size):
    header = struct.pack(">II", *size) + b"\1\0\0\0\0"
    png = with_chunk(b"\x89PNG\r\n\x1a\n" + bytes(25), b"IDAT", zlib.compress(bytes(8)))
    data = (
        png[:8] + struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png[33:]
    )
    with pytest.raises(FileError, match=rf"a.png: it is {size[0]} x {size[1]}, .*expected at most 200 megapixels"):
        check_image(data, "a.png")


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices in the file system")
def test_pipes_and_devices_are_refused_and_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name, words in {
        "pipe.png": "it is a pipe or a device",
        "zero.png": "it is a pipe or a device",
        "loop.png": "it cannot be opened",
        "gone.png": "no such file",
    }.items():
        for read in (load_image, images.image_size):
            with pytest.raises(picture_files.ImageError, match=f"{name}: {words}"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(64), "it is HEIC, which needs the package pillow-heif"),
        (b"\xff\x0a" + bytes(64), "it is JPEG XL, which needs the package pillow-jxl-plugin"),
        (b"<!DOCTYPE html><html>Not found</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        (b"8BPS" + bytes(64), "it is a Photoshop file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not an image"),  # Pillow would run Ghostscript
        (b"hello, this is no image", "it is not an image, or its start is damaged"),
        (b"\0\0\2" + bytes(9) + b"\x02\0\x02\0\x18\0" + bytes(64), "it is not an image"),  # passes for a TGA
    ],
)
def test_what_a_file_is_instead_of_a_picture_is_said(monkeypatch, data, words):
    known = {name: opener for name, opener in Image.OPEN.items() if name not in ("HEIF", "JXL")}
    picture_files.formats()
    monkeypatch.setattr(Image, "OPEN", known)
    with pytest.raises(FileError, match=f"photo.png: .*{words}"):
        decode_image(data, "photo.png")


@pytest.mark.parametrize("shape", [(40, 7), (5, 60), (30, 30), (200, 9)])
def test_a_part_of_a_long_picture_is_what_the_whole_resize_shows(monkeypatch, shape):
    down, across = (torch.linspace(0, 0.5, length) for length in shape)
    image = (down[:, None] + across).expand(3, -1, -1)
    pixel = max(0.5 / (length * max(64 / shape[1], 48 / shape[0])) for length in shape)  # the ramp's rise in the result
    for crop, flip in (("center", False), ("random", True)):
        drawn = [torch.Generator().manual_seed(7) for _ in range(2)]
        whole = resize_and_crop(image, 64, 48, crop, drawn[0], flip)
        monkeypatch.setattr(images, "LARGEST", 0)
        monkeypatch.setattr(images, "SPARE", 0)
        part = resize_and_crop(image, 64, 48, crop, drawn[1], flip)
        monkeypatch.undo()
        assert part.shape == whole.shape and part.is_contiguous()
        assert (part - whole).abs().max() < pixel


def test_a_picture_of_one_by_30000_pixels_needs_no_memory_to_speak_of():
    image = torch.linspace(0, 1, 30_000).expand(3, 1, -1).transpose(1, 2).contiguous()
    shown = resize_and_crop(image, 256, 1024)
    assert shown.shape == (3, 1024, 256)
    torch.testing.assert_close(shown, torch.full_like(shown, 0.5), atol=1e-3, rtol=0)
