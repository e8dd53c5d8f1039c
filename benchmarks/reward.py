"""Ways of going back through the sampler in a reward tuning, side by side: memory and time of one step of each.

All draw the same pictures from the same prompts and noise. Step by step, joint and checkpointed give the same gradient
of the text encoder: that of the last K steps, with none through what the UNet reads of the picture. The schedule of
TextCraftor's code (arXiv 2403.18978, github.com/snap-research/textcraftor) is another objective, ported as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..training.commands.open_model import DEMO, ModelConfig, build_model
from ..training.common.callbacks import Callbacks
from ..training.common.rng import generator
from ..training.config.checks import check_range
from ..training.config.reward import RewardTuneConfig
from ..training.data.prompts import PromptSlot
from ..training.models.protocols import Conditioning, TextToImage
from ..training.objectives.reward import RewardObjective
from ..training.recipes.reward import build_trainable
from ..training.rewards.combined import CombinedReward
from ..training.rewards.parse import read_rewards
from ..training.sampling.rollout import Guidance, Step, ddim_chain, first_latent, guided_output, rollout
from ..training.trainables.base import Trainable
from .memory import kept_bytes
from .study import table
from .timing import medians

ABOUT = "Memory and time of a step of reward tuning at several K: step by step, joint, checkpointed, and as published."
APART, JOINT, CHECKPOINTED, OFFICIAL = "step by step", "joint", "joint, UNet checkpointed", "TextCraftor's schedule"
OFFICIAL_STEPS = 5
"""Its K; its batch is 4 pictures a GPU."""
PROMPT = "two small red circles on the left, white background"
NO_CUDA = (
    "No CUDA device is here, so memory is what autograd keeps, weights left out, and seconds are processor time of all "
    "threads. Batch, memory and seconds at 512 pixels need a GPU: bench reward --model FILE --rewards ... --pixels 512 "
    "--gradient-steps 5 --batch-size 4."
)


@dataclass(frozen=True, kw_only=True)
class RewardBenchConfig:
    """What `reward` measures, beside rounds and batch_size."""

    model: str = DEMO
    """diffusers folder, .safetensors checkpoint, or "demo"."""
    rewards: tuple[str, ...] = ("demo aesthetic", "demo CLIP")
    """As of the verb `reward`."""
    pixels: int = 64
    """Side of the pictures, a multiple of 8."""
    gradient_steps: tuple[int, ...] = (1, 5, 10, 25)
    """Values of K, each at most sampling_steps."""
    sampling_steps: int = 25
    """Steps of the sampler (T)."""
    rounds: int = 7
    """Turns of every way, after one that is not counted."""
    batch_size: int = 16
    """Pictures in a step."""

    def __post_init__(self) -> None:
        check_range(self, pixels=(8, 8192), sampling_steps=(1, 1000), rounds=(1, 10**4), batch_size=(1, 10**4))
        if not self.gradient_steps:
            raise ValueError("gradient_steps are empty; expected at least one.")
        for steps in self.gradient_steps:
            self.tuning(steps)

    def tuning(self, gradient_steps: int) -> RewardTuneConfig:
        """The tuning of which one step is measured; ValueError for more gradient_steps than there are steps."""
        return RewardTuneConfig(
            run_name="bench",
            batch_size=self.batch_size,
            gradient_steps=gradient_steps,
            sampling_steps=self.sampling_steps,
            width=self.pixels,
            height=self.pixels,
        )


@dataclass(frozen=True)
class Bench:
    """What all ways share."""

    model: TextToImage
    reward: CombinedReward
    config: RewardBenchConfig
    trainable: Trainable

    @classmethod
    def open(cls, config: RewardBenchConfig, comfyui: Path | None = None) -> Bench:
        """Loads model and rewards, onto the GPU if there is one. Errors: those of the loaders."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reward = read_rewards(config.rewards, comfyui=comfyui)
        reward.network.to(device)
        model = build_model(ModelConfig(model=config.model, comfyui=comfyui, device=device))
        return cls(model, reward, config, build_trainable(model, config.tuning(1)))

    @property
    def prompts(self) -> list[str]:
        return [PROMPT] * self.config.batch_size

    def parameters(self) -> list[nn.Parameter]:
        """Everything there is, whether it trains or not."""
        parts = [self.model.denoiser.network, self.model.autoencoder.network, self.reward.network]
        base = [target.tensor for target in self.model.text_encoder.weights.values()]
        return [*(p for part in parts for p in part.parameters()), *base, *self.trainable.parameters.values()]

    def heard(self, cfg: float) -> Guidance:
        """The prompts, and the empty one, as the text encoder gives them now."""
        encoder, device = self.model.text_encoder, self.model.denoiser.device
        own, empty = (encoder.encode(encoder.tokenize([text])).to(device) for text in (PROMPT, ""))
        count = self.config.batch_size
        return Guidance(Conditioning.cat([own] * count), Conditioning.cat([empty] * count), cfg)

    def noise(self, tuning: RewardTuneConfig) -> Tensor:
        """(B, C, h, w), that of the first step of a tuning."""
        cells = self.config.pixels // self.model.autoencoder.downscale
        shape = (self.model.denoiser.latent_channels, cells, cells)
        sources = (generator(tuning.seed, "noise", 1, i) for i in range(self.config.batch_size))
        return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(self.model.denoiser.device)


