"""Image files of every common mode become the same float tensor."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile
from retune.training.data import picture_files
from retune.training.data.images import (
    ImageError,
    check_image,
    contact_sheet,
    flatten_alpha,
    image_size,
    load_image,
    resize_and_crop,
    save_png,
)

RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def corners() -> Image.Image:
    """4 x 2 pixels: left half red, right half blue, the top left pixel green."""
    image = Image.new("RGB", (4, 2), "red")
    image.paste("blue", (2, 0, 4, 2))
    image.putpixel((0, 0), (0, 255, 0))
    return image


def noisy(width=40, height=30, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixel(image: torch.Tensor, x: int, y: int) -> tuple[float, ...]:
    return tuple(image[:, y, x].tolist())


def test_rgb_png_is_exact(tmp_path):
    noisy().save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.shape == (3, 30, 40) and loaded.dtype == torch.float32 and loaded.is_contiguous()
    expected = torch.from_numpy(np.array(noisy())).permute(2, 0, 1) / 255
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """The stored image is the upright one under the inverse of the orientation, so all eight load the same."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = corners() if orientation == 1 else corners().transpose(inverse[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    assert (loaded.shape[2], loaded.shape[1]) == image_size(tmp_path / "a.png") == (4, 2)
    assert check_image((tmp_path / "a.png").read_bytes(), "a.png") == (4, 2)
    assert (pixel(loaded, 0, 0), pixel(loaded, 0, 1), pixel(loaded, 3, 1)) == (GREEN, RED, BLUE)


def test_alpha_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (255, 0, 0, alpha))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert pixel(loaded, 0, 0) == (1, 1, 1) and pixel(loaded, 2, 0) == RED
    assert pixel(loaded, 1, 0) == pytest.approx((1, 0.8, 0.8), abs=1 / 255)


def test_grey_and_grey_with_alpha(tmp_path):
    Image.new("L", (2, 2), 51).save(tmp_path / "grey.png")
    Image.new("LA", (2, 2), (0, 102)).save(tmp_path / "alpha.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert torch.equal(load_image(tmp_path / "grey.png"), torch.full((3, 2, 2), 51 / 255))
    torch.testing.assert_close(load_image(tmp_path / "alpha.png"), torch.full((3, 2, 2), 0.6), atol=1 / 255, rtol=0)
    assert torch.equal(load_image(tmp_path / "bit.png"), torch.ones(3, 2, 2))


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=0)
    plain, clear = load_image(tmp_path / "plain.png"), load_image(tmp_path / "clear.png")
    assert (pixel(plain, 0, 0), pixel(plain, 1, 0)) == (RED, BLUE)
    assert (pixel(clear, 0, 0), pixel(clear, 1, 0)) == ((1, 1, 1), BLUE)


def test_rgb_with_a_transparent_colour(tmp_path):
    corners().save(tmp_path / "a.png", transparency=(255, 0, 0))
    loaded = load_image(tmp_path / "a.png")
    assert (pixel(loaded, 0, 0), pixel(loaded, 1, 1), pixel(loaded, 3, 0)) == (GREEN, (1, 1, 1), BLUE)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_without_a_profile(tmp_path, suffix):
    """No ink is white, full yellow and magenta are red, full black is black, in JPEG's inverted storage too."""
    for name, inks, expected in [
        ("white", (0, 0, 0, 0), (1, 1, 1)),
        ("red", (0, 255, 255, 0), RED),
        ("black", (0, 0, 0, 255), (0, 0, 0)),
    ]:
        Image.new("CMYK", (16, 16), inks).save(tmp_path / f"{name}.{suffix}")
        loaded = load_image(tmp_path / f"{name}.{suffix}")
        assert loaded.shape == (3, 16, 16)
        assert pixel(loaded, 8, 8) == pytest.approx(expected, abs=2 / 255)


