"""Training of embeddings for new tokens on images, with a LoRA of the UNet along with them if asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.files import write_tensors
from ..common.foreign import metadata_json, read_tensors, reading
from ..config.embedding import EmbeddingConfig
from ..config.tokens import check_token
from ..data.examples import Dataset
from ..data.templates import (
    TEMPLATES,
    CaptionTemplates,
    contains_token,
    expect_readable,
    expect_tokens,
    keep_images_with_tokens,
    replace_caption_words,
)
from ..formats.embedding import Embedding, read_embedding
from ..formats.embedding_fit import assign_to_encoders, family_of
from ..formats.embedding_report import embedding_warnings, median_norm, token_warnings, vector_statistics
from ..formats.embedding_save import save_embedding
from ..models.concepts import Concept
from ..models.protocols import TextEncoder, TextToImage
from ..runs.folder import RunFolder
from ..trainables.base import Trainable
from ..trainables.lora import Adapters, select_layers
from ..trainables.token_embeddings import TokenEmbeddings, start_concept
from ..trainables.weights import TrainableGroup
from .checks import check_fit, with_precision
from .denoising import train_on_images
from .lora import ARTIFACT as LORA_ARTIFACT
from .lora import describe_training, unet_layers, write_lora
from .run import AGAIN, TrainingJob

log = logging.getLogger(__name__)

ARTIFACT = "tokens.safetensors"


@dataclass(frozen=True)
class TrainedEmbedding:
    """The result of a run.

    Attributes:
        path: its file.
        embedding: the trained concepts with their metadata.
        lora: ComfyUI's LORA_MODEL, empty where none trained.
    """

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
    """Trains embeddings of new tokens, resumes such a run, or reads a finished one.

    The model is left bit-identical, the vocabulary of its text encoder too.

    Args:
        model: the base model.
        dataset: images; `config.template` decides on their captions.
        config: settings; `config.resume` decides what happens to an earlier run of this name.
        root: folder of all runs.
        callbacks: progress display and cancelling.
        details: JSON for config.json besides the settings, such as the workflow.

    Raises:
        ValueError: before any training: a token that no caption contains, that gives no file name, or that the text
            encoder does not reach; an initial text without a token, a text encoder that does not fit the UNet, or a
            run of other settings under this name.
    """
    config = with_precision(config, model.denoiser.device, Path(root))
    check_fit(model, config)
    callbacks, config = callbacks or Callbacks(), _without_empty_captions(config)
    dataset, captions = choose_captions(dataset, config)
    shuffled = config.settings.caption_shuffle
    expect_readable(model.text_encoder, captions.all_of(dataset.captions), config.tokens, config.vectors, shuffled)
    vocabularies, concepts = model.text_encoder.vocabularies, _initial_concepts(model, config)
    model = replace(model, text_encoder=model.text_encoder.with_concepts(concepts))
    norms = {name: median_norm(v) for name, v in vocabularies.items()} if config.norm == "vocabulary" else {}
    tokens = TokenEmbeddings(concepts, [model.denoiser.network], norms, model.denoiser.device)
    callbacks.after_load()  # a text encoder that was asked for its width may have pushed the UNet out
    adapters = _build_adapters(model, config)
    job = TrainingJob(
        name="embedding",
        artifact=ARTIFACT,
        trainable=partial(_build_trainable, tokens, adapters, config),
        write=partial(_write, tokens, adapters, config),
        details=describe_training(model, dataset) | (details or {}),
        text_trains=True,
        caption_of=captions,
        stays=partial(contains_token, tokens=config.tokens),
        watch=lambda values: _measure_tokens(tokens.concepts(values), vocabularies, callbacks),
    )
    with model.text_encoder.training():
        return read_trained_embedding(train_on_images(job, model, dataset, config, Path(root), callbacks))


def _without_empty_captions(config: EmbeddingConfig) -> EmbeddingConfig:
    """The config without caption dropout where embeddings alone train: an empty caption has no token to train."""
    if config.lora_rank or not config.settings.caption_dropout:
        return config
    log.info("caption_dropout is left out: an empty caption teaches a token nothing")
    return replace(config, settings=replace(config.settings, caption_dropout=0.0))


def choose_captions(dataset: Dataset, config: EmbeddingConfig) -> tuple[Dataset, CaptionTemplates]:
    """The images that can teach a token, and the captions they are trained with; warns of what is left out.

    Raises ValueError where captions are asked for and none contains the token.
    """
    tokens, template = config.tokens, config.template
    if config.replaced_words:
        if len(tokens) > 1:
            raise ValueError(f"caption_word is {config.caption_word!r} for {len(tokens)} tokens; expected one token.")
        dataset = replace_caption_words(dataset, config.replaced_words, tokens[0])
    if template == "auto":
        in_captions = len(tokens) > 1 or any(contains_token(caption, tokens) for caption in dataset.captions)
        template = "captions" if in_captions else "object"
        if not in_captions:
            log.warning("no caption holds %s; sentences such as %r are used", tokens[0], TEMPLATES["object"][0])
    if template == "captions":
        dataset = dataset if config.lora_rank else keep_images_with_tokens(dataset, tokens)
        return dataset, CaptionTemplates((), tokens[0], config.seed)
    lines = config.lines if template == "own" else TEMPLATES[template]
    if not config.lora_rank:
        expect_tokens(lines, dataset.captions, tokens)
    return dataset, CaptionTemplates(lines, tokens[0], config.seed)


def _initial_concepts(model: TextToImage, config: EmbeddingConfig) -> list[Concept]:
    """The tokens before training; warns of tokens that the vocabulary has a meaning for."""
    vocabularies, known = model.text_encoder.vocabularies, model.text_encoder.concepts
    for line in (line for token in config.tokens for line in token_warnings(token, vocabularies)):
        log.warning("%s", line)
    rows = zip(config.tokens, config.starts, strict=True)
    return [start_concept(token, text, config.vectors, vocabularies, known, config.seed) for token, text in rows]


def read_concepts(entries: Iterable[str], encoder: TextEncoder) -> list[Concept]:
    """Concepts of embedding files, each given as `token=file`, for a text encoder. Raises ValueError for any other."""
    concepts = []
    for entry in entries:
        token, equals, file = entry.partition("=")
        if not equals:
            raise ValueError(f"known embedding is {entry!r}; expected token=file, such as <my-cat>=cat.safetensors.")
        read, vocabularies = read_embedding(file, token), encoder.vocabularies
        concept = Concept(check_token(token), assign_to_encoders(read, vocabularies))
        for line in embedding_warnings([read], concept, vocabularies):
            log.warning("%s", line)
        concepts.append(concept)
    return concepts


def _build_trainable(tokens: TokenEmbeddings, adapters: Adapters | None, config: EmbeddingConfig) -> Trainable:
    if adapters is None:
        return tokens
    return TrainableGroup((tokens, 1.0), (adapters, config.lora_learning_rate / config.learning_rate))


def _build_adapters(model: TextToImage, config: EmbeddingConfig) -> Adapters | None:
    """Adapters of the UNet, where a LoRA trains along."""
    lora = config.lora
    if lora is None:
        return None
    layers, denoiser = select_layers(unet_layers(model.denoiser), lora), model.denoiser
    return Adapters(layers, [denoiser.network], lora, config.seed, denoiser.device)


def _measure_tokens(concepts: tuple[Concept, ...], vocabularies: Mapping, callbacks: Callbacks) -> dict[str, Any]:
    """Norm of every vector over the vocabulary's median norm, and its nearest tokens."""
    measured = {}
    for concept in concepts:
        for name, vectors in concept.vectors.items():
            figures = vector_statistics(vocabularies[name], vectors)
            measured[f"{concept.token}/{name}"] = {
                "norm": [figure.ratio for figure in figures],
                "nearest": [[list(pair) for pair in figure.nearest] for figure in figures],
            }
            nearest = ", ".join(word for word, _ in figures[0].nearest)
            callbacks.on_text(f"{concept.token} ({name}) is nearest to {nearest}")
    return {"tokens": measured}


