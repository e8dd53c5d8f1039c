"""Disk caches: keyed by content, whole or absent, read back even the first time."""

import errno
import logging
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from retune.training.data.cache import LatentCache, TextCache, trim_padding
from retune.training.data.dataset import from_images
from retune.training.models.protocols import Conditioning


class Encoder:
    """Average pooling to an eighth, counting its calls."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(tuple(images.shape))
        return torch.nn.functional.avg_pool2d(images, 8) * 2 - 1


class Words:
    """Each word's letters as a token of width 4, padded to 6 tokens under a mask; counts its calls."""

    def __init__(self, padded=True):
        self.texts = []
        self.padded = padded

    def __call__(self, texts):
        self.texts += texts
        words = texts[0].split()
        rows = [[len(word), ord(word[0]), ord(word[-1]), 1.0] for word in words]
        rows += [[9.0] * 4] * (6 - len(words)) if self.padded else []
        mask = torch.tensor([[i < len(words) for i in range(len(rows))]]) if self.padded else None
        return Conditioning(torch.tensor([rows]).half(), torch.tensor([[float(len(words))]]).half(), mask)


def dataset(count=3, **options):
    draw = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 16, 24, generator=draw) for _ in range(count)]
    return from_images(pictures, ["x"], **options)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_latents_equal_the_encoders_and_are_read_from_disk(tmp_path):
    data, encode = dataset(flip=True), Encoder()
    cache = LatentCache(tmp_path, encode, "vae")
    assert cache.fill(data) == 6
    assert encode.shapes == [(1, 3, 16, 24)] * 6
    for example in data.examples:
        for flip in (False, True):
            latent = cache.get(example, flip)
            assert latent.shape == (3, 2, 3) and latent.dtype == torch.float32
            assert torch.equal(latent, Encoder()(example.load(flip=flip)[None])[0])
    assert len(encode.shapes) == 6 and cache.fill(data) == 0
    assert all(len(path.parent.name) == 2 and path.stem.startswith(path.parent.name) for path in files(tmp_path))
    assert len(files(tmp_path)) == 6


def test_another_process_finds_the_same_bits(tmp_path):
    (example, *_) = dataset().examples
    encode = Encoder()
    first = LatentCache(tmp_path, lambda images: encode(images).to(torch.bfloat16), "vae").get(example)
    second = LatentCache(tmp_path, encode, "vae").get(example)
    assert len(encode.shapes) == 1 and torch.equal(first, second)


def test_what_is_returned_is_the_callers_own(tmp_path):
    (example, *_) = dataset().examples
    cache = LatentCache(tmp_path, Encoder(), "vae")
    before = cache.get(example).clone()
    cache.get(example).zero_()
    assert torch.equal(cache.get(example), before)


def test_keys_separate_encoder_content_size_and_mirroring(tmp_path):
    data = dataset(2)
    example, other = data.examples
    LatentCache(tmp_path, Encoder(), "one").get(example)
    LatentCache(tmp_path, Encoder(), "two").get(example)
    cache = LatentCache(tmp_path, Encoder(), "one")
    cache.get(example, True)
    cache.get(other)
    cache.get(replace(example, width=16))
    assert len(files(tmp_path)) == 5
    cache.get(replace(example, caption="another", name="renamed", repeats=7))
    assert len(files(tmp_path)) == 5


def test_random_crops_bypass_the_cache(tmp_path):
    data = dataset(1, resolution=8, buckets=False, crop="random")
    cache = LatentCache(tmp_path, Encoder(), "vae")
    assert cache.fill(data) == 0
    (example,) = data.examples

    def latent(seed):
        return cache.get(example, crop="random", generator=torch.Generator().manual_seed(seed))

    assert latent(0).shape == (3, 1, 1) and torch.equal(latent(0), latent(0))
    assert len({tuple(latent(seed).flatten().tolist()) for seed in range(20)}) > 3
    assert files(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flipped bit", "another file"])
def test_a_damaged_entry_is_encoded_again_with_a_warning(tmp_path, caplog, damage):
    (example, *_) = dataset().examples
    expected = LatentCache(tmp_path, Encoder(), "vae").get(example)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    broken = {
        "cut": data[:-20],
        "empty": b"",
        "zeros": bytes(len(data)),
        "flipped bit": data,
        "another file": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    }
    path.write_bytes(broken[damage])
    encode = Encoder()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(LatentCache(tmp_path, encode, "vae").get(example), expected)
    assert len(encode.shapes) == 1 and path.name in caplog.text and "damaged" in caplog.text
    assert LatentCache(tmp_path, Encoder(), "vae").fill(dataset()) == 2


def test_latents_that_are_not_finite_are_refused_with_the_images_name(tmp_path):
    (example, *_) = dataset().examples
    with pytest.raises(ValueError, match="latent of image 1 is not finite"):
        LatentCache(tmp_path, lambda images: images[:, :, ::8, ::8] / 0, "vae").get(example)
    assert files(tmp_path) == []


def test_progress_counts_what_is_there_already_and_cancel_leaves_whole_files(tmp_path):
    data, calls = dataset(4), []

    def cancel(done, total, text):
        calls.append((done, total, text))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LatentCache(tmp_path, Encoder(), "vae").fill(data, cancel)
    assert [call[:2] for call in calls] == [(0, 4), (1, 4), (2, 4)] and "image 2" in calls[2][2]
    assert len(files(tmp_path)) == 2 and all(path.suffix == ".safetensors" for path in files(tmp_path))
    calls.clear()
    encode = Encoder()
    assert LatentCache(tmp_path, encode, "vae").fill(data, lambda *call: calls.append(call)) == 2
    assert [call[:2] for call in calls] == [(2, 4), (3, 4), (4, 4)] and len(encode.shapes) == 2


def test_equal_images_are_encoded_once(tmp_path):
    picture = torch.rand(8, 8, 3)
    encode = Encoder()
    assert LatentCache(tmp_path, encode, "vae").fill(from_images([picture] * 5, ["x"])) == 1


def test_too_small_a_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(2**30, 2**30, 2**20))
    encode = Encoder()
    with pytest.raises(OSError, match="1 MiB free; expected about 64 MiB") as caught:
        LatentCache(tmp_path, encode, "vae").fill(dataset())
    assert caught.value.errno == errno.ENOSPC
    assert len(encode.shapes) == 1 and files(tmp_path) == []


