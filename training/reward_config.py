"""Settings of a reward tuning, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import RunConfig, check_choices, check_range
from .lora_config import LoraConfig

WHAT = ("text encoder", "text encoder LoRA", "UNet", "UNet LoRA", "projection")
METHODS = ("last K", "random K", "one step")


@dataclass(frozen=True, kw_only=True)
class RewardTuneConfig(RunConfig):
    """Tune a model so that its pictures score higher (TextCraftor, arXiv 2403.18978, algorithm 1)."""

    learning_rate: float = 1e-6
    """Peak learning rate; LoRA wants about a hundred times as much."""
    train: Literal[WHAT] = "text encoder"  # type: ignore[valid-type]
    """What is tuned."""
    method: Literal[METHODS] = "last K"  # type: ignore[valid-type]
    """Sampler steps that gradients go through: the last K; as many of the last as a draw from 1 to K says (AlignProp,
    arXiv 2310.03739); or the clean picture seen from one step among the last K (ReFL, arXiv 2304.05977)."""
    gradient_steps: int = 5
    """K, the steps counted from the end."""
    sampling_steps: int = 25
    """Steps of the sampler (DDIM)."""
    cfg: float = 7.5
    """Classifier-free guidance while training."""
    stop_gradient: bool = True
    """Let no gradient through what the UNet reads of the picture (DRTune, arXiv 2405.00760): each step is then gone
    through on its own, and memory does not grow with K."""
    width: int = 512
    """Picture width in pixels, a multiple of 8."""
    height: int = 512
    """Picture height in pixels, a multiple of 8."""
    lora_rank: int = 16
    """Rank of the adapters, where a LoRA is tuned."""
    lora_alpha: float = 16.0
    """Scale of the adapters, fixed: dW = alpha / rank * up * down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_range(self, gradient_steps=(1, 1000), sampling_steps=(1, 1000), cfg=(0, 100))
        check_range(self, width=(8, 8192), height=(8, 8192), lora_rank=(1, 4096), lora_alpha=(1e-6, 1e6))
        if self.gradient_steps > self.sampling_steps:
            raise ValueError(
                f"gradient_steps is {self.gradient_steps}; expected at most sampling_steps, {self.sampling_steps}."
            )
        if self.width % 8 or self.height % 8:
            raise ValueError(f"picture size is {self.width}x{self.height}; expected multiples of 8.")

    @property
    def lora(self) -> LoraConfig:
        """The adapters that are tuned."""
        text = self.train == "text encoder LoRA"
        return LoraConfig(
            run_name=self.run_name,
            learning_rate=self.learning_rate,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            targets="regex" if text else "attention",
            target_regex=r"^text_encoders\..*\.encoder\.(layers|block)\." if text else "",  # what every loader knows
            text_encoder_learning_rate=self.learning_rate if text else 0.0,
        )
