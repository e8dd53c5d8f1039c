"""Valid files made wrong, in the ways that downloads, editors, other tools and attackers make them wrong.

Every choice is drawn from the generator that is handed in, so a case is a function of its seed and number.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from odd import changed, overwritten
from PIL import Image, PngImagePlugin
from tensor_files import (
    archive,
    header,
    many_tensors,
    metadata,
    pickled,
    tensor_dtype,
    tensor_name,
    tensor_shape,
    tensor_values,
)

SAFETENSORS, PICKLES = (".safetensors", ".sft"), (".pt", ".pth", ".bin", ".ckpt")
ODD_TEXTS = (b"\xed\xa0\x80", b"\xff\xfe", b"\0", b"\xe2\x80\xa8", b"\xc2\x85", b"\r", b"\x1b[2J", b'"', b"\\(")
JSONS, TEXTS, IMAGES = (".json",), (".txt", ".tsv", ".jsonl", ".caption"), (".png", ".jpg", ".webp", ".gif")


def mutate(path: Path, random: Random, others: Sequence[Path]) -> str:
    """Makes a valid file wrong in one way, or in two; returns which.

    Args:
        path: The file, changed in place.
        random: Draws what is changed.
        others: Valid files of other kinds.
    """
    mutators = [random.choice(_mutators(path))]
    if random.random() < 0.25:  # the second one finds a file that may be broken already
        mutators.append(random.choice((overwritten, _container)))
    for mutator in mutators:
        if path.is_file() and not path.is_symlink():
            mutator(path, random, others)
    return " + ".join(mutator.__name__.strip("_") for mutator in mutators)


def _mutators(path: Path) -> list[Callable[[Path, Random, Sequence[Path]], None]]:
    suffix = path.suffix.lower()
    kinds = [
        (SAFETENSORS, [tensor_name, tensor_shape, tensor_dtype, tensor_values, metadata, header, many_tensors]),
        (PICKLES, [pickled, pickled, pickled, archive]),
        (JSONS, [_json, _json, _json]),
        (TEXTS, [_text, _text, _lines]),
        (IMAGES, [_image, _image]),
    ]
    own = [mutator for suffixes, mutators in kinds if suffix in suffixes for mutator in mutators]
    return [*own, *own, overwritten, overwritten, _container]


def _container(path: Path, random: Random, others: Sequence[Path]) -> None:
    """Something else under the file's name."""
    data = path.read_bytes()
    path.unlink()
    match random.randrange(9):
        case 0:
            path.write_bytes(b"")
        case 1:
            os.mkfifo(path)
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/tty")))
        case 4:
            path.symlink_to("nowhere")
        case 5:
            path.symlink_to(path.name)
        case 6:
            path.write_bytes(gzip.compress(data))
        case 7:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")
        case _:
            shutil.copy(random.choice(others), path)


def _json(path: Path, random: Random, others: Sequence[Path]) -> None:
    value = changed(json.loads(path.read_bytes()), random)
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")


def _text(path: Path, random: Random, others: Sequence[Path]) -> None:
    data = path.read_bytes()
    odd = random.choice(
        (
            b"\xed\xa0\x80",
            b"\xff\xfe",
            b"\0",
            b"\xe2\x80\xa8",
            b"\xc2\x85",
            b"\r",
            b"\x1b[2J",
            b"a" * 10**6,
            b'"',
            b"\\(",
        )
    )
    at = random.choice((0, len(data), random.randrange(len(data) + 1)))
    whole = (data.decode("utf-8", "replace").encode("utf-16"), b"\xef\xbb\xbf" + data, b" \n\t\n", b"\n" * 10**6)
    path.write_bytes(random.choice((data[:at] + odd + data[at:],) * 3 + whole))


def _lines(path: Path, random: Random, others: Sequence[Path]) -> None:
    """A line dropped, doubled or, where it is JSON, changed."""
    lines = path.read_bytes().split(b"\n")
    number = random.randrange(len(lines))
    try:
        lines[number] = json.dumps(changed(json.loads(lines[number]), random)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        lines[number : number + 1] = random.choice(([], lines[number : number + 1] * 2, [b"{"], [b"a\tb\tc"]))
    path.write_bytes(b"\n".join(lines))


def _image(path: Path, random: Random, others: Sequence[Path]) -> None:
    """A sound or nearly sound picture of an unusual kind under the file's name."""
    choice = random.randrange(9)
    if choice == 8:
        return _text_chunk(path, random)
    image = (
        lambda: Image.new("1", (13_300, 13_300)),
        lambda: Image.new("L", (1, 30_000)),
        lambda: Image.new("RGB", (20_000, 2)),
        lambda: Image.new("I;16", (16, 16)),
        lambda: Image.new("P", (16, 16)),
        lambda: Image.new("LA", (16, 16)),
        lambda: Image.new("RGBA", (1, 1)),
        lambda: Image.new("CMYK", (16, 16)),
    )[choice]()
    image.save(path, format="TIFF" if image.mode == "CMYK" else "PNG")


def _text_chunk(path: Path, random: Random) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(
        random.choice(("sd-ti-embedding", "parameters", "icc")), "A" * random.choice((100, 2 * 10**6)), zip=True
    )
    Image.new("RGB", (16, 16)).save(path, format="PNG", pnginfo=info, icc_profile=random.randbytes(40))
