"""Settings of a textual inversion, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import alpha_setting, rate_setting, setting
from .lora import LoraConfig
from .run import RunConfig
from .tokens import check_token

LORA_TARGETS = ("attention", "cross-attention", "attention + feed-forward", "all")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(RunConfig):
    """Train new tokens of a text encoder on images (textual inversion, arXiv 2208.01618)."""

    token: str
    """The new token for prompts, such as <my-cat>. Several with commas between them, told apart by the captions."""
    learning_rate: float = rate_setting(1e-5)
    """Peak learning rate of the vectors."""
    vectors: int = setting(1, low=1, high=75)
    """Vectors of each token; more can describe more and use more of a prompt's 77 positions."""
    initial_text: str = setting("")
    """Text whose embeddings training starts from: a word or two for the thing, or a token of another embedding. Several
    tokens take a text each, with commas between them. Empty starts from random vectors."""
    template: Literal["auto", "captions", "object", "style", "own"] = setting("auto", advanced=True)
    """captions: those of the images, which contain the token. object, style: sentences such as a photo of a ... own:
    those of lines. auto: captions if any contains the token, else object."""
    lines: tuple[str, ...] = setting((), advanced=True)
    """Sentences for template own: {} stands for the token, {caption} for the image's caption."""
    caption_word: str = setting("", advanced=True)
    """A word of the captions, such as cat, that the token replaces; several with commas."""
    norm: Literal["vocabulary", "free"] = setting("vocabulary", advanced=True)
    """vocabulary: vectors stay as long as the vocabulary's median, so that they mix with other words. free: they may
    grow."""
    lora_rank: int = setting(0, low=0, high=4096, advanced=True)
    """Rank of a LoRA on the UNet that trains in the same run (pivotal tuning); 0: none."""
    lora_alpha: float = alpha_setting(16.0, advanced=True)
    """Scale of that LoRA: alpha / rank multiplies it."""
    lora_targets: Literal[LORA_TARGETS] = setting("attention", advanced=True)  # type: ignore[valid-type]
    """Layers of the UNet that get an adapter of that LoRA."""
    lora_learning_rate: float = rate_setting(1e-4, advanced=True)
    """Peak learning rate of that LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tokens()
        if self.learning_rate == 0:
            raise ValueError("learning_rate is 0; expected one above 0. 1e-3 to 5e-3 is usual for tokens.")
        self._check_template()

    def _check_tokens(self) -> None:
        lowered = [token.lower() for token in self.tokens]
        if len(set(lowered)) < len(lowered):
            raise ValueError(f"token is {self.token!r}; expected different words. Upper and lower case are alike.")
        if len(self.starts) != len(self.tokens):
            raise ValueError(
                f"initial_text has {len(self.starts)} texts for {len(self.tokens)} tokens; expected as many, or none. "
                "Put commas between them."
            )

    def _check_template(self) -> None:
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
        """The LoRA that trains together with the tokens."""
        if not self.lora_rank:
            return None
        return LoraConfig(
            run_name=self.run_name,
            learning_rate=self.lora_learning_rate,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets=self.lora_targets,
        )
