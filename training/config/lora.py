"""Settings of a LoRA training, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..common.patterns import TypedPattern
from .fields import alpha_setting, rate_setting, setting
from .run import RunConfig

ALGORITHMS = ("LoRA", "LoCon", "LoHa", "LoKr", "DoRA")
TARGET_CHOICES = ("attention", "cross-attention", "attention + feed-forward", "all", "regex")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RunConfig):
    """Train low-rank adapters of a UNet, and of its text encoder, on captioned images."""

    learning_rate: float = rate_setting(1e-5)
    """Peak learning rate of the UNet's adapters."""
    rank: int = setting(16, low=1, high=4096)
    """Rank of the adapters."""
    alpha: float = alpha_setting(16.0, advanced=True)
    """Scale of the adapters: alpha / rank multiplies them. It does not train."""
    algorithm: Literal[ALGORITHMS] = setting("LoRA", advanced=True)  # type: ignore[valid-type]
    """LoRA (arXiv 2106.09685); LoCon adapts 3x3 convolutions too; LoHa and LoKr (LyCORIS, arXiv 2309.14859); DoRA
    learns magnitudes (arXiv 2402.09353)."""
    targets: Literal[TARGET_CHOICES] = setting("attention + feed-forward", advanced=True)  # type: ignore[valid-type]
    """Layers that get an adapter; all adds the residual blocks. regex: see target_regex."""
    target_regex: str = setting("", advanced=True)
    """For targets regex: searched in layer names such as diffusion_model.input_blocks.1.1.proj_in."""
    text_encoder_learning_rate: float = rate_setting(0.0, advanced=True)
    """Peak learning rate of the text encoder's adapters; 0 does not train the text encoder."""
    text_encoder_2_learning_rate: float = setting(-1.0, step=1e-7, advanced=True)
    """Peak learning rate of SDXL's second text encoder; -1: as of the first, 0 does not train it."""
    conv_rank: int = setting(0, low=0, high=4096, advanced=True)
    """Rank for 3x3 convolutions; 0: rank."""
    conv_alpha: float = alpha_setting(0.0, low=0, advanced=True)
    """Scale for 3x3 convolutions; 0: alpha."""
    lokr_factor: int = setting(-1, advanced=True)
    """LoKr: size of the smaller factor; -1: near the square root."""
    dropout: float = setting(0.0, low=0, high=0.99, step=0.01, snap=True, advanced=True)
    """Share of each adapter's inputs set to zero while training."""
    rank_dropout: float = setting(0.0, low=0, high=0.99, step=0.01, snap=True, advanced=True)
    """Share of the ranks (LoHa, LoKr: of the outputs) left out while training."""
    module_dropout: float = setting(0.0, low=0, high=0.99, step=0.01, snap=True, advanced=True)
    """Share of the adapters left out while training."""
    lora_plus_ratio: float = setting(1.0, low=1e-3, high=1000, step=0.5, advanced=True)
    """LoRA+ (arXiv 2402.12354): how many times faster the matrix that starts at zero learns; 16 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rates()
        if self.targets == "regex" and not self.target_regex:
            raise ValueError("target_regex is empty; expected one for targets 'regex', for example 'attn2'.")
        if self.target_regex:
            TypedPattern("target_regex", self.target_regex, "attn2|proj_in")
        if self.algorithm == "DoRA" and self.rank_dropout:
            raise ValueError("rank_dropout is set for DoRA; expected 0. Its magnitudes need the whole product.")
        if self.lokr_factor != -1 and self.lokr_factor < 1:
            raise ValueError(f"lokr_factor is {self.lokr_factor}; expected -1 or at least 1.")

    def _check_rates(self) -> None:
        second = self.text_encoder_2_learning_rate
        if second != -1 and not 0 <= second <= 10:
            raise ValueError(f"text_encoder_2_learning_rate is {second}; expected 0 to 10, or -1 for the first's.")
        if self.trains_text and not self.learning_rate:
            raise ValueError(
                "learning_rate is 0 with a text_encoder_learning_rate; expected a rate for both. To train the text "
                "encoder alone choose targets 'regex' with target_regex '^text_encoders'."
            )

    @property
    def trains_text(self) -> bool:
        return any(self.text_rates)

    @property
    def text_rates(self) -> tuple[float, float]:
        """Peak learning rates of the first text encoder and of the second; 0 for one that does not train."""
        first, second = self.text_encoder_learning_rate, self.text_encoder_2_learning_rate
        return first, first if second == -1 else second

    @property
    def has_dropout(self) -> bool:
        return bool(self.dropout or self.rank_dropout or self.module_dropout)

    def shape_of(self, *, spatial: bool) -> tuple[int, float]:
        """(rank, alpha) of a layer; spatial: a convolution with a kernel larger than 1x1."""
        if not spatial:
            return self.rank, self.alpha
        return self.conv_rank or self.rank, self.conv_alpha or self.alpha


LORA_PRESETS: dict[str, dict[str, Any]] = {
    "custom": {},
    "SD1.5": {"rank": 16, "alpha": 16.0, "targets": "attention + feed-forward"},
    "SDXL": {"rank": 32, "alpha": 16.0, "targets": "attention + feed-forward"},
    "style": {"rank": 32, "alpha": 32.0, "algorithm": "LoCon", "targets": "all", "conv_rank": 16, "conv_alpha": 16.0},
    "character": {"rank": 16, "alpha": 8.0, "algorithm": "LoRA", "targets": "attention + feed-forward"},
}
"""Named groups of values; those of a preset other than "custom" replace the user's."""
