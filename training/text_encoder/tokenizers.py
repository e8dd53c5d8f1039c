"""T5 tokenizers, and the search for the one of a model: next to it, at a given path, or in ComfyUI's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.foreign import existing_file, is_file, label, parse_json, read_bytes, read_text, reading
from ..common.text import expect_whole_characters
from .t5_config import BYT5_VOCABULARY
from .t5_file import embedded_sentencepiece

FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
T5_VOCABULARIES = (32100, 32128)
BYT5_OFFSET = 3


class T5Tokenizer:
    """Tokenizes text; ids end in </s>, and a literal </s> or <pad> in the text is dropped.

    Args:
        encode_text: Text -> ids without special tokens.
        vocabulary: Token -> id.
        decode_ids: Ids -> text.
        fingerprint: Changes with the vocabulary and the rules.
        end_token: Id of </s>.
        pad_token: Id of <pad>.
        source: Its file, for messages.

    Raises:
        ValueError: The vocabulary is empty.
    """

    def __init__(
        self,
        encode_text: Callable[[str], list[int]],
        vocabulary: dict[str, int],
        decode_ids: Callable[[list[int]], str],
        fingerprint: str,
        *,
        end_token: int = 1,
        pad_token: int = 0,
        source: str | Path = "the tokenizer",
    ):
        if not vocabulary:
            raise ValueError(f"{label(source)} has no tokens; expected a vocabulary. Use the model's tokenizer.")
        self._source = source
        self._encode_text, self._vocabulary, self._decode_ids = encode_text, vocabulary, decode_ids
        self.fingerprint, self.end_token, self.pad_token = fingerprint, end_token, pad_token

    @property
    def size(self) -> int:
        """Largest id + 1."""
        return 1 + max(self._vocabulary.values())

    def encode(self, text: str) -> list[int]:
        """Ids of a text with </s> at the end. Raises ValueError for a text or a tokenizer that gives no ids."""
        special = (self.end_token, self.pad_token)
        text = expect_whole_characters(text, "a prompt")
        with reading(self._source, "of another model", "Use the tokenizer that belongs to the T5."):
            ids = self._encode_text(text)
        return [token for token in ids if token not in special] + [self.end_token]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = (self.end_token, self.pad_token) if skip_special_tokens else ()
        return self._decode_ids([int(token) for token in ids if token not in special])

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        """The interface that ComfyUI's tokenizer classes use."""
        return {"input_ids": self.encode(text)}


def load_tokenizer(path: str | Path, *, end_token: int = 1, pad_token: int = 0) -> T5Tokenizer:
    """Reads tokenizer.json, a sentencepiece .model, or a folder with one of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if file is None or not file.exists():
        raise FileNotFoundError(f"no tokenizer at {path}; expected {', '.join(FILES)} or a folder with one of them")
    special = {"end_token": end_token, "pad_token": pad_token}
    if existing_file(file).suffix == ".json":
        return _from_json(file, **special)
    return sentencepiece_tokenizer(read_bytes(file), source=file, **special)


def sentencepiece_tokenizer(model: bytes, *, source: str | Path = "spiece_model", **special: int) -> T5Tokenizer:
    """The tokenizer of a sentencepiece model, given as its file's content (mT5, UMT5, Pile-T5).

    Args:
        model: The content.
        source: The file it is from, for messages.
        special: `end_token` and `pad_token`.

    Raises:
        ValueError: The content is damaged.
    """
    import sentencepiece

    with reading(source, "no sentencepiece model", "Download it again."):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model, add_bos=False, add_eos=False)
        vocabulary = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    fingerprint = hashlib.sha256(model).hexdigest()
    return T5Tokenizer(processor.encode, vocabulary, processor.decode, fingerprint, source=source, **special)


def byte_tokenizer() -> T5Tokenizer:
    """ByT5's tokenizer: one token per UTF-8 byte, after three special tokens (Xue et al. 2022, arXiv 2105.13626)."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": byte + BYT5_OFFSET for byte in range(256)}

    def decode(ids: list[int]) -> str:
        values = [token - BYT5_OFFSET for token in ids if BYT5_OFFSET <= token < 256 + BYT5_OFFSET]
        return bytes(values).decode("utf-8", errors="ignore")

    return T5Tokenizer(lambda text: [b + BYT5_OFFSET for b in text.encode()], vocabulary, decode, "byt5")