def _write(
    tokens: TokenEmbeddings,
    adapters: Adapters | None,
    config: EmbeddingConfig,
    folder: RunFolder,
    values: Mapping[str, Tensor],
    ending: Mapping[str, Any],
) -> None:
    """Writes the vectors as the text encoder reads them, a file for other programs for each token, and the LoRA."""
    concepts = tokens.concepts(values)
    model = folder.config()["identity"]["model"]
    about = {"base": family_of(concepts[0].vectors), "run": config.run_name, "model": model, **ending}
    vectors = {f"{concept.token}/{name}": v for concept in concepts for name, v in concept.vectors.items()}
    write_tensors(folder.path / ARTIFACT, vectors, {"retune.run": json.dumps(about)})
    if adapters is not None:
        lora = adapters.lora_model({name: values[name] for name in adapters.parameters})
        write_lora(folder, lora, config.lora, ending)
    save_embedding(folder.path / "embeddings", Embedding(concepts, about), "safetensors")


def read_trained_embedding(folder: Path) -> TrainedEmbedding:
    """The result of a run from its folder."""
    file, lora = Path(folder) / ARTIFACT, Path(folder) / LORA_ARTIFACT
    tensors, metadata = read_tensors(file)
    by_token: dict[str, dict[str, Tensor]] = {}
    for key, vectors in tensors.items():
        token, _, name = key.rpartition("/")
        by_token.setdefault(token, {})[name] = vectors
    concepts = tuple(Concept(token, vectors) for token, vectors in by_token.items())
    with reading(file, advice=AGAIN):
        embedding = Embedding(concepts, metadata_json(metadata, "retune.run"))
    return TrainedEmbedding(file, embedding, read_tensors(lora)[0] if lora.exists() else {})
