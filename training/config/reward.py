"""Settings of a reward tuning, shared by the node, the command line and `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choices, check_range, check_size
from .guard import ACTIONS, GuardRule
from .lora import LoraConfig
from .run import RunConfig

TUNE_TARGETS = ("text encoder", "text encoder LoRA", "UNet", "UNet LoRA", "projection")
METHODS = ("last K", "random K", "one step", "direct")


@dataclass(frozen=True, kw_only=True)
class RewardTuneConfig(RunConfig):
    """Tune a model so that its pictures score higher (TextCraftor, arXiv 2403.18978, algorithm 1)."""

    learning_rate: float = 1e-6
    """Peak learning rate; LoRA wants about a hundred times as much."""
    train: Literal[TUNE_TARGETS] = "text encoder"  # type: ignore[valid-type]
    """What is tuned."""
    method: Literal[METHODS] = "last K"  # type: ignore[valid-type]
    """Sampler steps that gradients go through: the last K; as many of the last as a draw from 1 to K says (AlignProp,
    arXiv 2310.03739); the clean picture seen from one step among the last K (ReFL, arXiv 2304.05977); or direct: no
    sampler, the clean picture seen from a noised image of a data set, without guidance (TextCraftor, equation 4)."""
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
    eps_constraint: float = 0.0
    """Weight of the mean squared difference between the tuned and the frozen model's outputs at the steps that
    gradients go through (the KL term of DRaFT+); 0 = off. It costs a frozen pass for each."""
    drift_constraint: float = 0.0
    """Weight of how far the prompts' encodings move, as a share of their squared length; 0 = off."""
    guard_diversity: float = 0.0
    """Lowest diversity of a prompt's pictures, as a share of the untuned model's, that the guard allows; 0.8 is a good
    start, and 0.01 only logs. 0: no guard. It draws guard_prompts x guard_images pictures at step 0, every
    validate_every steps and at the end."""
    guard_action: Literal[ACTIONS] = "stop"  # type: ignore[valid-type]
    """Below guard_diversity, end the run with the best weights before; or let it go on, and make the best weights of
    all that are not below it the result. Best: the highest reward of the guard's pictures."""
    guard_prompts: int = 4
    """Prompts that the guard draws: the first held-out ones, and then the first of the others."""
    guard_images: int = 4
    """Pictures of each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_range(self, gradient_steps=(1, 1000), sampling_steps=(1, 1000), cfg=(0, 100))
        check_range(self, width=(8, 8192), height=(8, 8192), lora_rank=(1, 4096), lora_alpha=(1e-6, 1e6))
        check_range(self, eps_constraint=(0, 1e6), drift_constraint=(0, 1e6))
        if self.drift_constraint and not self.text_trains:
            raise ValueError(
                f"drift_constraint is {self.drift_constraint:g} and train {self.train!r}; expected 0, since no "
                "encoding of a prompt moves. Use eps_constraint instead."
            )
        check_range(self, guard_diversity=(0, 1), guard_prompts=(1, 1000), guard_images=(2, 1000))
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
            target_regex=r"^text_encoders\..*\.encoder\.(layers|block)\." if text else "",  # what every loader knows
            text_encoder_learning_rate=self.learning_rate if text else 0.0,
        )
