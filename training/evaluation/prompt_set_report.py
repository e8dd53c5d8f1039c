"""What a set of prompts shows: figures of all of it and by category, as JSON, as a table and picture by picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.prompts import Prompt
from .statistics import compare_scores, summarize_diversity, summarize_scores

BASE, TUNED = "base", "tuned"
"""The two models, as figures and files call them."""


@dataclass(frozen=True)
class PromptScores:
    """What is kept of one prompt's pictures by one model. scores: by reward, one a seed. vendi and distance: of the
    pictures, on the first reward's image tower; None for one seed."""

    model: str
    prompt: str
    scores: Mapping[str, Sequence[float]]
    vendi: float | None = None
    distance: float | None = None


def report(rows: Sequence[PromptScores], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """{"prompts", "seeds", "all", "categories"}: figures of all prompts and of each category where there are several.

    Figures: "prompts", how many; "rewards" by name, each with `summarize_scores` of both models and
    `compare_scores`; "diversity" of both, and "kept", the tuned spread as a share of the base's. Without a second model
    only "base".
    """
    by_model: dict[str, dict[str, PromptScores]] = {}
    for row in rows:
        by_model.setdefault(row.model, {})[row.prompt] = row
    groups: dict[str, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt.text)

    def figures(texts: Sequence[str]) -> dict[str, Any]:
        return _figures({name: [found[text] for text in texts] for name, found in by_model.items()})

    result = {"prompts": len(prompts), "seeds": len(next(iter(rows[0].scores.values())))}
    result["all"] = figures([prompt.text for prompt in prompts])
    result["categories"] = {name: figures(texts) for name, texts in sorted(groups.items())} if len(groups) > 1 else {}
    return result


def _figures(by_model: Mapping[str, Sequence[PromptScores]]) -> dict[str, Any]:
    first = next(iter(by_model.values()))
    result: dict[str, Any] = {"prompts": len(first), "rewards": {}, "diversity": {}}
    for name in first[0].scores:
        scores = {model: torch.tensor([row.scores[name] for row in rows]) for model, rows in by_model.items()}
        found: dict[str, Any] = {model: summarize_scores(values) for model, values in scores.items()}
        compared = compare_scores(scores[TUNED], scores[BASE]) if TUNED in scores else {}
        result["rewards"][name] = found | compared
    seeds = len(next(iter(first[0].scores.values())))
    if seeds > 1:
        for model, rows in by_model.items():
            vendi, distance = (torch.tensor([getattr(row, name) for row in rows]) for name in ("vendi", "distance"))
            result["diversity"][model] = summarize_diversity(vendi, distance, seeds)
        if TUNED in by_model and result["diversity"][BASE]["spread"] > 0:
            result["diversity"]["kept"] = result["diversity"][TUNED]["spread"] / result["diversity"][BASE]["spread"]
    return result


def as_csv(known: Mapping[tuple[str, str], PromptScores], models: Sequence[str], prompts: Sequence[Prompt]) -> str:
    """One line a picture: model, category, prompt, seed, and its score by each reward."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = list(known[next(iter(models)), prompts[0].text].scores)
    writer.writerow(["model", "category", "prompt", "seed", *names])
    for model in models:
        for prompt in prompts:
            scores = known[model, prompt.text].scores
            for seed, values in enumerate(zip(*(scores[name] for name in names), strict=True)):
                writer.writerow([model, prompt.category, prompt.text, seed, *map(repr, values)])
    return file.getvalue()


def table(result: Mapping[str, Any]) -> str:
    """The figures of a result as lines of text."""
    parts = [("all", result["all"]), *((name or "(none)", part) for name, part in result["categories"].items())]
    compared = TUNED in next(iter(result["all"]["rewards"].values()))
    heads = ["reward", "category", "prompts", BASE, "+-"]
    heads += [TUNED, "+-", "gain", "+-", "win rate", "+-"] if compared else []
    lines = [heads, *_score_lines(parts, compared), *_spread_lines(parts, compared)]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def _score_lines(parts: Sequence[tuple[str, Mapping]], compared: bool) -> Iterator[list[str]]:
    for part, figures in parts:
        for name, found in figures["rewards"].items():
            line = [name, part, str(figures["prompts"])]
            for model in (BASE, TUNED)[: 1 + compared]:
                line += [_number(found[model]["mean"]), _number(found[model]["seed_std"])]
            for figure in ("gain", "win_rate") if compared else ():
                line += [_number(found[figure]), _number(found[f"{figure}_error"])]
            yield line


def _spread_lines(parts: Sequence[tuple[str, Mapping]], compared: bool) -> Iterator[list[str]]:
    """None for one seed."""
    for part, figures in parts:
        if found := figures["diversity"]:
            line = ["spread of a prompt's pictures", part, str(figures["prompts"]), _number(found[BASE]["spread"]), ""]
            kept = f"kept {_number(found.get('kept'))}"
            yield line + ([_number(found[TUNED]["spread"]), "", kept] if compared else [])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
