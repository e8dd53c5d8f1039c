"""report.html of a run: one self-contained page with its settings, curves, samples and how it ended."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..common.files import write_text
from ..data.images import to_pil
from ..plots.run_chart import run_chart
from .folder import RunFolder
from .records import as_written
from .report_text import (
    KINDS,
    Row,
    ending,
    environment_table,
    outcome,
    settings_tables,
    stretches_table,
    summary,
    token_table,
)

REPORT = "report.html"
MAX_SAMPLES = 24
"""Steps whose samples are in the report, the first and the last among them."""
SIDE = 256
"""Pixels; larger samples are scaled down to it."""

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1040px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}figure{margin:1rem 0}img{max-width:100%}
.strip{display:flex;flex-wrap:wrap;gap:4px}.strip figure{width:128px;margin:0;font-size:12px;line-height:1.25}
.strip img{width:128px;image-rendering:pixelated}.wide figure,.wide img{width:256px;image-rendering:auto}
td:last-child:not(:first-child){text-align:left}summary{cursor:pointer;margin:1rem 0}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#1b1b1b}td,th{border-color:#444}}
"""


def data_url(image: Tensor) -> str:
    """A picture (3, H, W) in 0..1 as a data: URL."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return _url(buffer.getvalue(), "png")


def write_report(
    folder: RunFolder,
    tables: Mapping[str, Sequence[Mapping[str, object]]] | None = None,
    pictures: Mapping[str, Sequence[tuple[str, Tensor]]] | None = None,
    status: Mapping[str, object] | None = None,
) -> Path:
    """Writes report.html into a run folder and returns its path.

    Args:
        folder: the run's.
        tables: title -> rows of equal keys, for the top of the page.
        pictures: title -> pairs of caption and picture (3, H, W), besides the run's samples.
        status: how the run ended, where status.json does not say so yet.

    Raises:
        ValueError: The run's files are damaged; the message names the run.
    """
    rows, about, status = folder.rows(), folder.config() or {}, status or folder.status()
    with as_written(folder.path):
        return _page(folder, _body(folder, rows, about, status, tables or {}, pictures or {}))


def _body(
    folder: RunFolder,
    rows: Sequence[Row],
    about: Mapping[str, Any],
    status: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    pictures: Mapping[str, Sequence[tuple[str, Tensor]]],
) -> str:
    parts = [f"<h1>{html.escape(folder.name)}</h1>", _paragraph(ending(status))]
    described = about.get("identity", {}).get("kind") in KINDS  # not so a measurement of `evaluate`
    parts += [_paragraph(summary(about))] if described else []
    parts += [_table(title, table) for title, table in tables.items()]
    parts += [_table("Figures", outcome(rows)), _table("New words", token_table(rows))]
    chart = data_url(run_chart(folder.name, rows, rates=True).movedim(-1, 0))
    parts.append(f'<h2>Curves</h2><figure><img alt="curves of the run" src="{chart}"></figure>')
    parts += [_pictures(title, pairs) for title, pairs in pictures.items()]
    parts.append("<h2>Samples while training</h2>")
    files = folder.pictures()
    parts += [_strip(files, row) for row in _spread([row for row in rows if row.get("event") == "sample"])]
    if described:
        changed, usual = settings_tables(about)
        parts += [_table("Settings that are not the defaults", changed), _folded("All other settings", usual)]
    parts.append(_table("Made with", environment_table(about)))
    parts.append(_table("Stretches of steps", stretches_table(about)))
    return "".join(parts)


def _page(folder: RunFolder, body: str) -> Path:
    path, title = folder.path / REPORT, html.escape(folder.name)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    write_text(path, f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{STYLE}</style>{body}</html>')
    return path


def _spread(rows: Sequence[Row]) -> list[Row]:
    """At most MAX_SAMPLES of them, evenly spread."""
    if len(rows) <= MAX_SAMPLES:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (MAX_SAMPLES - 1))] for i in range(MAX_SAMPLES)]


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A titled table, or nothing where there are no rows."""
    return f"<h2>{html.escape(title)}</h2>{_cells(rows)}" if rows else ""


def _folded(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    """A table that opens when its title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{_cells(rows)}</details>" if rows else ""


def _cells(rows: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _strip(files: Mapping[str, Path], row: Mapping) -> str:
    """The samples of one step, without deleted ones. Names in the row are only compared, since they may be anything."""
    pairs = zip(row["prompts"], row["files"], strict=True)
    samples = [(prompt, *_sample(files[file])) for prompt, file in pairs if file in files]
    wide = " wide" if any(larger for *_, larger in samples) else ""
    figures = "".join(_figure(prompt, url) for prompt, url, _ in samples)
    return f'<h3>step {row["step"]}, epoch {row["epoch"]:g}</h3><div class="strip{wide}">{figures}</div>'


def _sample(path: Path) -> tuple[str, bool]:
    """A sample as a data: URL, and whether it is larger than SIDE; it is then scaled down to keep the page small."""
    with Image.open(path) as image:
        if max(image.size) <= SIDE:
            return _url(path.read_bytes(), "png"), False
        small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(buffer, "JPEG", quality=88)
    return _url(buffer.getvalue(), "jpeg"), True


def _pictures(title: str, pairs: Sequence[tuple[str, Tensor]]) -> str:
    figures = "".join(_figure(caption, data_url(image)) for caption, image in pairs)
    return f'<h2>{html.escape(title)}</h2><div class="strip">{figures}</div>'


def _figure(caption: str, url: str) -> str:
    text = html.escape(caption)
    return f'<figure><img alt="{text}" title="{text}" src="{url}">{text}</figure>'


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
