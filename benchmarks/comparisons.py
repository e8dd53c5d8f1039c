"""What is compared side by side, at the size of the demo model, SD1.5 or SDXL: variants, and what they must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LORA, FINETUNE, EMBEDDING, REWARD = "lora", "finetune", "embedding", "reward"
ENCODE, STARTUP = "encode", "startup"
OWN, PEERS, COMFYUI = "own_runs", "peers", "comfyui_peer"
"""Modules of this folder, imported by a variant's process alone."""
UNET_WEIGHTS = {"demo": 5e6, "sd15": 0.86e9, "sdxl": 2.57e9}
OTHER_WEIGHTS = {"demo": 5e6, "sd15": 0.21e9, "sdxl": 0.9e9}
"""Of text encoders and VAE."""
ACTIVATION_BYTES = 12_000
"""About what a picture's pixel needs while a step is computed without checkpointing, in fp32."""
REWARD_BATCHES = ((1, 1), (2, 1), (5, 1), (1, 2), (1, 4), (1, 8))
"""K and batch size of the reward variants: pictures of a batch share a pass up to 512 x 512 pixels, four of 256."""


@dataclass(frozen=True)
class Variant:
    """One way to do a thing.

    Attributes:
        module: of this folder.
        function: of that module; called with the case and the recorder.
        options: its further arguments.
        weight_bytes: about the bytes for each of the UNet's weights at its peak, to leave out what cannot fit.
        batch_size: of the variant itself; 0 for that of the run.
        needs: package without which it is left out.
    """

    module: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_bytes: float = 4
    batch_size: int = 0
    needs: str = "diffusers"

    def bytes_needed(self, size: str, pixels: int, batch_size: int) -> float:
        """About the memory of its process at most."""
        weights = self.weight_bytes * UNET_WEIGHTS[size] + 4 * OTHER_WEIGHTS[size]
        return weights + ACTIVATION_BYTES * pixels**2 * (self.batch_size or batch_size)


@dataclass(frozen=True)
class Claim:
    """A figure of one variant over that of another, and what it must be.

    Attributes:
        figure: "seconds", "training" (peak bytes) or "first step"; of one variant "loading/training", one over another.
        most, least: bounds of the ratio; None for no bound.
        from_side: pixels of a picture's side from which on it is claimed.
    """

    of: str
    over: str
    figure: str
    most: float | None = None
    least: float | None = None
    from_side: int = 0

    @property
    def bounds(self) -> str:
        """What the ratio must be, in words; empty for no bound."""
        limits = {"at least": self.least, "at most": self.most}
        return " and ".join(f"{word} {value:g}" for word, value in limits.items() if value is not None)


@dataclass(frozen=True)
class Comparison:
    """Variants that are run in turns.

    Attributes:
        description: for the list of benchmarks.
        variants: by name; the part after the last comma is the precision.
        claims: what they must show.
        figure: what the chart and the ratio are of.
        baseline: start of the name of what each is compared with, that of the same precision; empty for the first.
    """

    description: str
    variants: Mapping[str, Variant]
    claims: tuple[Claim, ...] = ()
    figure: str = "seconds"
    baseline: str = ""

    def baseline_of(self, variant: str) -> str:
        """The variant whose figure is 1."""
        if not self.baseline:
            return next(iter(self.variants))
        return f"{self.baseline}, {variant.rpartition(', ')[2]}"


BOTH = ("fp32", "bf16")


def _each(name: str, module: str, function: str, weight_bytes: Mapping[str, float], **more: Any) -> dict[str, Variant]:
    """A variant for each precision; more: further options of the function, or fields of `Variant` named `needs`."""
    needs = more.pop("needs", "diffusers")
    return {
        f"{name}, {precision}": Variant(
            module, function, {"precision": precision, **more}, weight_bytes[precision], needs=needs
        )
        for precision in BOTH
    }


FROZEN, LOADED_FP32 = {"fp32": 4, "bf16": 2}, {"fp32": 4, "bf16": 4}
ADAMW, FUSED, SCRIPT = {"fp32": 18, "bf16": 18}, {"fp32": 9, "bf16": 9}, {"fp32": 16, "bf16": 18}
EIGHT_BIT = {"fp32": 11, "bf16": 11}
COMFYUI_BYTES = {"fp32": 12, "bf16": 8}
FUSED_NAME, EIGHT_BIT_NAME = "Retune, Adafactor, fused backward", "Retune, AdamW8bit, fused backward"

LORA_VARIANTS = {
    **_each("limit", PEERS, "run_limit", FROZEN),
    **_each("Retune", OWN, "run_lora", FROZEN),
    **_each("Retune, channels last", OWN, "run_lora", FROZEN, channels_last=True),
    **_each("Retune, every layer", OWN, "run_lora", FROZEN, every_layer=True),
    **_each("diffusers + peft", PEERS, "run_lora", LOADED_FP32, needs="peft"),
    **_each("diffusers + peft, cached", PEERS, "run_lora", LOADED_FP32, needs="peft", cached=True),
    **_each("ComfyUI, bypass off", COMFYUI, "run_lora", COMFYUI_BYTES, needs="comfyui", bypass=False),
    **_each("ComfyUI, bypass on", COMFYUI, "run_lora", COMFYUI_BYTES, needs="comfyui", bypass=True),
}
FINETUNE_VARIANTS = {
    **_each("limit", PEERS, "run_limit", {"fp32": 8, "bf16": 4}, weights=True),
    **_each("Retune", OWN, "run_finetune", ADAMW),
    **_each(FUSED_NAME, OWN, "run_finetune", FUSED, optimizer="Adafactor", fused_backward=True),
    **_each(
        EIGHT_BIT_NAME,
        OWN,
        "run_finetune",
        EIGHT_BIT,
        needs="bitsandbytes",
        optimizer="AdamW8bit",
        fused_backward=True,
    ),
    **_each("diffusers", PEERS, "run_finetune", SCRIPT),
    **_each("diffusers, cached", PEERS, "run_finetune", SCRIPT, cached=True),
}
EMBEDDING_VARIANTS = {
    **_each("limit", PEERS, "run_limit", FROZEN),
    **_each("Retune", OWN, "run_embedding", FROZEN),
    **_each("diffusers", PEERS, "run_embedding", LOADED_FP32),
}
FLAT = 1.05
"""Bound of a peak that does not grow, over the one that it is compared with."""


