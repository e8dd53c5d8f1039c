"""Reward tuning on the demo model, measured: the claims of TextCraftor (arXiv 2403.18978) and its open questions.

The demo's aesthetic head is the reward that is trained on. The mean quality, which a program reads from pixels and
which the head was trained to predict, is held out; the judge's alignment measures whether pictures still match their
prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..training.commands.demo import held_out_captions
from ..training.commands.open_model import build_demo_model
from ..training.common.files import read_json
from ..training.common.rng import generator
from ..training.config.reward import RewardTuneConfig
from ..training.config.training_settings import TrainingSettings
from ..training.data.prompts import Prompt
from ..training.demo.judge import alignment
from ..training.demo.quality import mean_quality
from ..training.demo.scenes import caption, training_scenes
from ..training.models.protocols import Conditioning, TextToImage
from ..training.recipes.apply_results import with_tuned
from ..training.recipes.reward import tune
from ..training.rewards.combined import CombinedReward, Term
from ..training.rewards.diversity import Diversity
from ..training.rewards.load import RewardConfig, load_reward
from ..training.sampling.rollout import Guidance, advance, ddim_chain, first_latent
from .study import Claim, Study, Trial, check_claims, format_mean

SAMPLING, CFG, SIDE = 8, 2.5, 128
RATES = {"UNet": 1e-4, "text encoder": 3e-4}
PROMPTS, IMAGES, BATCH = 200, 4, 32
"""Training prompts; pictures of each prompt when measuring; pictures drawn at a time."""
CATEGORIES = {"one": "one thing", "two": "two things", "three": "three things"}
"""A word of the caption -> the category that diversity is reported by."""
WINDOWS = (2, 4, 8)
"""Numbers of last sampler steps that read the tuned encoder, the steps before them reading the original one."""
BLENDS = (0.25, 0.5, 0.75)
"""Shares of the tuned encoder's output in its mix with the original's."""


@dataclass(frozen=True)
class Tuning:
    """How one cell of the study tunes.

    Attributes:
        parts: What is tuned, one after the other.
        aesthetic, clip: Weights of the two rewards.
        changes: Fields of RewardTuneConfig that differ from the other cells.
        windows, blends: Whether `WINDOWS` and `BLENDS` are measured.
    """

    parts: tuple[str, ...]
    aesthetic: float = 1.0
    clip: float = 0.0
    changes: tuple[tuple[str, object], ...] = ()
    windows: bool = False
    blends: bool = False


EncodeWith = Callable[[TextToImage], Guidance]
"""Encodes the captions of a batch, and as many empty ones, with a model's text encoder."""
Schedule = Callable[[EncodeWith], list[Guidance]]
"""The guidance of every sampler step."""
NOTHING = "nothing"
TEXT, UNET = "text encoder", "UNet"
CELLS: dict[str, Tuning] = {
    NOTHING: Tuning(()),
    "UNet": Tuning((UNET,)),
    "UNet + CLIP 1": Tuning((UNET,), clip=1.0),
    "text encoder": Tuning((TEXT,), windows=True, blends=True),
    "text encoder + CLIP 1": Tuning((TEXT,), clip=1.0),
    "text encoder (direct)": Tuning((TEXT,), changes=(("method", "direct"),)),
    "text encoder then UNet + CLIP 1": Tuning((TEXT, UNET), clip=1.0),
    "UNet + CLIP 3": Tuning((UNET,), clip=3.0),
    "UNet 0.5 + CLIP 1": Tuning((UNET,), aesthetic=0.5, clip=1.0),
    "UNet 0.5 + CLIP 3": Tuning((UNET,), aesthetic=0.5, clip=3.0),
    "UNet + eps-MSE": Tuning((UNET,), changes=(("eps_constraint", 30.0),)),
    "UNet (CLIP alone)": Tuning((UNET,), aesthetic=0.0, clip=1.0),
    "text encoder (K=2)": Tuning((TEXT,), changes=(("gradient_steps", 2),), windows=True),
    "text encoder (K=8)": Tuning((TEXT,), changes=(("gradient_steps", 8),), windows=True),
}
"""By default the reward is the aesthetic at weight 1, K is 4 of 8 steps, and there is no constraint."""