def test_rgb_profile_is_converted_to_srgb(tmp_path):
    """A profile with red and green primaries swapped turns stored green into red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    description = profile.index("sRGB".encode("utf-16-be"))
    profile[description : description + 8] = "mine".encode("utf-16-be")
    Image.new("RGB", (2, 2), (0, 255, 0)).save(tmp_path / "a.png", icc_profile=bytes(profile))
    Image.new("RGBA", (2, 2), (0, 255, 0, 255)).save(tmp_path / "b.png", icc_profile=bytes(profile))
    for name in ("a.png", "b.png"):
        assert pixel(load_image(tmp_path / name), 0, 0) == pytest.approx(RED, abs=0.02)


def test_srgb_profile_changes_nothing_and_a_broken_one_warns(tmp_path, caplog):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noisy().save(tmp_path / "srgb.png", icc_profile=srgb)
    noisy().save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    noisy().save(tmp_path / "plain.png")
    plain = load_image(tmp_path / "plain.png")
    assert torch.equal(load_image(tmp_path / "srgb.png"), plain) and not caplog.records
    assert torch.equal(load_image(tmp_path / "broken.png"), plain)
    assert "broken.png" in caplog.text and "profile" in caplog.text


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 13107], [32768, 52428, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    loaded = load_image(tmp_path / f"a.{suffix}")
    expected = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, -1, -1)
    torch.testing.assert_close(loaded, expected, atol=1e-7, rtol=0)


def test_integer_and_float_grey_out_of_range_are_refused(tmp_path):
    Image.fromarray(np.array([[70000]], dtype=np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.array([[0.25, 1.0]], dtype=np.float32)).save(tmp_path / "good.tif")
    Image.fromarray(np.array([[7.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert pixel(load_image(tmp_path / "good.tif"), 0, 0) == (0.25, 0.25, 0.25)
    for name in ("int.tif", "float.tif"):
        with pytest.raises(ImageError, match=f"{name}.*grey values"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100, **lossless)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 2
    assert pixel(load_image(tmp_path / f"a.{suffix}"), 3, 3) == RED


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noisy(200, 150).save(path)
    whole = path.read_bytes()
    assert check_image(whole, path) == (200, 150)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ImageError, match=f"cut.{suffix}"):
        load_image(path)
    with pytest.raises(ImageError, match=f"cut.{suffix}"):
        check_image(path.read_bytes(), path)


def test_truncated_files_are_refused_although_pillow_was_told_to_tolerate_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noisy(200, 150).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError):
        load_image(tmp_path / "cut.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"hello, this is no image", "not an image"), (None, "no such file")]
)
def test_what_is_no_image_is_named(tmp_path, data, reason):
    path = tmp_path / "bad.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ImageError, match=f"bad.png: .*{reason}") as caught:
        load_image(path)
    assert caught.value.path == path and isinstance(caught.value, ValueError)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noisy(64, 64).save(tmp_path / "big.png")
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ImageError, match="big.png: it is 64 x 64, .*expected at most"):
        load_image(tmp_path / "big.png")


def test_save_png_rounds_clamps_and_leaves_nothing_else(tmp_path):
    image = torch.tensor([[[-1.0, 0.5]], [[2.0, 0.2]], [[0.0, 1.0]]])
    save_png(image, tmp_path / "deep" / "a.png")
    with Image.open(tmp_path / "deep" / "a.png") as saved:
        assert saved.getpixel((0, 0)) == (0, 255, 0) and saved.getpixel((1, 0)) == (128, 51, 255)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="shape"):
        save_png(torch.zeros(1, 4, 4), tmp_path / "b.png")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    save_png(torch.zeros(3, 2, 2), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError):
        save_png(torch.ones(3, 0, 2), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_resize_and_crop_leaves_the_right_size_alone_and_crops_the_middle():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_and_crop(image, 16, 16), image)
    assert torch.equal(resize_and_crop(image, 16, 8), image[:, 4:12])
    assert torch.equal(resize_and_crop(image, 8, 16, flip=True), image[:, :, 4:12].flip(-1))


def test_resize_and_crop_is_antialiased_like_pillow():
    """Halving noise: close to Pillow's bicubic with its antialiasing, far from plain point sampling."""
    picture = noisy(64, 64)
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    expected = torch.from_numpy(np.array(picture.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    assert (resize_and_crop(image, 16, 16) - expected).abs().max() < 2 / 255
    assert (image[:, ::4, ::4] - expected).abs().max() > 0.3


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (7, 9), (333, 80), (64, 64)])
def test_resize_and_crop_covers_any_size(size):
    image = torch.full((3, size[1], size[0]), 0.5)
    fitted = resize_and_crop(image, 64, 48, "random", torch.Generator().manual_seed(1))
    assert fitted.shape == (3, 48, 64)
    torch.testing.assert_close(fitted, torch.full((3, 48, 64), 0.5))


def test_random_crop_follows_its_generator_and_reaches_both_ends():
    image = torch.arange(20.0).div(20).expand(3, 8, 20)
    starts = []
    for seed in range(200):
        fitted = resize_and_crop(image, 8, 8, "random", torch.Generator().manual_seed(seed))
        assert torch.equal(fitted, resize_and_crop(image, 8, 8, "random", torch.Generator().manual_seed(seed)))
        starts.append(round(fitted[0, 0, 0].item() * 20))
    assert set(starts) == set(range(13))
    with pytest.raises(ValueError, match="generator"):
        resize_and_crop(image, 8, 8, "random")
    with pytest.raises(ValueError, match="crop is 'middle'"):
        resize_and_crop(image, 8, 8, "middle")


def test_flatten_alpha_of_batches():
    image = torch.zeros(2, 4, 1, 1)
    image[1, 3] = 0.25
    assert flatten_alpha(image).flatten(1).tolist() == [[1, 1, 1], [0.75, 0.75, 0.75]]
    assert flatten_alpha(torch.full((1, 1, 1), 0.3)).shape == (3, 1, 1)


def test_progressive_jpeg_of_a_large_photo_is_checked_to_its_end():
    data = io.BytesIO()
    noisy(900, 700).save(data, "JPEG", progressive=True, quality=80)
    whole = data.getvalue()
    assert check_image(whole, "a.jpg") == (900, 700)
    with pytest.raises(ImageError):
        check_image(whole[: int(len(whole) * 0.9)], "a.jpg")


def test_contact_sheet_fills_rows_and_leaves_the_rest_black():
    images = [torch.full((3, 2, 3), (i + 1) / 10) for i in range(5)]
    sheet = contact_sheet(images)
    assert sheet.shape == (3, 4, 12)
    assert torch.allclose(sheet[0, ::2, ::3], torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0, 0, 0]]))
    assert torch.equal(sheet[:, 1], sheet[:, 0])
    assert contact_sheet(images[:2]).shape == (3, 2, 6)
