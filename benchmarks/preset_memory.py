"""What the runs of the presets by card take, as the estimate before a run computes it, on tensors without values."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..training.commands.train import ADAPTER_PRESETS, REWARD_PRESETS, TRAIN_PRESETS, WORD_PRESETS
from ..training.common.callbacks import Callbacks
from ..training.config.embedding import EmbeddingConfig
from ..training.config.loop import LoopConfig
from ..training.config.lora import LoraConfig
from ..training.config.reward import RewardTuneConfig
from ..training.config.run import RunConfig, TrainModelConfig
from ..training.config.sample_prompts import SamplePrompts
from ..training.config.training_settings import CARDS, TrainingSettings
from ..training.data.examples import Example
from ..training.data.order import Slot
from ..training.data.prompts import PromptSlot
from ..training.loop.estimate import ACTIVATIONS, MemoryEstimate, estimate_memory
from ..training.loop.gradient_step import GradientStep
from ..training.loop.known_peaks import Peaks
from ..training.loop.optimizers import PACKAGES
from ..training.models.block_swap import freed_bytes
from ..training.models.concepts import Concept
from ..training.models.diffusers import DiffusersDenoiser
from ..training.models.layers import is_selected
from ..training.models.parameters import parameter_refs
from ..training.models.protocols import Conditioning, TextToImage
from ..training.models.recast import store_in
from ..training.objectives.denoising import DenoisingObjective
from ..training.objectives.objective import Objective
from ..training.objectives.reward import RewardObjective
from ..training.recipes.lora import unet_layers
from ..training.recipes.reward import build_trainable
from ..training.recipes.run import encoding, sample_decoding
from ..training.rewards.combined import CombinedReward, Term
from ..training.rewards.load import RewardConfig, load_reward
from ..training.trainables.base import Trainable
from ..training.trainables.lora import Adapters, select_layers
from ..training.trainables.token_embeddings import TokenEmbeddings
from ..training.trainables.weights import SelectedWeights
from .charts import save_bars
from .memory_use import FixedText, MemoryConfig, OneBatch, sized_model
from .study import markdown_table

KINDS = {
    "lora": (LoraConfig, ADAPTER_PRESETS),
    "train": (TrainModelConfig, TRAIN_PRESETS),
    "embedding": (EmbeddingConfig, WORD_PRESETS),
    "reward": (RewardTuneConfig, REWARD_PRESETS),
}
"""Verb -> its config and presets."""
CLIPS = {"sd15": {"clip_l": (768, 12)}, "sdxl": {"clip_l": (768, 12), "clip_g": (1280, 32)}}
"""Width and layers of each text encoder."""
SCORER_BYTES = 304 * 10**6 * 4
"""Of a reward's image tower, OpenAI's ViT-L/14 in fp32, beside which its activations are small."""
SPARE = 0.1
"""Share of a card that a preset leaves."""
NOT_OF_A_STEP = {"block_swap": 0, "optimizer": "AdamW", "gradient_accumulation": 1, "fused_backward": False}
"""Settings that the peaks of a step do not depend on."""


class SharedPeaks:
    """Peaks of a run's steps in the place of `KnownPeaks`: those of one picture are computed once and bound a batch's,
    whose activations are at most as many times those of one.

    Presets that differ in block swap, optimizer or batch alone share them.

    Args:
        known: key -> the peaks of one picture.
        key: of all that they depend on.
        count: pictures of a batch that are differentiated together; 0: only to be written.
        more: bytes of gradients that are there too while a later step of a reward's chain is differentiated.
    """

    def __init__(self, known: dict[str, Peaks], key: str, count: int = 0, more: int = 0):
        self._known, self._key, self._count, self._more = known, key, count, more

    def read(self) -> Peaks | None:
        if not self._count:
            return None
        peak, less = self._known[self._key][ACTIVATIONS]
        batch, activations = peak + (self._count - 1) * less, self._count * less
        return self._known[self._key] | {ACTIVATIONS: (batch + self._more, activations + self._more)}

    def write(self, peaks: Peaks) -> None:
        self._known[self._key] = dict(peaks)


class OnACard(DiffusersDenoiser):
    """From which blocks leave when they are swapped."""

    device = torch.device("meta")


class ClipText(FixedText):
    """CLIPs of true size in fp32, through which words train."""

    def __init__(self, size: str, denoiser: DiffusersDenoiser, mode: AbstractContextManager):
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__(denoiser)
        shapes = {name: (width, layers, 4 * width, width // 64) for name, (width, layers) in CLIPS[size].items()}
        names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
        configs = [
            CLIPTextConfig(vocab_size=49408, **dict(zip(names, shape, strict=True))) for shape in shapes.values()
        ]
        with mode:
            networks = [CLIPTextModel(config).eval().requires_grad_(False) for config in configs]
        object.__setattr__(self, "networks", networks)

    def encode(self, texts: list[str]) -> Conditioning:
        ids = torch.zeros(len(texts), 77, dtype=torch.long)
        for network in self.networks:
            network.get_input_embeddings().weight.requires_grad_(True)  # as the words in it do
        context = torch.cat([network(input_ids=ids).last_hidden_state for network in self.networks], dim=-1)
        return Conditioning(context, super().encode(texts).pooled)


def preset_config(name: str, kind: str) -> tuple[RunConfig, int]:
    """A run's config with a preset's values, in bf16 as on a card of today, and a sample prompt; the pictures' side."""
    config, presets = KINDS[kind]
    values = presets[name]

    def chosen(cls: type, prefix: str = "") -> dict:
        names = (field.name for field in fields(cls) if field.name not in ("settings", "samples"))
        return {key: values[prefix + key] for key in names if prefix + key in values}

    settings = TrainingSettings(**{**chosen(TrainingSettings), "precision": "bf16"})
    samples = SamplePrompts(prompts=("a red circle",), **chosen(SamplePrompts, "sample_"))
    more = {"token": "<it>"} if kind == "embedding" else {}
    return config(run_name="r", settings=settings, samples=samples, **chosen(config), **more), values["resolution"]


