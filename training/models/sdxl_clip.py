"""SDXL's two CLIP text encoders as one (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from . import open_clip
from .clip import ClipTextEncoder
from .concepts import Concept, Vocabulary, add_concepts, expect_vectors
from .parameters import ParameterRef
from .protocols import Conditioning
from .recast import recastable, recasting

Windows = list[list[int]]
SECOND_PAD = 0
"""The second encoder was trained on windows padded with "!"."""


class SdxlTextEncoder:
    """TextEncoder over SDXL's pair: penultimate states concatenated (768 + 1280 wide), and the second's pooled output.

    Both encoders read the same tokens, split into windows as by `ClipTextEncoder`; only their pads differ.
    """

    chunks_long_prompts = True

    def __init__(self, first: ClipTextEncoder, second: ClipTextEncoder):
        if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
            raise ValueError(
                "SDXL's tokenizers have different vocabularies; expected the same in both. Use one model's."
            )
        self.first, self.second = first.named("clip_l"), second.named("clip_g")
        self.network = nn.ModuleList([first.network, second.network])
        self.width, self.pooled_width = first.width + second.width, second.pooled_width
        self.projection = None

    @classmethod
    def from_state(
        cls,
        states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        configs: tuple[Mapping | None, Mapping | None],
        tokenizer: Path | None,
        held: bool = False,
    ) -> SdxlTextEncoder:
        """From both encoders' tensors in a checkpoint.

        Args:
            states: of the first encoder in transformers' layout, of the second in OpenCLIP's.
            configs: CLIPTextConfig values of each; None reads them from the shapes.
            tokenizer: folder of the tokenizer of both.
            held: whether weights keep the dtypes of the file (`recast.hold`).

        Raises:
            ValueError: an encoder's tensors or the tokenizer are missing.
        """
        for index, state in enumerate(states):
            if not state:
                raise ValueError(
                    f"checkpoint lacks SDXL's text encoder conditioner.embedders.{index}; expected both. Give a "
                    "complete checkpoint or a diffusers folder."
                )
        first, second = states[0], open_clip.to_transformers(states[1])
        options = {"penultimate": True, "held": held}
        return cls(
            ClipTextEncoder.from_state(first, configs[0], tokenizer, **options),
            ClipTextEncoder.from_state(second, configs[1], tokenizer, projected=True, pad=SECOND_PAD, **options),
        )

    @property
    def token_embedding(self) -> nn.Embedding:
        """The first encoder's."""
        return self.first.token_embedding

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.first.fingerprint} {self.second.fingerprint}".encode()).hexdigest()

    @property
    def max_prompt_tokens(self) -> int:
        return self.first.max_prompt_tokens

    @property
    def layers(self) -> dict[str, nn.Module]:
        return self.first.layers | self.second.layers

    @property
    def weights(self) -> dict[str, ParameterRef]:
        return self.first.weights | self.second.weights

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return self.first.concepts

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return self.first.vocabularies | self.second.vocabularies

    def with_concepts(self, concepts: Iterable[Concept]) -> SdxlTextEncoder:
        both = add_concepts(self.concepts, concepts)
        expect_vectors(both, {part.name: part.width for part in (self.first, self.second)})
        return SdxlTextEncoder(self.first.with_concepts(both), self.second.with_concepts(both))

    def refreshed(self) -> SdxlTextEncoder:
        """See `ClipTextEncoder.refreshed`."""
        return SdxlTextEncoder(self.first.refreshed(), self.second.refreshed())

    def training(self) -> AbstractContextManager:
        return recasting(recastable(self.network))

    def tokenize(self, texts: list[str]) -> list[tuple[Windows, Windows]]:
        """The windows of both encoders, one pair for each text."""
        return list(zip(self.first.tokenize(texts), self.second.tokenize(texts), strict=True))

    def backbone(self, tokens: list[tuple[Windows, Windows]]) -> Conditioning:
        first, second = zip(*tokens, strict=True)
        left, right = self.first.backbone(list(first)), self.second.backbone(list(second))
        return Conditioning(torch.cat([left.context, right.context], dim=-1), right.pooled, left.mask)

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        return states

    def encode(self, tokens: list[tuple[Windows, Windows]]) -> Conditioning:
        return self.backbone(tokens)

    def real_tokens(self, tokens: list[tuple[Windows, Windows]]) -> Tensor:
        """(B, L) bool: the tokens of each prompt and the first end token, without start token and pads."""
        return self.first.real_tokens([windows for windows, _ in tokens])
