"""The CLIP text encoders of Stable Diffusion 1.x, 2.x and XL, over transformers' CLIPTextModel."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..common.fingerprint import tensors_fingerprint
from ..common.foreign import count_numbered, is_file, read_bytes, whole_number
from .clip_tokenizer import TOKENIZER_FILES, load_clip_tokenizer
from .concepts import (
    Concept,
    Vocabulary,
    add_concepts,
    concept_rows,
    embedding,
    expect_vectors,
    pieces,
    with_fingerprints,
)
from .parameters import ParameterRef, expect_shape, expect_tensors, finite_weight, parameter_refs
from .protocols import Conditioning
from .recast import hold, recastable, recasting
from .visitors import arrive

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SD2_WIDTH = 1024
LONG_WORD = 8
"""Texts of fewer tokens are not split between two windows, in ComfyUI and here."""


class ClipTextEncoder:
    """TextEncoder over CLIPTextModel: final hidden states, every window padded to the full 77 tokens.

    Prompts longer than a window are split every 75 tokens into windows that are encoded separately and concatenated, as
    ComfyUI does. Pads are attended, as the model was trained. Over CLIPTextModelWithProjection the pooled output is
    that of the first window. `name` is ComfyUI's: clip_l, or SD2's clip_h, by the width.

    Args:
        network: a CLIPTextModel or CLIPTextModelWithProjection of transformers.
        tokenizer_folder: with vocab.json and merges.txt.
        penultimate: whether the states are those before the last layer, without the final norm, as SDXL reads them.
        pad: id that fills a window, by default the tokenizer's.

    Raises:
        ValueError: the folder has no tokenizer, or one of more words than the network.
    """

    concepts: tuple[Concept, ...] = ()
    chunks_long_prompts = True

    def __init__(
        self, network: nn.Module, tokenizer_folder: Path, *, penultimate: bool = False, pad: int | None = None
    ):
        folder = Path(tokenizer_folder)
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = load_clip_tokenizer(folder, network.config.vocab_size)
        self.window = network.config.max_position_embeddings
        self.width = network.config.hidden_size
        self.name = "clip_h" if self.width == SD2_WIDTH else "clip_l"
        self.pooled_width = network.config.projection_dim if hasattr(network, "text_projection") else 0
        self.projection = None
        self._penultimate = penultimate
        self._pad = self.tokenizer.pad_token_id if pad is None else pad
        shape = (self.window, network.config.hidden_act, network.config.num_attention_heads)
        more = ("penultimate", self._pad) if penultimate else ()
        digest = _tokenizer_digest(folder)
        self._about = ("clip", shape, digest, *more)
        self._fingerprint = tensors_fingerprint(network.named_parameters(), *self._about)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        config: Mapping | None,
        tokenizer: Path | None,
        *,
        projected: bool = False,
        held: bool = False,
        **options,
    ) -> ClipTextEncoder:
        """From a checkpoint's tensors.

        Args:
            state: `text_model.*` tensors.
            config: CLIPTextConfig values; None reads them from the shapes.
            tokenizer: folder of the tokenizer.
            projected: whether `text_projection.weight` is among the tensors, for a pooled output.
            held: whether weights keep the dtypes of the file (`recast.hold`), which gives the same outputs.
            options: keyword arguments of the class.

        Raises:
            ValueError: tensors or the tokenizer are missing.
        """
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        state = {k.removeprefix("text_model."): v for k, v in state.items() if "position_ids" not in k}
        if "embeddings.token_embedding.weight" not in state:
            raise ValueError("checkpoint holds no CLIP text encoder (cond_stage_model.transformer.text_model...).")
        if tokenizer is None:
            raise ValueError("no CLIP tokenizer is given; expected a folder with vocab.json. Use --tokenizer.")
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        settings = CLIPTextConfig(**_config_that_fits(config, state))
        network = load_clip_network(kind, settings, state, "text_model.", "CLIP text encoder", held)
        return cls(network, tokenizer, **options)

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.network.get_input_embeddings()

    @property
    def fingerprint(self) -> str:
        return with_fingerprints(self._fingerprint, self.concepts)

    @property
    def max_prompt_tokens(self) -> int:
        return self.window - 2

    @property
    def layers(self) -> dict[str, nn.Module]:
        """See `TextEncoder.layers`. transformers 5 has no `text_model.` in its paths."""
        start = f"text_encoders.{self.name}.transformer.text_model."
        layers = {path.removeprefix("text_model."): layer for path, layer in self.network.named_modules()}
        return {start + path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear)}

    @property
    def weights(self) -> dict[str, ParameterRef]:
        start = f"text_encoders.{self.name}.transformer."
        inner = f"{start}text_model."
        refs = {}
        for path, ref in parameter_refs(self.network).items():
            plain = path.removeprefix("text_model.")
            refs[(start if plain.startswith("text_projection.") else inner) + plain] = ref
        return refs

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        return {self.name: Vocabulary(self.token_embedding.weight, self._ids, self._word)}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token]).strip()

    def named(self, name: str) -> ClipTextEncoder:
        """The same encoder under ComfyUI's name of it."""
        other = copy.copy(self)
        other.name = name
        return other

    def with_concepts(self, concepts: Iterable[Concept]) -> ClipTextEncoder:
        other = copy.copy(self)
        other.concepts = add_concepts(self.concepts, concepts)
        expect_vectors(other.concepts, {self.name: self.width})
        return other

    def refreshed(self) -> ClipTextEncoder:
        """The same encoder with the fingerprint of its present weights, after they were changed in place."""
        other = copy.copy(self)
        other._fingerprint = tensors_fingerprint(self.network.named_parameters(), *self._about)
        return other

    def training(self) -> AbstractContextManager:
        return recasting(recastable(self.network))

    def tokenize(self, texts: list[str]) -> list[list[list[int]]]:
        """One list of windows for each text; a window is start, up to 75 tokens, end, pads.

        Ids beyond the vocabulary are the concepts' vectors, numbered in their order.
        """
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        most = self.max_prompt_tokens
        windows = []
        for text in texts:
            parts = _split_into_windows(self._groups(text), most)
            windows.append([[begin, *part, end] + [self._pad] * (most - len(part)) for part in parts])
        return windows

    def _groups(self, text: str) -> list[list[int]]:
        """Token ids of a prompt's texts and concepts."""
        rows = concept_rows(self.concepts, self.name, len(self.token_embedding.weight))
        parts = pieces(text, self.concepts)
        return [rows[part.token] if isinstance(part, Concept) else self._ids(part) for part in parts]

    def backbone(self, tokens: list[list[list[int]]]) -> Conditioning:
        arrive(self.network)
        flat = torch.tensor([window for windows in tokens for window in windows])
        with embedding(self.token_embedding, flat, self.concepts, self.name) as flat:
            output = self.network(input_ids=flat, output_hidden_states=self._penultimate)
        states = output.hidden_states[-2] if self._penultimate else output.last_hidden_state
        counts = [len(windows) for windows in tokens]
        pooled = [text[:1] for text in output.text_embeds.split(counts)] if self.pooled_width else [None] * len(tokens)
        rows = (row.reshape(1, -1, row.shape[-1]) for row in states.split(counts))
        return Conditioning.cat(Conditioning(row, text) for row, text in zip(rows, pooled, strict=True))

    def project(self, states: Conditioning, time: Tensor | None = None) -> Conditioning:
        return states

    def encode(self, tokens: list[list[list[int]]]) -> Conditioning:
        return self.backbone(tokens)

    def real_tokens(self, tokens: list[list[list[int]]]) -> Tensor:
        """(B, L) bool: the tokens of each prompt and the first end token, without start token and pads."""
        end, longest = self.tokenizer.eos_token_id, max(len(windows) for windows in tokens) * self.window
        rows = []
        for windows in tokens:
            row = [0 < i <= window.index(end) for window in windows for i in range(self.window)]
            rows.append(row + [False] * (longest - len(row)))
        return torch.tensor(rows)


