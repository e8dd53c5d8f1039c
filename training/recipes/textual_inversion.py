"""Training new tokens of a text encoder on images, and a LoRA of the UNet beside them if asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.files import read_tensors, write_tensors
from ..config.embedding import EmbeddingConfig
from ..config.tokens import check_token
from ..data.examples import Dataset
from ..data.templates import TEMPLATES, CaptionTemplates, contains_token, keep_images_with_tokens, replace_caption_words
from ..formats.embedding import Embedding, read_embedding
from ..formats.embedding_fit import assign_to_encoders, family_of
from ..formats.embedding_report import median_norm, token_warnings, vector_statistics
from ..formats.embedding_save import save_embedding
from ..models.concepts import Concept
from ..models.protocols import TextEncoder, TextToImage
from ..runs.folder import RunFolder
from ..trainables.lora import Adapters, select_layers
from ..trainables.token_embeddings import TokenEmbeddings, start_concept
from ..trainables.weights import Trainable, TrainableGroup
from .checks import check_fit
from .denoising import train_on_images
from .lora import ARTIFACT as LORA_ARTIFACT
from .lora import describe_training, unet_layers, write_lora
from .run import TrainingJob

log = logging.getLogger(__name__)

ARTIFACT = "tokens.safetensors"


@dataclass(frozen=True)
class TrainedEmbedding:
    """What a run made: its file, the concepts with what is known of them, and ComfyUI's LORA_MODEL (empty without)."""

    path: Path
    embedding: Embedding
    lora: dict[str, Tensor]


def train_embedding(
    model: TextToImage,
    dataset: Dataset,
    config: EmbeddingConfig,
    root: Path,
    callbacks: Callbacks | None = None,
    details: dict | None = None,
) -> TrainedEmbedding:
    """Trains, or goes on, or returns a finished run of this name and config from disk; see `config.resume`.

    root: the folder that holds all runs. details: anything JSON that should stand in config.json beside the settings.
    The model is left bit-identical, its text encoder's vocabulary too. Raises ValueError before any training for a
    token that no caption holds, an initial text without a token, a text encoder that does not fit the UNet, or a run of
    other settings under this name.
    """
    check_fit(model, config)
    callbacks = callbacks or Callbacks()
    dataset, captions = choose_captions(dataset, config)
    if not config.lora_rank and config.settings.caption_dropout:
        log.info("caption_dropout is left out: an empty caption teaches a token nothing")
        config = replace(config, settings=replace(config.settings, caption_dropout=0.0))
    vocabularies, starts = model.text_encoder.vocabularies, _starts(model, config)
    model = replace(model, text_encoder=model.text_encoder.with_concepts(starts))
    norms = {name: median_norm(v) for name, v in vocabularies.items()} if config.norm == "vocabulary" else {}
    tokens = TokenEmbeddings(starts, [model.denoiser.network], norms, model.denoiser.device)
    adapters = _adapters(model, config)
    about = describe_training(model, dataset)
    job = TrainingJob(
        name="embedding",
        artifact=ARTIFACT,
        trainable=lambda: _both(tokens, adapters, config),
        write=lambda folder, values, ending: _write(folder, values, tokens, adapters, config, ending),
        details=about | (details or {}),
        text_trains=True,
        caption_of=captions,
        watch=lambda values: _watched(tokens.concepts(values), vocabularies, callbacks),
    )
    with model.text_encoder.training():
        path = train_on_images(job, model, dataset, config, Path(root), callbacks)
    return read_trained_embedding(path)


def _starts(model: TextToImage, config: EmbeddingConfig) -> list[Concept]:
    """Each token as it begins; warns of tokens that mean something already."""
    vocabularies, known = model.text_encoder.vocabularies, model.text_encoder.concepts
    for line in (line for token in config.tokens for line in token_warnings(token, vocabularies)):
        log.warning("%s", line)
    rows = zip(config.tokens, config.starts, strict=True)
    return [start_concept(token, text, config.vectors, vocabularies, known, config.seed) for token, text in rows]


