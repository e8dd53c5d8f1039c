"""report.html of a run: one self-contained page with the loss curve, the samples over time and a table of figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .chart import run_chart
from .data.images import to_pil
from .files import write_text
from .run_folder import RunFolder

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1040px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}figure{margin:1rem 0}img{max-width:100%}
.strip{display:flex;flex-wrap:wrap;gap:4px}.strip figure{width:128px;margin:0;font-size:12px;line-height:1.25}
.strip img{width:128px;image-rendering:pixelated}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#1b1b1b}td,th{border-color:#444}}
"""


def data_url(image: Tensor) -> str:
    """A picture (3, H, W) in 0..1 as a data: URL."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return _png_url(buffer.getvalue())


def write_report(
    folder: RunFolder,
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    pictures: Mapping[str, Sequence[tuple[str, Tensor]]] | None = None,
) -> Path:
    """Writes report.html into a run folder and returns its path.

    tables: title -> rows of equal keys. pictures: title -> pairs of caption and picture (3, H, W) to show besides the
    run's own samples.
    """
    rows = folder.rows()
    parts = [f"<h1>{html.escape(folder.name)}</h1>"]
    parts += [_table(title, table) for title, table in tables.items()]
    chart = data_url(run_chart(folder.name, rows).movedim(-1, 0))
    parts.append(f'<h2>Loss</h2><figure><img alt="loss curve" src="{chart}"></figure>')
    parts += [_pictures(title, shown) for title, shown in (pictures or {}).items()]
    parts.append("<h2>Samples while training</h2>")
    for row in rows:
        if row.get("event") == "sample":
            parts.append(_strip(folder, row))
    page = "".join(parts)
    title = html.escape(folder.name)
    path = folder.path / "report.html"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    write_text(path, f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{STYLE}</style>{page}</html>')
    return path


def _table(title: str, rows: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _strip(folder: RunFolder, row: Mapping) -> str:
    files = zip(row["prompts"], row["files"], strict=True)
    shown = [(prompt, (folder.samples / file).read_bytes()) for prompt, file in files]
    figures = "".join(_figure(prompt, _png_url(data)) for prompt, data in shown)
    return f'<h3>step {row["step"]}, epoch {row["epoch"]:g}</h3><div class="strip">{figures}</div>'


def _pictures(title: str, shown: Sequence[tuple[str, Tensor]]) -> str:
    figures = "".join(_figure(caption, data_url(image)) for caption, image in shown)
    return f'<h2>{html.escape(title)}</h2><div class="strip">{figures}</div>'


def _figure(caption: str, url: str) -> str:
    text = html.escape(caption)
    return f'<figure><img alt="{text}" title="{text}" src="{url}">{text}</figure>'


def _png_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