def reward_name(k: int, batch: int) -> str:
    """A reward variant's name without its precision."""
    return f"Retune, K = {k}, batch {batch}"


REWARD_VARIANTS = {
    f"{reward_name(k, batch)}, {precision}": Variant(
        OWN,
        "run_reward",
        {"precision": precision, "gradient_steps": k, "batch_size": batch},
        FROZEN[precision],
        batch_size=batch,
    )
    for precision in BOTH
    for k, batch in REWARD_BATCHES
}
ENCODE_VARIANTS = {
    f"{name}, {part}": Variant(module, "run_encoding", {"part": part, **more})
    for part in ("latents", "texts")
    for name, module, more in (
        ("one batch", PEERS, {"one_by_one": False}),
        ("one by one", PEERS, {"one_by_one": True}),
        ("Retune, into its cache", OWN, {}),
    )
}
STARTUP_VARIANTS = {
    **_each("diffusers + peft", PEERS, "run_lora", LOADED_FP32, needs="peft"),
    **_each("Retune", OWN, "run_lora", FROZEN),
}


def _pairs(of: str, over: str, figure: str, **bounds: float) -> tuple[Claim, ...]:
    return tuple(Claim(f"{of}, {p}", f"{over}, {p}", figure, **bounds) for p in BOTH)


WITHIN = {"least": 0.9, "most": 1.1, "from_side": 256}
"""How near an estimate must be; the demo model's own bytes are few beside those of a process."""


def _estimated(*names: str) -> tuple[Claim, ...]:
    """What runs say before they start, over what they then take."""
    return tuple(claim for name in names for claim in _pairs(name, name, "estimate/training", **WITHIN))


COMPARISONS: dict[str, Comparison] = {
    LORA: Comparison(
        "A LoRA step here, by diffusers + peft, by ComfyUI's Train LoRA, and the limit: seconds, peak memory.",
        LORA_VARIANTS,
        (
            *_pairs("Retune", "limit", "seconds", most=1.05),
            *_pairs("Retune", "diffusers + peft", "seconds", most=1.0),
            *_pairs("Retune", "diffusers + peft, cached", "seconds"),
            *_pairs("ComfyUI, bypass on", "Retune, every layer", "seconds", least=1.2),
            *_pairs("Retune", "diffusers + peft", "training", most=1.05),
            Claim("Retune, bf16", "Retune, fp32", "training", most=0.62),
            *_pairs("Retune", "Retune", "loading/training", most=1.0),
            *_estimated("Retune"),
        ),
        baseline="limit",
    ),
    FINETUNE: Comparison(
        "A step of retraining the whole UNet here and by diffusers' script: seconds, peak memory.",
        FINETUNE_VARIANTS,
        (
            *_pairs("diffusers", "Retune", "seconds", least=1.5),
            *_pairs("diffusers", FUSED_NAME, "seconds", least=1.5),
            *_pairs("diffusers, cached", "Retune", "seconds"),
            *_pairs(FUSED_NAME, "diffusers", "training", most=0.6),
            *_pairs(EIGHT_BIT_NAME, "diffusers", "training", most=0.6),
            *_pairs("Retune", "diffusers", "training"),
            *_estimated("Retune", FUSED_NAME),
        ),
        baseline="limit",
    ),
    EMBEDDING: Comparison(
        "A step of textual inversion here and by diffusers' script, and the limit: seconds, peak memory.",
        EMBEDDING_VARIANTS,
        (
            *_pairs("Retune", "limit", "seconds", most=1.05),
            *_pairs("Retune", "diffusers", "seconds", most=1.0),
            *_estimated("Retune"),
        ),
        baseline="limit",
    ),
    REWARD: Comparison(
        "A reward tuning step at several K and batch sizes: seconds, peak memory.",
        REWARD_VARIANTS,
        (
            *_pairs(reward_name(2, 1), reward_name(1, 1), "training", most=FLAT),
            *_pairs(reward_name(5, 1), reward_name(1, 1), "training", most=FLAT),
            *_pairs(reward_name(1, 2), reward_name(1, 1), "training", most=FLAT, from_side=512),
            *_pairs(reward_name(1, 4), reward_name(1, 1), "training", most=FLAT, from_side=512),
            *_pairs(reward_name(1, 8), reward_name(1, 4), "training", most=FLAT, from_side=256),
            *_estimated(reward_name(1, 1)),
        ),
        figure="training",
        baseline=reward_name(1, 1),
    ),
    ENCODE: Comparison(
        "Encoding pictures and captions into the caches, and without them: seconds, peak memory.",
        ENCODE_VARIANTS,
        tuple(
            Claim(f"Retune, into its cache, {part}", f"one by one, {part}", "seconds", most=1.05)
            for part in ("latents", "texts")
        ),
        baseline="one by one",
    ),
    STARTUP: Comparison(
        "From the start of the process to the end of the first LoRA step: seconds.",
        STARTUP_VARIANTS,
        _pairs("Retune", "diffusers + peft", "first step", most=1.0),
        figure="first step",
        baseline="diffusers + peft",
    ),
}
"""Name -> comparison."""
