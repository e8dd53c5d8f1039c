"""Reward tuning on the demo model, measured: what TextCraftor (arXiv 2403.18978) found, and what it left open.

Trained on is the demo's aesthetic head. Held out, and never trained on, is the polish that a program reads from pixels,
which the head was made to guess; the judge's alignment tells whether pictures still show their prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..training.commands.demo import held_out_captions
from ..training.commands.open_model import ModelConfig, build_model
from ..training.common.files import read_json
from ..training.common.rng import generator
from ..training.config.reward import RewardTuneConfig
from ..training.config.training_settings import TrainingSettings
from ..training.data.prompts import Prompt
from ..training.demo.judge import alignment
from ..training.demo.polish import mean_polish
from ..training.demo.scenes import caption, training_scenes
from ..training.models.protocols import Conditioning, TextToImage
from ..training.recipes.apply_results import with_tuned
from ..training.recipes.reward import tune
from ..training.rewards.combined import CombinedReward, Term
from ..training.rewards.diversity import Diversity
from ..training.rewards.load import RewardConfig, load_reward
from ..training.sampling.rollout import Guidance, advance, ddim_chain, first_latent
from .study import Labels, Study, Trial, format_mean, verdict

SAMPLING, CFG, SIDE = 8, 2.5, 128
RATES = {"UNet": 1e-4, "text encoder": 3e-4}
PROMPTS, IMAGES, BATCH = 200, 4, 32
"""Prompts to train on; pictures of each prompt when measured; drawn at a time."""
CATEGORIES = {"one": "one thing", "two": "two things", "three": "three things"}
WINDOWS = (2, 4, 8)
"""Last sampler steps that hear the tuned encoder."""
BLENDS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Tuning:
    """How one cell tunes: parts in turn, weights of the two rewards, and what differs from the usual."""

    parts: tuple[str, ...]
    aesthetic: float = 1.0
    clip: float = 0.0
    changes: tuple[tuple[str, object], ...] = ()
    windows: bool = False
    blends: bool = False


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
"""Tuned for the aesthetic at weight 1, with K = 4 of 8 steps and no constraint, where the name says nothing else."""


def figures(trial: Trial) -> dict[str, float | None]:
    """One way to tune, one seed; noise and batches of a seed are the same for all."""
    cell = CELLS[trial.labels["tuning"]]
    fresh = build_model(ModelConfig(model="demo"))
    rewards = {kind: load_reward(RewardConfig(kind=f"demo {kind}")) for kind in ("aesthetic", "CLIP")}
    model = _tuned(trial, cell, rewards) if cell.parts else fresh
    gauge = Gauge(trial, rewards, model)
    found = gauge.figures(gauge.count, lambda said: [said(model)] * SAMPLING)
    base = read_json(replace(trial, labels={"tuning": NOTHING}).results) if cell.parts else found
    found |= {f"{name} kept": found[name] / base[name] for name in list(found) if name.startswith("diversity")}
    few = max(1, gauge.count // 2)
    for window in WINDOWS if cell.windows else ():
        heard = lambda said, window=window: [said(fresh)] * (SAMPLING - window) + [said(model)] * window  # noqa: E731
        found |= _named(gauge.figures(few, heard), f"window {window}")
    for share in BLENDS if cell.blends else ():
        heard = lambda said, share=share: [_mixed(said(fresh), said(model), share)] * SAMPLING  # noqa: E731
        found |= _named(gauge.figures(few, heard), f"blend {share:g}")
    if cell.windows:
        found |= _named(gauge.figures(few, lambda said: [said(fresh)] * SAMPLING), "window 0")
    return found


def _named(figures: Mapping[str, float], name: str) -> dict[str, float]:
    return {f"{name}: {key}": figures[key] for key in ("reward", "polish", "alignment")}


def _tuned(trial: Trial, cell: Tuning, rewards: Mapping) -> TextToImage:
    """The demo model with the cell's parts tuned one after the other."""
    prompts = [Prompt(caption(s, generator(3, "study", i))) for i, s in enumerate(training_scenes(PROMPTS, 3))]
    model = build_model(ModelConfig(model="demo"))
    for number, part in enumerate(cell.parts, start=1):
        weights = {"aesthetic": cell.aesthetic, "CLIP": cell.clip}
        judged = CombinedReward([Term(reward=rewards[kind], weight=weight) for kind, weight in weights.items()])
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
        result = tune(model, judged, [] if direct else prompts, config, trial.folder, trial.callbacks, dataset=dataset)
        model = with_tuned(model, [str(result.path.parent)])
    return model


