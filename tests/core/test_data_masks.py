"""Masks follow their image through resize, crop and mirror, from alpha channels and from files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from retune.training.data.cache import LatentCache
from retune.training.data.dataset import FolderConfig, from_images, load_folder
from retune.training.data.examples import Mask
from retune.training.data.images import ImageError


def picture(path, size=(64, 48), mode="RGB"):
    """Every pixel's value is its place: x in red, y in green; and x in alpha."""
    width, height = size
    x = Image.linear_gradient("L").rotate(90).resize(size)
    y = Image.linear_gradient("L").resize(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = (x, y, y, x)[: len(mode)]
    Image.merge(mode, bands).save(path)
    path.with_suffix(".txt").write_text("a picture", encoding="utf-8")
    return x, y


def values(image):
    return torch.from_numpy(np.array(image)).flatten()


def load(folder, **options):
    return load_folder(FolderConfig(folder=folder, resolution=64, **options))


def test_masks_are_found_by_onetrainers_name_or_in_a_folder(tmp_path, caplog):
    for name in ("a", "b", "c", "sub/a"):
        picture(tmp_path / f"{name}.png")
    Image.new("L", (64, 48), 255).save(tmp_path / "a-masklabel.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (64, 48), 51).save(tmp_path / "masks" / "b.jpg", quality=100)
    Image.new("L", (64, 48), 0).save(tmp_path / "masks" / "a.png")  # the label beside the image goes first
    dataset = load(tmp_path, masks="files")
    assert [e.name for e in dataset.examples] == ["a.png", "b.png", "c.png", "sub/a.png"]
    a, b, c, d = dataset.examples
    assert c.mask is None and d.mask is None and c.load_mask() is None
    assert a.load_mask().shape == (1, a.height, a.width) and a.load_mask().min() > 0.999
    torch.testing.assert_close(b.load_mask().mean(), torch.tensor(0.2), atol=0.005, rtol=0)
    assert "masks: 2 of 4 images" in dataset.report and not caplog.text


def test_without_the_option_nothing_changes(tmp_path):
    picture(tmp_path / "a.png")
    before = load(tmp_path)
    (tmp_path / "masks").mkdir()
    Image.new("L", (64, 48), 255).save(tmp_path / "a-masklabel.png")
    masked = load(tmp_path, masks="files")
    assert masked.fingerprint != before.fingerprint
    bare = tuple(replace(e, mask=None) for e in masked.examples)
    assert replace(masked, examples=bare).fingerprint == before.fingerprint
    plain = load(tmp_path)
    assert plain.fingerprint == before.fingerprint
    assert "masks not used, since masks is 'none': 1 (a-masklabel.png)" in plain.report


def test_alpha_is_a_mask_where_there_is_one(tmp_path, caplog):
    x, _ = picture(tmp_path / "a.png", mode="RGBA")
    picture(tmp_path / "b.png")
    first, second = load(tmp_path, masks="alpha", buckets=False).examples
    assert second.mask is None and first.mask.alpha
    (own,) = load(tmp_path, masks="alpha", buckets=False).examples[:1]
    whole = own.mask.pixels()
    assert whole.shape == (1, 48, 64)
    assert torch.equal((whole[0] * 255).round().byte().flatten(), values(x))
    (tmp_path / "a.png").unlink()
    load(tmp_path, masks="alpha")
    assert "no image has one; all count whole" in caplog.text


def test_a_turned_photo_has_a_turned_mask(tmp_path):
    x, _ = picture(tmp_path / "a.png", mode="RGBA")
    with Image.open(tmp_path / "a.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.png", exif=exif)
    (example,) = load(tmp_path, masks="alpha").examples
    assert example.mask.pixels().shape == (1, 64, 48) == (1, *example.pixels().shape[1:])
    turned = values(x.rotate(-90, expand=True))
    assert torch.equal((example.mask.pixels()[0] * 255).round().byte().flatten(), turned)


def test_a_mask_of_another_size_is_skipped_or_stops(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    Image.new("L", (48, 64), 255).save(tmp_path / "a-masklabel.png")
    dataset = load(tmp_path, masks="files")
    assert [e.name for e in dataset.examples] == [
        "b.png"
    ] and "this mask is 48 x 64, its image 64 x 48" in dataset.report
    with pytest.raises(ImageError, match="a-masklabel.png: this mask is 48 x 64"):
        load(tmp_path, masks="files", on_bad_image="stop")


def test_a_mask_that_changes_or_goes_is_noticed(tmp_path):
    picture(tmp_path / "a.png")
    Image.new("L", (64, 48), 255).save(tmp_path / "a-masklabel.png")
    (example,) = load(tmp_path, masks="files").examples
    Image.new("L", (64, 48), 0).save(tmp_path / "a-masklabel.png")
    with pytest.raises(ImageError, match="it changed since the data set was loaded"):
        example.load_mask()
    (tmp_path / "a-masklabel.png").unlink()
    with pytest.raises(ImageError, match="could be read before but not now"):
        example.load_mask()


def own_mask(count=2, size=(72, 40), **options):
    """Images whose mask is their own red channel."""
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=draw) for _ in range(count)]
    data = from_images(images, ["x"], 32, buckets=False, **options)
    examples = tuple(replace(e, mask=Mask(e.key, source=e.source[:1])) for e in data.examples)
    return replace(data, examples=examples)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_is_cut_and_mirrored_as_its_image(tmp_path, crop, flip):
    cache = LatentCache(tmp_path, lambda images: torch.nn.functional.avg_pool2d(images, 8), "vae")
    for i, example in enumerate(own_mask().examples):
        latent, mask = (
            get(example, flip, crop=crop, generator=torch.Generator().manual_seed(i)) for get in (cache.get, cache.mask)
        )
        assert mask.shape == (1, 4, 4) and mask.dtype == torch.float32
        torch.testing.assert_close(mask, latent[:1])


def test_masks_are_cached_with_the_latents_and_apart_from_them(tmp_path):
    data = own_mask(flip=True)
    made = []
    cache = LatentCache(tmp_path, lambda images: made.append(1) or images[:, :, ::8, ::8], "vae")
    assert cache.fill(data) == 8 and cache.fill(data) == 0 and len(made) == 4
    plain = replace(data, examples=tuple(replace(e, mask=None) for e in data.examples))
    assert cache.fill(plain) == 0 and cache.mask(plain.examples[0]) is None
    (example, *_) = data.examples
    first = cache.mask(example, True)
    gone = replace(example, mask=replace(example.mask, source=torch.full((1, 1, 1), torch.nan)))
    assert torch.equal(cache.mask(gone, True), first)  # from the cache, not from the source
    cache.mask(example).zero_()
    assert cache.mask(example).any()
    coarse = LatentCache(tmp_path, None, "vae", downscale=16)
    torch.testing.assert_close(coarse.mask(example)[0], torch.nn.functional.avg_pool2d(cache.mask(example), 2)[0])


def test_masks_of_given_images_are_those_of_files(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (48, 64))
    for name, size in {"a": (64, 48), "b": (48, 64)}.items():
        Image.linear_gradient("L").rotate(90).resize(size).save(tmp_path / f"{name}-masklabel.png")
    files = load(tmp_path, masks="files", flip=True).examples
    images, masks = [e.pixels() for e in files], [e.mask.pixels()[0] for e in files]
    given = from_images(images, ["a picture"], 64, masks=masks, flip=True)
    for one, other in zip(given.examples, files, strict=True):
        assert (one.width, one.height) == (other.width, other.height) and one.mask.pixels().any()
        for flip in (False, True):
            assert torch.equal(one.load_mask(flip=flip), other.load_mask(flip=flip))
    assert "masks: 2 of 2 images" in given.report
    plain = from_images(images, ["a picture"], 64, flip=True)
    assert plain.fingerprint != given.fingerprint and all(e.mask is None for e in plain.examples)


def test_one_mask_for_all_and_batches_of_masks(caplog):
    images, mask = torch.rand(2, 16, 24, 3), torch.zeros(16, 24)
    mask[:, :8] = 1
    for masks in ([mask], [mask[None]], [torch.stack([mask, mask])], [mask, mask[None]]):
        found = [e.load_mask() for e in from_images([images], ["x"], masks=masks).examples]
        assert all(torch.equal(one, mask[None]) for one in found) and not caplog.text
    from_images([images], ["x"], masks=[mask, 0 * mask])
    assert "mask 2 is black" in caplog.text
    with torch.inference_mode():
        (example, _) = from_images([images.clone()], ["x"], masks=[mask.clone()]).examples
    assert not example.mask.source.is_inference()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.ones(3, 16, 24)], "there are 3 masks for 2 images; expected one for all or one per image"),
        ([torch.ones(64, 64)], "mask 1 is 64 x 64, its image 24 x 16; expected the same size. Load Image gives"),
        ([torch.full((16, 24), 255.0)], "mask values are not finite or far outside 0..1"),
        ([torch.ones(16, 24).byte()], "mask is .*uint8; expected a float"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        from_images([torch.rand(2, 16, 24, 3)], ["x"], masks=masks)


def test_the_options_are_checked(tmp_path):
    for options, message in (({"masks": "depth"}, "masks is 'depth'"), ({"weight": -1.0}, "weight is -1.0")):
        with pytest.raises(ValueError, match=message):
            FolderConfig(folder=tmp_path, **options)