def run_trial(trial: Trial) -> dict[str, float | None]:
    """Tunes in one way from one seed and measures the result; all cells share the noise and batches of a seed."""
    cell = CELLS[trial.labels["tuning"]]
    original = build_demo_model()
    rewards = {kind: load_reward(RewardConfig(kind=f"demo {kind}")) for kind in ("aesthetic", "CLIP")}
    model = _tune(trial, cell, rewards) if cell.parts else original
    evaluation = Evaluation(trial, rewards, model)
    count, fewer = evaluation.count, max(1, evaluation.count // 2)
    figures = evaluation.measure(count, lambda encode: [encode(model)] * SAMPLING)
    base = read_json(replace(trial, labels={"tuning": NOTHING}).results) if cell.parts else figures
    figures |= {f"{name} kept": figures[name] / base[name] for name in list(figures) if name.startswith("diversity")}
    for name, schedule in _schedules(cell, original, model).items():
        found = evaluation.measure(fewer, schedule)
        figures |= {f"{name}: {key}": found[key] for key in ("reward", "quality", "alignment")}
    return figures


def _schedules(cell: Tuning, original: TextToImage, tuned: TextToImage) -> dict[str, Schedule]:
    """Further ways to use the tuned encoder that the cell measures, by name."""

    def window(steps: int) -> Schedule:
        return lambda encode: [encode(original)] * (SAMPLING - steps) + [encode(tuned)] * steps

    def blend(share: float) -> Schedule:
        return lambda encode: [_lerp(encode(original), encode(tuned), share)] * SAMPLING

    schedules = {f"window {steps}": window(steps) for steps in WINDOWS if cell.windows}
    schedules |= {f"blend {share:g}": blend(share) for share in BLENDS if cell.blends}
    return schedules | ({"window 0": lambda encode: [encode(original)] * SAMPLING} if cell.windows else {})


def _tune(trial: Trial, cell: Tuning, rewards: Mapping) -> TextToImage:
    """The demo model with the cell's parts tuned one after the other."""
    prompts = [Prompt(caption(s, generator(3, "study", i))) for i, s in enumerate(training_scenes(PROMPTS, 3))]
    model = build_demo_model()
    for number, part in enumerate(cell.parts, start=1):
        weights = {"aesthetic": cell.aesthetic, "CLIP": cell.clip}
        combined = CombinedReward([Term(reward=rewards[kind], weight=weight) for kind, weight in weights.items()])
        values = {"gradient_steps": 4, "sampling_steps": SAMPLING, "cfg": CFG, "width": SIDE, "height": SIDE}
        config = RewardTuneConfig(
            run_name=trial.name if len(cell.parts) == 1 else f"{trial.name} part {number}",
            train=part,
            steps=trial.config.steps,
            batch_size=trial.config.batch_size,
            learning_rate=RATES[part],
            seed=trial.seed,
            settings=TrainingSettings(warmup_steps=5, lr_schedule="constant", weight_decay=0.0),
            **(values | dict(cell.changes)),
        )
        direct = config.method == "direct"
        dataset = trial.dataset if direct else None
        texts = [] if direct else prompts
        result = tune(model, combined, texts, config, trial.folder, trial.callbacks, dataset=dataset)
        model = with_tuned(model, [str(result.path.parent)])
    return model


def _lerp(first: Guidance, second: Guidance, share: float) -> Guidance:
    """Encodings between two, element by element."""

    def mix(a: Conditioning, b: Conditioning) -> Conditioning:
        return Conditioning(torch.lerp(a.context, b.context, share), None, a.mask)

    return Guidance(mix(first.positive, second.positive), mix(first.negative, second.negative), first.cfg)


class Evaluation:
    """Draws and judges held-out captions, `IMAGES` pictures of each, from noise of the trial's seed."""

    def __init__(self, trial: Trial, rewards: Mapping, model: TextToImage):
        self.trial, self.rewards, self.model = trial, rewards, model
        self.count = max(1, trial.config.judged // IMAGES)

    @torch.no_grad()
    def measure(self, count: int, schedule: Schedule) -> dict[str, float]:
        """Figures over the pictures of `count` captions; schedule: the guidance of each sampler step."""
        captions = [text for text in held_out_captions(count) for _ in range(IMAGES)]
        images = torch.cat([self._draw(captions[i : i + BATCH], i, schedule) for i in range(0, len(captions), BATCH)])
        scores = {kind: reward.scores(images, captions) for kind, reward in self.rewards.items()}
        spreads = spreads_of(self.rewards["CLIP"].image_embeddings(images))
        return {
            "reward": scores["aesthetic"].mean().item(),
            "quality": mean_quality(images),
            "CLIP": scores["CLIP"].mean().item(),
            "alignment": alignment(images, captions)["alignment"],
            "diversity": statistics.fmean(spreads),
            **_spreads_by_category(spreads, captions[::IMAGES]),
            "reward std": scores["aesthetic"].std().item(),
        }

    def _draw(self, captions: list[str], first: int, schedule: Schedule) -> Tensor:
        """(B, 3, 128, 128) in 0..1 by deterministic DDIM; first: the number of the first picture."""
        self.trial.callbacks.on_text(f"{self.trial.name}: drawing from picture {first}")
        denoiser, autoencoder = self.model.denoiser, self.model.autoencoder
        side = SIDE // autoencoder.downscale
        shape = (denoiser.latent_channels, side, side)
        generators = (generator(self.trial.seed, "gauge", first + i) for i in range(len(captions)))
        noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
        chain = ddim_chain(denoiser, SAMPLING)
        x = first_latent(denoiser, noise, chain)
        for step, guidance in zip(chain, schedule(lambda model: _encode(model, captions)), strict=True):
            x = advance(denoiser, x, step, guidance)
        return autoencoder.decode(x)


def _encode(model: TextToImage, captions: list[str]) -> Guidance:
    encoder = model.text_encoder
    positive = Conditioning.cat([encoder.encode(encoder.tokenize([text])) for text in captions])
    empty = Conditioning.cat([encoder.encode(encoder.tokenize([""]))] * len(captions))
    return Guidance(positive, empty, CFG)


def spreads_of(embeddings: Tensor) -> list[float]:
    """How different the pictures of each caption are: 0 (all equal) to 1."""
    return [Diversity.of(group).spread for group in embeddings.split(IMAGES)]


def _spreads_by_category(spreads: Sequence[float], captions: Sequence[str]) -> dict[str, float]:
    groups = {
        name: [spread for spread, text in zip(spreads, captions, strict=True) if word in text]
        for word, name in CATEGORIES.items()
    }
    return {f"diversity, {name}": statistics.fmean(values) for name, values in groups.items() if values}


TEXT_CLIP, UNET_CLIP, IN_TURN = "text encoder + CLIP 1", "UNet + CLIP 1", "text encoder then UNet + CLIP 1"
CLAIMS = (
    Claim("Without a constraint pictures collapse: CLIP 1 keeps more", UNET_CLIP, UNET, ("alignment",)),
    Claim("Without a constraint pictures collapse: CLIP 1 keeps more", UNET_CLIP, UNET, ("diversity",)),
    Claim("Without a constraint the reward goes higher", UNET, UNET_CLIP, ("reward",)),
    Claim("Prompt-based tuning beats direct tuning", TEXT, "text encoder (direct)", ("reward",)),
    Claim("Direct tuning does something", "text encoder (direct)", NOTHING, ("reward",)),
    Claim("Both in turn beat the text encoder alone", IN_TURN, TEXT_CLIP, ("reward",)),
    Claim("Both in turn beat the UNet alone", IN_TURN, UNET_CLIP, ("reward",)),
)


def findings(rows: Sequence[Mapping]) -> list[str]:
    """The gain of every cell, and the paper's claims and open questions, as far as their cells are measured."""
    found = {row["tuning"]: row for row in rows}
    if NOTHING not in found:
        return []
    sentences = [_gain(found[name], found[NOTHING], name) for name in CELLS if name != NOTHING and name in found]
    sentences += check_claims(CLAIMS, found)
    sentences += _additive(found)
    sentences += [_windows(found[name], name) for name, cell in CELLS.items() if cell.windows and name in found]
    sentences += [_blends(found[name]) for name, cell in CELLS.items() if cell.blends and name in found]
    return sentences


def _gain(row: Mapping, base: Mapping, name: str) -> str:
    rise = (row["reward"] - base["reward"]) / base["reward std"]
    points = 100 * (row["alignment"] - base["alignment"])
    return (
        f"{name}: reward {rise:+.1f} standard deviations, quality {row['quality'] - base['quality']:+.2f} (held out), "
        f"alignment {points:+.1f} points, diversity {row['diversity kept']:.0%} of before."
    )


def _additive(found: Mapping[str, Mapping]) -> list[str]:
    names = (TEXT_CLIP, UNET_CLIP, IN_TURN)
    if not all(name in found for name in names):
        return []
    text, unet, both = (found[name]["reward"] - found[NOTHING]["reward"] for name in names)
    return [
        f"Are the gains additive? text encoder {text:+.2f}, UNet {unet:+.2f}, sum {text + unet:+.2f}; "
        f"in turn {both:+.2f}."
    ]


def _windows(row: Mapping, name: str) -> str:
    cells = [
        f"{steps} steps {format_mean(row, f'window {steps}: reward')} "
        f"({format_mean(row, f'window {steps}: alignment')})"
        for steps in (0, *WINDOWS)
    ]
    return f"{name}, in the last sampler steps only, reward (alignment): {', '.join(cells)}."


def _blends(row: Mapping) -> str:
    names = ["window 0", *(f"blend {share:g}" for share in BLENDS), f"window {SAMPLING}"]
    values = [row[f"{name}: reward"] for name in names]
    rising = all(a < b for a, b in itertools.pairwise(values))
    listed = ", ".join(format_mean(row, f"{name}: reward") for name in names)
    return f"Reward along the blend (0, 0.25, 0.5, 0.75, 1): {listed}: {'monotone' if rising else 'not monotone'}."


STUDY = Study(
    description="Reward, alignment and diversity by what is tuned, how, and against which constraint (TextCraftor).",
    cells=[{"tuning": name} for name in CELLS],
    run_trial=run_trial,
    findings=findings,
    steps=20,
    batch_size=8,
    judged=96,
)
