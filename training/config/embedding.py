"""Settings of a textual inversion, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choices, check_range
from .lora import LoraConfig
from .run import RunConfig
from .tokens import check_token

LORA_TARGETS = ("attention", "cross-attention", "attention + feed-forward", "all")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(RunConfig):
    """Train new tokens of a text encoder on images (textual inversion, arXiv 2208.01618)."""

    token: str
    """The new word, such as <cat-toy>; several with commas between them, told apart by the captions."""
    vectors: int = 1
    """Token embeddings that stand for each word; each takes a place of the prompt's 77."""
    initial_text: str = ""
    """Words whose embeddings training starts from, cut or repeated to `vectors`; with several tokens one text each,
    commas between them; empty starts from random vectors of the vocabulary's size."""
    template: Literal["auto", "captions", "object", "style", "own"] = "auto"
    """Captions of the images: their own where they hold the token, or sentences about an object or a style, or `lines`.
    auto: their own if any holds the token, else object."""
    lines: tuple[str, ...] = ()
    """Sentences for template "own": {} stands for the token and {caption} for the image's caption."""
    caption_word: str = ""
    """Word of the captions whose place the token takes, such as cat; several with commas between them."""
    norm: Literal["vocabulary", "free"] = "vocabulary"
    """vocabulary: every vector stays as long as the vocabulary's median, so that it mixes with other words."""
    lora_rank: int = 0
    """Rank of a LoRA on the UNet that trains in the same run (pivotal tuning); 0 trains the tokens alone."""
    lora_alpha: float = 16.0
    """Scale of that LoRA, fixed: dW = alpha / rank * up * down."""
    lora_targets: Literal[LORA_TARGETS] = "attention"  # type: ignore[valid-type]
    """Layers of the UNet that get an adapter of that LoRA."""
    lora_learning_rate: float = 1e-4
    """Peak learning rate of that LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_range(self, vectors=(1, 75), lora_rank=(0, 4096), lora_alpha=(1e-6, 1e6), lora_learning_rate=(0, 10))
        lowered = [token.lower() for token in self.tokens]
        if len(set(lowered)) < len(lowered):
            raise ValueError(f"token is {self.token!r}; expected different words. Upper and lower case are alike.")
        if len(self.starts) != len(self.tokens):
            raise ValueError(
                f"initial_text has {len(self.starts)} texts for {len(self.tokens)} tokens; expected as many, or none. "
                "Put commas between them."
            )
        if self.learning_rate == 0:
            raise ValueError("learning_rate is 0; expected one above 0. 1e-3 to 5e-3 is usual for tokens.")
        if self.template == "own" and not any("{}" in line for line in self.lines):
            raise ValueError("lines hold no {}; expected sentences with {} in place of the token for template 'own'.")
        if len(self.tokens) > 1 and self.template in ("object", "style", "own"):
            raise ValueError(
                f"template is {self.template!r} for {len(self.tokens)} tokens; expected 'captions', which tell whose "
                "image each is."
            )

    @property
    def tokens(self) -> list[str]:
        return [check_token(token) for token in self.token.split(",")]

    @property
    def starts(self) -> list[str]:
        """The initial text of each token."""
        given = [text.strip() for text in self.initial_text.split(",")]
        return given if any(given) else [""] * len(self.tokens)

    @property
    def replaced_words(self) -> list[str]:
        return [word.strip() for word in self.caption_word.split(",") if word.strip()]

    @property
    def lora(self) -> LoraConfig | None:
        """The LoRA that trains beside the tokens."""
        if not self.lora_rank:
            return None
        return LoraConfig(
            run_name=self.run_name,
            learning_rate=self.lora_learning_rate,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
        )
