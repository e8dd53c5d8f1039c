"""T5 with a projection as a text encoder: prompts to a denoiser's conditioning, in fp32 and differentiable."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.fingerprint import tensors_fingerprint
from ..common.transfer import upload
from ..models.concepts import (
    Concept,
    Vocabulary,
    add_concepts,
    concept_rows,
    embedding,
    expect_vectors,
    pieces,
    with_fingerprints,
)
from ..models.parameters import ParameterRef, parameter_refs
from ..models.protocols import Conditioning
from ..models.recast import hold, recastable, recasting
from ..models.visitors import arrive
from .projection import Projection, masked_mean
from .t5_file import T5Weights, read_t5
from .tokenizers import T5Tokenizer, find_tokenizer

logger = logging.getLogger(__name__)

PADDINGS = ("none", "max_tokens")
XXL_WIDTH = 4096


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Length of contexts, in training as in inference; saved with the encoder."""

    max_tokens: int = 256
    """Maximum length in tokens with </s>; longer prompts are truncated with a warning."""
    pad: str = "none"
    """"none": as long as the prompt. "max_tokens": always `max_tokens`; the denoiser attends to pads like to tokens."""

    def __post_init__(self):
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 2 (one token and </s>)")
        if self.pad not in PADDINGS:
            raise ValueError(f"pad is {self.pad!r}; expected one of {', '.join(PADDINGS)}")


