"""T5 tokenizers: beside the model, at a given path, in a ComfyUI folder, or in the demo; ids always end in </s>."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .t5_config import BYT5_VOCABULARY
from .t5_file import embedded_sentencepiece

FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
T5_VOCABULARIES = (32100, 32128)
BYT5_OFFSET = 3


class T5Tokenizer:
    """Text to token ids that end in </s>; a literal </s> or <pad> inside a prompt is dropped.

    encode_text: ids of one text without special tokens. fingerprint: changes with the vocabulary or its rules.
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
    ):
        self._encode_text, self._vocabulary, self._decode_ids = encode_text, vocabulary, decode_ids
        self.fingerprint, self.end_token, self.pad_token = fingerprint, end_token, pad_token

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._vocabulary.values())

    def encode(self, text: str) -> list[int]:
        special = (self.end_token, self.pad_token)
        return [token for token in self._encode_text(text) if token not in special] + [self.end_token]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = (self.end_token, self.pad_token) if skip_special_tokens else ()
        return self._decode_ids([int(token) for token in ids if token not in special])

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        """As ComfyUI's tokenizer classes call it."""
        return {"input_ids": self.encode(text)}


def load_tokenizer(path: str | Path, *, end_token: int = 1, pad_token: int = 0) -> T5Tokenizer:
    """Reads tokenizer.json, a sentencepiece .model, or a folder that has one. Errors: ValueError, FileNotFoundError."""
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; expected {', '.join(FILES)} or a folder with one of them")
    if file.suffix == ".json":
        return _from_json(file, end_token, pad_token)
    return sentencepiece_tokenizer(file.read_bytes(), end_token=end_token, pad_token=pad_token)


def sentencepiece_tokenizer(model: bytes, *, end_token: int = 1, pad_token: int = 0) -> T5Tokenizer:
    """A tokenizer from the bytes of a sentencepiece model (mT5, UMT5, Pile-T5)."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model, add_bos=False, add_eos=False)
    except RuntimeError as error:
        raise ValueError(f"the sentencepiece model of {len(model)} bytes is damaged ({error})") from error
    vocabulary = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    fingerprint = hashlib.sha256(model).hexdigest()
    special = {"end_token": end_token, "pad_token": pad_token}
    return T5Tokenizer(processor.encode, vocabulary, processor.decode, fingerprint, **special)


def byte_tokenizer() -> T5Tokenizer:
    """ByT5's: one token per UTF-8 byte, shifted by three special tokens (Xue et al. 2022, arXiv 2105.13626)."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": byte + BYT5_OFFSET for byte in range(256)}

    def decode(ids: list[int]) -> str:
        known = [token - BYT5_OFFSET for token in ids if BYT5_OFFSET <= token < 256 + BYT5_OFFSET]
        return bytes(known).decode("utf-8", errors="ignore")

    return T5Tokenizer(lambda text: [b + BYT5_OFFSET for b in text.encode()], vocabulary, decode, "byt5")


def find_tokenizer(
    model: str | Path,
    config: dict,
    *,
    path: str | Path | None = None,
    comfyui: str | Path | None = None,
) -> T5Tokenizer:
    """The tokenizer of a T5: `path`, inside its file, beside it (the demo's lies there), ByT5's bytes, or ComfyUI's.

    config: of the T5; a tokenizer with more ids than its vocabulary does not fit. comfyui: ComfyUI's folder. Errors:
    FileNotFoundError that lists where it looked; ValueError for a given tokenizer that does not fit.
    """
    special = {"end_token": config["eos_token_id"], "pad_token": config["pad_token_id"]}
    if path is not None:
        return _fitting(load_tokenizer(path, **special), config, str(path))
    if config["vocab_size"] == BYT5_VOCABULARY:
        return byte_tokenizer()
    spiece = embedded_sentencepiece(model)
    if spiece is not None:
        return _fitting(sentencepiece_tokenizer(spiece, **special), config, f"the one inside {Path(model).name}")
    candidates = _candidates(Path(model), config, comfyui)
    for candidate in candidates:
        if _file_in(candidate) is not None:
            return _fitting(load_tokenizer(candidate, **special), config, str(candidate))
    looked = "\n  ".join(str(candidate) for candidate in candidates) or "(nowhere)"
    raise FileNotFoundError(
        f"no tokenizer for {Path(model).name} (vocabulary of {config['vocab_size']}); looked for {', '.join(FILES)} "
        f"in\n  {looked}\nPut the model's tokenizer.json beside it, pass its path, or use an installed ComfyUI's."
    )


def _candidates(model: Path, config: dict, comfyui: str | Path | None) -> list[Path]:
    folder = model if model.is_dir() else model.parent
    places = [] if model.is_dir() else [folder / model.stem, folder / f"{model.stem}_tokenizer"]
    places += [folder, folder / "tokenizer"]
    if folder.name.startswith("text_encoder"):  # in a diffusers folder text_encoder_3 goes with tokenizer_3
        places.append(folder.parent / folder.name.replace("text_encoder", "tokenizer"))
    if comfyui is not None and config["vocab_size"] in T5_VOCABULARIES:
        name = "t5_pile_tokenizer" if config["model_type"] == "umt5" else "t5_tokenizer"
        places.append(Path(comfyui) / "comfy" / "text_encoders" / name)
    return places


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def _fitting(tokenizer: T5Tokenizer, config: dict, origin: str) -> T5Tokenizer:
    if tokenizer.size > config["vocab_size"]:
        raise ValueError(
            f"tokenizer {origin} has {tokenizer.size} tokens; expected at most the T5's {config['vocab_size']}. "
            "Use the tokenizer that belongs to this T5."
        )
    return tokenizer


def _from_json(file: Path, end_token: int, pad_token: int) -> T5Tokenizer:
    from tokenizers import Tokenizer

    text = file.read_text(encoding="utf-8")
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file.name} in {file.parent.name} is no tokenizer.json ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    fingerprint = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()
    return T5Tokenizer(
        lambda prompt: backend.encode(prompt, add_special_tokens=False).ids,
        backend.get_vocab(with_added_tokens=True),
        lambda ids: backend.decode(ids),
        fingerprint,
        end_token=end_token,
        pad_token=pad_token,
    )
