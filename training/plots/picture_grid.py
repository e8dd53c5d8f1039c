"""A table of pictures: a title over each column, a text over each row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .canvas import PAGE, Canvas, text_width

GAP, MARGIN, LINES = 4, 6, 2
"""Pixels between pictures and before texts; lines of a row's text at most."""
SMALLEST_TEXT, TEXT_SHARE = 14, 50
"""Size of the texts in pixels, and at least this part of the width: a node shows the table at some 500 pixels."""


def picture_grid(pictures: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Tensor:
    """Pictures under their titles.

    Args:
        pictures: (rows * columns, height, width, 3) in 0..1, one row after the other.
        rows: a text for each row, such as its prompt; of a long one the first two lines are shown.
        columns: a title for each column.

    Returns:
        One picture (height, width, 3) in 0..1.
    """
    height, width = pictures.shape[1:3]
    whole = (width + GAP) * len(columns) - GAP
    size = max(SMALLEST_TEXT, whole // TEXT_SHARE)
    line = round(1.4 * size)
    texts = [wrapped(row, whole - 2 * MARGIN, size) for row in rows]
    canvas = Canvas(whole, line * (1 + sum(map(len, texts))) + (height + GAP) * len(rows), PAGE)
    for column, title in enumerate(columns):
        middle = column * (width + GAP) + width / 2
        canvas.text((middle, line / 2), shortened(title, width, size), anchor="mm", size=size)
    top = line
    for row, lines in enumerate(texts):
        for text in lines:
            canvas.text((MARGIN, top + line / 2), text, anchor="lm", size=size)
            top += line
        for column in range(len(columns)):
            canvas.picture((column * (width + GAP), top), pictures[row * len(columns) + column])
        top += height + GAP
    return canvas.tensor()


def wrapped(text: str, width: float, size: int) -> list[str]:
    """A text in at most two lines of a width in pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = text_width(longer, size) <= width
        if fits or len(lines) == LINES or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [shortened(line, width, size) for line in lines]


def shortened(text: str, width: float, size: int) -> str:
    """A text, cut to a width in pixels with an ellipsis at its end."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text}…"