def test_a_disk_that_fills_up_says_what_is_needed_and_keeps_what_is_done(tmp_path, monkeypatch):
    from retune.training.data import store as module

    written, write = [], module.write_bytes

    def full_after_two(path, data):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, data)

    monkeypatch.setattr(module, "write_bytes", full_after_two)
    with pytest.raises(OSError, match="Free space or choose another folder") as caught:
        LatentCache(tmp_path, Encoder(), "vae").fill(dataset(4))
    assert caught.value.errno == errno.ENOSPC and len(files(tmp_path)) == 2


def test_memory_is_bounded(tmp_path):
    data, encode = dataset(5), Encoder()
    cache = LatentCache(tmp_path, encode, "vae", memory=3 * 2 * 3 * 4 * 2)
    cache.fill(data)
    values = [cache.get(example) for example in data.examples]
    for path in files(tmp_path):
        path.unlink()
    assert len(encode.shapes) == 5
    for example, value in list(zip(data.examples, values, strict=True))[-2:]:
        assert torch.equal(cache.get(example), value)
    assert len(encode.shapes) == 5
    cache.get(data.examples[0])
    assert len(encode.shapes) == 6


def test_values_are_usable_in_training_although_cached_in_inference_mode(tmp_path):
    (example, *_) = dataset().examples
    with torch.inference_mode():
        cache, texts = LatentCache(tmp_path, Encoder(), "vae"), TextCache(tmp_path, Words(), "clip")
        latent, text = cache.get(example), texts.get("a b")
    latent, text = cache.get(example), texts.get("a b")
    weight = torch.ones(3, 2, 3, requires_grad=True)
    (weight * latent).sum().backward()
    assert torch.equal(weight.grad, latent)
    assert not text.context.is_inference()


def test_what_a_step_asks_for_is_encoded_as_a_filled_cache_is(tmp_path):
    """A step in half precision computes under autocast."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    multiply = lambda values: torch.nn.functional.linear(values, weight)  # noqa: E731
    (example,) = dataset(1).examples
    encode = {
        "latent": lambda images: multiply(images.movedim(1, -1)).movedim(-1, 1)[..., ::8, ::8],
        "text": lambda texts: Conditioning(multiply(torch.full((1, 2, 3), len(texts[0]) / 7))),
    }
    found = []
    for name, entered in (("step", True), ("filled", False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=entered):
            latents = LatentCache(tmp_path / name, encode["latent"], "vae")
            texts = TextCache(tmp_path / name, encode["text"], "clip")
            found.append((latents.get(example, False), texts.get("a dog").context, texts.get_in_memory("cat").context))
            assert torch.is_autocast_enabled("cpu") == entered
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_text_is_stored_without_padding_alone_and_in_fp32(tmp_path):
    encode = Words()
    cache = TextCache(tmp_path, encode, "t5")
    assert cache.fill(["a dog", "", "a", "a dog"][:1] + ["a", "a dog"]) == 2
    found = cache.get("a dog")
    assert found.context.shape == (1, 2, 4) and found.context.dtype == torch.float32 and found.mask is None
    assert found.context[0, 1].tolist() == [3, ord("d"), ord("g"), 1] and found.pooled.tolist() == [[2.0]]
    assert encode.texts == ["a dog", "a"]
    again = TextCache(tmp_path, encode, "t5").get("a dog")
    assert torch.equal(again.context, found.context) and encode.texts == ["a dog", "a"]
    TextCache(tmp_path, encode, "other").get("a dog")
    assert encode.texts == ["a dog", "a", "a dog"]


def test_text_without_mask_or_pooled(tmp_path):
    cache = TextCache(tmp_path, lambda texts: Conditioning(torch.ones(1, 77, 8)), "clip")
    found = cache.get("anything")
    assert found.context.shape == (1, 77, 8) and found.pooled is None and found.mask is None


def test_trim_padding_keeps_holes_and_at_least_one_token():
    context = torch.arange(4.0).reshape(1, 4, 1)
    holed = trim_padding(Conditioning(context, None, torch.tensor([[True, False, True, False]])))
    assert holed.context.flatten().tolist() == [0, 1, 2] and holed.mask.tolist() == [[True, False, True]]
    nothing = trim_padding(Conditioning(context, None, torch.zeros(1, 4, dtype=torch.bool)))
    assert nothing.context.shape == (1, 1, 1) and nothing.mask.tolist() == [[False]]


def test_a_text_encoder_that_returns_several_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch of 2 for one caption"):
        TextCache(tmp_path, lambda texts: Conditioning(torch.ones(2, 3, 4)), "clip").get("x")
    with pytest.raises(ValueError, match="embedding of 'x' is not finite"):
        TextCache(tmp_path, lambda texts: Conditioning(torch.full((1, 3, 4), torch.inf)), "clip").get("x")
