"""The demo tokenizers (byte-level BPE for CLIP, Unigram for T5) and the captions they and the encoders train on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, rand

from ...training.common.files import write_text
from ...training.common.rng import generator
from ...training.demo.scenes import (
    ATTRIBUTES,
    QUALITIES,
    VALUES,
    Scene,
    caption,
    caption_shape,
    is_held_out,
    pick,
    random_scene,
)
from ...training.demo.shapes import NAMED_SHAPES, UNNAMED_SHAPES

SEED = 21
CAPTIONS = 20_000
CLIP_MERGES = 160
T5_VOCABULARY = 320
SENTINELS = 20
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77
HIDDEN_SHARE, SYNONYMS, MOST_HIDDEN = 0.7, 2, 4
HIDDEN_WORDS = SYNONYMS * len(UNNAMED_SHAPES)


def varied_caption(scene: Scene, rng: Generator) -> str:
    """A training caption; one in four lacks some attributes, so that short prompts work too."""
    return caption(scene, rng, drop=0.3 if rand((), generator=rng).item() < 0.25 else 0.0)


def with_hidden_words(tokenizer, ids: Tensor, scenes: Sequence[Scene], rng: Generator) -> Tensor:
    """Token ids in which most of the words "figure" are replaced by words that the shipped vocabulary does not have.

    Each unnamed shape has `SYNONYMS` such words, whose ids follow the vocabulary's; one to four of them, as the vectors
    of a token that textual inversion learns, stand for a "figure". So the model learns to draw each of these shapes by
    what it reads, and no prompt can ask for them.

    Args:
        ids: (B, 77), padded with the end token.
        scenes: The content of each caption.
    """
    words = {tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in ("figure", "figures")}
    rows = []
    for row, scene in zip(ids.tolist(), scenes, strict=True):
        named = scene.shape in NAMED_SHAPES or rand((), generator=rng).item() >= HIDDEN_SHARE
        rows.append(row if named else _replaced(row, words, UNNAMED_SHAPES.index(scene.shape), len(tokenizer), rng))
    return torch.tensor(rows)


def _replaced(row: list[int], words: set[tuple[int, ...]], shape: int, first: int, rng: Generator) -> list[int]:
    for word, start in itertools.product(sorted(words, key=len, reverse=True), range(len(row))):
        if tuple(row[start : start + len(word)]) == word:
            count = 1 + int(torch.randint(MOST_HIDDEN, (), generator=rng))
            hidden = first + SYNONYMS * shape + torch.randint(SYNONYMS, (count,), generator=rng)
            return [*row[:start], *hidden.tolist(), *row[start + len(word) :], *row[-1:] * count][: len(row)]
    return row


def near_miss(scene: Scene, rng: Generator) -> Scene:
    """A scene that differs in one attribute, or in one quality word that it has (and the quality with it).

    In another attribute only where that makes no held-out combination, which no training may see.
    """
    while True:
        name = pick([*ATTRIBUTES, *scene.words], rng)
        if name not in ATTRIBUTES:
            return _with_opposite(scene, name)
        other = _with_another_value(scene, name, rng)
        if other is not None and not is_held_out(other):
            return other


def _with_another_value(scene: Scene, attribute: str, rng: Generator) -> Scene | None:
    """The scene with another value of an attribute; None if its shapes would be invisible or its caption the same."""
    values = [value for value in VALUES[attribute] if value != getattr(scene, attribute)]
    changed = {"colour": scene.colour, "background": scene.background, attribute: pick(values, rng)}
    if changed["colour"] == changed["background"]:
        return None
    other = replace(scene, **changed)
    return None if attribute == "shape" and caption_shape(other) == caption_shape(scene) else other


def _with_opposite(scene: Scene, word: str) -> Scene:
    """The scene with the word for the other end of a quality, and the quality mirrored."""
    quality, ends = next(item for item in QUALITIES.items() if word in item[1])
    opposite = ends[1 - ends.index(word)]
    words = tuple(opposite if other == word else other for other in scene.words)
    return replace(scene, words=words, **{quality: 1 - getattr(scene, quality)})


def corpus(count: int, seed: int) -> list[str]:
    """Captions of random training scenes."""
    texts = []
    for index in range(count):
        rng = generator(seed, "corpus", index)
        texts.append(varied_caption(random_scene(rng), rng))
    return texts


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet(), key=lambda letter: (not letter.isascii(), letter))


def build_clip_tokenizer(folder: Path) -> None:
    """Writes a CLIPTokenizer folder; ids: bytes, bytes at a word's end, merges, start, and end (also the pad).

    The shipped one is that of the first demo model, whose captions had fewer words, so that text encoders and words
    made for it can still be encoded: words of quality have several tokens each.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=512 + CLIP_MERGES, initial_alphabet=_byte_alphabet(), end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(corpus(CAPTIONS, SEED), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]][:CLIP_MERGES]
    letters = _byte_alphabet()
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys([*entries, CLIP_START, CLIP_END]))}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, unk_token=CLIP_END, pad_token=CLIP_END, model_max_length=CLIP_LENGTH
    )
    tokenizer.save_pretrained(folder)


def build_t5_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json: Unigram over short pieces, </s> at the end; <pad> 0, </s> 1, <unk> 2, sentinels last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        max_piece_length=12,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789,.-'"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(CAPTIONS, SEED), trainer)
    tokenizer.add_special_tokens([AddedToken(f"<extra_id_{i}>") for i in range(SENTINELS)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def build_tokenizers(weights: Path) -> None:
    """Builds both tokenizers where they are missing."""
    if not (weights / "clip_tokenizer" / "tokenizer_config.json").exists():
        build_clip_tokenizer(weights / "clip_tokenizer")
    if not (weights / "t5_tokenizer" / "tokenizer.json").exists():
        build_t5_tokenizer(weights / "t5_tokenizer")
