"""The demo tokenizers (byte-level BPE for CLIP, Unigram for T5) and the captions they and the encoders train on."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Generator

from ...training.common.files import write_text
from ...training.common.rng import generator
from ...training.demo.scenes import Scene, caption, random_scene

SEED = 21
CAPTIONS = 20_000
CLIP_MERGES = 160
T5_VOCABULARY = 320
SENTINELS = 20
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77


def varied_caption(scene: Scene, rng: Generator) -> str:
    """A training caption; one in four lacks some attributes, so that short prompts work too."""
    from torch import rand

    return caption(scene, rng, drop=0.3 if rand((), generator=rng).item() < 0.25 else 0.0)


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
    """Writes a CLIPTokenizer folder; ids: bytes, bytes at a word's end, merges, start, and end (also the pad)."""
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
        max_piece_length=6,
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
