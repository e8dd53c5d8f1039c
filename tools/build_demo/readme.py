"""Writes the README of the demo's weights from the figures that its parts returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...training.common.files import write_text
from ...training.demo.files import WEIGHTS

_TITLES = {
    "vae": "autoencoder",
    "t5": "T5, span corruption",
    "scorer": "scorer and aesthetic head",
    "clip_unet": "UNet with its CLIP",
    "loras": "two LoRAs, from twenty pictures each",
    "embeddings": "the word, from five pictures",
    "text_encoders": "tuned text encoder",
    "figures": "the table above",
}
_NOT_FIGURES = ("seconds", "date", "threads", "steps", "rows", "table")


def write_readme(parts: Mapping[str, Mapping]) -> None:
    """Writes `weights/README.md`. parts: of each finished part its figures, "seconds", "date" and "threads"."""
    template = (Path(__file__).parent / "weights_readme.md").read_text(encoding="utf-8")
    write_text(WEIGHTS / "README.md", template.format(table=_drawn(parts), parts=_parts(parts), total=_total(parts)))


def _drawn(parts: Mapping[str, Mapping]) -> str:
    return parts["figures"]["table"] if "figures" in parts else "(not measured yet)"


def _parts(parts: Mapping[str, Mapping]) -> str:
    lines = ["| part | date | steps | minutes | figures |", "|---|---|---|---|---|"]
    for name, title in _TITLES.items():
        if name in parts:
            part = parts[name]
            figures = {key: value for key, value in part.items() if key not in _NOT_FIGURES}
            minutes = f"{part['seconds'] / 60:.0f}"
            lines.append(f"| {title} | {part['date']} | {part.get('steps', '')} | {minutes} | {_listed(figures)} |")
    return "\n".join(lines)


def _listed(figures: Mapping) -> str:
    def text(value: object) -> str:
        if isinstance(value, Mapping):
            return f"({_listed(value)})"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in figures.items())


def _total(parts: Mapping[str, Mapping]) -> str:
    minutes = round(sum(part["seconds"] for part in parts.values()) / 60)
    threads = sorted({part["threads"] for part in parts.values()})
    return f"{minutes // 60} h {minutes % 60:02d} min with {' or '.join(map(str, threads))} threads"