Key = tuple[str, int]
"""Way and K."""
Way = Callable[[Bench, int], Callable[[], None]]
"""(what is shared, K) -> one step's forward and backward, which leaves gradients."""


def step_by_step(bench: Bench, gradient_steps: int) -> Callable[[], None]:
    """The objective that the verb `reward` minimises."""
    tuning = bench.config.tuning(gradient_steps)
    objective = RewardObjective(bench.model, bench.reward, tuning, bench.trainable, text_trains=True)
    slots = [PromptSlot(prompt, 1, i) for i, prompt in enumerate(bench.prompts)]

    def run() -> None:
        with bench.trainable.attach(rng_key=(1, 0)):
            objective(list(enumerate(objective.load(slots))), 1).per_sample.mean().backward()

    return run


def joint(bench: Bench, gradient_steps: int, checkpointed: bool = False) -> Callable[[], None]:
    """One graph of the text encoder, the last steps with the gradient stopped at their inputs, decoder and rewards."""
    tuning, denoiser = bench.config.tuning(gradient_steps), bench.model.denoiser
    chain = ddim_chain(denoiser, tuning.sampling_steps)
    first = len(chain) - gradient_steps

    def run() -> None:
        with bench.trainable.attach(rng_key=(1, 0)):
            heard = bench.heard(tuning.cfg)
            start = first_latent(denoiser, bench.noise(tuning), chain)
            x = rollout(denoiser, start, chain[:first], heard)[-1]
            for step in chain[first:]:
                x = _advanced(denoiser, x, x.detach(), step, heard, checkpointed)
            score = bench.reward.evaluate(bench.model.autoencoder.pixels(x), bench.prompts).total
            (-score.mean()).backward()

    return run


def official(bench: Bench, gradient_steps: int) -> Callable[[], None]:
    """As TextCraftor's code has it: the first steps hear the original text encoder, the last ones the tuned one, with
    each UNet call checkpointed and the latents not cut; pictures cut to 0..1; all rewards in one graph; and UNet and
    rewards not frozen, so that all of their weights get gradients that nobody reads."""
    tuning, denoiser = bench.config.tuning(gradient_steps), bench.model.denoiser
    chain = ddim_chain(denoiser, tuning.sampling_steps)
    first = len(chain) - gradient_steps

    def run() -> None:
        with torch.no_grad():
            original = bench.heard(tuning.cfg)
        with bench.trainable.attach(rng_key=(1, 0)), _unfrozen([denoiser.network, bench.reward.network]):
            heard = bench.heard(tuning.cfg)
            start = first_latent(denoiser, bench.noise(tuning), chain)
            x = rollout(denoiser, start, chain[:first], original)[-1]
            for step in chain[first:]:
                x = _advanced(denoiser, x, x, step, heard, True)
            score = bench.reward.evaluate(bench.model.autoencoder.decode(x), bench.prompts).total
            (-score.mean()).backward()

    return run


def _advanced(denoiser, x: Tensor, seen: Tensor, step: Step, heard: Guidance, checkpointed: bool) -> Tensor:
    """One step on from x, of which the UNet reads `seen`."""

    def output(seen: Tensor, *tensors: Tensor) -> Tensor:
        return guided_output(denoiser, seen, step, _with(heard, tensors))

    # Reentrant, or what is computed again would escape `kept_bytes`.
    out = checkpoint(output, seen, *heard.tensors, use_reentrant=True) if checkpointed else output(seen, *heard.tensors)
    return step.a.to(x) * x + step.b.to(x) * out