def _mixed(first: Guidance, second: Guidance, share: float) -> Guidance:
    """Encodings between two, element by element."""

    def mix(a: Conditioning, b: Conditioning) -> Conditioning:
        return Conditioning(torch.lerp(a.context, b.context, share), None, a.mask)

    return Guidance(mix(first.positive, second.positive), mix(first.negative, second.negative), first.cfg)


Said = Callable[[TextToImage], Guidance]


class Gauge:
    """Draws and judges held-out captions, `IMAGES` of each, from noise of the trial's seed."""

    def __init__(self, trial: Trial, rewards: Mapping, model: TextToImage):
        self.trial, self.rewards, self.model = trial, rewards, model
        self.count = max(1, trial.config.judged // IMAGES)

    @torch.no_grad()
    def figures(self, count: int, heard_of: Callable[[Said], list[Guidance]]) -> dict[str, float]:
        """Of `count` captions. heard_of: from what encoders say of a batch to what each sampler step hears."""
        captions = [text for text in held_out_captions(count) for _ in range(IMAGES)]
        images = torch.cat([self._drawn(captions[i : i + BATCH], i, heard_of) for i in range(0, len(captions), BATCH)])
        scores = {kind: reward.scores(images, captions) for kind, reward in self.rewards.items()}
        spreads = spreads_of(self.rewards["CLIP"].image_embeddings(images))
        by_category = {
            f"diversity, {name}": statistics.fmean(
                s for s, text in zip(spreads, captions[::IMAGES], strict=True) if word in text
            )
            for word, name in CATEGORIES.items()
            if any(word in text for text in captions[::IMAGES])
        }
        return {
            "reward": scores["aesthetic"].mean().item(),
            "polish": mean_polish(images),
            "CLIP": scores["CLIP"].mean().item(),
            "alignment": alignment(images, captions)["alignment"],
            "diversity": statistics.fmean(spreads),
            **by_category,
            "reward std": scores["aesthetic"].std().item(),
        }

    def _drawn(self, captions: list[str], first: int, heard_of: Callable[[Said], list[Guidance]]) -> Tensor:
        """(B, 3, 128, 128) in 0..1 by deterministic DDIM."""
        self.trial.callbacks.on_text(f"{self.trial.name}: drawing from picture {first}")
        denoiser, autoencoder = self.model.denoiser, self.model.autoencoder
        side = SIDE // autoencoder.downscale
        shape = (denoiser.latent_channels, side, side)
        noise = [
            torch.randn(shape, generator=generator(self.trial.seed, "gauge", first + i)) for i in range(len(captions))
        ]
        chain = ddim_chain(denoiser, SAMPLING)

        def said(one: TextToImage) -> Guidance:
            encoder = one.text_encoder
            positive = Conditioning.cat([encoder.encode(encoder.tokenize([text])) for text in captions])
            empty = Conditioning.cat([encoder.encode(encoder.tokenize([""]))] * len(captions))
            return Guidance(positive, empty, CFG)

        x = first_latent(denoiser, torch.stack(noise), chain)
        for step, heard in zip(chain, heard_of(said), strict=True):
            x = advance(denoiser, x, step, heard)
        return autoencoder.decode(x)


def spreads_of(embeddings: Tensor) -> list[float]:
    """Within each caption's pictures: 0, all alike, to 1."""
    return [Diversity.of(group).spread for group in embeddings.split(IMAGES)]


def findings(rows: Sequence[Mapping]) -> list[str]:
    """What the rows say of the paper's claims and of its open questions; only what is measured already."""
    found = {row["tuning"]: row for row in rows}
    if NOTHING not in found:
        return []
    words = [_risen(found[name], found[NOTHING], name) for name in CELLS if name != NOTHING and name in found]
    claims = (
        ("Without a constraint pictures collapse: CLIP 1 keeps more", "UNet + CLIP 1", "UNet", "alignment"),
        ("Without a constraint pictures collapse: CLIP 1 keeps more", "UNet + CLIP 1", "UNet", "diversity"),
        ("Without a constraint the reward goes higher", "UNet", "UNet + CLIP 1", "reward"),
        ("Prompt-based tuning beats direct tuning", "text encoder", "text encoder (direct)", "reward"),
        ("Direct tuning does something", "text encoder (direct)", NOTHING, "reward"),
        (
            "Both in turn beat the text encoder alone",
            "text encoder then UNet + CLIP 1",
            "text encoder + CLIP 1",
            "reward",
        ),
        ("Both in turn beat the UNet alone", "text encoder then UNet + CLIP 1", "UNet + CLIP 1", "reward"),
    )
    for claim, better, worse, figure in claims:
        if better in found and worse in found:
            words.append(f"{claim}: {verdict(found[better], found[worse], figure)}.")
    words += _additive(found)
    words += [_windows(found[name], name) for name, cell in CELLS.items() if cell.windows and name in found]
    words += [_blends(found[name]) for name, cell in CELLS.items() if cell.blends and name in found]
    return words


def _risen(row: Mapping, base: Mapping, name: str) -> str:
    rise = (row["reward"] - base["reward"]) / base["reward std"]
    kept = row["diversity kept"]
    points = 100 * (row["alignment"] - base["alignment"])
    return (
        f"{name}: reward {rise:+.1f} standard deviations, polish {row['polish'] - base['polish']:+.2f} (held out), "
        f"alignment {points:+.1f} points, diversity {kept:.0%} of before."
    )


def _additive(found: Mapping[str, Mapping]) -> list[str]:
    names = ("text encoder + CLIP 1", "UNet + CLIP 1", "text encoder then UNet + CLIP 1")
    if not all(name in found for name in names):
        return []
    text, unet, both = (found[name]["reward"] - found[NOTHING]["reward"] for name in names)
    return [
        f"Are the gains additive? text encoder {text:+.2f}, UNet {unet:+.2f}, sum {text + unet:+.2f}; "
        f"in turn {both:+.2f}."
    ]


def _windows(row: Mapping, name: str) -> str:
    cells = [
        f"{w} steps {format_mean(row, f'window {w}: reward')} ({format_mean(row, f'window {w}: alignment')})"
        for w in (0, *WINDOWS)
    ]
    return f"{name}, heard in the last steps only, reward (alignment): {', '.join(cells)}."


def _blends(row: Mapping) -> str:
    names = ["window 0", *(f"blend {share:g}" for share in BLENDS), f"window {SAMPLING}"]
    values = [row[f"{name}: reward"] for name in names]
    rising = all(a < b for a, b in zip(values, values[1:], strict=False))
    listed = ", ".join(format_mean(row, f"{name}: reward") for name in names)
    return f"Reward along the blend (0, 0.25, 0.5, 0.75, 1): {listed}: {'monotone' if rising else 'not monotone'}."


def cells() -> list[Labels]:
    return [{"tuning": name} for name in CELLS]


STUDY = Study(
    about="Reward, alignment and diversity by what is tuned, how, and against which constraint (TextCraftor).",
    cells=cells(),
    figures=figures,
    findings=findings,
    steps=20,
    batch_size=8,
    judged=96,
)
