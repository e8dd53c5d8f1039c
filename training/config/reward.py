"""Settings of a reward tuning, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_size
from .fields import alpha_setting, rate_setting, setting, side_setting
from .guard import ACTIONS, GuardRule
from .lora import LoraConfig
from .run import RunConfig

TUNE_TARGETS = ("text encoder", "text encoder LoRA", "UNet", "UNet LoRA", "projection")
METHODS = ("last K", "random K", "one step", "direct")


@dataclass(frozen=True, kw_only=True)
class RewardTuneConfig(RunConfig):
    """Tune a model so that its pictures score higher (TextCraftor, arXiv 2403.18978, algorithm 1)."""

    batch_size: int = setting(1, low=1, high=10**5)
    """Pictures per batch."""
    learning_rate: float = rate_setting(1e-6)
    """Peak learning rate; a LoRA needs about 100 times more."""
    train: Literal[TUNE_TARGETS] = setting("text encoder")  # type: ignore[valid-type]
    """What is tuned."""
    method: Literal[METHODS] = setting("last K", advanced=True)  # type: ignore[valid-type]
    """last K: gradients through the last gradient_steps. random K: through a random number of the last, up to it
    (AlignProp, arXiv 2310.03739). one step: through the clean picture predicted at one of them, the cheapest (ReFL,
    arXiv 2304.05977). direct: no sampler, the clean picture predicted from noised images of a dataset (TextCraftor)."""
    gradient_steps: int = setting(5, low=1, high=1000, advanced=True)
    """K: sampler steps, counted from the end, that gradients go through."""
    sampling_steps: int = setting(25, low=1, high=1000, advanced=True)
    """Steps of the sampler (DDIM)."""
    cfg: float = setting(7.5, low=0, high=100, step=0.1, snap=True, advanced=True)
    """Scale of classifier-free guidance while tuning; the one that pictures are later sampled with."""
    stop_gradient: bool = setting(True, advanced=True)
    """Let no gradient through the UNet's noisy input (DRTune, arXiv 2405.00760): the backward pass goes step by step,
    and memory does not grow with gradient_steps."""
    width: int = side_setting(512)
    """Picture width in pixels while tuning, a multiple of 8."""
    height: int = side_setting(512)
    """Picture height in pixels while tuning, a multiple of 8."""
    lora_rank: int = setting(16, low=1, high=4096, advanced=True)
    """Rank of a tuned LoRA."""
    lora_alpha: float = alpha_setting(16.0, advanced=True)
    """Scale of a tuned LoRA: alpha / rank multiplies it."""
    eps_constraint: float = setting(0.0, low=0, high=1e6, step=0.05, advanced=True)
    """Weight of the squared difference between the tuned and the original model's outputs (the KL term of DRaFT+);
    0: none."""
    drift_constraint: float = setting(0.0, low=0, high=1e6, step=0.05, advanced=True)
    """Weight of how far the prompts' encodings move, as a share of their squared length; 0: none."""
    guard_diversity: float = setting(0.0, low=0, high=1, step=0.05, snap=True, advanced=True)
    """Lowest diversity of a prompt's pictures, as a share of the untuned model's; 0.8 is a good start, 0.01 only logs.
    Measured every validate_every steps, on pictures drawn for it. 0: no guard."""
    guard_action: Literal[ACTIONS] = setting("stop", advanced=True)  # type: ignore[valid-type]
    """stop: below guard_diversity the run ends, with the best weights until then. keep best: the run continues, and the
    best weights not below it are the result. Best by the reward of the guard's pictures."""
    guard_prompts: int = setting(4, low=1, high=1000, advanced=True)
    """Prompts that the guard draws, the held-out ones first."""
    guard_images: int = setting(4, low=2, high=1000, advanced=True)
    """Pictures of each of the guard's prompts, always from the same noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drift_constraint and not self.text_trains:
            raise ValueError(
                f"drift_constraint is {self.drift_constraint:g} and train {self.train!r}; expected 0, since no "
                "encoding of a prompt moves. Use eps_constraint instead."
            )
        if self.guard_rule and self.guard_rule.chooses(stopped=False) and self.settings.result == "best":
            raise ValueError(
                "result is 'best' and guard_action is 'keep best'; expected one of the two. The one goes by the loss "
                "of held-out prompts, the other by the reward of the guard's pictures: set result to 'last'."
            )
        if self.gradient_steps > self.sampling_steps:
            raise ValueError(
                f"gradient_steps is {self.gradient_steps}; expected at most sampling_steps, {self.sampling_steps}."
            )
        check_size(self, "picture size")

    @property
    def text_trains(self) -> bool:
        """Whether what is tuned is part of the text encoder."""
        return self.train in ("text encoder", "text encoder LoRA", "projection")

    @property
    def guard_rule(self) -> GuardRule | None:
        return GuardRule(self.guard_diversity, self.guard_action) if self.guard_diversity else None

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
            target_regex=r"^text_encoders\..*\.encoder\.(layers|block)\." if text else "",  # every loader reads these
            text_encoder_learning_rate=self.learning_rate if text else 0.0,
        )
