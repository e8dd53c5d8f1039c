"""Data at size: work ahead in order, caches that go on after a kill with the same bytes, little in memory."""

import hashlib
import json
import os
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch
from retune.training.common.parallel import computed_ahead, worker_count
from retune.training.common.rng import generator
from retune.training.data.cache import LatentCache, TextCache
from retune.training.data.examples import Dataset, Example, content_key
from retune.training.data.order import BatchOrder
from retune.training.models.protocols import Conditioning


def test_results_come_in_order_and_few_are_computed_ahead():
    begun, most, handed_out, lock = 0, 0, 0, threading.Lock()

    def square(number):
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - handed_out)
        return number * number

    for expected, found in enumerate(computed_ahead(square, iter(range(500)), workers=3)):
        assert found == expected * expected
        handed_out += 1
    assert handed_out == 500 and most <= 7
    assert list(computed_ahead(square, [])) == [] and 1 <= worker_count() <= 8


def test_an_error_is_raised_in_its_place():
    def inverse(number):
        return 1 / number

    found = computed_ahead(inverse, [4, 2, 0, 1], workers=4)
    assert [next(found), next(found)] == [0.25, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(found)


def examples(count, side=32):
    random = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, side, side, generator=random) for _ in range(count)]
    return Dataset(tuple(Example(f"{i:032x}", f"number {i}", side, side, p, f"{i}") for i, p in enumerate(pixels)))


def encode(image):
    return torch.nn.functional.avg_pool2d(image, 8)[:, :1]


def files_of(folder):
    paths = sorted(path for path in folder.rglob("*.safetensors"))
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_cache_that_is_cancelled_goes_on_with_the_same_bytes(tmp_path):
    data, seen = examples(40), []

    def cancel(done, total, text):
        seen.append((done, total))
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LatentCache(tmp_path / "a", encode, "f").fill(data, cancel)
    assert seen == [(done, 40) for done in range(18)] and len(files_of(tmp_path / "a")) == 17
    assert LatentCache(tmp_path / "a", encode, "f").fill(data) == 23
    assert LatentCache(tmp_path / "b", encode, "f").fill(data) == 40
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert all(path.parts[0] == path.name[:2] for path in files_of(tmp_path / "a"))


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_a_cache_whose_process_is_killed_goes_on_with_the_same_bytes(tmp_path):
    data = examples(30)

    def die(done, total, text):
        if done == 11:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        LatentCache(tmp_path / "a", encode, "f").fill(data, die)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert LatentCache(tmp_path / "a", encode, "f").fill(data) == 19
    LatentCache(tmp_path / "b", encode, "f").fill(data)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_two_processes_fill_one_cache_at_once(tmp_path):
    data, children = examples(60), []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                LatentCache(tmp_path / "a", encode, "f").fill(data)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert LatentCache(tmp_path / "b", encode, "f").fill(data) == 60
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert all(path.is_dir() or path.suffix == ".safetensors" for path in (tmp_path / "a").rglob("*"))


def test_few_pictures_are_in_memory_while_a_cache_is_filled(tmp_path):
    live, most, lock = 0, 0, threading.Lock()

    class Counted(Example):
        def load(self, **options):
            nonlocal live, most
            with lock:
                live += 1
                most = max(most, live)
            return super().load(**options)

    def count(done, total, text):
        nonlocal live
        live -= 1 if done else 0

    data = examples(100, 16)
    counted = replace(
        data, examples=tuple(Counted(**{f: getattr(e, f) for f in e.__match_args__}) for e in data.examples)
    )
    assert LatentCache(tmp_path, encode, "f").fill(counted, count) == 100
    assert most <= 2 * worker_count() + 1


def test_captions_that_recur_are_encoded_once(tmp_path):
    asked = []

    def encode_text(captions):
        asked.extend(captions)
        return Conditioning(torch.full((1, 2, 3), float(len(captions[0]))))

    cache, progress = TextCache(tmp_path, encode_text, "f"), []
    captions = ["a", "bb", "a", "ccc", "bb"]
    assert cache.fill(iter(captions), lambda done, total, text: progress.append((done, total))) == 3
    assert asked == ["a", "bb", "ccc"] and progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert TextCache(tmp_path, encode_text, "f").fill(captions) == 0


def former_batches(buckets, batch_size, seed, epoch):
    """The batches of an epoch as lists of names, as versions up to 0.4 made them."""
    random, batches = generator(seed, "order", epoch), []
    for bucket in buckets:
        order = torch.randperm(len(bucket), generator=random).tolist()
        for start in range(0, len(bucket), batch_size):
            batches.append([bucket[order[place % len(order)]] for place in range(start, start + batch_size)])
    return [batches[i] for i in torch.randperm(len(batches), generator=random).tolist()]


def test_the_order_of_earlier_versions_stays():
    sizes = {(64, 64): 7, (64, 96): 1, (96, 64): 5}
    rows = [(size, f"{size}{i}") for size, count in sizes.items() for i in range(count)]
    picture = torch.zeros(3, 8, 8)
    data = Dataset(tuple(Example(name, name, *size, picture, name) for size, name in rows), repeats=2)
    buckets = [[name for s, name in rows if s == size for _ in range(2)] for size in sorted(sizes)]
    order = BatchOrder(data, 3, seed=5)
    for epoch in (0, 1, 7):
        found = [
            [slot.example.name for slot in order.batch(epoch * order.steps_per_epoch + i + 1)]
            for i in range(order.steps_per_epoch)
        ]
        assert found == former_batches(buckets, 3, 5, epoch)
    assert order.largest().example.width * order.largest().example.height == 96 * 64


def test_the_fingerprint_of_earlier_versions_stays():
    data = replace(examples(3), repeats=2, crop="random")
    data = replace(data, examples=(*data.examples[:2], replace(data.examples[2], weight=0.5, caption='é "x"')))
    rows = [[e.key, e.caption, e.width, e.height, e.repeats] for e in data.examples]
    rows[2].extend([0.5, None, False])
    assert data.fingerprint == content_key(json.dumps([rows, "random", False, 2]).encode())
    none = Dataset(())
    assert none.fingerprint == content_key(json.dumps([[], "center", False, 1]).encode())
