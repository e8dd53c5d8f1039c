"""The result of drawing a set of prompts: figures over all prompts and by category, as JSON, table and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.prompts import Prompt
from .statistics import compare_scores, summarize_diversity, summarize_scores

BASE, TUNED = "base", "tuned"
"""Names of the two models in figures and files."""


@dataclass(frozen=True)
class PromptScores:
    """Figures of one prompt's pictures by one model.

    Attributes:
        model: `BASE` or `TUNED`.
        scores: Reward -> the score of each seed's picture.
        vendi, distance: Diversity of the pictures on the first reward's image tower; None for one seed.
    """

    model: str
    prompt: str
    scores: Mapping[str, Sequence[float]]
    vendi: float | None = None
    distance: float | None = None


def report(rows: Sequence[PromptScores], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Figures of all prompts, and of each category where there are several.

    Args:
        rows: Of one model or two, for every prompt.
        prompts: For their categories.

    Returns:
        {"prompts", "seeds", "all", "categories"}. "all" and each category hold "prompts", their number; "rewards" by
        name, each with `summarize_scores` of the models by name and `compare_scores`; "diversity" of the models, and
        "kept", the tuned spread as a share of the base's. Without a second model there is only "base".
    """
    by_model: dict[str, dict[str, PromptScores]] = {}
    for row in rows:
        by_model.setdefault(row.model, {})[row.prompt] = row
    groups: dict[str, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt.text)

    def figures(texts: Sequence[str]) -> dict[str, Any]:
        return _figures({name: [rows[text] for text in texts] for name, rows in by_model.items()})

    result = {"prompts": len(prompts), "seeds": len(next(iter(rows[0].scores.values())))}
    result["all"] = figures([prompt.text for prompt in prompts])
    result["categories"] = {name: figures(texts) for name, texts in sorted(groups.items())} if len(groups) > 1 else {}
    return result


def _figures(by_model: Mapping[str, Sequence[PromptScores]]) -> dict[str, Any]:
    rows = next(iter(by_model.values()))
    rewards = {name: _reward_figures(by_model, name) for name in rows[0].scores}
    seeds = len(next(iter(rows[0].scores.values())))
    return {"prompts": len(rows), "rewards": rewards, "diversity": _diversity(by_model, seeds) if seeds > 1 else {}}


def _reward_figures(by_model: Mapping[str, Sequence[PromptScores]], name: str) -> dict[str, Any]:
    scores = {model: torch.tensor([row.scores[name] for row in rows]) for model, rows in by_model.items()}
    compared = compare_scores(scores[TUNED], scores[BASE]) if TUNED in scores else {}
    return {model: summarize_scores(values) for model, values in scores.items()} | compared


def _diversity(by_model: Mapping[str, Sequence[PromptScores]], seeds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for model, rows in by_model.items():
        vendi, distance = (torch.tensor([getattr(row, name) for row in rows]) for name in ("vendi", "distance"))
        result[model] = summarize_diversity(vendi, distance, seeds)
    if TUNED in by_model and result[BASE]["spread"] > 0:
        result["kept"] = result[TUNED]["spread"] / result[BASE]["spread"]
    return result


def as_csv(scores: Mapping[tuple[str, str], PromptScores], models: Iterable[str], prompts: Sequence[Prompt]) -> str:
    """One line for each picture: model, category, prompt, seed, and its score by each reward.

    Args:
        scores: By (model, prompt).
        models, prompts: In the order of the lines.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = list(scores[next(iter(models)), prompts[0].text].scores)
    writer.writerow(["model", "category", "prompt", "seed", *names])
    for model in models:
        for prompt in prompts:
            by_reward = scores[model, prompt.text].scores
            for seed, values in enumerate(zip(*(by_reward[name] for name in names), strict=True)):
                writer.writerow([model, prompt.category, prompt.text, seed, *map(repr, values)])
    return file.getvalue()


def table(result: Mapping[str, Any]) -> str:
    """The figures of a `report` as lines of text."""
    parts = [("all", result["all"]), *((name or "(none)", part) for name, part in result["categories"].items())]
    compared = TUNED in next(iter(result["all"]["rewards"].values()))
    heads = ["reward", "category", "prompts", BASE, "+-"]
    heads += [TUNED, "+-", "gain", "+-", "win rate", "+-"] if compared else []
    lines = [heads, *_score_lines(parts, compared), *_spread_lines(parts, compared)]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def _score_lines(parts: Sequence[tuple[str, Mapping]], compared: bool) -> Iterator[list[str]]:
    for part, figures in parts:
        for name, reward in figures["rewards"].items():
            line = [name, part, str(figures["prompts"])]
            for model in (BASE, TUNED)[: 1 + compared]:
                line += [_number(reward[model]["mean"]), _number(reward[model]["seed_std"])]
            for figure in ("gain", "win_rate") if compared else ():
                line += [_number(reward[figure]), _number(reward[f"{figure}_error"])]
            yield line


def _spread_lines(parts: Sequence[tuple[str, Mapping]], compared: bool) -> Iterator[list[str]]:
    """No lines for one seed."""
    for part, figures in parts:
        if spread := figures["diversity"]:
            line = ["spread of a prompt's pictures", part, str(figures["prompts"]), _number(spread[BASE]["spread"]), ""]
            share = f"kept {_number(spread.get('kept'))}"
            yield line + ([_number(spread[TUNED]["spread"]), "", share] if compared else [])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
