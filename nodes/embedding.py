"""Textual inversion files as tokens of prompts, and trained tokens as files."""

import logging
import re
from pathlib import Path

from comfy_api.latest import io

from ..training.demo.files import EMBEDDINGS, weights_path
from .common import types
from .common.paths import files, listed_file, named_after, size_of

log = logging.getLogger(__name__)

NONE = "none"
FOLDER = "embeddings"
DEMO = {f"demo: {name}": f"embeddings/{name}.safetensors" for name in EMBEDDINGS}
"""Combo value -> embedding of the demo model."""


class RetuneLoadEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = embedding_files()
        return io.Schema(
            node_id="RetuneLoadEmbedding",
            display_name="Load Embedding",
            category="retune/embedding",
            description="Makes a word of prompts from a textual inversion file of any trainer: A1111 (also pictures), "
            "kohya, diffusers, OneTrainer, ai-toolkit; SD1.x, SD2.x, SDXL and T5. The report names the file's "
            "kind and the words nearest to its vectors.",
            search_aliases=["textual inversion", "embedding", "learned_embeds", "negative embedding", "load embedding"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder; it is not changed, a clone has the word."),
                io.Combo.Input(
                    "file",
                    options=[*names, *DEMO],
                    tooltip="A file of the embeddings folders: .safetensors, .pt, .bin, .png. The demo one is for the "
                    "demo model.",
                ),
                io.String.Input(
                    "token",
                    default="",
                    tooltip="The word that stands for it in prompts, such as <cat-toy> or sks. Empty: the word in the "
                    "file, else its name.",
                ),
                io.Combo.Input(
                    "second_file",
                    options=[NONE, *names],
                    default=NONE,
                    optional=True,
                    tooltip="SDXL in two files, as diffusers writes it: the one for the other text encoder.",
                ),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoder that reads the word as the file's vectors."),
                io.String.Output(
                    display_name="report",
                    tooltip="Format, word, vectors, norms against the vocabulary, nearest words, warnings.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file="", second_file=NONE, **_):
        paths = [listed_embedding(name) for name in (file, second_file) if name not in ("", NONE)]
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]

    @classmethod
    def execute(cls, clip, file, token="", second_file=NONE) -> io.NodeOutput:
        from ..training.config.tokens import check_token
        from ..training.formats.embedding import read_embedding
        from ..training.formats.embedding_fit import assign_to_encoders
        from ..training.formats.embedding_report import embedding_report, embedding_warnings
        from ..training.models.concepts import Concept
        from .clips.concept_tokens import vocabularies_of, with_concepts

        chosen = [name for name in (file, second_file) if name != NONE]
        parts = [read_embedding(listed_embedding(name), token.strip()) for name in chosen]
        vocabularies = vocabularies_of(clip)
        token = check_token(token) if token.strip() else own_token(parts[0].token or Path(file).stem, file)
        concept = Concept(token, assign_to_encoders(parts[0], vocabularies, *parts[1:]))
        clip = with_concepts(clip, [concept])
        for line in embedding_warnings(parts, concept, vocabularies):
            log.warning("%s", line)
        report = embedding_report(parts, concept, vocabularies)
        return io.NodeOutput(clip, report, ui={"text": [report]})


class RetuneSaveEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneSaveEmbedding",
            display_name="Save Embedding",
            category="retune/embedding",
            description="Writes trained words into the first embeddings folder, where ComfyUI's own embedding: finds "
            "them at once. A file that is there already is never overwritten.",
            search_aliases=["export embedding", "textual inversion", "learned_embeds", "save embedding"],
            is_output_node=True,
            inputs=[
                types.Embedding.Input("embedding", tooltip="From Train Embedding."),
                io.Combo.Input(
                    "format",
                    options=["safetensors", "A1111 pt", "diffusers"],
                    tooltip="safetensors: for ComfyUI, A1111, Forge, OneTrainer and diffusers. A1111 pt: for old "
                    "programs. diffusers: the word inside the file; SDXL in two files.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="%token%",
                    tooltip="Name of the file; %token% is the word without marks. May hold a sub-folder. Left as it "
                    "is, or empty, a connected run gives its name.",
                ),
                types.Run.Input(
                    "run", optional=True, tooltip="The run it comes from, whose name the file gets in embedding: too."
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file written; one a line for several words."),
            ],
        )

    @classmethod
    def execute(cls, embedding, format, filename_prefix, run=None) -> io.NodeOutput:
        import folder_paths

        from ..training.formats.embedding_save import save_embedding

        folder = folder_paths.get_folder_paths(FOLDER)[0]
        prefix = prefix_of(run, filename_prefix, len(embedding.concepts))
        written = save_embedding(folder, embedding, format, prefix)
        folder_paths.filename_list_cache.pop(FOLDER, None)  # else a file made in the same tick of the clock is missed
        every = [path for paths in written for path in paths]
        shown = [*map(str, every), *map(size_of, every)]
        return io.NodeOutput("\n".join(str(paths[0]) for paths in written), ui={"text": shown})


def prefix_of(run, prefix: str, words: int) -> str:
    """The prefix of the files of some words: a run's name where the widget names none, and of several words each."""
    from ..training.formats.embedding_save import TOKEN, token_file_name

    named = named_after(run, prefix, TOKEN)
    if named == prefix:
        return prefix
    name = token_file_name(re.sub(r"\s+", "-", named))  # as `embedding:` reads it
    return (name or TOKEN) if words == 1 else f"{name}-{TOKEN}"


def embedding_files() -> list[str]:
    """ComfyUI's embeddings, then the pictures in their folders, which may hold some; previews left out."""
    return files(FOLDER) + sorted(_pictures())


def listed_embedding(name: str) -> Path:
    """The path of a file that `embedding_files` lists, or of the demo model's; ValueError for another."""
    from ..training.formats.embedding import IMAGES

    if name in DEMO:
        return weights_path(DEMO[name])
    is_picture = Path(name).suffix.lower() in IMAGES
    return (_pictures().get(name) if is_picture else None) or listed_file(name, FOLDER)


def own_token(name: str, file: str) -> str:
    """The token stored in a file, or the file's name, as one word: blanks and commas become hyphens.

    Raises ValueError, which names the file, for a word that cannot stand in a prompt.
    """
    from ..training.common.foreign import reading
    from ..training.config.tokens import check_token

    with reading(file):
        return check_token(re.sub(r"[\s,]+", "-", name.strip()))


def _pictures() -> dict[str, Path]:
    """Name below an embeddings folder -> path; the first folder counts."""
    import folder_paths

    from ..training.formats.embedding import IMAGES

    paths: dict[str, Path] = {}
    for folder in folder_paths.get_folder_paths(FOLDER):
        for name in folder_paths.recursive_search(folder, [".git"])[0]:
            path = Path(folder) / name
            if path.suffix.lower() in IMAGES and not path.stem.lower().endswith(".preview"):
                paths.setdefault(name, path)
    return paths
