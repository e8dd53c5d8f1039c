"""The table of pictures: each at its place, with its labels above."""

import torch
from retune.training.plots.canvas import text_width
from retune.training.plots.picture_grid import GAP, LINES, picture_grid, shortened, wrapped


def test_pictures_stand_under_their_titles_row_after_row():
    shades = torch.tensor([1, 2, 3, 4, 5, 6]) / 10
    pictures = shades[:, None, None, None].expand(6, 40, 80, 3)
    grid = picture_grid(pictures, ["first row", "second row"], ["a", "b", "c"])
    line = (grid.shape[0] - 2 * (40 + GAP)) // 3  # the titles, and a line above each row
    for number, shade in enumerate(shades):
        top, left = 2 * line + (number // 3) * (40 + GAP + line), (number % 3) * (80 + GAP)
        cell = grid[top : top + 40, left : left + 80]
        torch.testing.assert_close(cell, (shade * 255).round().div(255).expand(40, 80, 3))
        assert (grid[:line, left : left + 80] < 0.5).any()
    for row in range(2):
        top = line + row * (40 + GAP + line)
        assert (grid[top : top + line] < 0.5).any()


def test_long_texts_are_cut_with_an_ellipsis():
    text = "a very long prompt of many words " * 9
    lines = wrapped(text, 200, 14)
    assert len(lines) == LINES and lines[-1].endswith("…") and all(text_width(line, 14) <= 200 for line in lines)
    assert wrapped("short", 200, 14) == ["short"] and shortened("word" * 40, 100, 14).endswith("…")