def _split_into_windows(groups: list[list[int]], most: int) -> list[list[int]]:
    """Groups of tokens in windows of at most `most`, as ComfyUI's SDTokenizer fills them: a group that does not fit is
    split when it is long, and starts the next window when it is short."""
    windows: list[list[int]] = [[]]
    for group in groups:
        rest = group
        while len(windows[-1]) + len(rest) > most:
            if len(group) >= LONG_WORD:
                left = most - len(windows[-1])
                windows[-1], rest = windows[-1] + rest[:left], rest[left:]
            windows.append([])
        windows[-1] = windows[-1] + rest
    return windows


def _tokenizer_digest(folder: Path) -> str:
    """Hash of the tokenizer files: with another vocabulary the same weights are another encoder."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if is_file(folder / name):
            digest.update(name.encode() + read_bytes(folder / name))
    return digest.hexdigest()


def load_clip_network(
    kind: type[nn.Module],
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    prefix: str,
    owner: str,
    held: bool = False,
) -> nn.Module:
    """A frozen CLIP network of transformers in fp32, or with its weights held as they are, from a state dict.

    Args:
        kind: class of the network, such as CLIPTextModel.
        config: its config.
        state: name -> tensor, names without `prefix`.
        prefix: leads the names in some versions of transformers, such as "text_model.".
        owner: names the network in the error.
        held: see `recast.hold`.

    Raises:
        ValueError: tensors are missing.
    """
    with torch.device("meta"):
        network = kind(config)
    names = {name: name.removeprefix(prefix) for name in network.state_dict()}
    expect_tensors(state, names.values(), owner)
    for name, tensor in network.state_dict().items():
        expect_shape(names[name], state[names[name]], tensor.shape, owner)
    weights = {name: finite_weight(bare, state[bare], owner, own_dtype=held) for name, bare in names.items()}
    network.load_state_dict(weights, assign=True)
    for module in network.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(module.position_embedding.num_embeddings)[None]
    return (hold(network) if held else network).eval().requires_grad_(False)


def clip_config(state: Mapping[str, Tensor]) -> dict:
    """CLIPTextConfig values from tensor shapes; heads are 64 wide, the activation is quick_gelu up to width 768.

    Raises ValueError where tensors are missing that tell a size.
    """
    needed = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    expect_tensors(state, (*needed, "encoder.layers.0.mlp.fc1.weight"), "CLIP text encoder")
    projected = state.get("text_projection.weight")
    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width if projected is None else projected.shape[0],
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count_numbered(state, "encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": state["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu" if width <= 768 else "gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _config_that_fits(config: Mapping | None, state: Mapping[str, Tensor]) -> dict:
    """The given config, or the one that shapes tell. Raises ValueError for one of more layers than there are."""
    read = clip_config(state)
    if not config:
        return read
    layers = whole_number(config.get("num_hidden_layers"), "num_hidden_layers", 1, read["num_hidden_layers"])
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    return {**config, **{name: read[name] for name in sizes}, "num_hidden_layers": layers}