def choose_captions(dataset: Dataset, config: EmbeddingConfig) -> tuple[Dataset, CaptionTemplates]:
    """The images that can teach a token, and the sentences that they are shown with. Warns of what is left out.

    Raises ValueError where captions are asked for and none holds the token.
    """
    tokens, template = config.tokens, config.template
    if config.replaced_words:
        if len(tokens) > 1:
            raise ValueError(f"caption_word is {config.caption_word!r} for {len(tokens)} tokens; expected one token.")
        dataset = replace_caption_words(dataset, config.replaced_words, tokens[0])
    if template == "auto":
        found = len(tokens) > 1 or any(contains_token(caption, tokens) for caption in dataset.captions)
        template = "captions" if found else "object"
        if not found:
            log.warning("no caption holds %s; sentences such as %r are used", tokens[0], TEMPLATES["object"][0])
    if template == "captions":
        dataset = dataset if config.lora_rank else keep_images_with_tokens(dataset, tokens)
        return dataset, CaptionTemplates((), tokens[0], config.seed)
    lines = config.lines if template == "own" else TEMPLATES[template]
    return dataset, CaptionTemplates(lines, tokens[0], config.seed)


def _adapters(model: TextToImage, config: EmbeddingConfig) -> Adapters | None:
    lora = config.lora
    if lora is None:
        return None
    return Adapters(select_layers(unet_layers(model.denoiser), lora), [model.denoiser.network], lora, config.seed)


def _both(tokens: TokenEmbeddings, adapters: Adapters | None, config: EmbeddingConfig) -> Trainable:
    if adapters is None:
        return tokens
    return TrainableGroup((tokens, 1.0), (adapters, config.lora_learning_rate / config.learning_rate))


def _watched(concepts: tuple[Concept, ...], vocabularies: Mapping, callbacks: Callbacks) -> dict[str, Any]:
    """Norm against the vocabulary's median, and nearest words, of every vector."""
    found = {}
    for concept in concepts:
        for name, vectors in concept.vectors.items():
            figures = vector_statistics(vocabularies[name], vectors)
            found[f"{concept.token}/{name}"] = {
                "norm": [figure.ratio for figure in figures],
                "nearest": [[list(pair) for pair in figure.nearest] for figure in figures],
            }
            words = ", ".join(word for word, _ in figures[0].nearest)
            callbacks.on_text(f"{concept.token} ({name}) is nearest to {words}")
    return {"tokens": found}


def _write(
    folder: RunFolder,
    values: Mapping[str, Tensor],
    tokens: TokenEmbeddings,
    adapters: Adapters | None,
    config: EmbeddingConfig,
    ending: Mapping,
) -> None:
    """The vectors as they are read, a file for other programs for each token, and the LoRA if one trained."""
    concepts = tokens.concepts(values)
    about = {"base": family_of(concepts[0].vectors), "run": config.run_name, **ending}
    vectors = {f"{concept.token}/{name}": v for concept in concepts for name, v in concept.vectors.items()}
    write_tensors(folder.path / ARTIFACT, vectors, {"retune.run": json.dumps(about)})
    if adapters is not None:
        lora = adapters.lora_model({name: values[name] for name in adapters.parameters})
        write_lora(folder, lora, config.lora, ending)
    save_embedding(folder.path / "embeddings", Embedding(concepts, about), "safetensors")


def read_trained_embedding(path: Path) -> TrainedEmbedding:
    """The result of a run from its folder."""
    file = Path(path) / ARTIFACT
    tensors, metadata = read_tensors(file)
    found: dict[str, dict[str, Tensor]] = {}
    for key, vectors in tensors.items():
        token, _, name = key.rpartition("/")
        found.setdefault(token, {})[name] = vectors
    concepts = tuple(Concept(token, vectors) for token, vectors in found.items())
    lora = Path(path) / LORA_ARTIFACT
    embedding = Embedding(concepts, json.loads(metadata["retune.run"]))
    return TrainedEmbedding(file, embedding, read_tensors(lora)[0] if lora.exists() else {})


def read_concepts(named: Iterable[str], encoder: TextEncoder) -> list[Concept]:
    """Concepts of embedding files, each given as `token=file`, for a text encoder. ValueError for one that is not."""
    found = []
    for entry in named:
        token, equals, file = entry.partition("=")
        if not equals:
            raise ValueError(f"known embedding is {entry!r}; expected token=file, such as <my-cat>=cat.safetensors.")
        vectors = assign_to_encoders(read_embedding(file, token), encoder.vocabularies)
        found.append(Concept(check_token(token), vectors))
    return found