def _with(heard: Guidance, tensors: Sequence[Tensor]) -> Guidance:
    """The same with other tensors, in the order of `Heard.tensors`."""
    rest = iter(tensors)

    def of(one: Conditioning) -> Conditioning:
        return replace(one, context=next(rest), pooled=None if one.pooled is None else next(rest))

    return Guidance(of(heard.positive), of(heard.negative), heard.cfg)


@contextmanager
def _unfrozen(networks: Sequence[nn.Module]) -> Iterator[None]:
    frozen = [p for network in networks for p in network.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


WAYS: dict[str, Way] = {
    APART: step_by_step,
    JOINT: joint,
    CHECKPOINTED: lambda bench, gradient_steps: joint(bench, gradient_steps, checkpointed=True),
    OFFICIAL: official,
}


def run_reward_bench(
    config: RewardBenchConfig, comfyui: Path | None = None, callbacks: Callbacks | None = None
) -> dict:
    """Rows of every way and K, how flat memory is over K, and a Markdown table; comfyui: for its tokenizer.

    Raises ValueError and FileNotFoundError for a model or reward that is not there.
    """
    callbacks = callbacks or Callbacks()
    bench = Bench.open(config, comfyui)
    turns = turns_of(bench)
    memory = {}
    for (way, steps), run in turns.items():
        callbacks.on_text(f"memory of {way}, K = {steps}")
        memory[way, steps] = measured(bench, run)
    callbacks.on_text(f"{len(turns)} ways, {config.rounds + 1} turns each")
    seconds = medians({key: _cleared(bench, run) for key, run in turns.items()}, config.rounds, _clock)
    return figures(config, memory, seconds)


def turns_of(bench: Bench) -> dict[Key, Callable[[], None]]:
    """(way, K) -> one step; TextCraftor's schedule with its own K alone."""
    config = bench.config
    ways = [(way, steps) for steps in config.gradient_steps for way in WAYS if way != OFFICIAL]
    ways.append((OFFICIAL, min(OFFICIAL_STEPS, config.sampling_steps)))
    return {(way, steps): WAYS[way](bench, steps) for way, steps in ways}


def measured(bench: Bench, run: Callable[[], None]) -> dict[str, float]:
    """Figures of one step's memory, in MiB.

    "memory": the most at one time that autograd keeps on a CPU, the allocator's peak above what lay there on a GPU,
    where "allocated" is the whole peak. "gradients": what lies in .grad afterwards, of whatever.
    """
    _clear(bench)
    if bench.model.denoiser.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
        found = {"memory": peak - before, "allocated": peak}
    else:
        found = {"memory": kept_bytes(run, bench.parameters())}
    found["gradients"] = sum(p.grad.nbytes for p in bench.parameters() if p.grad is not None)
    _clear(bench)
    return {name: size / 2**20 for name, size in found.items()}


def _clear(bench: Bench) -> None:
    for parameter in bench.parameters():
        parameter.grad = None


def _cleared(bench: Bench, run: Callable[[], None]) -> Callable[[], None]:
    def turn() -> None:
        run()
        _clear(bench)

    return turn


def _clock() -> float:
    """Seconds of the GPU's work; without one those of the processor for this process, whatever else it does."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def figures(config: RewardBenchConfig, memory: Mapping[Key, Mapping[str, float]], seconds: Mapping[Key, float]) -> dict:
    """What was measured, by way and K, as JSON. ratio: seconds over those step by step at the same K."""
    rows = []
    for (way, steps), found in memory.items():
        sizes = {f"{name} (MiB)": round(size, 2) for name, size in found.items()}
        beside = seconds.get((APART, steps))
        ratio = None if beside is None else round(seconds[way, steps] / beside, 3)
        rows.append({"way": way, "K": steps, **sizes, "seconds": round(seconds[way, steps], 4), "ratio": ratio})
    rows.sort(key=lambda row: (list(WAYS).index(row["way"]), row["K"]))
    cuda = torch.cuda.is_available()
    return {
        "config": asdict(config),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "rows": rows,
        "flatness": {way: flatness(memory, way) for way in WAYS if way != OFFICIAL},
        "note": "Memory is the allocator's peak above what lay there before the step." if cuda else NO_CUDA,
        "table": table(rows),
    }


def flatness(memory: Mapping[Key, Mapping[str, float]], way: str) -> float:
    """Largest over smallest memory of a way at all K, minus 1."""
    sizes = [found["memory"] for (name, _), found in memory.items() if name == way]
    return max(sizes) / min(sizes) - 1