def build_preset_trainable(
    model: TextToImage, config: RunConfig, kind: str, size: str, trains: Callable[[str], bool]
) -> Trainable:
    """What a preset's run trains. trains: whether a weight of the UNet, by its canonical name, does."""
    denoiser, network = model.denoiser, model.denoiser.network
    if kind == "reward":
        return build_trainable(model, config)
    if kind == "embedding":
        vectors = {name: torch.zeros(1, width) for name, (width, _) in CLIPS[size].items()}
        return TokenEmbeddings([Concept("<it>", vectors)], [network], {}, denoiser.device)
    names = {denoiser.canonical_name(n): ref for n, ref in parameter_refs(network).items()}
    if kind == "train":
        return SelectedWeights({n: ref for n, ref in names.items() if trains(n)}, [network])
    return Adapters(select_layers(unet_layers(denoiser), config), [network], config, 0)


def build_preset_objective(
    model: TextToImage, config: RunConfig, kind: str, side: int, trainable: Trainable
) -> tuple[Objective, Slot | PromptSlot]:
    """The objective, and the slot that it trains on."""
    if kind == "reward":
        reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
        return RewardObjective(model, reward, config, trainable, text_trains=False), PromptSlot("a red circle", 1, 0)
    latent, text = torch.zeros(4, side // 8, side // 8), model.text_encoder.encode([""])
    text_of = (lambda caption: model.text_encoder.encode([caption])) if kind == "embedding" else (lambda caption: text)
    parts = {"latent_of": lambda slot: latent, "text_of": text_of, "project": model.text_encoder.project}
    slot = Slot(Example("", "a red circle", side, side, latent, "picture"), False, 0, 0)
    return DenoisingObjective(model.denoiser, config.settings, 0, **parts), slot


def preset_estimate(name: str, kind: str, known: dict[str, Peaks] | None = None) -> tuple[MemoryEstimate, int]:
    """The estimate of a preset's run on the command line: text encoder and VAE wait in RAM where neither trains nor
    scores. A text encoder that does not train has the fp16 of its file. Bytes of what is beside it on the device.

    known: where given, an upper bound in place of the estimate, by `SharedPeaks`.
    """
    (config, side), size = preset_config(name, kind), name.split()[0].lower().replace(".", "")
    mode, besides = FakeTensorMode(allow_non_fake_inputs=True), 0
    model = sized_model(size, mode)
    denoiser, network = model.denoiser, model.denoiser.network
    weights = [network]
    if kind in ("embedding", "reward"):
        text = ClipText(size, denoiser, mode)
        weights += [model.autoencoder.network, *(text.networks if kind == "embedding" else ())]
        if kind == "embedding":
            model = TextToImage(denoiser, text, model.autoencoder)
        else:
            besides = SCORER_BYTES + sum(p.numel() * 2 for clip in text.networks for p in clip.parameters())
    trains = (lambda n: is_selected(n, config.train)) if kind == "train" else (lambda n: False)
    store_in(network, torch.bfloat16, lambda n: trains(denoiser.canonical_name(n)))
    trainable = build_preset_trainable(model, config, kind, size, trains)
    loop = LoopConfig(
        steps=1, batch_size=config.batch_size, learning_rate=1e-4, settings=config.settings, samples=SamplePrompts()
    )
    single = replace(config, gradient_steps=1) if known is not None and kind == "reward" else config
    objective, slot = build_preset_objective(model, single, kind, side, trainable)
    step = GradientStep(trainable, objective, OneBatch(slot, config.batch_size), loop, denoiser.device)
    card = copy.copy(denoiser)
    card.__class__ = OnACard
    swapped = freed_bytes(card, config.settings.block_swap, trainable.parameters if kind == "train" else ())
    tensors = [tensor for module in weights for tensor in (*module.parameters(), *module.buffers())]
    (sample,) = objective.load([slot])
    with denoiser.checkpointing(True) if config.settings.gradient_checkpointing else nullcontext():
        picture = Slot(Example("", "a red circle", side, side, None, "picture"), False, 0, 0)
        more = sample_decoding(model, config) | encoding(model, config, picture)
        if known is None:
            return estimate_memory(step, tensors, sample, config.batch_size, more, swapped), besides
        settings = replace(config.settings, **NOT_OF_A_STEP)
        key = repr((size, kind, side, replace(config, batch_size=1, settings=settings)))
        if key not in known:
            estimate_memory(step, tensors, sample, 1, more, known=SharedPeaks(known, key))
        together, later = (1, total_bytes(trainable)) if kind == "reward" else (config.batch_size, 0)
        shared = SharedPeaks(known, key, together, later)
        return estimate_memory(step, tensors, sample, config.batch_size, more, swapped, shared), besides


def total_bytes(trainable: Trainable) -> int:
    """Bytes of all that trains."""
    return sum(parameter.nbytes for parameter in trainable.parameters.values())


def card_bytes(name: str) -> float:
    """Memory of the card that a preset is named after."""
    return float(name.split()[1]) * 1e9


def missing(name: str, kind: str) -> str:
    """The package without which a preset's optimizer does not run; empty where it is there."""
    module, package = PACKAGES.get(preset_config(name, kind)[0].settings.optimizer, ("torch", ""))
    return package if importlib.util.find_spec(module) is None else ""


def run_preset_bench(config: MemoryConfig, callbacks: Callbacks) -> dict:
    """The estimate of every preset by card for every trainer, in bf16.

    Returns:
        "rows" by preset and trainer with the bytes by part, those "besides" the estimate, their sum and its share of
        the card; "claims"; "skipped"; "chart"; "table", in GB.
    """
    rows, skipped = [], {}
    for name in CARDS:
        for kind in KINDS:
            callbacks.on_text(f"{kind}, {name}")
            if package := missing(name, kind):
                skipped[f"{kind}, {name}"] = f"{package} is not installed"
                continue
            estimate, besides = preset_estimate(name, kind)
            whole = estimate.peak + besides
            about = {"preset": name, "trainer": kind, "pixels": preset_config(name, kind)[1]}
            share = round(whole / card_bytes(name), 3)
            rows.append({**about, **estimate.as_dict(), "besides": besides, "bytes": whole, "share": share})
    names, panels = [f"{r['trainer']}, {r['preset']}" for r in rows], {"GB": [row["bytes"] / 1e9 for row in rows]}
    chart = save_bars("memory by preset, bf16", names, panels, config.output / "memory presets.png")
    claims = [claim_of(row) for row in rows]
    return {"rows": rows, "claims": claims, "skipped": skipped, "chart": chart, "table": preset_table(rows)}


def claim_of(row: dict) -> str:
    """A sentence on whether a preset's run leaves a tenth of its card."""
    most = 1 - SPARE
    verdict = "holds" if row["share"] <= most else f"missed by {100 * (row['share'] / most - 1):.1f} %"
    return f"{row['trainer']}, {row['preset']}: {row['share']:.3f} of the card; at most {most:g}: {verdict}."


def preset_table(rows: Sequence[dict]) -> str:
    """A line for each preset: side of the pictures, and GB by trainer."""
    lines: dict[str, dict] = {}
    for row in rows:
        line = lines.setdefault(
            row["preset"], {"preset": row["preset"], "pixels": row["pixels"]} | dict.fromkeys(KINDS, "")
        )
        line[row["trainer"]] = round(row["bytes"] / 1e9, 2)
    return markdown_table(list(lines.values()))
