"""Captions for textual inversion: the images' own captions with the token in them, or templates.

The templates are those of the textual inversion paper (arXiv 2208.01618, appendix), which took them from CLIP's
ImageNet templates; {} is replaced by the token.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..common.rng import generator
from ..common.text import plain_text
from ..models.concepts import split_tokens
from ..models.protocols import TextEncoder
from .examples import Dataset

log = logging.getLogger(__name__)

OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)
TEMPLATES = {"object": OBJECT, "style": STYLE}


@dataclass(frozen=True)
class CaptionTemplates:
    """Replaces captions by templates, drawn at random for each image of a batch.

    Args:
        lines: Templates, with {} for the token and {caption} for the image's caption; empty keeps the captions.
        token: The token.
        seed: Seed of the draw.
    """

    lines: Sequence[str]
    token: str
    seed: int

    def __call__(self, caption: str, number: int, index: int) -> str:
        """The caption for an image.

        Args:
            caption: Its own caption.
            number: Number of the batch, from 1; 0 outside of training, where the first template is used.
            index: The image's position in the batch.
        """
        if not self.lines:
            return caption
        choice = 0
        if number:
            choice = torch.randint(
                len(self.lines), (), generator=generator(self.seed, "template", number, index)
            ).item()
        return self._filled(self.lines[choice], caption)

    def all_of(self, captions: Sequence[str]) -> list[str]:
        """Every caption that may come of these."""
        filled = (self._filled(line, caption) for line in self.lines for caption in captions)
        return list(dict.fromkeys(filled)) or list(captions)

    def _filled(self, line: str, caption: str) -> str:
        return line.replace("{caption}", caption).replace("{}", self.token)


def replace_caption_words(dataset: Dataset, words: Sequence[str], token: str) -> Dataset:
    """Replaces whole words in a data set's captions by a token; warns if no caption has them.

    Args:
        dataset: The data set.
        words: The words to replace, in upper or lower case.
        token: The token.
    """
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    changed = _map_captions(dataset, lambda caption: pattern.sub(lambda _: token, caption))
    if changed.captions == dataset.captions:
        log.warning("no caption holds %s, whose place %s was to take", " or ".join(words), token)
    return changed


def _map_captions(dataset: Dataset, function: Callable[[str], str]) -> Dataset:
    return replace(dataset, examples=tuple(replace(e, caption=function(e.caption)) for e in dataset.examples))


def contains_token(caption: str, tokens: Sequence[str]) -> bool:
    """Whether a caption has one of the tokens."""
    return len(split_tokens(caption, tokens)) > 1


def keep_images_with_tokens(dataset: Dataset, tokens: Sequence[str]) -> Dataset:
    """Keeps the images whose captions have one of the tokens; warns about the number of the others.

    Raises:
        ValueError: A token is in no caption.
    """
    for token in tokens:
        if not any(contains_token(caption, [token]) for caption in dataset.captions):
            raise ValueError(
                f"token {token} is in none of {len(dataset.captions)} captions; expected it in those of its images. "
                "Write it into them, name the caption_word that it replaces, or choose template object or style."
            )
    examples = tuple(e for e in dataset.examples if contains_token(e.caption, tokens))
    if len(examples) < len(dataset.examples):
        log.warning("%d images without a token in their caption are left out", len(dataset.examples) - len(examples))
    return replace(dataset, examples=examples)


def expect_tokens(lines: Sequence[str], captions: Sequence[str], tokens: Sequence[str]) -> None:
    """Raises ValueError for a template in which no token would stand: a batch of it has nothing to train.

    Args:
        lines: Templates, see `CaptionTemplates`.
        captions: The images' captions, which stand in place of {caption}.
        tokens: The tokens.
    """
    for line in lines:
        filled = [line.replace("{caption}", caption).replace("{}", tokens[0]) for caption in captions]
        without = [text for text in filled if not contains_token(text, tokens)]
        if without:
            raise ValueError(
                f"the line {line!r} gives {without[0]!r}, without {tokens[0]}; expected the token in every line. Put "
                "{} there."
            )


def expect_readable(
    encoder: TextEncoder, captions: Sequence[str], tokens: Sequence[str], vectors: int, shuffled: bool
) -> None:
    """Raises ValueError for a caption whose token the text encoder cuts off, so that it could not learn.

    Only a T5 cuts; a CLIP reads long captions in windows.

    Args:
        encoder: The text encoder.
        captions: Every caption of the training.
        tokens: The tokens.
        vectors: Vectors of each token.
        shuffled: Whether tags are shuffled, which may put the token last.
    """
    if encoder.chunks_long_prompts:
        return
    vocabularies, limit = encoder.vocabularies, encoder.max_prompt_tokens
    ids = next(vocabulary.ids for name, vocabulary in vocabularies.items() if name.startswith("t5"))
    for caption in captions:
        before, *rest = split_tokens(caption, tokens)
        ahead = "".join([before, *rest[1::2]]) if shuffled else before
        if not rest or len(ahead.encode()) + vectors <= limit:  # a token has a byte or more
            continue
        needed = len(ids(plain_text(ahead))) + vectors
        if needed > limit:
            raise ValueError(
                f"{tokens[0]} would end at place {needed} of the caption {caption[:60]!r}; expected at most {limit}, "
                "where the T5 cuts. Put it further to the front, shorten the caption, or raise max_tokens."
            )