def find_tokenizer(
    model: str | Path,
    config: dict,
    *,
    path: str | Path | None = None,
    comfyui: str | Path | None = None,
) -> T5Tokenizer:
    """Finds the tokenizer of a T5: at `path`, ByT5's, inside the model's file, next to it, or ComfyUI's.

    Args:
        model: File or folder of the T5.
        config: Its configuration; the tokenizer must not have more ids than its vocabulary.
        path: File or folder of the tokenizer; by default it is searched for.
        comfyui: ComfyUI's folder.

    Raises:
        FileNotFoundError: There is none; the message lists the searched folders.
        ValueError: The tokenizer has too many ids or is damaged.
    """
    special = {"end_token": config["eos_token_id"], "pad_token": config["pad_token_id"]}
    if path is not None:
        return _check_size(load_tokenizer(path, **special), config, str(path))
    if config["vocab_size"] == BYT5_VOCABULARY:
        return byte_tokenizer()
    spiece = embedded_sentencepiece(model)
    if spiece is not None:
        inside = sentencepiece_tokenizer(spiece, source=model, **special)
        return _check_size(inside, config, f"the one inside {Path(model).name}")
    candidates = _candidate_folders(Path(model), config, comfyui)
    for candidate in candidates:
        if _file_in(candidate) is not None:
            return _check_size(load_tokenizer(candidate, **special), config, str(candidate))
    searched = "\n  ".join(str(candidate) for candidate in candidates) or "(nowhere)"
    raise FileNotFoundError(
        f"no tokenizer for {Path(model).name} (vocabulary of {config['vocab_size']}); looked for {', '.join(FILES)} "
        f"in\n  {searched}\nPut the model's tokenizer.json beside it, pass its path, or use an installed ComfyUI's."
    )


def _candidate_folders(model: Path, config: dict, comfyui: str | Path | None) -> list[Path]:
    """Folders where the tokenizer of a T5 may be, in order of preference."""
    folder = model if model.is_dir() else model.parent
    candidates = [] if model.is_dir() else [folder / model.stem, folder / f"{model.stem}_tokenizer"]
    candidates += [folder, folder / "tokenizer"]
    if folder.name.startswith("text_encoder"):  # in a diffusers folder text_encoder_3 goes with tokenizer_3
        candidates.append(folder.parent / folder.name.replace("text_encoder", "tokenizer"))
    if comfyui is not None and config["vocab_size"] in T5_VOCABULARIES:
        name = "t5_pile_tokenizer" if config["model_type"] == "umt5" else "t5_tokenizer"
        candidates.append(Path(comfyui) / "comfy" / "text_encoders" / name)
    return candidates


def _file_in(folder: Path) -> Path | None:
    """The tokenizer file in a folder, or None."""
    return next((folder / name for name in FILES if is_file(folder / name)), None)


def _check_size(tokenizer: T5Tokenizer, config: dict, origin: str) -> T5Tokenizer:
    """The tokenizer; ValueError if it has more ids than the T5. origin: its path, for the message."""
    if tokenizer.size > config["vocab_size"]:
        raise ValueError(
            f"tokenizer {origin} has {tokenizer.size} tokens; expected at most the T5's {config['vocab_size']}. "
            "Use the tokenizer that belongs to this T5."
        )
    return tokenizer


def _from_json(file: Path, end_token: int, pad_token: int) -> T5Tokenizer:
    """Reads a tokenizer.json of the tokenizers library."""
    from tokenizers import Tokenizer

    text = read_text(file)
    with reading(file, "no tokenizer.json"):
        content = parse_json(text, dict)
        backend = Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
    return T5Tokenizer(
        lambda prompt: backend.encode(prompt, add_special_tokens=False).ids,
        vocabulary,
        lambda ids: backend.decode(ids),
        hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        end_token=end_token,
        pad_token=pad_token,
        source=file,
    )
