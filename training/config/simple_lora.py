"""Values of a LoRA training, derived from the model's family, the number of images, a quality and the card.

What the rules rest on (defaults that other trainers ship for Stable Diffusion):
- rank and alpha: those of `LORA_PRESETS`, from sd-scripts' guides (SDXL 32 and 16) and OneTrainer (16). `best` doubles
  the rank and leaves alpha alone: spacepxl's study of SD1.5 found more rank better up to 128, with alpha fixed.
- learning rate 1e-4: sd-scripts' guides, diffusers' examples, SimpleTuner and ai-toolkit.
- attention and feed-forward layers, text encoder not trained: the same study; OneTrainer's preset for SDXL.
- times that each image is seen: 100 as in sd-scripts' guides (10 repeats, 10 epochs); 40 and 200 around it.
- limits of the steps: 500 are diffusers' DreamBooth, 3000 ai-toolkit's usual run, at one image a step; here a step has
  four, so their quarter is the order of size for few images.
- pictures of the size that the family was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .lora import LORA_PRESETS, LoraConfig
from .sample_prompts import SamplePrompts
from .training_settings import CARD_RUNS, CARDS, TrainingSettings

QUALITIES = ("quick", "good", "best")
AUTO = "auto"
LEARNING_RATE = 1e-4
SEEN = {"quick": 40, "good": 100, "best": 200}
"""Times that a run shows each image."""
STEPS = {"quick": (100, 500), "good": (200, 2000), "best": (400, 4000)}
"""Fewest and most steps, however few or many images there are."""
RESOLUTIONS = {"demo": 128, "SD1.x": 512, "SD2.x": 768, "SDXL": 1024}
"""Family -> resolution."""
SAMPLE_SETS, SAMPLED_CAPTIONS = 5, 2
"""Times that samples are drawn after step 0, and captions of the data that are drawn besides the trigger word."""
GIB = 2**30


@dataclass(frozen=True)
class SimpleLora:
    """A training as a person asks for it who wants no settings."""

    family: str
    """One of RESOLUTIONS."""
    trigger_word: str = ""
    quality: str = "good"
    card: str = AUTO
    """One of CARDS, or AUTO for what fits the memory."""
    memory: int = 0
    """Bytes of the device that trains, for AUTO."""

    def __post_init__(self) -> None:
        if self.family not in RESOLUTIONS:
            raise ValueError(
                f"the MODEL's family is {self.family or 'unknown'}; expected {', '.join(RESOLUTIONS)}. Train LoRA, "
                "with Load Dataset and Training Settings, takes other values for other models."
            )

    @property
    def resolution(self) -> int:
        return RESOLUTIONS[self.family]

    @property
    def preset(self) -> str:
        """The card's preset; with AUTO the largest that the memory has room for."""
        if self.card != AUTO:
            return self.card
        if self.family != "SDXL":
            return "SD1.5 6 GB"
        return next((f"SDXL {size} GB" for size in (24, 12) if self.memory >= 0.9 * size * GIB), "SDXL 8 GB")

    @property
    def settings(self) -> TrainingSettings:
        return TrainingSettings(**CARDS[self.preset])

    def steps(self, images: int) -> int:
        """Steps for a number of images, each of which is seen SEEN times, within STEPS."""
        low, high = STEPS[self.quality]
        each = CARD_RUNS[self.preset]["batch_size"] * self.settings.gradient_accumulation
        return min(max(low, round(SEEN[self.quality] * images / each)), high)

    def config(self, images: int, captions: list[str], **run: Any) -> LoraConfig:
        """The config of Train LoRA for a number of images with these captions; run: its name, seed and resume."""
        shape = dict(LORA_PRESETS["SDXL" if self.family == "SDXL" else "SD1.5"])
        shape["rank"] *= 2 if self.quality == "best" else 1
        steps = self.steps(images)
        prompts = dict.fromkeys([*_filled(self.trigger_word), *captions[:SAMPLED_CAPTIONS]])
        samples = SamplePrompts(
            prompts=tuple(prompts), every=-(-steps // SAMPLE_SETS), width=self.resolution, height=self.resolution
        )
        batch_size = CARD_RUNS[self.preset]["batch_size"]
        values = {"learning_rate": LEARNING_RATE, "batch_size": batch_size, "steps": steps, **shape}
        return LoraConfig(settings=self.settings, samples=samples, **values, **run)

    def text(self, images: int, config: LoraConfig) -> str:
        """What was derived, for people to read and to set in the full graph."""
        each = config.batch_size * config.gradient_accumulation
        changed = {name: value for name, value in CARDS[self.preset].items() if value != getattr(DEFAULTS, name)}
        return "\n".join(
            [
                f"{self.family}, {images} images, quality {self.quality}",
                f"Load Dataset: resolution {self.resolution}, trigger_word {self.trigger_word!r}",
                f"Training Settings: preset {self.preset} ({', '.join(f'{k} {v}' for k, v in changed.items())})",
                f"Train LoRA: steps {config.steps}, batch_size {config.batch_size}, learning_rate "
                f"{config.learning_rate:g}, rank {config.rank}, alpha {config.alpha:g}, targets {config.targets}",
                f"Sample Prompts: every {config.samples.every} steps, {self.resolution} x {self.resolution}",
                f"each image is seen about {config.steps * each / images:.0f} times, {each} a step",
            ]
        )


DEFAULTS = TrainingSettings()


def _filled(word: str) -> list[str]:
    return [word.strip()] if word.strip() else []
