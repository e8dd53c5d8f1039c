"""Settings of a LoRA training, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_choices, check_range
from .run import RunConfig

ALGORITHMS = ("LoRA", "LoCon", "LoHa", "LoKr", "DoRA")
TARGET_CHOICES = ("attention", "cross-attention", "attention + feed-forward", "all", "regex")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RunConfig):
    """Train low-rank adapters of a UNet, and of its text encoder, on captioned images."""

    rank: int = 16
    """Rank r of the adapters; LoKr uses full factors where r is as large as they are."""
    alpha: float = 16.0
    """Scale of the adapters, fixed: dW = alpha / rank * up * down."""
    algorithm: Literal[ALGORITHMS] = "LoRA"  # type: ignore[valid-type]
    """LoRA (arXiv 2106.09685), LoCon (convolutions too), LoHa and LoKr (arXiv 2309.14859), DoRA (arXiv 2402.09353)."""
    targets: Literal[TARGET_CHOICES] = "attention + feed-forward"  # type: ignore[valid-type]
    """Which layers get an adapter; "all" adds the residual blocks, whose 3x3 convolutions LoRA and DoRA leave out."""
    target_regex: str = ""
    """For targets "regex": the layers whose name (`diffusion_model.input_blocks.1.1...`, `text_encoders.clip_l...`)
    it is found in."""
    text_encoder_learning_rate: float = 0.0
    """Peak learning rate of the text encoder's adapters; 0 trains the UNet alone."""
    text_encoder_2_learning_rate: float = -1.0
    """Peak learning rate of the second text encoder's adapters, where there are two (SDXL's CLIP-G); -1: as of the
    first, 0: it gets none."""
    conv_rank: int = 0
    """Rank of the adapters of 3x3 convolutions; 0 = as `rank`."""
    conv_alpha: float = 0.0
    """Scale of the adapters of 3x3 convolutions; 0 = as `alpha`."""
    lokr_factor: int = -1
    """LoKr: the size of the smaller factor; -1 = as near to the square root as it goes."""
    dropout: float = 0.0
    """Share of each adapter's inputs set to zero while training."""
    rank_dropout: float = 0.0
    """Share of the ranks (LoHa, LoKr: of the outputs) left out while training."""
    module_dropout: float = 0.0
    """Share of the adapters left out while training."""
    lora_plus_ratio: float = 1.0
    """LoRA+ (arXiv 2402.12354): how many times faster the matrix that starts at zero learns; 16 is the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_range(
            self,
            rank=(1, 4096),
            alpha=(1e-6, 1e6),
            conv_rank=(0, 4096),
            conv_alpha=(0, 1e6),
            text_encoder_learning_rate=(0, 10),
            lora_plus_ratio=(1e-3, 1000),
            dropout=(0, 0.99),
            rank_dropout=(0, 0.99),
            module_dropout=(0, 0.99),
        )
        self._check_rates()
        if self.targets == "regex" and not self.target_regex:
            raise ValueError("target_regex is empty; expected one for targets 'regex', for example 'attn2'.")
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
"""Named groups of values; a preset other than "custom" wins over the values it names."""
