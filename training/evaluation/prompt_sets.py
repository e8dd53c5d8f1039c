"""Sets of prompts to measure models on: Parti-Prompts, the HPS v2 benchmark, and the user's files."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..common.foreign import read_json, read_text
from ..common.rng import derive_seed
from ..data.prompts import Prompt, read_prompts

LAYOUTS = (
    "PartiPrompts.tsv (columns Prompt and Category), a folder of HPS v2's anime.json, concept-art.json, ..., one such "
    ".json file, .txt with a prompt a line, or .jsonl with prompt and category"
)


def read_prompt_set(path: Path) -> Iterable[Prompt]:
    """The prompts of a file or folder in one of the `LAYOUTS`, in its order, read lazily.

    Their categories are Parti's column, the names of HPS v2's files, or `category` of .jsonl lines. Raises ValueError
    that names the file, and FileNotFoundError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a set of prompts: {LAYOUTS}.")
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ValueError(f"folder {path} holds no .json file; expected a set of prompts: {LAYOUTS}.")
        return (prompt for file in files for prompt in _listed(file))
    readers = {".tsv": _columns, ".json": _listed, ".txt": read_prompts, ".jsonl": read_prompts}
    if path.suffix.lower() not in readers:
        raise ValueError(f"prompts are {path.name}; expected a set of prompts: {LAYOUTS}.")
    return readers[path.suffix.lower()](path)


def _columns(path: Path) -> Iterator[Prompt]:
    """The prompts of a tab-separated table with a header line; quotation marks are part of a prompt."""
    head, *lines = read_text(path, advice="Save it as UTF-8 text.").split("\n")
    names = [name.strip().lower() for name in head.rstrip("\r").split("\t")]
    if "prompt" not in names:
        raise ValueError(f"{path}, line 1: columns are {', '.join(names):.200}; expected Prompt among them.")
    for number, line in enumerate(lines, start=2):
        row = dict(zip(names, line.rstrip("\r").split("\t"), strict=False))
        if line.strip() and not row.get("prompt", "").strip():
            raise ValueError(f"{path}, line {number}: no prompt; expected one under Prompt.")
        if line.strip():
            yield Prompt(" ".join(row["prompt"].split()), category=row.get("category", "").strip())


def _listed(path: Path) -> Iterator[Prompt]:
    """The prompts of a JSON list of texts; their category is the file's name."""
    texts = read_json(path, advice="Expected a list of prompts.")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} holds something else than prompts; expected a list of texts, as HPS v2's files are.")
    return (Prompt(" ".join(text.split()), category=path.stem) for text in texts)


def choose(prompts: Iterable[Prompt], limit: int = 0, seed: int = 0) -> list[Prompt]:
    """At most `limit` prompts, spread evenly over the categories; repeated prompts count once.

    Args:
        prompts: Read once; at most `limit` of each category are in memory.
        limit: 0 for all.
        seed: With the prompt's text, decides alone which prompts are chosen, so that of a category a larger limit
            includes the choice of a smaller one.

    Returns:
        The chosen prompts in the order of the set.
    """
    heaps: dict[str, list] = {}
    seen: set[int] = set()
    for place, prompt in enumerate(prompts):
        rank = derive_seed(seed, "limit", prompt.text)
        if rank not in seen:
            seen.add(rank)
            heap = heaps.setdefault(prompt.category, [])
            heapq.heappush(heap, (-rank, place, prompt))
            if limit and len(heap) > limit:
                heapq.heappop(heap)
    sizes = {category: len(heap) for category, heap in heaps.items()}
    counts = share_out(sizes, limit) if limit else sizes
    chosen = (entry for category, heap in heaps.items() for entry in heapq.nlargest(counts[category], heap))
    return [prompt for _, prompt in sorted((place, prompt) for _, place, prompt in chosen)]


def share_out(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many to take of each category: equal numbers as far as each has them, `limit` in all or every item."""
    left, result = limit, {}
    smallest_first = sorted(sizes, key=lambda category: (sizes[category], category))
    for number, category in enumerate(smallest_first):
        result[category] = min(sizes[category], left // (len(sizes) - number))
        left -= result[category]
    return result
