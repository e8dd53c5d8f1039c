"""report.html: one page that needs no other file and shows what it is given, escaped."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from retune.training.data.images import save_png
from retune.training.report import data_url, write_report
from retune.training.run_folder import RunFolder

NASTY = "<script>alert(\"x\")</script> & 'quotes'"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "a & b")
    folder.samples.mkdir(parents=True)
    for step in (0, 4):
        name = f"{step:06d}_00.png"
        save_png(torch.rand(3, 8, 8), folder.samples / name)
        folder.add_row({"event": "sample", "step": step, "epoch": step / 2, "files": [name], "prompts": [NASTY]})
    for step in range(1, 5):
        folder.add_row({"step": step, "loss": 1 / step})
    return folder


def test_page_is_self_contained_and_escaped(folder):
    picture = torch.rand(3, 4, 4)
    path = write_report(
        folder, {"Table <1>": [{"what": NASTY, "share": 0.123456, "n": 3}]}, {"Title": [(NASTY, picture)]}
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == folder.path / "report.html" and text.startswith("<!doctype html>")
    assert "script" not in page.tags and "http" not in text and "@import" not in text and "url(" not in text
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == 1 + 1 + 2  # chart, picture, two samples
    assert page.words.count(NASTY) == 1 + 1 + 2 and "0.123" in page.words and "3" in page.words
    assert {"step 0, epoch 0", "step 4, epoch 2"} <= set(page.words)
    assert "a & b" in page.words and "Table <1>" in page.words


def test_sample_files_are_inside_byte_for_byte(folder):
    text = write_report(folder, {}).read_text(encoding="utf-8")
    inside = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', text)]
    assert [(folder.samples / f"{s:06d}_00.png").read_bytes() for s in (0, 4)] == inside[1:]


def test_a_picture_survives_its_data_url():
    import numpy as np
    from PIL import Image

    image = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0)) / 255
    data = base64.b64decode(data_url(image.movedim(-1, 0)).removeprefix("data:image/png;base64,"))
    decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(data))))
    assert torch.equal(decoded, (image * 255).round().byte())