class T5TextEncoder:
    """`TextEncoder` with transformers' T5. Tokens are one list of ids per prompt, without padding.

    A prompt's result does not depend on the others in the batch: T5 always gets an attention mask.

    Args:
        model: T5EncoderModel or UMT5EncoderModel.
        tokenizer: Its tokenizer.
        projection: From the T5's width to the denoiser's.
        padding: Length of contexts.
        source: Hash of the T5's weights.

    Raises:
        ValueError: The projection reads another width than the T5's.
    """

    concepts: tuple[Concept, ...] = ()
    chunks_long_prompts = False

    def __init__(self, model: nn.Module, tokenizer: T5Tokenizer, projection: Projection, padding: Padding, source: str):
        width = model.config.d_model
        if projection.in_width != width:
            raise ValueError(f"the projection reads a width of {projection.in_width}; expected the T5's {width}")
        self.model, self.tokenizer, self.projection, self.padding = model, tokenizer, projection, padding
        self.file_hash = source
        identity = (source, tokenizer.fingerprint, padding.max_tokens, padding.pad)
        identity += ("pooled",) if projection.pooled_width else ()
        self._fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Changes with weights, tokenizer, padding, concepts and having a pooled output; not with the projection."""
        return with_fingerprints(self._fingerprint, self.concepts)

    @property
    def name(self) -> str:
        """ComfyUI's name of this T5."""
        return comfyui_name(self.model.config.d_model)

    @property
    def width(self) -> int:
        return self.projection.width

    @property
    def pooled_width(self) -> int:
        return self.projection.pooled_width

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def max_prompt_tokens(self) -> int:
        return self.padding.max_tokens - 1

    @property
    def layers(self) -> dict[str, nn.Module]:
        prefix = f"text_encoders.{self.name}.transformer."
        modules = self.model.named_modules()
        return {prefix + path: layer for path, layer in modules if isinstance(layer, nn.Linear)}

    @property
    def weights(self) -> dict[str, ParameterRef]:
        return parameter_refs(self.model, f"text_encoders.{self.name}.transformer.")

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return {self.name: Vocabulary(self.token_embedding.weight, self._ids, lambda i: self.tokenizer.decode([i]))}

    def _ids(self, text: str) -> list[int]:
        """Ids of a text without </s> and without concepts."""
        return self.tokenizer.encode(text)[:-1]

    def with_concepts(self, concepts: Iterable[Concept]) -> T5TextEncoder:
        """A copy, sharing the T5's weights, whose prompts may contain further concepts."""
        result = copy.copy(self)
        result.concepts = add_concepts(self.concepts, concepts)
        expect_vectors(result.concepts, {self.name: self.model.config.d_model})
        return result

    def refreshed(self) -> T5TextEncoder:
        """The encoder with a new fingerprint, after its weights were changed in place."""
        source = tensors_fingerprint(self.model.named_parameters(), "changed")
        result = T5TextEncoder(self.model, self.tokenizer, self.projection, self.padding, source)
        return result.with_concepts(self.concepts)

    def training(self) -> AbstractContextManager:
        return recasting(recastable(self.model))

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text with </s> at the end, at most `max_tokens`.

        Ids from the size of the vocabulary on are the concepts' vectors, numbered in order.
        """
        return [truncate_tokens(self._token_ids(text), self.padding.max_tokens, text) for text in texts]

    def _token_ids(self, text: str) -> list[int]:
        """Ids of a text with </s> at the end, concepts included; not truncated."""
        rows = concept_rows(self.concepts, self.name, len(self.token_embedding.weight))
        parts = pieces(text, self.concepts)
        ids = (rows[part.token] if isinstance(part, Concept) else self._ids(part) for part in parts)
        return [*itertools.chain.from_iterable(ids), self.tokenizer.end_token]

    def backbone(self, tokens: list[list[int]]) -> Conditioning:
        """The T5's output, before the projection.

        Returns:
            A conditioning with context (B, L, d_model) and, as mask, the real tokens, or None if pads are attended. Its
            pooled output is the mean (B, d_model) of the real tokens' states, or None if the projection does not read
            it; it is computed here because a mask of None does not tell which tokens are real.
        """
        arrive(self.model)
        ids, real = self._batch(tokens)
        real = upload(real, self.token_embedding.weight.device)
        with embedding(self.token_embedding, ids, self.concepts, self.name) as ids:
            states = self.model(input_ids=ids, attention_mask=real.long()).last_hidden_state
        mean = masked_mean(states, real) if self.projection.pooled_width else None
        return Conditioning(states, mean, real if self.padding.pad == "none" else None)

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        return self.projection.project(states, time)

    def encode(self, tokens: list[list[int]]) -> Conditioning:
        return self.project(self.backbone(tokens))

    def real_tokens(self, tokens: list[list[int]]) -> Tensor:
        """(B, L) bool for the output of `encode`: the prompt's tokens and </s>, not pads; all tokens of a resampler."""
        if self.projection.tokens:
            device = self.token_embedding.weight.device
            return torch.ones(len(tokens), self.projection.tokens, dtype=torch.bool, device=device)
        return self.backbone_tokens(tokens)

    def backbone_tokens(self, tokens: list[list[int]]) -> Tensor:
        """(B, L) bool for the output of `backbone`: the prompt's tokens and </s>, without pads."""
        return self._batch(tokens)[1].to(self.token_embedding.weight.device)

    def scaled(self, factor: float) -> T5TextEncoder:
        """A copy, sharing the T5's weights, with its output multiplied by `factor`."""
        return self.with_projection(self.projection.scaled(factor))

    def with_projection(self, projection: Projection) -> T5TextEncoder:
        """A copy, sharing the T5's weights, with another projection."""
        result = T5TextEncoder(self.model, self.tokenizer, projection, self.padding, self.file_hash)
        return result.with_concepts(self.concepts)

    def _batch(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded ids (B, L), and (B, L) bool of the real tokens, both on the CPU."""
        length = self.padding.max_tokens if self.padding.pad == "max_tokens" else max(map(len, tokens))
        ids = torch.full((len(tokens), length), self.tokenizer.pad_token)
        real = torch.zeros(len(tokens), length, dtype=torch.bool)
        for row, prompt in enumerate(tokens):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            real[row, : len(prompt)] = True
        return ids, real


def comfyui_name(width: int) -> str:
    """ComfyUI's name of a T5 of this width, in its weights' prefix, embeddings and tokenizer options."""
    return "t5xxl" if width == XXL_WIDTH else "t5base"


def truncate_tokens(ids: list[int], max_tokens: int, text: str) -> list[int]:
    """Truncates ids to `max_tokens` and keeps the end token; logs a warning, with the start of `text`, if it does."""
    if len(ids) <= max_tokens:
        return ids
    logger.warning("Prompt of %d tokens is cut to max_tokens = %d: %.60s...", len(ids), max_tokens, text)
    return ids[: max_tokens - 1] + ids[-1:]


def load_t5(
    path: str | Path,
    projection: Projection,
    *,
    padding: Padding | None = None,
    tokenizer: str | Path | T5Tokenizer | None = None,
    comfyui: str | Path | None = None,
    device: torch.device | str = "cpu",
    held: bool = False,
) -> T5TextEncoder:
    """Loads a T5 text encoder in fp32, or with its weights held as in the file.

    Args:
        path: File or folder of the T5.
        projection: From the T5's width to the denoiser's.
        padding: Length of contexts.
        tokenizer: The tokenizer or its path; by default it is searched for (see `find_tokenizer`).
        comfyui: ComfyUI's folder, searched for a tokenizer.
        device: Device of weights and projection.
        held: Whether weights keep the dtypes of the file (`recast.hold`), which gives the same outputs.

    Raises:
        FileNotFoundError: Weights or tokenizer are missing.
        ValueError: Weights or tokenizer are unsuitable, or the projection reads another width.
    """
    weights = read_t5(path, None if held else torch.float32)
    if not isinstance(tokenizer, T5Tokenizer):
        tokenizer = find_tokenizer(path, weights.config, path=tokenizer, comfyui=comfyui)
    model = t5_model(weights)
    model = (hold(model) if held else model).to(device)
    return T5TextEncoder(model, tokenizer, projection.to(device), padding or Padding(), weights.file_hash)


def t5_model(weights: T5Weights) -> nn.Module:
    """transformers' T5EncoderModel, or UMT5EncoderModel for UMT5 and Pile-T5, frozen and in eval mode."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    umt5 = weights.config["model_type"] == "umt5"
    fields = {key: value for key, value in weights.config.items() if key not in ("model_type", "dense_act_fn")}
    config = (UMT5Config if umt5 else T5Config)(**fields, dropout_rate=0.0)
    with torch.device("meta"):
        model = (UMT5EncoderModel if umt5 else T5EncoderModel)(config)
    state = weights.state_dict | {"encoder.embed_tokens.weight": weights.state_dict["shared.weight"]}
    model.load_state_dict(state, assign=True)
    model.encoder.embed_tokens = model.shared
    return model.eval().requires_grad_(False)
