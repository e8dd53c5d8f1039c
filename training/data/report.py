"""A text report on a data set: images, sizes, captions, duplicates and skipped files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from ..common.text import count_noun, first_few
from .buckets import Size
from .examples import Dataset, Example

LISTED = 5
"""Number of names that a line of the report lists."""
BAR = 24
"""Length of the longest bar, in characters."""

Skipped = tuple[str, str]
"""(file name, reason)."""


def format_report(
    dataset: Dataset, title: str, sizes: Sequence[Size], skipped: Sequence[Skipped] = (), notes: Sequence[str] = ()
) -> str:
    """The report, as plain text for a console or a text node.

    Args:
        dataset: The data set.
        title: Its name.
        sizes: The images' original sizes, in the order of the examples.
        skipped: Files that were left out.
        notes: Further lines.
    """
    parts = [
        _headline(dataset, title),
        _bucket_table(dataset.examples),
        _captions(dataset.examples),
        *notes,
        _enlarged(dataset.examples, sizes),
        _cropped(dataset.examples, sizes),
        _folder_repeats(dataset.examples),
        _duplicates(dataset.examples),
        _skipped(skipped),
    ]
    return "\n".join(part for part in parts if part)


def _headline(dataset: Dataset, title: str) -> str:
    images = count_noun(len(dataset.examples), "image")
    options = [f"{dataset.crop} crop"] + ["mirrored at random"] * dataset.flip
    per_epoch = "" if len(dataset) == len(dataset.examples) else f", {len(dataset)} shown per epoch"
    return f"{title}: {images}{per_epoch} ({', '.join(options)})"


def _bucket_table(examples: Sequence[Example]) -> str:
    """A bar chart of the number of images per size."""
    if not examples:
        return ""
    counts = Counter((e.width, e.height) for e in examples)
    largest = max(counts.values())
    rows = [f"  {'size':>11}  {'images':>6}"]
    for (width, height), count in sorted(counts.items(), key=lambda item: (item[0][0] / item[0][1], item[0])):
        rows.append(f"  {f'{width} x {height}':>11}  {count:>6}  {'#' * max(1, round(BAR * count / largest))}")
    return "\n".join(rows)


def _captions(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    lengths = [len(e.caption.split()) for e in examples]
    distinct = len({e.caption for e in examples})
    return f"captions: {distinct} different; {min(lengths)} to {max(lengths)} words, median {median(lengths):g}"


def _enlarged(examples: Sequence[Example], sizes: Sequence[Size]) -> str:
    """Images smaller than their target size."""
    pairs = zip(examples, sizes, strict=True)
    small = [f"{e.name} ({w} x {h})" for e, (w, h) in pairs if w < e.width or h < e.height]
    return (
        f"enlarged: {count_noun(len(small), 'image')} smaller than the target size: {first_few(small, LISTED)}"
        if small
        else ""
    )


def _cropped(examples: Sequence[Example], sizes: Sequence[Size]) -> str:
    """Images of which more than half is cut off, since no target size is as long or as wide."""
    shares = [
        min(e.width / w, e.height / h) / max(e.width / w, e.height / h)
        for e, (w, h) in zip(examples, sizes, strict=True)
    ]
    much = [f"{e.name} ({w} x {h})" for e, (w, h), share in zip(examples, sizes, shares, strict=True) if share < 0.5]
    return f"cropped: {count_noun(len(much), 'image')} to less than half: {first_few(much, LISTED)}" if much else ""


def _folder_repeats(examples: Sequence[Example]) -> str:
    """Repeats that come from folder names."""
    counts = Counter((e.name.rpartition("/")[0], e.repeats) for e in examples if e.repeats > 1)
    rows = [f"{folder} {images} x {repeats}" for (folder, repeats), images in sorted(counts.items())]
    return f"repeats by folder name: {first_few(rows, LISTED)}" if rows else ""


def _duplicates(examples: Sequence[Example]) -> str:
    """Images with the same content."""
    names: dict[str, dict[str, None]] = {}
    for example in examples:
        names.setdefault(example.key, {})[example.name] = None
    groups = [" = ".join(equal) for equal in names.values() if len(equal) > 1]
    return (
        f"duplicates: {count_noun(len(groups), 'image')} present more than once: {first_few(groups, LISTED)}"
        if groups
        else ""
    )


def _skipped(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    rows = [f"  {name}: {reason}" for name, reason in skipped[: 4 * LISTED]]
    more = [f"  and {len(skipped) - len(rows)} more"] if len(skipped) > len(rows) else []
    return "\n".join([f"skipped: {count_noun(len(skipped), 'file')}", *rows, *more])
